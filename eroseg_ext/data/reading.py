"""One image and its label map, whatever holds them: a file, a PIL image, an array or a tensor.

Images become uint8 or float32 [K, H, W], labels int64 [H, W] with the values that the label map gives them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from eroseg_ext.data.palettes import Palette

_MOST_CHANNELS = 4
"""An array whose last side is no longer than this, and whose first is longer, has its channels last."""


@contextmanager
def named(name: object, what: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a ValueError that names the file, or the item of the data."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} cannot be read as {what}: {str(error) or type(error).__name__}") from error


def opened(path: Path) -> Image.Image:
    """A file, decoded; the first of several frames."""
    if not path.is_file():
        raise ValueError("it is no regular file")
    with Image.open(path) as image:
        image.load()
    return image


def image_of(value: Any, size: torch.Size | None = None) -> Tensor:
    """An image as uint8 or float32 [K, H, W], of a PIL image in RGB; a volume as [K, D, H, W].

    Images of 16 bits are scaled to 8, a PIL image's floats must lie in [0, 1], and its alpha is dropped: colours are
    taken as they are stored. A PIL image with an EXIF orientation is turned as viewers show it; where only the picture
    as it is stored has the label map's size, it is taken as that.

    Args:
        value: a file's path; a PIL image; a tensor or array [K, H, W], [H, W, K], [H, W] or [K, D, H, W].
        size: [H, W] of the label map.
    """
    value = opened(value) if isinstance(value, Path) else value
    if isinstance(value, Image.Image):
        shown = _shown(value)
        stored_fits = shown.size != value.size and size is not None and value.size == (size[1], size[0])
        return torch.from_numpy(_rgb(value if stored_fits else shown)).permute(2, 0, 1)
    image = _channels_first(_tensor(value, "an image [K, H, W]"))
    if image.dim() not in (3, 4):
        raise ValueError(f"its shape is {list(image.shape)}, wanted one image [K, H, W]")
    if image.dtype == torch.uint16:
        return (image.float() / 257).round().to(torch.uint8)  # as those of files
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"it is {image.dtype}, wanted uint8, or floats in the range of clip")
    return image if image.dtype == torch.uint8 else image.float()


def labels_of(value: Any, palette: Palette | None = None, of_volume: bool = False) -> Tensor:
    """A label map as int64 [H, W], of a volume [D, H, W].

    Of a PIL image: the values of a grey one, the indices of a palette file; of a GIF, which has no grey, and of RGB
    that holds nothing but grey, the grey. With a ``palette``, the classes of the colours.

    Args:
        value: a file's path; a PIL image; a tensor or array [H, W], with or without a side of 1, or of colours
            [H, W, 3] or [3, H, W]; of a volume [D, H, W] or [1, D, H, W].
        palette: the colours of the classes.
        of_volume: whether it is that of a volume.
    """
    value = opened(value) if isinstance(value, Path) else value
    if isinstance(value, Image.Image):
        stored = torch.from_numpy(_stored(value, palette))
        planes = stored.permute(2, 0, 1) if stored.dim() == 3 else stored[None]
    elif of_volume:
        planes = _tensor(value, "labels [D, H, W]").cpu()
        planes = planes[None] if planes.dim() == 3 else planes
    else:
        planes = _channels_first(_tensor(value, "labels [H, W]").cpu())
    if planes.dim() == 3 and planes.dtype == torch.uint8 and len(planes) in (3, 4):
        return _of_colours(planes[:3].long(), palette)
    if planes.dim() != (4 if of_volume else 3) or len(planes) != 1:
        wanted = "[D, H, W]" if of_volume else "[H, W]"
        raise ValueError(f"its shape is {list(planes.shape)}, wanted one label map {wanted}")
    labels = planes[0]
    if labels.is_floating_point() and not (labels == labels.round()).all():
        low, high = labels.aminmax()
        raise ValueError(
            f"it has floats from {low:.4g} to {high:.4g}, wanted whole numbers: a transform such as ToTensor scales "
            "label maps as if they were images"
        )
    return labels.long()


def resized(image: Tensor, labels: Tensor, size: tuple[int, int], labels_too: bool = True) -> tuple[Tensor, Tensor]:
    """Both at (height, width): images with antialiased bilinear interpolation, labels with nearest neighbour."""
    if image.dtype == torch.uint8 and len(image) == 3:
        # Pillow rounds alike on every CPU, which torch does not.
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        image = torch.from_numpy(np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR))).permute(2, 0, 1)
    else:
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    if labels_too:  # Float64 holds every value of a label map.
        labels = F.interpolate(labels[None, None].double(), size, mode="nearest-exact")[0, 0].long()
    return image, labels


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


def _tensor(value: Any, wanted: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"it is a {type(value).__name__}, wanted a PIL image, or a tensor or array, {wanted}")
    return torch.from_numpy(np.require(value, requirements=("C", "W")))


def _channels_first(pixels: Tensor) -> Tensor:
    if pixels.dim() == 2:
        return pixels[None]
    last = pixels.dim() == 3 and pixels.shape[2] <= _MOST_CHANNELS < pixels.shape[0]
    return pixels.permute(2, 0, 1) if last else pixels


def _shown(image: Image.Image) -> Image.Image:
    try:
        shown = ImageOps.exif_transpose(image)
    except Exception:  # Damaged EXIF data leave the picture as it is, in viewers too.
        return image
    shown.format = image.format  # which a copy has not
    return shown


def _rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode[0] in "IF":
        if image.mode == "I" and image.format not in ("PNG", "PPM"):  # Those have 16 bits in this mode.
            raise ValueError("it has 32-bit integers, wanted 8 or 16 bits, or floats in [0, 1]")
        values = np.asarray(image, np.float32) / (1 if image.mode == "F" else 65535)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"its floats go from {low:g} to {high:g}, wanted [0, 1]")
        image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _stored(image: Image.Image, palette: Palette | None) -> npt.NDArray[Any]:
    """The numbers or colours of a label map's pixels, turned as viewers show it."""
    image = _shown(image)
    is_gif = image.format == "GIF"
    if palette is None and not is_gif:
        if image.mode[0] == "I":
            return np.asarray(image).astype(np.int32)
        if image.mode in ("1", "L", "P", "F"):
            return np.array(image)
    colours = np.array(image.convert("RGB"))
    # Programs that write a GIF renumber its colours: only what they look like is kept.
    if is_gif and palette is None and (colours == colours[..., :1]).all() and not (colours % 255).any():
        return colours[..., 0] > 0
    return colours


def _of_colours(colours: Tensor, palette: Palette | None) -> Tensor:
    """Labels int64 [H, W] of colours int64 [3, H, W]."""
    if palette is not None:
        return palette.classes_of(colours)
    if bool((colours == colours[:1]).all()):
        return colours[0]
    count = len(cast(Tensor, colours.flatten(1).unique(dim=1)).T)
    raise ValueError(
        f"wanted class indices, but it has {count} colours, which must be turned into class indices: palette says "
        "which class each of them is"
    )
