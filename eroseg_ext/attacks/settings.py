"""The settings of an attack: one frozen dataclass, checked in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.models.normalisation import take_statistics
from eroseg_ext.models.outputs import OUTPUTS
from eroseg_ext.models.windows import check_window
from eroseg_ext.utils.validate import (
    check_choice,
    check_integer,
    check_number,
    check_pair,
    check_sequence,
    near_misses,
    require,
)

PRESETS: dict[str, dict[str, Any]] = {
    "progressive": {
        "method": "eroseg",
        "confidence": "top",
        "front": "hard",
        "direction": "ce",
        "radius": 1,
        "schedule": "linear",
        "balance": 0.0,
    },
}
OTHER_NAMES = {
    "alpha": "step_size",
    "eps_iter": "step_size",
    "eps_step": "step_size",
    "iterations": "steps",
    "nb_iter": "steps",
    "max_iter": "steps",
}
"""What other libraries call a setting, where its name here is not similar."""
CALL_ARGUMENTS = ("mask", "generator", "callback", "return_info")
RHO_RANGES = {"geometric": (0.4, 0.05), "linear": (0.1, 1.0)}
"""First and last fraction of sensitive pixels of the schedules that fix it in advance."""


def check_below_range(name: str, value: float | None, extent: float, what: str) -> None:
    """Raises ValueError for a length that is no smaller than the pixel values' whole extent: it bounds nothing."""
    if value is not None:
        wanted = f"a number below {extent:.6g}, {what}: lengths are in pixel values, such as 8/255 for images in [0, 1]"
        require(value < extent, name, value, wanted)


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """The settings of an attack, checked when they are made: ValueError or TypeError with one sentence.

    Attributes:
        method: ``eroseg``, ``pgd``, ``segpgd``, ``cospgd``, ``mce``, ``mce_bal``, ``js`` or ``tsallis``.
        eps: radius of the ball in pixel values, >= 0 and less than the range of ``clip``; with ``norm="l2"`` the l_2
            norm over an image.
        step_size: default eps / 4; also less than the range of ``clip``.
        steps: gradients of a restart.
        norm: ``linf`` or ``l2``.
        targeted: labels are the wanted classes.
        ignore_index: label of void pixels, any integer; they enter neither the loss nor a count.
        random_start: uniform in the ball.
        restarts: independent runs; each image keeps its best one.
        keep: ``last`` iterate, or the ``best``: fewest correct pixels (most, if targeted), per image.
        early_stop: an image with no correct pixel left (all, if targeted) takes no further step; on the CPU it leaves
            the batch.
        clip: range of pixel values.
        quantize: return 8-bit images, 255ths of the range of ``clip``, rounded towards the clean ones, which must be of
            that kind and float32; what the model is shown and what is counted is so too.
        mean: with std: the model is given (image - mean) / std, per channel; eps and clip stay in pixel values. Alone:
            an object that has both, such as an image processor of transformers or a transform of torchvision.
        std: with mean.
        images_are_normalized: with mean and std: the images come, and are returned, as (image - mean) / std, in float32
            or float64; eps, clip and what a callback sees stay in pixel values.
        autocast: run the model under torch.autocast with this dtype (float16 or bfloat16).
        output: what the model returns: ``logits``, or ``probabilities`` (of a softmax) or scores of a ``sigmoid``, of
            which the logits are then computed; where they are exactly 0 or 1 no gradient is left, so a model without
            that layer is better.
        output_key: which entry of the model's output are the logits, where it returns several: a number or a name.
        logits: instead of ``output_key``: a callable from the model's output to the logits.
        align_corners: of the bilinear upsampling of logits that are smaller than the labels.
        see_through: where the model's last operation upsamples its logits to the images' size, do without it, and take
            the logits before; see ``docs/models.md``.
        window: give the model no more of an image at once than so many pixels, or (height, width), and average its
            logits where windows overlap, as mmsegmentation does in mode "slide"; a backward pass computes each window
            anew, so that one window's activations are in memory at a time.
        stride: with window: distance of two windows, likewise; default 3/4 of the window.
        own_label_size: labels may have another size than images, to which the logits are then interpolated.
        micro_batch: attack so many images at a time; results are those of the whole batch for models that treat images
            alone.
        backend: ``fused``, ``reference`` or ``auto``: fused where it is built for the images' device.
        model_mode: mode of the model during the attack: ``eval``, ``train`` or ``keep``.
        graph: CUDA: run the model from CUDA graphs; the model must allow it. Captured in each call of ``attack``, and
            kept by the object forms such as :class:`eroseg_ext.EroSeg`.
        progress: show a tqdm bar.
        confidence: eroseg: |log-odds| of the ``label``, 0 where it is predicted with less than 1/2; or of the ``top``
            class.
        front: eroseg: weight ``soft`` sech^2(q / 2 tau) or ``hard`` 1[q <= tau].
        direction: eroseg: descend the ``log_odds`` of the label, or ascend the cross-entropy ``ce``.
        radius: eroseg: of the erosion, 0 to 8 pixels of the logits.
        slope: eroseg: rise of the erosion's cone per pixel, in units of tau, >= 0.
        within: eroseg: the erosion crosses ``any`` pixels or only those within one predicted ``class``.
        threshold: eroseg: tau from the step before (``lagged``), or from the step's own scores (``exact``, reads logits
            twice).
        schedule: eroseg: the front's width follows the ``movement``, or is kth(rho) with rho ``geometric`` or
            ``linear`` in t.
        reach: eroseg, movement: how many times the expected movement the front is wide, > 0.
        front_first: eroseg, movement: fraction of sensitive pixels in the first two steps; in attacks of more than 10
            steps, which reach further, times the square root of steps / 10, but not above ``front_max``.
        front_min: eroseg, movement: lower bound of the front, as a fraction of the valid pixels; targeted, times the
            square root of the steps left, of the pixels that are not of the wanted class yet.
        front_max: eroseg, movement: upper bound.
        balance: eroseg: exponent from 0 (off) to 1 of a pixel's weight by how rare its class is in the image.
        rho_range: eroseg, geometric or linear: first and last rho; default (0.4, 0.05) and (0.1, 1.0).
        variant: cospgd: probabilities by ``softmax`` or ``sigmoid``.
        q: tsallis: the entropic index, >= 1.
    """

    method: str = "eroseg"
    eps: float = 8 / 255
    step_size: float | None = None
    steps: int = 10
    norm: str = "linf"
    targeted: bool = False
    ignore_index: int = 255
    random_start: bool = True
    restarts: int = 1
    keep: str = "last"
    early_stop: bool = False
    clip: tuple[float, float] = (0.0, 1.0)
    quantize: bool = False
    mean: Sequence[float] | Any | None = None
    std: Sequence[float] | None = None
    images_are_normalized: bool = False
    autocast: torch.dtype | None = None
    output: str = "logits"
    output_key: int | str | None = None
    logits: Callable[[Any], Tensor] | None = None
    align_corners: bool = False
    see_through: bool = True
    window: int | tuple[int, int] | None = None
    stride: int | tuple[int, int] | None = None
    own_label_size: bool = False
    micro_batch: int | None = None
    backend: str = "auto"
    model_mode: str = "eval"
    graph: bool = False
    progress: bool = False
    confidence: str = "label"
    front: str = "soft"
    direction: str = "log_odds"
    radius: int = 1
    slope: float = 2.0
    within: str = "any"
    threshold: str = "lagged"
    schedule: str = "movement"
    reach: float = 1.0
    front_first: float = 0.2
    front_min: float = 0.03
    front_max: float = 0.4
    balance: float = 0.15
    rho_range: tuple[float, float] | None = None
    variant: str = "softmax"
    q: float = 2.0

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(METHODS))
        check_choice("norm", self.norm, ("linf", "l2"))
        check_choice("keep", self.keep, ("last", "best"))
        check_choice("backend", self.backend, ("auto", "fused", "reference"))
        check_choice("output", self.output, OUTPUTS)
        check_choice("model_mode", self.model_mode, ("eval", "train", "keep"))
        check_choice("confidence", self.confidence, ("label", "top"))
        check_choice("front", self.front, ("soft", "hard"))
        check_choice("direction", self.direction, ("log_odds", "ce"))
        check_choice("within", self.within, ("any", "class"))
        check_choice("threshold", self.threshold, ("lagged", "exact"))
        check_choice("schedule", self.schedule, ("movement", "geometric", "linear"))
        check_choice("variant", self.variant, ("softmax", "sigmoid"))
        for name in ("targeted", "random_start", "early_stop", "graph", "progress", "align_corners", "see_through"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("own_label_size", "quantize", "images_are_normalized"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        check_number("eps", self.eps, 0, math.inf)
        if self.step_size is not None:
            check_number("step_size", self.step_size, 0, math.inf)
        check_integer("steps", self.steps, 1)
        check_integer("restarts", self.restarts, 1)
        check_integer("ignore_index", self.ignore_index, -(2**63), 2**63 - 1)
        check_integer("radius", self.radius, 0, 8)
        if self.micro_batch is not None:
            check_integer("micro_batch", self.micro_batch, 1)
        check_window(self.window, self.stride)
        require(self.window is None or not self.graph, "graph", True, "False beside window")
        check_number("slope", self.slope, 0, math.inf)
        check_number("reach", self.reach, 0, math.inf)
        check_number("q", self.q, 1, math.inf)
        for name in ("front_first", "front_min", "front_max", "balance"):
            check_number(name, getattr(self, name), 0, 1)
        require(self.front_min <= self.front_max, "front_min", self.front_min, f"at most front_max = {self.front_max}")
        check_pair("clip", self.clip)
        require(self.clip[0] < self.clip[1], "clip", self.clip, "a pair (low, high) with low < high")
        take_statistics(self, self.clip)
        if self.norm == "linf":
            for name, value in (("eps", self.eps), ("step_size", self.step_size)):
                check_below_range(name, value, self.range, f"the range of clip={tuple(self.clip)}")
            wanted = f"0, or at least a 255th of the range of clip={tuple(self.clip)}, since quantize is True"
            large = not self.quantize or self.eps == 0 or self.eps >= 0.999 * self.range / 255
            require(large, "eps", self.eps, wanted)
        if self.rho_range is not None:
            check_pair("rho_range", self.rho_range)
            require(all(0 < rho <= 1 for rho in self.rho_range), "rho_range", self.rho_range, "two fractions in (0, 1]")
        require(
            (self.mean is None) == (self.std is None), "std" if self.std is None else "mean", None, "both mean and std"
        )
        told = self.mean is not None or not self.images_are_normalized
        require(told, "images_are_normalized", True, "it with mean and std")
        if self.mean is not None and self.std is not None:
            check_sequence("mean", self.mean)
            check_sequence("std", self.std)
            require(len(self.mean) == len(self.std), "std", self.std, f"{len(self.mean)} numbers, as mean has")
            require(all(value > 0 for value in self.std), "std", self.std, "numbers > 0")
            low, high = self.clip
            within = f"numbers within clip={tuple(self.clip)}, in whose units mean and std are"
            require(all(low <= value <= high for value in self.mean), "mean", self.mean, within)
            # Of 0 to 255, or of 0 to 1, while clip is the other: the widest input that is common is 0 to 255.
            wanted = f"numbers from {self.range / 256:.3g} to {self.range:g}, in the units of clip={tuple(self.clip)}"
            require(all(self.range / 256 <= v <= self.range for v in self.std), "std", self.std, wanted)
        key_is_one = self.output_key is None or type(self.output_key) in (int, str)
        require(key_is_one, "output_key", self.output_key, "a number or a name")
        require(
            self.logits is None or callable(self.logits), "logits", self.logits, "a callable from the model's output"
        )
        require(self.logits is None or self.output_key is None, "output_key", self.output_key, "None beside logits=")
        require(
            self.autocast in (None, torch.float16, torch.bfloat16),
            "autocast",
            self.autocast,
            "None, torch.float16 or torch.bfloat16",
        )

    @classmethod
    def create(cls, preset: str | None = None, **keywords: Any) -> AttackSettings:
        """Settings from keywords; ``preset`` changes defaults only, a keyword given beside it wins.

        Raises TypeError for a keyword that does not exist, naming the nearest ones.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name in CALL_ARGUMENTS:
                raise TypeError(f"{name} is an argument of each call, not a setting that is bound")
            if name not in names:
                choices = [*names, *CALL_ARGUMENTS, "preset"]
                near = f" (did you mean {OTHER_NAMES[name]}?)" if name in OTHER_NAMES else near_misses(name, choices)
                raise TypeError(f"{name} is not a setting of attack(){near}")
        if preset is not None:
            check_choice("preset", preset, tuple(PRESETS))
            keywords = PRESETS[preset] | keywords
        return cls(**keywords)

    @property
    def alpha(self) -> float:
        """The step size in force."""
        return self.eps / 4 if self.step_size is None else self.step_size

    @property
    def range(self) -> float:
        """How far the pixel values of ``clip`` reach."""
        return self.clip[1] - self.clip[0]

    @property
    def rho_first(self) -> float:
        """The fraction of sensitive pixels in the first two steps, under the schedule ``movement``."""
        return max(self.front_first, min(self.front_first * math.sqrt(self.steps / 10), self.front_max))

    def rho(self, step: int) -> float:
        """The fraction of sensitive pixels of ``step``, under the schedules ``geometric`` and ``linear``."""
        first, last = self.rho_range or RHO_RANGES[self.schedule]
        done = step / max(self.steps - 1, 1)
        if self.schedule == "geometric":
            return first * (last / first) ** done
        return first + (last - first) * done
