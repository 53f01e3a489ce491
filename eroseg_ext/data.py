"""Images with label maps from a folder.

Everything is returned as the attack wants it: images float32 [3, H, W] in [0, 1], labels int64 [H, W] in which void
pixels keep the value that the label map gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")


class SegmentationFolder:
    """Images and label maps of a folder, ``ROOT/images/NAME.*`` with ``ROOT/labels/NAME.png``, in order of name.

    Args:
        root: the folder.
        size: (height, width) that everything is resized to: images with antialiased bilinear interpolation, labels
            with nearest neighbour. None (default) leaves every image at its own size.

    Indexing gives ``(image, labels)``: float32 [3, H, W] in [0, 1] and int64 [H, W], decoded anew each time. Label
    maps are 8-bit or 16-bit grey, or palette PNG files whose pixel values are the class indices.

    Raises:
        FileNotFoundError: root, its images or a label map is missing.
        ValueError: size is not two positive numbers; on indexing, a file that is not an image, a label map that is not
            one number per pixel, or one whose size differs from its image's.
    """

    def __init__(self, root: str | Path, size: tuple[int, int] | None = None) -> None:
        self.root = Path(root)
        self.size = checked_size(size)
        folder = self.root / "images"
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.root} must hold the folders images/ and labels/, but has no images/")
        self.images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.images:
            raise FileNotFoundError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        self.labels = [self.root / "labels" / f"{path.stem}.png" for path in self.images]
        for image, label in zip(self.images, self.labels, strict=True):
            if not label.is_file():
                raise FileNotFoundError(f"{image} has no label map: {label} is missing")

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


def read_pair(
    image_path: Path, label_path: Path, size: tuple[int, int] | None = None
) -> tuple[Image.Image, Image.Image]:
    """An image in RGB and its label map, whose pixel values are class indices, of one size; decoded.

    With ``size``, (height, width), both are resized: the image with antialiased bilinear interpolation, the labels with
    nearest neighbour.

    Raises:
        ValueError: a file is not an image, the label map is not one number per pixel, or the sizes differ; names it.
    """
    image = _open(image_path).convert("RGB")
    label = _open(label_path)
    if label.mode not in ("L", "P", "I", "I;16"):
        raise ValueError(f"{label_path} must be a grey or palette PNG of class indices, but its mode is {label.mode}")
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


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
