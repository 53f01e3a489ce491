"""Colours of classes, by which label maps that hold colours are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOID = -1
"""Label of void pixels after the class map: no data set's class, however many it has."""

CAMVID = {
    "sky": "808080",
    "building": "008040 800000 40c000 400040 c00080",
    "pole": "c0c080 000040",
    "road": "804080 8000c0 c00040",
    "pavement": "0000c0 40c080 8080c0",
    "tree": "808000 c0c000",
    "sign": "c08080 808040 004040",
    "fence": "404080",
    "car": "400080 4080c0 c080c0 c04080 804040",
    "pedestrian": "404000 c08040 4000c0 408040",
    "bicyclist": "0080c0 c000c0",
}
"""The published colours of CamVid's 32 classes, by the class of the usual 11 that they are merged into, as SegNet does
(Badrinarayanan et al., TPAMI 2017); black is void."""
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_TRIPLE = r"(?<!\d)(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})(?!\d)"
_COLOUR = (rf"^\s*{_TRIPLE}", rf"{_TRIPLE}\s*$", _TRIPLE)
"""First and last in a line before anywhere in it: a name may end or begin with a number."""
_VOID = re.compile("void|ignore|unlabel", re.IGNORECASE)


@dataclass(frozen=True)
class Palette:
    """The class (or VOID) of each colour; a colour is one number, 65536 red + 256 green + blue."""

    name: str
    classes: dict[int, int]

    @classmethod
    def of(cls, given: str | Path) -> Palette:
        """The palette ``camvid`` or ``voc``, or that of a text file with a line per class.

        A line holds red, green and blue from 0 to 255 and may name the class before or after them, as CamVid's
        ``label_colors.txt`` and the ``class_dict.csv`` of many data sets do. The first line's class is 0; lines
        without a colour, or with ``#`` first, do not count, and one whose name has "void", "ignore" or "unlabel" in it
        is void.

        Raises:
            ValueError: there is no such file, or it has no colour, or one twice.
        """
        if given == "camvid":
            merged = enumerate(colours.split() for colours in CAMVID.values())
            return cls(
                "camvid", {0: VOID} | {int(colour, 16): index for index, colours in merged for colour in colours}
            )
        if given == "voc":
            return cls("voc", {_voc_colour(index): index for index in range(len(VOC))} | {_voc_colour(255): VOID})
        if not Path(given).is_file():
            raise ValueError(
                f"palette is {str(given)!r}, wanted camvid, voc, or a text file with a line R G B per class"
            )
        classes: dict[int, int] = {}
        count = 0
        for line in Path(given).read_text(encoding="utf-8-sig").splitlines():
            found = next(filter(None, (re.search(pattern, line) for pattern in _COLOUR)), None)
            if found is None or line.lstrip().startswith("#"):
                continue
            red, green, blue = map(int, found.groups())
            colour = red << 16 | green << 8 | blue
            if max(red, green, blue) > 255 or colour in classes:
                raise ValueError(f"palette {given} has the line {line!r}, wanted a colour of its own, 0 to 255 each")
            classes[colour] = VOID if _VOID.search(line) else count
            count += classes[colour] != VOID
        if count == 0:
            raise ValueError(f"palette {given} has no colour, wanted lines such as '128 64 128 road', or camvid or voc")
        return cls(str(given), classes)

    def __len__(self) -> int:
        """How many classes there are."""
        return max(self.classes.values()) + 1

    def classes_of(self, colours: Tensor) -> Tensor:
        """Classes and VOID, int64 [H, W], of colours int64 [3, H, W]; ValueError names a colour that is not there."""
        numbers = colours[0] * 65536 + colours[1] * 256 + colours[2]
        known = torch.tensor(sorted(self.classes))
        at = torch.searchsorted(known, numbers).clamp(max=len(known) - 1)
        missing = known[at] != numbers
        if missing.any():
            row, column = missing.nonzero()[0].tolist()
            raise ValueError(
                f"its colour {tuple(colours[:, row, column].tolist())} at row {row}, column {column} is not in the "
                f"palette {self.name}"
            )
        return torch.tensor([self.classes[int(colour)] for colour in known])[at]


def _voc_colour(index: int) -> int:
    """Of VOC's development kit: the bits of the class, three by three, are the highest bits of red, green and blue."""
    return sum((index >> bit & 1) << (7 - bit // 3 + 8 * (2 - bit % 3)) for bit in range(8))
