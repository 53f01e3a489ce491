"""Folders of images and label maps for the tests to read."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from eroseg_ext.scenes import IGNORE_INDEX, generated_scenes

SIZE = (40, 56)


def write_folder(root: Path, count: int, void: int = IGNORE_INDEX, suffix: str = ".png") -> Path:
    """Drawn scenes of 8 classes as images/00.png, ... and labels/00.png, ..."""
    scenes = generated_scenes(count, SIZE, seed=0)
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for index in range(count):
        pixels = (scenes.images[index].permute(1, 2, 0) * 255).byte().numpy()
        labels = scenes.labels[index].where(scenes.labels[index] != IGNORE_INDEX, void).byte().numpy()
        Image.fromarray(pixels).save(root / "images" / f"{index:02}{suffix}")
        Image.fromarray(labels).save(root / "labels" / f"{index:02}.png")
    return root


def write_blank(root: Path, *paths: str) -> None:
    """Black images of 6x8 pixels at these paths."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6)).save(root / path)
