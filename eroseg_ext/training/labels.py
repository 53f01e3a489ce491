"""What the label maps to train on hold: their classes, what is suspicious about them, how the classes are weighed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from eroseg_ext.data.datasets import ClassMap, listed
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.reading import one_class

LabelCounts = Mapping[str, dict[int, int]]
"""Pixels of each value, by the name of a label map."""

MOST_COUNTED_CLASSES = 1000
"""More classes than this must be said, not counted: labels that large are no class indices."""


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
