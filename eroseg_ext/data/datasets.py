"""The data sets that are known by name: where their files lie, which class each value of their label maps is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eroseg_ext.data.reading import (
    Pair,
    SegmentationFolder,
    checked_size,
    evenly_spaced,
    images_in,
    one_class,
    paired,
    read_label,
)
from eroseg_ext.utils.validate import check_choice

FOLDER = "folder"
"""No data set known by name: images/ and labels/, whose values are the classes."""
DATASETS = (FOLDER, "camvid", "voc", "cityscapes", "ade20k")

VOID = -1
"""Label of void pixels after the class map: no data set's class, however many it has."""

LabelCounts = dict[Path, dict[int, int]]
"""Pixels of each value, by label map."""

MOST_COUNTED_CLASSES = 1000
"""More classes than this must be said, not counted: labels that large are no class indices."""

_VALUES = 2**16
"""Label maps have up to 16 bits."""
_WRONG = -2


@dataclass(frozen=True)
class ClassMap:
    """Which class each value of a label map is.

    ``classes`` counts the classes; ``table[value]`` is the class of a value, ``VOID``, or -2 for a value that
    must not occur; ``names`` are the classes' names where they are few enough to be listed.
    """

    classes: int
    table: npt.NDArray[np.int16]
    names: tuple[str, ...] = ()

    def allows(self, value: int) -> bool:
        """Whether the value may occur."""
        return 0 <= value < _VALUES and self.table[value] != _WRONG

    def __call__(self, values: npt.NDArray[np.int64], path: Path) -> npt.NDArray[np.int16]:
        """Classes (and VOID) of the values of a label map.

        Raises:
            ValueError: a value must not occur; names the file ``path``.
        """
        inside = (values >= 0) & (values < _VALUES)
        labels = self.table[np.where(inside, values, 0)]
        wrong = (labels == _WRONG) | ~inside
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            allowed = np.flatnonzero(self.table >= 0)
            void = np.flatnonzero(self.table == VOID)
            raise ValueError(
                f"{path} has the label {values[row, column]} at row {row}, column {column}, wanted classes "
                f"{allowed[0]} to {allowed[-1]}, or {_listed(void.tolist())} for void"
            )
        return labels


def class_map(dataset: str, classes: int | None = None, ignore_index: int = 255) -> ClassMap:
    """The class map of a data set; ``classes`` and ``ignore_index`` are those of ``dataset="folder"``.

    Cityscapes' values are the label ids of its ``*_labelIds.png``, of which 19 are trained; ADE20K's are 0 for void and
    1 to 150; VOC's 0 to 20 and 255 for void; CamVid's 0 to 10 and 11 for void, as in the SegNet tutorial.
    """
    if dataset == "voc":
        return _identity(len(VOC_CLASSES), 255, VOC_CLASSES)
    if dataset == "camvid":
        return _identity(len(CAMVID_CLASSES), 11, CAMVID_CLASSES)
    if dataset == "ade20k":
        table = np.full(_VALUES, _WRONG, np.int16)
        table[:151] = np.arange(-1, 150)
        return ClassMap(150, table)
    if dataset == "cityscapes":
        table = np.full(_VALUES, _WRONG, np.int16)
        table[:34] = VOID
        table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
        return ClassMap(len(CITYSCAPES_IDS), table, tuple(CITYSCAPES_IDS.values()))
    if classes is None:
        raise ValueError("classes is None, wanted their number for dataset='folder'")
    return _identity(classes, ignore_index)


