"""The data sets that are known by name: which class each value of their label maps is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from eroseg_ext.data.palettes import CAMVID, VOC, VOID

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

MOST_CLASSES = 2**15 - 1

_VALUES = 2**16
"""Of label maps of up to 16 bits; the table has one entry more for all values beyond, and one for -1."""
_WRONG = -2


@dataclass(frozen=True)
class ClassMap:
    """Which class each value of a label map is.

    ``classes`` counts the classes; ``table[value]`` is the class of a value, ``VOID``, or -2 for a value that must not
    occur, as are those beyond the table; its last entry, that of -1, is ``VOID``. ``ignore_index`` is void too;
    ``names`` are the classes' names, where there are few.
    """

    classes: int
    table: Tensor
    ignore_index: int = VOID
    names: tuple[str, ...] = ()

    def __call__(self, values: Tensor, name: str) -> Tensor:
        """Classes and VOID, int16, of the values of a label map.

        Raises:
            ValueError: a value must not occur; names the label map as ``name``.
        """
        labels = self._of(values)
        if labels.numel() > 0 and int(labels.amin()) == _WRONG:
            wrong = labels == _WRONG
            allowed = (self.table >= 0).nonzero()
            raise ValueError(
                f"{name} has the label {int(values[wrong][0])} at {place_of(wrong)}, wanted classes {int(allowed[0])} "
                f"to {int(allowed[-1])}, or {listed(sorted(self.void))} for void"
            )
        return labels

    def of_value(self, value: int) -> int:
        """The class of one value."""
        return int(self._of(torch.tensor(value)))

    @property
    def void(self) -> set[int]:
        """The values that are void, but for -1."""
        found: set[int] = set((self.table[:_VALUES] == VOID).nonzero()[:, 0].tolist())
        return found if self.ignore_index == VOID else found | {self.ignore_index}

    def digest(self) -> str:
        """A hash of which class each value is."""
        return hashlib.sha256(f"{self.ignore_index}".encode() + self.table.numpy().tobytes()).hexdigest()[:16]

    def _of(self, values: Tensor) -> Tensor:
        if not VOID <= self.ignore_index < _VALUES:
            values = values.where(values != self.ignore_index, VOID)
        return self.table[values.clamp(max=_VALUES).where(values >= VOID, _VALUES)]


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
    table = torch.full((_VALUES + 2,), _WRONG, dtype=torch.int16)
    table[-1] = VOID
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
    if 0 <= ignore_index < _VALUES:
        table[ignore_index] = VOID
    return ClassMap(count, table, ignore_index, names)


def place_of(found: Tensor) -> str:
    """Where in a label map, or in that of a volume, the first true value is."""
    place = found.nonzero()[0].tolist()
    return ", ".join(f"{side} {at}" for side, at in zip(("slice", "row", "column")[-len(place) :], place, strict=True))


def listed(values: list[int]) -> str:
    """The first values and the last."""
    shown = [*values[:8], "...", values[-1]] if len(values) > 9 else values
    return ", ".join(map(str, shown)) or "none"
