"""Scores from counts per image and class, and the worst case over several attacks.

Counts are int64 arrays ``[N, C, 3]``: of image n and class c the correct pixels, the pixels with that label, and the
pixels with that prediction, void left out. That is all that accuracy and intersection over union need, and it adds up
over images. Scores are in percent.

By default a class counts if some label has it, however few; so the mean is over the same classes whatever the attack
makes the model predict, and none is NaN. A class that is predicted and that no label has is then left out of mIoU,
while mmsegmentation and torchmetrics average it in as 0: ``"labelled_or_predicted"`` does so too. mAcc is in either
case over the classes that some label has, as only they have an accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
CORRECT, LABELS, PREDICTED = 0, 1, 2
MIOU_CLASSES = ("labelled", "labelled_or_predicted")
"""Over which classes mIoU is the mean: those that some label has, or also those that are only predicted, as 0."""


def counts_of(matrix: Tensor) -> Tensor:
    """Counts ``[..., C, 3]`` of confusion matrices ``[..., C, C]`` whose rows are labels, on their device."""
    return torch.stack([matrix.diagonal(dim1=-2, dim2=-1), matrix.sum(-1), matrix.sum(-2)], -1)


@dataclass(frozen=True)
class Scores:
    """Scores over a set of images, in percent; NaN without a valid pixel."""

    miou: float
    """mean over the classes of intersection over union"""
    macc: float
    """mean over the classes of the share of correct pixels"""
    aacc: float
    """share of correct pixels"""
    iou: tuple[float | None, ...]
    """intersection over union by class; None for classes that are not part of the mean"""


@dataclass(frozen=True)
class WorstCase:
    """The lowest scores that choosing one of several attacks anew for each image can reach, in percent."""

    miou: float
    """of a greedy search: some choice of attacks reaches it; another may reach less, but not less than the bound"""
    miou_bound: float
    """no choice of attacks for the images reaches a lower mIoU: each class's IoU is minimised on its own, exactly"""
    macc: float
    """exact: the minimum over all choices"""
    aacc: float
    """exact: of each image the attack with the fewest correct pixels"""
    chosen_miou: tuple[int, ...]
    """by image, the number of the attack in the choice behind ``miou``"""
    chosen_aacc: tuple[int, ...]
    """by image, the number of the attack behind ``aacc``; the first on ties"""


def scores(counts: Counts, miou_classes: str = "labelled") -> Scores:
    """Scores of counts ``[N, C, 3]`` over all N images, mIoU over one of ``MIOU_CLASSES``."""
    total = counts.sum(0)
    labelled = total[:, LABELS] > 0
    if not labelled.any():
        return Scores(np.nan, np.nan, np.nan, (None,) * len(total))
    counted = labelled if miou_classes == "labelled" else _union(total) > 0
    iou = total[counted, CORRECT] / _union(total[counted])
    by_class: list[float | None] = [None] * len(total)
    for index, value in zip(np.flatnonzero(counted), iou, strict=True):
        by_class[index] = float(100 * value)
    correct, labels = total[labelled, CORRECT], total[labelled, LABELS]
    return Scores(
        miou=float(100 * iou.mean()),
        macc=float(100 * (correct / labels).mean()),
        aacc=float(100 * correct.sum() / labels.sum()),
        iou=tuple(by_class),
    )


def miou_and_accuracy(matrix: Tensor) -> dict[str, float]:
    """``miou`` (over the classes that some label has) and ``accuracy`` (aAcc) in percent of a confusion matrix int64
    ``[C, C]`` whose rows are labels."""
    found = scores(counts_of(matrix)[None].cpu().numpy())
    return {"miou": found.miou, "accuracy": found.aacc}