class NamedDataset(SegmentationFolder):
    """A data set known by name, as :class:`SegmentationFolder` gives a folder, but with classes and VOID for labels.

    Args:
        dataset: ``camvid``, ``voc``, ``cityscapes`` or ``ade20k``.
        root: see :func:`find`.
        split: ``train`` or ``val``, of a publisher's folder.
        size: (height, width) that everything is resized to; None (default) leaves every image at its own size.

    Raises:
        ValueError: ``dataset`` or ``size`` is not as described; on indexing, a file that cannot be used, or a value
            that the data set's label maps do not have.
        FileNotFoundError: names the folder or file that is missing.
    """

    def __init__(self, dataset: str, root: str | Path, split: str = "val", size: tuple[int, int] | None = None) -> None:
        check_choice("dataset", dataset, DATASETS[1:])
        self.dataset = dataset
        self.root = Path(root)
        self.size = checked_size(size)
        self.to_class = class_map(dataset)
        pairs = find(dataset, self.root, split)
        self.images = [image for image, _ in pairs]
        self.labels = [label for _, label in pairs]

    @property
    def reading(self) -> str:
        """What an item depends on besides its files."""
        return f"{self.size} {self.dataset}"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, values = super().__getitem__(index)
        return image, torch.from_numpy(self.to_class(values.numpy(), self.labels[index])).long()


def find(dataset: str, root: Path, split: str) -> list[Pair]:
    """The images and label maps of a data set, in order of name.

    Args:
        dataset: one of ``DATASETS``.
        root: folder with ``images/NAME.*`` and ``labels/NAME.png``, for every data set; or, for a named data set, the
            folder that its publisher's archive unpacks to.
        split: ``train`` or ``val``, of a publisher's folder.

    Raises:
        FileNotFoundError: names the folder or file that is missing.
    """
    if dataset == FOLDER or ((root / "images").is_dir() and (root / "labels").is_dir()):
        folder = SegmentationFolder(root)
        pairs = list(zip(folder.images, folder.labels, strict=True))
    elif dataset == "voc":
        names = (_existing(root / "ImageSets" / "Segmentation" / f"{split}.txt")).read_text(encoding="utf-8").split()
        pairs = paired([_existing(root / "JPEGImages" / f"{name}.jpg") for name in names], root / "SegmentationClass")
    elif dataset == "cityscapes":
        cities = sorted(path for path in _existing(root / "leftImg8bit" / split).iterdir() if path.is_dir())
        pairs = []
        for city in cities:
            images = [image for image in images_in(city) if image.stem.endswith("_leftImg8bit")]
            pairs += paired(images, root / "gtFine" / split / city.name)
    elif dataset == "ade20k":
        part = {"train": "training", "val": "validation"}[split]
        pairs = paired(images_in(_existing(root / "images" / part)), root / "annotations" / part)
    else:
        pairs = paired(images_in(_existing(root / split)), root / f"{split}annot")
    if not pairs:
        raise FileNotFoundError(f"{root} holds no images for {split}")
    if dataset == "cityscapes":
        _refuse_train_ids(root, pairs)
    return pairs


def _identity(classes: int, void: int, names: tuple[str, ...] = ()) -> ClassMap:
    table = np.full(_VALUES, _WRONG, np.int16)
    table[:classes] = np.arange(classes)
    if 0 <= void < _VALUES:
        table[void] = VOID
    return ClassMap(classes, table, names)


def _refuse_train_ids(root: Path, pairs: list[Pair]) -> None:
    """Told by the files' names; or by values up to 18 alone, with 255, or of which most are void as label ids."""
    pixels: Counter[int] = Counter()
    for counts in label_counts([pairs[index] for index in evenly_spaced(len(pairs), 8)]).values():
        pixels.update(counts)
    void = sum(count for value, count in pixels.items() if value not in CITYSCAPES_IDS)
    low = len(pixels) > 1 and pixels.keys() <= {*range(19), 255}
    if any("TrainIds" in label.name for _, label in pairs) or (low and (255 in pixels or void > pixels.total() / 2)):
        raise ValueError(
            f"{root} holds label maps of train ids (values {_listed(sorted(pixels))}), wanted label ids, or "
            "dataset='folder' with classes=19"
        )


def _listed(values: list[int]) -> str:
    """The first values and the last."""
    shown = [*values[:8], "...", values[-1]] if len(values) > 9 else values
    return ", ".join(map(str, shown)) or "none"


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    return path


VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

CITYSCAPES_IDS = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""Label id of each trained class, in order of train id; the other ids up to 33 are void."""


def label_counts(pairs: Iterable[Pair]) -> LabelCounts:
    """Pixels of each value in every label map; ValueError names a file that cannot be read."""
    paths = [label for _, label in pairs]
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(_counted, paths), strict=True))


def _counted(path: Path) -> dict[int, int]:
    label = read_label(path)
    colours = label.getcolors(label.width * label.height) or []
    return {cast(int, value): pixels for pixels, value in colours}


def count_classes(counts: LabelCounts, val_counts: LabelCounts, ignore_index: int) -> int:
    """One more than the largest label of the label maps of both.

    Raises:
        ValueError: the first hold no class or a single one, or a label is too large to be a class index.
    """
    found = {value for values in counts.values() for value in values}
    folder = next(iter(counts)).parent
    if not found - {ignore_index}:
        raise ValueError(f"{folder} has no pixel with a label other than ignore_index {ignore_index}")
    if told := one_class(found, {ignore_index}):
        raise ValueError(f"{folder}: {told}, wanted at least two, another ignore_index, or their number as classes")
    largest = -1
    for path, values in (*counts.items(), *val_counts.items()):
        for value in values.keys() - {ignore_index}:
            largest = max(largest, value)
            if not 0 <= value < MOST_COUNTED_CLASSES:
                raise ValueError(
                    f"{path} has the label {value}, wanted class indices below {MOST_COUNTED_CLASSES}, ignore_index "
                    f"{ignore_index} for void, or the number of classes as classes"
                )
    return largest + 1


def check_labels(counts: LabelCounts, to_class: ClassMap) -> None:
    """Raises ValueError, naming file and pixel, if a value must not occur."""
    for path, values in counts.items():
        if not all(map(to_class.allows, values)):
            to_class(np.array(read_label(path), dtype=np.int64), path)


def suspicions(counts: LabelCounts, val_counts: LabelCounts, to_class: ClassMap, every: bool) -> Iterator[str]:
    """What the labels have that may be meant, and often is not, a line each.

    ``every``: ``counts`` are of all the label maps to train on, not of some.
    """
    void = np.flatnonzero(to_class.table == VOID).tolist()
    found, val_found = ({value for values in part.values() for value in values} for part in (counts, val_counts))
    for name, values in (("data", found), ("val", val_found)):
        if told := one_class(values, void):
            yield f"warning: in {name} {told}"
    if every:
        shown = sorted(found.difference(void))
        if len(shown) < to_class.classes:
            missing = f"{to_class.classes - len(shown)} of {to_class.classes} classes have no pixel to learn from"
            yield f"warning: data has the labels {_listed(shown)}: {missing}"
        if unknown := sorted(val_found.difference(void, found)):
            yield f"warning: val alone has the labels {_listed(unknown)}"


def median_frequency_weights(counts: LabelCounts, to_class: ClassMap) -> npt.NDArray[np.float32]:
    """Class weights ``median(f) / f_c``, with f_c the share of class c in the valid pixels of the images that show it.

    Classes that no image shows weigh 1, which no pixel will notice. Source: Eigen and Fergus, "Predicting Depth,
    Surface Normals and Semantic Labels with a Common Multi-Scale Convolutional Architecture", ICCV 2015.
    """
    pixels, shown = np.zeros(to_class.classes), np.zeros(to_class.classes)
    for values in counts.values():
        image = np.zeros(to_class.classes)
        for value, count in values.items():
            if to_class.table[value] != VOID:
                image[to_class.table[value]] += count
        pixels += image
        shown += np.where(image > 0, image.sum(), 0)
    frequency = np.divide(pixels, shown, out=np.ones_like(pixels), where=shown > 0)
    weights = np.ones(to_class.classes)
    if (shown > 0).any():
        weights[shown > 0] = np.median(frequency[shown > 0]) / frequency[shown > 0]
    return weights.astype(np.float32)
