"""The settings of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eroseg_ext.attacks.apgd import NOT_OF_APGD, checked
from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.data.sources import Reading, SegmentationData, Source
from eroseg_ext.evaluation.metrics import MIOU_CLASSES
from eroseg_ext.models.adapter import SETTINGS as OF_THE_MODEL
from eroseg_ext.models.normalisation import take_statistics
from eroseg_ext.utils.validate import check_choice, check_integer, check_number, require

DEFAULT_ATTACKS = ("eroseg", "js:shrinking", "cospgd")
"""Of all methods and radii the three whose worst case was lowest on three trained networks, see ``bench/NOTES.md``."""
CLEAN = "clean"
OF_THE_DATA_AND_MODEL = ("norm", "ignore_index", "clip", "own_label_size", "backend", *OF_THE_MODEL)
"""Settings that all rows and the sanity checks share."""
OF_THE_LABELS = ("dataset", "reduce_zero_label", "palette")
"""Settings that say, beside ``ignore_index``, which class a label map's value is."""
OF_THE_ATTACKS = ("steps", "restarts")
"""Settings that a row may have otherwise."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Reading):
    """What :func:`evaluate` takes as keywords. Lengths in the image are in pixel values of ``clip``'s range.

    Raises ValueError or TypeError with one sentence if a value is not allowed.
    """

    attacks: Sequence[str] | Mapping[str, Mapping[str, Any]] = DEFAULT_ATTACKS
    """methods, such as ``"js"``, with ``"js:shrinking"`` for the shrinking radii; or by name of the row what it passes
    to :func:`eroseg_ext.strong_attack`"""
    eps: float | Sequence[float] = 8 / 255
    """radius of the ball, or several; each has a worst case of its own"""
    steps: int = 100
    """gradients per attack and restart"""
    restarts: int = 1
    """independent runs of each attack; each image keeps its best one"""
    norm: str = "linf"
    """of the ball: ``linf`` or ``l2``"""
    seed: int = 0
    """of the random starts; an image's noise depends on the seed, the image's number and the restart alone"""
    batch_size: int = 8
    """images attacked at once; those of one batch that differ in size are attacked one after the other"""
    adversarial: Path | None = None
    """folder of :func:`eroseg_ext.save_adversarial` or ``eroseg attack``, whose images are evaluated instead of
    attacking: ``attacks``, ``eps``, ``norm`` and ``sanity`` are then not used"""
    images: int | None = None
    """evaluate on so many evenly spaced images; default: all"""
    clip: tuple[float, float] = (0.0, 1.0)
    """range of pixel values"""
    mean: Sequence[float] | Any | None = None
    """with std: the model is given (image - mean) / std, per channel, while eps and clip stay in pixel values; or in
    Python alone, an object that has both, such as an image processor of transformers or a transform of torchvision"""
    std: Sequence[float] | None = None
    """with mean"""
    autocast: torch.dtype | None = None
    """run the model under torch.autocast with this dtype, also to count its correct pixels"""
    output: str = "logits"
    """what the model returns: ``logits``, ``probabilities`` (of a softmax) or scores of a ``sigmoid``"""
    output_key: int | str | None = None
    """which entry of the model's output are the logits, where it returns several: a number or a name"""
    logits: Callable[[Any], Tensor] | None = None
    """instead of ``output_key``: a callable from the model's output to the logits"""
    align_corners: bool = False
    """of the bilinear upsampling of logits that are smaller than the labels"""
    see_through: bool = True
    """do without a model's last upsampling of its logits, and take those before it"""
    window: int | tuple[int, int] | None = None
    """give the model no more of an image at once than so many pixels, or (height, width), and average its logits where
    windows overlap, as mmsegmentation does in mode "slide"; one window's activations are in memory at a time"""
    stride: int | tuple[int, int] | None = None
    """with window: distance of two windows, likewise; default 3/4 of the window"""
    own_label_size: bool = False
    """labels keep their own size where images are resized, by ``size`` or by the data set itself, and the prediction is
    interpolated to it, as transformers and mmsegmentation evaluate"""
    backend: str = "auto"
    """of the attacks: ``fused``, ``reference`` or ``auto``"""
    miou_classes: str = "labelled"
    """classes that mIoU is the mean of: ``labelled``, those that some label has; or ``labelled_or_predicted``, where a
    class that is predicted and that no label has counts as 0, as in mmsegmentation and torchmetrics"""
    model_description: Mapping[str, Any] = field(default_factory=dict)
    """what else tells the model from others, such as its name and arguments, as JSON can hold it: kept results are of a
    model with the same description"""
    sanity: int = 4
    """run the sanity checks on so many images; 0 leaves them out"""
    progress: bool = False
    """show a bar on stderr, or lines where that is no terminal"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.attacks, str):
            raise TypeError(f"attacks is the string {self.attacks!r}, wanted a list of methods such as ['eroseg']")
        rows = self.rows
        require(len(rows) > 0, "attacks", self.attacks, "at least one method")
        require(CLEAN not in rows, "attacks", self.attacks, f"names of rows other than {CLEAN!r}")
        try:
            json.dumps(self.model_description, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model_description is not what JSON can hold: {error}") from error
        budgets = self.budgets
        require(len(budgets) > 0 and len(set(budgets)) == len(budgets), "eps", self.eps, "one or several numbers")
        # Twice the radius and its square have to be float32.
        for eps in budgets:
            check_number("eps", eps, 0, 1e18)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seed", self.seed, 0, 2**63 - 1)
        check_integer("sanity", self.sanity, 0)
        check_choice("miou_classes", self.miou_classes, MIOU_CLASSES)
        if self.images is not None:
            check_integer("images", self.images, 1)
        for eps in budgets:
            for name, row in rows.items():
                if not isinstance(row, Mapping):
                    raise TypeError(f"attacks[{name!r}] is a {type(row).__name__}, wanted a dict of settings")
                for setting in row:
                    others = ("eps", "model_mode", "progress", "images_are_normalized")
                    if setting in (*NOT_OF_APGD, *OF_THE_DATA_AND_MODEL, *others):
                        raise ValueError(f"attacks[{name!r}] sets {setting}, which is not a row's to set")
                attack, _ = self.attack(name, eps)
                passes = attack.steps * attack.restarts
                require(
                    passes <= 10**6, "steps x restarts", passes, "at most 1000000, as numbers of each step are kept"
                )
        take_statistics(self, self.clip)

    def source(self, data: str | Path | SegmentationData | Source, split: str) -> Source:
        """The data as they are read."""
        found = copy(super().source(data, split))
        found.own_label_size, found.takes_volumes = self.own_label_size, True
        return found

    @property
    def budgets(self) -> tuple[float, ...]:
        """The values of eps, in the order given."""
        return tuple(self.eps) if isinstance(self.eps, Sequence) else (self.eps,)

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Settings of its own by row: name of the attack, and at least its method."""
        if isinstance(self.attacks, Mapping):
            return {name: row for name, row in self.attacks.items()}
        return {entry: _row(entry) for entry in self.attacks}

    def attack(self, row: str, eps: float) -> tuple[AttackSettings, str]:
        """The settings and the radii of :func:`eroseg_ext.strong_attack` for a row at a budget."""
        shared = {name: getattr(self, name) for name in (*OF_THE_DATA_AND_MODEL, *OF_THE_ATTACKS)}
        keywords = {"radii": "fixed", **shared, "eps": eps, **self.rows[row]}
        return checked(**keywords), keywords["radii"]


def share_of(shard: str | tuple[int, int]) -> tuple[int, int]:
    """The number of a share, and how many there are."""
    try:
        number, count = map(int, shard.split("/") if isinstance(shard, str) else shard)
    except (TypeError, ValueError):
        number, count = 0, 0
    require(0 <= number < count, "shard", shard, "i/n with i from 0 to n - 1, such as 0/4")
    return number, count


def _row(entry: str) -> dict[str, str]:
    """What ``method`` or ``method:radii`` passes to the attack."""
    method, colon, radii = entry.partition(":")
    check_choice("attacks", method, tuple(METHODS))
    return {"method": method, "radii": radii} if colon else {"method": method}
