"""What evaluation and training read: a folder's images and label maps, or the items of any data set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from eroseg_ext.data import layouts
from eroseg_ext.data.datasets import CITYSCAPES, DATASETS, FOLDER, ClassMap, class_map, listed
from eroseg_ext.data.palettes import Palette
from eroseg_ext.data.reading import evenly_spaced, image_of, labels_of, named, resized
from eroseg_ext.utils.validate import check_choice, check_integer, check_size, require

IMAGE_KEYS = ("image", "img", "images", "pixel_values")
LABEL_KEYS = (
    *("label", "labels", "mask", "annotation", "segmentation_mask", "semantic_mask", "segmentation", "label_map"),
    *("semantic_segmentation", "semantic", "seg_map", "gt_semantic_seg", "target", "gt"),
)
"""What data sets call an image and its label map where an item is a dict."""
_KEYS = (IMAGE_KEYS, LABEL_KEYS)


class SegmentationData(Protocol):
    """Any data set: ``data[i]`` is an image and its labels, as a tuple or a dict, and whatever else."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Source:
    """Images with label maps, one way to read them all.

    Args:
        data: anything with ``len`` whose items are tuples that begin with image and labels, or dicts with one of
            ``IMAGE_KEYS`` and one of ``LABEL_KEYS``; a list of pairs of paths; a DataLoader, whose data set is read one
            by one; or arrays ``(images [N, K, H, W], labels [N, H, W])``. Volumes have D before H.
        size: (height, width) that everything is resized to: images with antialiased bilinear interpolation, labels with
            nearest neighbour. None leaves every image at its own size.
        palette: of label maps that hold colours: a name or a file, see :meth:`Palette.of`.
        to_class: of the label maps' values, where the data themselves tell it.

    Raises:
        TypeError: data is nothing of that kind.
    """

    own_label_size = False
    """label maps need not have their image's size, and keep their own"""
    takes_volumes = False
    """images may be [K, D, H, W] and their label maps [D, H, W]"""

    def __init__(
        self,
        data: Any,
        size: tuple[int, int] | None = None,
        palette: str | Path | None = None,
        to_class: ClassMap | None = None,
    ) -> None:
        if size is not None:
            check_size("size", size)
        self.size = size
        self.palette = None if palette is None else Palette.of(palette)
        self.to_class = to_class
        if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
            with torch.random.fork_rng(devices=[]):  # a sampler that shuffles draws
                data = Subset(data.dataset, sorted(data.sampler))
        sides = [getattr(part, "ndim", 0) for part in data[:3]] if isinstance(data, (tuple, list)) else []
        if sides in ([4, 3], [5, 4]):
            data = list(zip(*data, strict=True))
        kind = f"data is a {type(data).__name__}"
        if isinstance(data, Mapping):
            raise TypeError(f"{kind} with {', '.join(map(repr, data))}, wanted one split of it, such as data['train']")
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise TypeError(f"{kind}, wanted a folder, or a data set that has a len and that data[i] gives items of")
        self._data = data
        in_files = isinstance(data, list) and all(isinstance(x, tuple) and isinstance(x[0], Path) for x in data[:1])
        self._paths: list[layouts.Pair] = data if in_files else []

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """What results call an image."""
        return self._paths[index][0].name if self._paths else f"image {index}"

    def stem(self, index: int) -> str | int:
        """What files made of an image are called: the name of its file, or its number."""
        return self._paths[index][0].stem if self._paths else index

    def where(self, index: int) -> tuple[str, str]:
        """What messages call an image and its label map."""
        if not self._paths:
            return f"data[{index}]", f"the label map of data[{index}]"
        image, label = self._paths[index]
        return str(image), str(label)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """An image, uint8 or float32 [K, H, W], and the values of its label map, int64 [H, W]; volumes have D before H.

        Raises:
            ValueError, TypeError: one of them cannot be read as what it should be, or the sizes differ; names it.
        """
        held, held_labels = self._held(index)
        image_name, label_name = self.where(index)
        is_volume = _is_volume(held)
        with named(label_name, "a label map"):
            values = labels_of(held_labels, self.palette, is_volume)
        with named(image_name, "an image"):
            image = image_of(held, values.shape)
        if image.shape[1:] != values.shape and (is_volume or not self.own_label_size):
            labelled, pixels = ("x".join(map(str, reversed(shape))) for shape in (values.shape, image.shape[1:]))
            kind = "volume" if is_volume else "image"
            raise ValueError(f"{label_name} is {labelled} pixels but its {kind} {image_name} is {pixels}")
        return (image, values) if self.size is None else resized(image, values, self.size, not self.own_label_size)

    def values(self, index: int) -> Tensor:
        """The values of a label map alone, at its own size."""
        held, held_labels = self._held(index)
        with named(self.where(index)[1], "a label map"):
            return labels_of(held_labels, self.palette, _is_volume(held))

    def digest(self, index: int) -> str:
        """A hash of what is read; of files as they are, since decoding takes longer."""
        digest = hashlib.sha256(f"{self.size} {self.own_label_size} {self.palette}".encode())
        for path in self._paths[index] if self._paths else ():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        for part in () if self._paths else self.read(index):
            digest.update(f"{part.dtype} {list(part.shape)}".encode() + part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def label_counts(self, indices: Iterable[int]) -> dict[str, dict[int, int]]:
        """Pixels of each value in these label maps, by what messages call them."""
        with ThreadPoolExecutor() as pool:  # for files: whether a data set can be read by threads, it alone knows
            return dict((pool.map if self._paths else map)(self._counted, indices))

    def _counted(self, index: int) -> tuple[str, dict[int, int]]:
        values, counts = np.unique(self.values(index).numpy(), return_counts=True)
        return self.where(index)[1], dict(zip(values.tolist(), counts.tolist(), strict=True))

    def _held(self, index: int) -> tuple[Any, Any]:
        """What holds an image, and what holds its labels."""
        item = self._data[index]
        if isinstance(item, Mapping):
            found: list[Any] = [next((item[key] for key in keys if _is_map(item.get(key))), None) for keys in _KEYS]
            held = f" with {', '.join(f'{key}: {type(value).__name__}' for key, value in item.items())}"
        else:
            found = [*item[:2]] if isinstance(item, (tuple, list)) else []
            held = f" of {', '.join(type(part).__name__ for part in item)}" if found else ""
        if len(found) < 2 or not all(map(_is_map, found)):
            raise TypeError(
                f"data[{index}] is a {type(item).__name__}{held}, wanted an image and its labels, each a PIL image, a "
                "tensor or an array: first in a tuple, or in a dict under 'image' and 'label'"
            )
        image, labels = found
        if _is_volume(image):
            if not self.takes_volumes:
                raise ValueError(f"data[{index}] is a volume of shape {list(image.shape)}, wanted an image [K, H, W]")
            require(self.size is None, "size", self.size, f"None for volumes, such as data[{index}]")
        return image, labels


def _is_map(value: Any) -> bool:
    return isinstance(value, (Image.Image, Path)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim >= 2)


def _is_volume(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 4


class SegmentationFolder(Source):
    """Images and label maps of a folder, ``ROOT/images/NAME.*`` with ``ROOT/labels/NAME.png``, in order of name.

    A label map may also have one of ``LABEL_SUFFIXES``, or one of ``LABEL_ENDINGS`` after the image's name, such as
    ``NAME_mask.png``; beside ``NAME_leftImg8bit.png`` it may be ``NAME_gtFine_labelIds.png``.

    Args:
        root: the folder, in any layout of :func:`eroseg_ext.data.layouts.find`.
        size: (height, width) that everything is resized to: images with antialiased bilinear interpolation, labels
            with nearest neighbour. None (default) leaves every image at its own size.
        split: ``train``, ``val`` or another one, where the folder holds several.
        palette: for label maps that hold colours: ``camvid``, ``voc`` or a text file, see
            :meth:`eroseg_ext.data.palettes.Palette.of`. Labels are then classes, and -1 for void.
        dataset: ``camvid``, ``voc``, ``cityscapes`` or ``ade20k``: labels are then classes, and -1 for void.

    Indexing gives ``(image, labels)``: float32 [3, H, W] in [0, 1] and int64 [H, W], decoded anew each time.

    Raises:
        FileNotFoundError: root, its images or a label map is missing.
        ValueError: size is not two positive numbers, or two images have one label map; on indexing, a file that cannot
            be used, or a value that the data set's label maps do not have.
    """

    def __init__(
        self,
        root: str | Path,
        size: tuple[int, int] | None = None,
        *,
        split: str = "val",
        palette: str | Path | None = None,
        dataset: str = FOLDER,
    ) -> None:
        check_choice("dataset", dataset, DATASETS)
        self.root = Path(root)
        pairs = layouts.find(self.root, split)
        super().__init__(pairs, size, palette, None if dataset == FOLDER else class_map(dataset))
        self.images = [image for image, _ in pairs]
        self.labels = [label for _, label in pairs]
        if dataset == "cityscapes":
            self._refuse_train_ids()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, values = self.read(index)
        labels = values if self.to_class is None else self.to_class(values, self.where(index)[1]).long()
        return image.contiguous() / 255, labels

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

    def _refuse_train_ids(self) -> None:
        """Told by the files' names; or by values up to 18 alone, with 255, or of which most are void as label ids."""
        pixels: Counter[int] = Counter()
        for counts in self.label_counts(evenly_spaced(len(self), 8)).values():
            pixels.update(counts)
        void = sum(count for value, count in pixels.items() if value not in CITYSCAPES)
        low = len(pixels) > 1 and pixels.keys() <= {*range(19), 255}
        named_so = any("TrainIds" in label.name for label in self.labels)
        if named_so or (low and (255 in pixels or void > pixels.total() / 2)):
            raise ValueError(
                f"{self.root} holds label maps of train ids (values {listed(sorted(pixels))}), wanted label ids, or "
                "dataset='folder' with classes=19"
            )


class NamedDataset(SegmentationFolder):
    """A :class:`SegmentationFolder` with classes and VOID for labels, of the data set that is named first."""

    def __init__(
        self, dataset: str, root: str | Path, split: str = "val", size: tuple[int, int] | None = None, **options: Any
    ) -> None:
        check_choice("dataset", dataset, DATASETS[1:])
        super().__init__(root, size, split=split, dataset=dataset, **options)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data are read: keywords of :func:`eroseg_ext.evaluate` and :func:`eroseg_ext.train`."""

    dataset: str = FOLDER
    """which class each value of the label maps is: ``folder`` (the values are the classes), ``camvid``, ``voc``,
    ``cityscapes`` (label ids) or ``ade20k``, whose void needs no ignore_index"""
    ignore_index: int = 255
    """label of void pixels in the label maps of ``dataset="folder"``; they never count"""
    reduce_zero_label: bool = False
    """label 0 is void and the classes' labels begin with 1, in label maps of ``dataset="folder"``"""
    palette: str | None = None
    """for label maps that hold colours: ``camvid``, ``voc``, or a text file with a line ``R G B NAME`` per class"""
    size: tuple[int, int] | None = None
    """resize all images and labels to this; default: every image keeps its own size"""

    def __post_init__(self) -> None:
        check_choice("dataset", self.dataset, DATASETS)
        check_integer("ignore_index", self.ignore_index, -(2**63), 2**63 - 1)
        require(isinstance(self.reduce_zero_label, bool), "reduce_zero_label", self.reduce_zero_label, "True or False")
        if self.palette is not None:
            fits = ("camvid", "voc", FOLDER)
            require(self.dataset in fits, "dataset", self.dataset, f"one of {', '.join(fits)} beside palette")
        if self.size is not None:
            check_size("size", self.size)

    def source(self, data: str | Path | SegmentationData | Source, split: str) -> Source:
        """The data as they are read."""
        if isinstance(data, Source):
            return data
        if not isinstance(data, (str, Path)):
            return Source(data, self.size, self.palette)
        return SegmentationFolder(data, self.size, split=split, palette=self.palette, dataset=self.dataset)

    def class_map(self, classes: int | None = None) -> ClassMap:
        """Of the label maps' values; with a palette and no number of classes, those of the palette."""
        if classes is None and self.palette is not None and self.dataset == FOLDER:
            classes = len(Palette.of(self.palette))
        return class_map(self.dataset, classes, self.ignore_index, self.reduce_zero_label)
