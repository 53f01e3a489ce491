"""The data sets that are known by name: which class each value of their label maps is, and how often it occurs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eroseg_ext.data.palettes import CAMVID, VOC, VOID
from eroseg_ext.data.reading import one_class

FOLDER = "folder"
"""No data set known by name: the values of its label maps are the classes."""
DATASETS = (FOLDER, "camvid", "voc", "cityscapes", "ade20k")
_TRAINED = (
    *((7, "road"), (8, "sidewalk"), (11, "building"), (12, "wall"), (13, "fence"), (17, "pole"), (19, "traffic light")),
    *((20, "traffic sign"), (21, "vegetation"), (22, "terrain"), (23, "sky"), (24, "person"), (25, "rider")),
    *((26, "car"), (27, "truck"), (28, "bus"), (31, "train"), (32, "motorcycle"), (33, "bicycle")),
)
CITYSCAPES = dict(_TRAINED)
"""Name of each trained class by its label id, in order of train id; the other ids up to 33 are void."""

LabelCounts = Mapping[str, dict[int, int]]
"""Pixels of each value, by the name of a label map."""

MOST_COUNTED_CLASSES = 1000
"""More classes than this must be said, not counted: labels that large are no class indices."""
MOST_CLASSES = 2**15 - 1

_VALUES = 2**16
"""Label maps have up to 16 bits."""
_WRONG = -2


@dataclass(frozen=True)
class ClassMap:
    """Which class each value of a label map is.

    ``classes`` counts the classes; ``table[value]`` is the class of a value, ``VOID``, or -2 for a value that must not
    occur; ``ignore_index`` and -1 are void too; ``names`` are the classes' names, where there are few.
    """

    classes: int
    table: Tensor
    ignore_index: int = VOID
    names: tuple[str, ...] = ()

    def __call__(self, values: Tensor, name: str) -> Tensor:
        """Classes and VOID, int64, of the values of a label map.

        Raises:
            ValueError: a value must not occur; names the label map as ``name``.
        """
        inside = (values >= 0) & (values < _VALUES)
        labels = self.table[values.where(inside, 0)].where(inside, _WRONG).long()
        labels = labels.where((values != self.ignore_index) & (values != VOID), VOID)
        wrong = labels == _WRONG
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            allowed = (self.table >= 0).nonzero()
            raise ValueError(
                f"{name} has the label {int(values[row, column])} at row {row}, column {column}, wanted classes "
                f"{int(allowed[0])} to {int(allowed[-1])}, or {listed(sorted(self.void))} for void"
            )
        return labels

    @property
    def void(self) -> set[int]:
        """The values that are void, but for -1."""
        found: set[int] = set((self.table == VOID).nonzero()[:, 0].tolist())
        return found if self.ignore_index == VOID else found | {self.ignore_index}

    def digest(self) -> str:
        """A hash of which class each value is."""
        return hashlib.sha256(f"{self.ignore_index}".encode() + self.table.numpy().tobytes()).hexdigest()[:16]

    def of_value(self, value: int) -> int:
        """The class of one value."""
        if value in (VOID, self.ignore_index):
            return VOID
        return int(self.table[value]) if 0 <= value < _VALUES else _WRONG


def class_map(
    dataset: str, classes: int | None = None, ignore_index: int = 255, reduce_zero_label: bool = False
) -> ClassMap:
    """The class map of a data set; what comes after ``dataset`` is of ``dataset="folder"``.

    Cityscapes' values are the label ids of its ``*_labelIds.png``, of which 19 are trained; ADE20K's are 0 for void and
    1 to 150; VOC's 0 to 20 and 255 for void; CamVid's 0 to 10 and 11 for void, as in the SegNet tutorial.

    Args:
        dataset: one of ``DATASETS``.
        classes: their number; None: as many as there may be.
        ignore_index: value of void pixels.
        reduce_zero_label: 0 is void, and the classes' values are from 1.
    """
    table = torch.full((_VALUES,), _WRONG, dtype=torch.int16)
    names: tuple[str, ...] = ()
    first = 0
    if dataset == "cityscapes":
        table[:34] = VOID
        table[list(CITYSCAPES)] = torch.arange(len(CITYSCAPES), dtype=torch.int16)
        return ClassMap(len(CITYSCAPES), table, names=tuple(CITYSCAPES.values()))
    if dataset == "voc":
        classes, ignore_index, names = len(VOC), 255, VOC
    elif dataset == "camvid":
        classes, ignore_index, names = len(CAMVID), len(CAMVID), tuple(CAMVID)
    elif dataset == "ade20k":
        classes, ignore_index, first = 150, VOID, 1
    elif reduce_zero_label:
        first = 1
    count = classes or MOST_CLASSES
    table[:first] = VOID
    table[first : first + count] = torch.arange(count, dtype=torch.int16)
    return ClassMap(count, table, ignore_index, names)


def listed(values: list[int]) -> str:
    """The first values and the last."""
    shown = [*values[:8], "...", values[-1]] if len(values) > 9 else values
    return ", ".join(map(str, shown)) or "none"


def count_classes(counts: LabelCounts, val_counts: LabelCounts, to_class: ClassMap) -> int:
    """One more than the largest class of the label maps of both, of which ``to_class`` allows as many as there may be.

    Raises:
        ValueError: the first hold no class or a single one, or a label is too large to be a class index.
    """
    void = to_class.void | {VOID}
    found = {value for values in counts.values() for value in values}
    if not found - void:
        raise ValueError(f"data has no pixel with a label other than ignore_index {to_class.ignore_index}")
    if told := one_class(found, void):
        raise ValueError(f"data: {told}, wanted at least two, another ignore_index, or their number as classes")
    for name, values in (*counts.items(), *val_counts.items()):
        for value in values.keys() - void:
            if not 0 <= value < MOST_COUNTED_CLASSES:
                raise ValueError(
                    f"{name} has the label {value}, wanted class indices below {MOST_COUNTED_CLASSES}, ignore_index "
                    f"{to_class.ignore_index} for void, or the number of classes as classes"
                )
    return 1 + max(
        to_class.of_value(value) for part in (counts, val_counts) for values in part.values() for value in values
    )


def suspicions(counts: LabelCounts, val_counts: LabelCounts, to_class: ClassMap, every: bool) -> Iterator[str]:
    """What the labels have that may be meant, and often is not, a line each.

    ``every``: ``counts`` are of all the label maps to train on, not of some.
    """
    void = to_class.void | {VOID}
    found, val_found = ({value for values in part.values() for value in values} for part in (counts, val_counts))
    for name, values in (("data", found), ("val", val_found)):
        if told := one_class(values, void):
            yield f"warning: in {name} {told}"
    if every:
        shown = sorted(found.difference(void))
        if len(shown) < to_class.classes:
            missing = f"{to_class.classes - len(shown)} of {to_class.classes} classes have no pixel to learn from"
            yield f"warning: data has the labels {listed(shown)}: {missing}"
        if unknown := sorted(val_found.difference(void, found)):
            yield f"warning: val alone has the labels {listed(unknown)}"


def median_frequency_weights(counts: LabelCounts, to_class: ClassMap) -> npt.NDArray[np.float32]:
    """Class weights ``median(f) / f_c``, with f_c the share of class c in the valid pixels of the images that show it.

    Classes that no image shows weigh 1, which no pixel will notice. Source: Eigen and Fergus, "Predicting Depth,
    Surface Normals and Semantic Labels with a Common Multi-Scale Convolutional Architecture", ICCV 2015.
    """
    pixels, shown = np.zeros(to_class.classes), np.zeros(to_class.classes)
    for values in counts.values():
        image = np.zeros(to_class.classes)
        for value, count in values.items():
            if (label := to_class.of_value(value)) != VOID:
                image[label] += count
        pixels += image
        shown += np.where(image > 0, image.sum(), 0)
    frequency = np.divide(pixels, shown, out=np.ones_like(pixels), where=shown > 0)
    weights = np.ones(to_class.classes)
    if (shown > 0).any():
        weights[shown > 0] = np.median(frequency[shown > 0]) / frequency[shown > 0]
    return weights.astype(np.float32)
