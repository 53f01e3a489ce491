"""Folders of images and label maps for the tests to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eroseg_ext.data.scenes import IGNORE_INDEX, generated_scenes
from eroseg_ext.models.small_deeplab import SmallDeepLab

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


def write_evaluated(root: Path, count: int, void: int = IGNORE_INDEX) -> Path:
    """``data/`` of drawn scenes and ``weights.pt`` of an untrained network of their 8 classes."""
    write_folder(root / "data", count, void)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save({"model": SmallDeepLab(8, width=8).state_dict()}, root / "weights.pt")
    return root


def write_blank(root: Path, *paths: str) -> None:
    """Black images of 6x8 pixels at these paths."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6)).save(root / path)


def write_labels(root: Path, *maps: object) -> Path:
    """Grey images of 24x32 pixels with label maps of these values, in stripes."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for number, values in enumerate(maps):
        stripes = np.resize(np.asarray(values), (24, 32))
        Image.new("L", (32, 24), 128).save(root / "images" / f"{number}.png")
        Image.fromarray(stripes.astype(np.uint8 if stripes.max() < 256 else np.uint16)).save(
            root / "labels" / f"{number}.png"
        )
    return root