def worst_case(candidates: Counts, miou_classes: str = "labelled") -> WorstCase:
    """The worst case over A attacks on the same N images.

    Args:
        candidates: counts ``[A, N, C, 3]``; the clean images may be one of the attacks.
        miou_classes: one of ``MIOU_CLASSES``, as for :func:`scores`.

    Source: Croce, Singh & Hein, ECCV 2024, for the accuracy and the greedy search for mIoU; the bound on mIoU by
    Dinkelbach's method for ratios of sums (Management Science, 1967).
    """
    images = candidates.shape[1]
    present = candidates[0, :, :, LABELS].sum(0) > 0
    if not present.any():
        none = (0,) * images
        return WorstCase(np.nan, np.nan, np.nan, np.nan, none, none)
    predicted_only = ~present & (candidates[..., PREDICTED] > 0).any((0, 1))
    counted = present if miou_classes == "labelled" else present | predicted_only
    greedy = candidates[:, :, counted]
    candidates = candidates[:, :, present]
    correct = candidates[..., CORRECT]
    labels = candidates[0, :, :, LABELS].sum(0)
    fewest = correct.sum(2).argmin(0)
    lowest_macc = (correct / labels).mean(2).min(0).sum()
    miou, chosen = _greedy_miou(greedy, fewest)
    return WorstCase(
        miou=100 * miou,
        # A class that no label has can only add a 0 to the mean.
        miou_bound=100 * float(_lowest_iou(candidates).sum() / counted.sum()),
        macc=float(100 * lowest_macc),
        aacc=float(100 * correct.sum(2).min(0).sum() / labels.sum()),
        chosen_miou=tuple(chosen.tolist()),
        chosen_aacc=tuple(fewest.tolist()),
    )


def _union(counts: Counts) -> Counts:
    return counts[..., LABELS] + counts[..., PREDICTED] - counts[..., CORRECT]


def _mean_iou(hits: Counts, unions: Counts) -> Floats:
    """mIoU of ``[..., C]`` hits and unions, over the classes that occur."""
    total: Floats = (hits / np.maximum(unions, 1)).sum(-1)
    return total / (unions > 0).sum(-1)


def _greedy_miou(candidates: Counts, fewest: npt.NDArray[np.intp]) -> tuple[float, npt.NDArray[np.intp]]:
    """The lowest mIoU that changing one image's attack at a time leads to, and the choice of attacks.

    It starts from each attack alone and from the choice of the fewest correct pixels, and goes over the images until no
    change lowers the mIoU; so the result is no higher than any single attack's.
    """
    attacks, images = candidates.shape[:2]
    hit, union = candidates[..., CORRECT], _union(candidates)
    every = np.arange(images)
    best: tuple[float, npt.NDArray[np.intp]] | None = None
    for start in (*(np.full(images, attack) for attack in range(attacks)), fewest):
        chosen = start.astype(np.intp)
        hits, unions = hit[chosen, every].sum(0), union[chosen, every].sum(0)
        lowest, changed = float(_mean_iou(hits, unions)), True
        while changed:
            changed = False
            for image in range(images):
                held = chosen[image]
                new_hits = hits - hit[held, image] + hit[:, image]
                new_unions = unions - union[held, image] + union[:, image]
                mious = _mean_iou(new_hits, new_unions)
                attack = int(mious.argmin())
                if mious[attack] < lowest:
                    chosen[image], lowest, changed = attack, float(mious[attack]), True
                    hits, unions = new_hits[attack], new_unions[attack]
        if best is None or lowest < best[0]:
            best = lowest, chosen
    assert best is not None
    return best


def _lowest_iou(candidates: Counts) -> Floats:
    """Of each class on its own the lowest IoU that any choice of attacks reaches, ``[C]``, exactly.

    Dinkelbach: at a ratio r that is reached, the choice that minimises sum(hit - r * union) separates into images; if
    its own ratio is not lower than r, none is.
    """
    hit, union = candidates[..., CORRECT], _union(candidates)
    ratio: Floats = (hit.sum(1) / union.sum(1)).min(0)
    while True:
        chosen = (hit - ratio * union).argmin(0)[None]
        hits = np.take_along_axis(hit, chosen, 0)[0].sum(0)
        unions = np.take_along_axis(union, chosen, 0)[0].sum(0)
        lower = np.minimum(hits / unions, ratio)
        if (lower == ratio).all():
            return ratio
        ratio = lower
