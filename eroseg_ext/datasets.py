"""The data sets that are known by name: where their files lie, which class each value of their label maps is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eroseg_ext.checks import check_choice
from eroseg_ext.data import Pair, SegmentationFolder, checked_size, images_in, paired, read_label

FOLDER = "folder"
"""No data set known by name: images/ and labels/, whose values are the classes."""
DATASETS = (FOLDER, "camvid", "voc", "cityscapes", "ade20k")

VOID = -1
"""Label of void pixels after the class map: no data set's class, however many it has."""

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
                f"{allowed[0]} to {allowed[-1]}, or {_listed(void)} for void"
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
    if dataset == "cityscapes" and any("TrainIds" in label.name for _, label in pairs):
        raise ValueError(f"{root} holds label maps of train ids, wanted label ids, or dataset='folder' with classes=19")
    return pairs


def _identity(classes: int, void: int, names: tuple[str, ...] = ()) -> ClassMap:
    table = np.full(_VALUES, _WRONG, np.int16)
    table[:classes] = np.arange(classes)
    if 0 <= void < _VALUES:
        table[void] = VOID
    return ClassMap(classes, table, names)


def _listed(values: npt.NDArray[np.int64]) -> str:
    return ", ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "") if len(values) else "none"


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


def count_classes(pairs: Sequence[Pair], ignore_index: int) -> int:
    """One more than the largest label of the label maps, at least 2.

    Raises:
        ValueError: no pixel has a label other than ``ignore_index``.
    """
    largest = -1
    for pair in pairs:
        values = np.unique(np.array(read_label(pair[1]), dtype=np.int64))
        largest = max(largest, *values[values != ignore_index].tolist(), -1)
    if largest < 0:
        raise ValueError(f"{pairs[0][1].parent} has no pixel with a label other than ignore_index {ignore_index}")
    return max(largest + 1, 2)


def median_frequency_weights(pairs: Sequence[Pair], to_class: ClassMap) -> npt.NDArray[np.float32]:
    """Class weights ``median(f) / f_c``, with f_c the share of class c in the valid pixels of the images that show it.

    Classes that no image shows weigh 1, which no pixel will notice. Source: Eigen and Fergus, "Predicting Depth,
    Surface Normals and Semantic Labels with a Common Multi-Scale Convolutional Architecture", ICCV 2015.
    """
    pixels, shown = np.zeros(to_class.classes), np.zeros(to_class.classes)
    for pair in pairs:
        labels = to_class(np.array(read_label(pair[1]), dtype=np.int64), pair[1])
        counts = np.bincount(labels[labels != VOID], minlength=to_class.classes)
        pixels += counts
        shown += np.where(counts > 0, counts.sum(), 0)
    frequency = np.divide(pixels, shown, out=np.ones_like(pixels), where=shown > 0)
    weights = np.ones(to_class.classes)
    if (shown > 0).any():
        weights[shown > 0] = np.median(frequency[shown > 0]) / frequency[shown > 0]
    return weights.astype(np.float32)
