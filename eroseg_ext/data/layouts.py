"""Where images and their label maps lie in a folder: the usual layouts, and the usual names of label maps."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
"""Of several label maps the first of these is taken."""
IMAGE_ENDINGS = ("_leftImg8bit", "_sat", "_image", "_img", "_rgb")
"""What publishers add to an image's name in the place of an ending of the label map's."""
LABEL_ENDINGS = (
    *("", "_L", "_P", "_mask", "_masks", "_label", "_labels", "_labelIds", "_gt", "_seg", "_segmentation"),
    *("_color", "_manual1", "_gtFine_labelIds", "_gtFine_labelTrainIds", "_gtFine_color"),
)
"""What publishers add to the image's name in the label map's."""
FOLDERS = (
    *(("images", "labels"), ("images", "annotations"), ("images", "masks"), ("img_dir", "ann_dir")),
    *(("image", "label"), ("imgs", "masks"), ("JPEGImages", "SegmentationClass"), ("leftImg8bit", "gtFine")),
)
"""Folders of images and of their label maps, in which each split may have a folder of its own."""
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}
"""What folders of a split are called; any other split by its name."""

Pair = tuple[Path, Path]
"""An image and its label map."""


def find(root: Path, split: str) -> list[Pair]:
    """The images and label maps of a folder, in order of name.

    Args:
        root: holds a pair of ``FOLDERS``, perhaps inside a folder for each split, or with one for each split inside;
            or ``SPLIT`` with ``SPLITannot`` or ``SPLIT_labels``; or what a data set's publisher packs.
        split: ``train``, ``val`` or another one, where the folder holds several.

    Raises:
        FileNotFoundError: names the folder or file that is missing.
        ValueError: two images have one label map, or something is no regular file.
    """
    lists = root / "ImageSets" / "Segmentation"  # of PASCAL VOC
    if lists.is_dir():
        stems = existing(lists / f"{split}.txt").read_text(encoding="utf-8").split()
        images = [existing(root / "JPEGImages" / f"{stem}.jpg") for stem in stems]
        return paired(images, root / "SegmentationClass")
    for folder, labels in _folders(root, split):
        if folder.is_dir() and labels.is_dir():
            break
    else:
        found = sorted(f"{path.relative_to(root)}/" for path in (*root.glob("*"), *root.glob("*/*")) if path.is_dir())
        raise FileNotFoundError(
            f"{root} must hold the folders images/ and labels/, or images/{split}/ and labels/{split}/ (or masks, "
            f"annotations; img_dir and ann_dir), but has {', '.join(found[:12]) or 'no folder'}"
        )
    images = images_in(folder)
    if folder.parent.name == "leftImg8bit":  # Foggy and rainy versions of the images lie beside them.
        images = [image for image in images if image.stem.endswith("_leftImg8bit")]
    if not images:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return [
        pair
        for parent, group in groupby(images, lambda image: image.parent)
        for pair in paired(list(group), labels / parent.relative_to(folder))
    ]


def _folders(root: Path, split: str) -> Iterator[Pair]:
    """Where images and label maps may lie, the most special first."""
    for name in SPLITS.get(split, (split,)):
        for images, labels in FOLDERS:
            yield root / images / name, root / labels / name
            yield root / name / images, root / name / labels
        yield root / name, root / f"{name}annot"
        yield root / name, root / f"{name}_labels"
    splits = {"test", *(name for names in SPLITS.values() for name in names)}
    for images, labels in FOLDERS:
        if not any((root / images / name).is_dir() for name in splits):
            yield root / images, root / labels


def images_in(folder: Path) -> list[Path]:
    """The images of a folder and of the folders in it, folder by folder, in order of name.

    Hidden files, such as macOS's ``._NAME.jpg``, are none.
    """
    found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(shown, key=lambda path: (path.parent, path.name))


def paired(images: list[Path], folder: Path) -> list[Pair]:
    """Each image with its label map, which lies in ``folder`` under one of the names that publishers give it.

    Raises:
        FileNotFoundError: an image has no label map; tells which names were tried and what lies there instead.
        ValueError: two images have one label map, or something is no regular file.
    """
    files = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    rank = {suffix: number for number, suffix in enumerate(LABEL_SUFFIXES)}
    maps = [path for path in files if path.suffix.lower() in rank]
    by_stem = {path.stem: path for path in sorted(maps, key=lambda path: rank[path.suffix.lower()], reverse=True)}
    owners: dict[Path, Path] = {}
    pairs = []
    for image in images:
        stems = dict.fromkeys((image.stem, *(image.stem.removesuffix(ending) for ending in IMAGE_ENDINGS)))
        names = (stem + ending for stem in stems for ending in LABEL_ENDINGS)
        label = next((by_stem[name] for name in names if name in by_stem), None)
        if label is None:
            near = difflib.get_close_matches(image.stem, [path.name for path in files], n=3, cutoff=0)
            raise FileNotFoundError(
                f"{image} has no label map: {folder / [*stems][-1]}.png is missing, and so is that name with "
                f"{', '.join(LABEL_ENDINGS[1:])} or {', '.join(LABEL_SUFFIXES[1:])}; nearest there: "
                f"{', '.join(near) or 'no file'}"
            )
        for path in (image, label):
            if not path.is_file():
                raise ValueError(f"{path} is no regular file, wanted an image")
        if owners.setdefault(label, image) != image:
            raise ValueError(f"{owners[label]} and {image} have one label map, {label}, wanted one for each")
        pairs.append((image, label))
    return pairs


def existing(path: Path) -> Path:
    """The path; FileNotFoundError if there is nothing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    return path
