"""Images with label maps from a folder.

Everything is returned as the attack wants it: images float32 [3, H, W] in [0, 1], labels int64 [H, W] in which void
pixels keep the value that the label map gives them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
"""Formats that keep a pixel's number, as GIF does not; of several label maps the first of these is taken."""
LABEL_ENDINGS = (
    *("", "_L", "_P", "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation"),
    *("_gtFine_labelIds", "_gtFine_labelTrainIds"),
)
"""What publishers add to the image's name in the label map's."""

Pair = tuple[Path, Path]
"""An image and its label map."""

_ORIENTATION = 274
"""EXIF tag."""
_AS_SHOWN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What viewers do to an image of each EXIF orientation."""


class SegmentationFolder:
    """Images and label maps of a folder, ``ROOT/images/NAME.*`` with ``ROOT/labels/NAME.png``, in order of name.

    A label map may also have one of ``LABEL_SUFFIXES``, or one of ``LABEL_ENDINGS`` after the image's name, such as
    ``NAME_mask.png``; beside ``NAME_leftImg8bit.png`` it may be ``NAME_gtFine_labelIds.png``.

    Args:
        root: the folder.
        size: (height, width) that everything is resized to: images with antialiased bilinear interpolation, labels
            with nearest neighbour. None (default) leaves every image at its own size.

    Indexing gives ``(image, labels)``: float32 [3, H, W] in [0, 1] and int64 [H, W], decoded anew each time, as
    :func:`read_pair` describes it.

    Raises:
        FileNotFoundError: root, its images or a label map is missing.
        ValueError: size is not two positive numbers, or two images have one label map; on indexing, a file that cannot
            be used.
    """

    def __init__(self, root: str | Path, size: tuple[int, int] | None = None) -> None:
        self.root = Path(root)
        self.size = checked_size(size)
        folder = self.root / "images"
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.root} must hold the folders images/ and labels/, but has no images/")
        pairs = paired(images_in(folder), self.root / "labels")
        if not pairs:
            raise FileNotFoundError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        self.images = [image for image, _ in pairs]
        self.labels = [label for _, label in pairs]

    @property
    def reading(self) -> str:
        """What an item depends on besides its files."""
        return str(self.size)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = read_pair(self.images[index], self.labels[index], self.size)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1).contiguous() / 255
        return pixels, torch.from_numpy(np.array(label, dtype=np.int64))

    def load(self, indices: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Decodes many at once: images [N, 3, H, W] and labels [N, H, W] of the given indices (default: all).

        Raises:
            ValueError: the images differ in size; give the folder a ``size``.
        """
        pairs = [self[index] for index in (range(len(self)) if indices is None else indices)]
        shapes = {tuple(labels.shape) for _, labels in pairs}
        if len(shapes) > 1:
            raise ValueError(f"{self.root} holds images of {len(shapes)} sizes; a size to resize them to is needed")
        return torch.stack([image for image, _ in pairs]), torch.stack([labels for _, labels in pairs])


def checked_size(size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The size; ValueError if it is neither None nor two positive numbers."""
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width), both at least 1, got {size}")
    return size


def images_in(folder: Path) -> list[Path]:
    """The images of a folder in order of name; hidden files, such as macOS's ``._NAME.jpg``, are none."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def paired(images: Sequence[Path], folder: Path) -> list[Pair]:
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
        stems = dict.fromkeys((image.stem, image.stem.removesuffix("_leftImg8bit")))
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


def evenly_spaced(total: int, count: int | None) -> list[int]:
    """Which ``count`` of ``total`` images are taken, the first among them; None: all."""
    count = total if count is None else min(count, total)
    return [number * total // count for number in range(count)]


def one_class(values: Collection[int], void: Collection[int]) -> str | None:
    """What to tell of labels that are a single class, beside void; None where they are several, or void alone."""
    classes = set(values) - set(void)
    if len(classes) != 1:
        return None
    found = " and ".join(map(str, sorted(values)))
    beside = ", ".join(str(value) for value in sorted(values) if value not in classes)
    return f"the labels are {found} alone" + (f", and {beside} counts as void" if beside else "") + ": a single class"


def read_pair(
    image_path: Path, label_path: Path, size: tuple[int, int] | None = None
) -> tuple[Image.Image, Image.Image]:
    """An image in RGB and its label map, whose pixel values are class indices, of one size; decoded.

    16-bit grey images are scaled by 65535, float images must lie in [0, 1], and alpha is dropped: colours are taken as
    they are stored. An image with an EXIF orientation is turned as viewers show it; where only the picture as it is
    stored has the label map's size, it is taken as that. Of several frames the first is read.

    With ``size``, (height, width), both are resized: the image with antialiased bilinear interpolation, the labels with
    nearest neighbour.

    Raises:
        ValueError: a file cannot be read as what it should be, or the sizes differ; names it.
    """
    stored, shown = _read(image_path, "an image", _rgb)
    label = read_label(label_path)
    image = shown if shown.size == label.size else stored
    if label.size != image.size:
        raise ValueError(
            f"{label_path} is {label.size[0]}x{label.size[1]} pixels but its image "
            f"{image_path} is {image.size[0]}x{image.size[1]}"
        )
    if size is not None:
        # Pillow's bilinear filter widens with the scale, which is the antialiasing.
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        label = label.resize(size[::-1], Image.Resampling.NEAREST)
    return image, label


def read_label(path: Path) -> Image.Image:
    """A label map, whose pixel values are class indices: those of a grey file, the indices of a palette file.

    Raises:
        ValueError: it cannot be read, or is not one number per pixel.
    """
    return _read(path, "a label map", _indices)[1]


def _read(path: Path, what: str, convert: Callable[[Image.Image], Image.Image]) -> tuple[Image.Image, Image.Image]:
    """The converted image as it is stored, and as viewers show it."""
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        with Image.open(path) as image:
            image.load()
            stored = convert(image)
            orientation = _orientation(image)
    except Exception as error:  # Decoders raise many kinds.
        raise ValueError(f"{path} cannot be read as {what}: {str(error) or type(error).__name__}") from error
    return stored, stored.transpose(_AS_SHOWN[orientation]) if orientation in _AS_SHOWN else stored


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # Damaged EXIF data leave the picture as it is, in viewers too.
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] not in "IF":
        return image.convert("RGB")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # Those have 16 bits in this mode.
        raise ValueError("it has 32-bit integers, wanted 8 or 16 bits, or floats in [0, 1]")
    values = np.asarray(image, np.float32) / (1 if image.mode == "F" else 65535)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"its floats go from {low:g} to {high:g}, wanted [0, 1]")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _indices(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "P"):
        return image
    if image.mode != "1" and image.mode[0] != "I":
        colours = len(image.getcolors(image.width * image.height) or ())
        raise ValueError(
            f"wanted a grey or palette file of class indices, but its mode is {image.mode}: its {colours} colours must "
            "be turned into class indices first"
        )
    return Image.fromarray(np.asarray(image).astype(np.int32))
