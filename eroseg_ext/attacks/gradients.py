"""What a method makes of the logits in a step: their gradient, from the fused operations or the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops.protocol import Operations
from eroseg_ext.utils.precision import wide, widest

NARROWING = 0.9
"""The front narrows by no more than this factor in a step, beside the square root of the steps left: where pixels come
and go over the boundary it moves little on average, and would let go of pixels that can still be flipped."""


class GradientBuffer:
    """Keeps one logits-sized buffer over the steps: a fresh one costs more in page faults than filling it does."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def adopt(self, buffer: Tensor) -> None:
        """Takes another buffer, for logits that are like it."""
        self._buffer = buffer

    def like(self, logits: Tensor) -> Tensor:
        """A buffer of the logits' shape, dtype, device and layout; its content is undefined."""
        kept = self._buffer
        if kept is None or kept.shape != logits.shape or kept.dtype != logits.dtype or kept.stride() != logits.stride():
            kept = self._buffer = torch.empty_like(logits)
        return kept


class SideStream:
    """Runs work beside the current CUDA stream, so that the model's backward need not wait for it; on the CPU at once.

    Memory is safe without further ado if what the work reads is kept until ``join``, and what it returned is used
    before the next ``run``: each of the two makes one stream wait for the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """The work's result, to be used after ``join``."""
        if self._stream is None:
            return work()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return work()

    def join(self) -> None:
        """Makes the current stream wait for all work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class MethodGradient:
    """A method on one batch of labels: cross-entropy with a weight per pixel.

    Args:
        settings: of the attack.
        ops: the backend's operations.
        labels: ``[B, H, W]``.
        buffer: where gradients are written.
        ignore_index: of these labels, if not the settings'.
    """

    def __init__(
        self,
        settings: AttackSettings,
        ops: Operations,
        labels: Tensor,
        buffer: GradientBuffer,
        ignore_index: int | None = None,
    ) -> None:
        self._settings = settings
        self._ops = ops
        self._labels = labels
        self._buffer = buffer
        self._ignore_index = settings.ignore_index if ignore_index is None else ignore_index
        self._method = METHODS[settings.method]
        self._class_weight: Tensor | None = None

    @property
    def tau(self) -> Tensor | None:
        """``[B]``, the width of the front in the last step; None without a front."""
        return None

    def gradient(self, logits: LogitMap, step: int) -> tuple[Tensor, Tensor]:
        """G in the logits' shape, and stats ``[B, 4]``."""
        settings, op = self._settings, self._method.op
        return self._ops.pixel_grad(
            logits.values,
            self._labels,
            "cospgd_sigmoid" if op == "cospgd" and settings.variant == "sigmoid" else op,
            step / settings.steps,
            ignore_index=self._ignore_index,
            targeted=settings.targeted,
            q=settings.q,
            class_weight=self._weight_by_class(logits.values, 1.0 if self._method.balanced else 0.0),
            align_corners=logits.align_corners,
            out=self._buffer.like(logits.values),
        )

    def select(self, rows: Tensor) -> None:
        """Continues with these images of the batch only."""
        self._labels = self._labels[rows]
        if self._class_weight is not None:
            self._class_weight = self._class_weight[rows]

    def _weight_by_class(self, logits: Tensor, exponent: float) -> Tensor | None:
        if exponent > 0 and self._class_weight is None:
            classes = max(logits.shape[1], 2)
            balance = self._ops.class_balance(self._labels, classes, ignore_index=self._ignore_index)
            self._class_weight = balance**exponent
        return self._class_weight


class LastStep(NamedTuple):
    """What EroSeg carries from one step to the next."""

    log_odds: Tensor
    stats: Tensor
    tau: Tensor
    next_tau: Tensor
    """the width for the step to come; ``tau`` itself where that step finds its own"""


class ErosionFront(MethodGradient):
    """EroSeg on one batch of labels."""

    def __init__(self, *batch: Any) -> None:
        super().__init__(*batch)
        self._last: LastStep | None = None
        self._side = SideStream(self._labels.device)

    @property
    def tau(self) -> Tensor | None:
        return None if self._last is None else self._last.tau

    def gradient(self, logits: LogitMap, step: int) -> tuple[Tensor, Tensor]:
        settings, last = self._settings, self._last
        class_weight = self._weight_by_class(logits.values, settings.balance)
        self._side.join()
        if last is None or settings.threshold == "exact":
            tau = self._tau_from_own_scores(logits, step)
        else:
            tau = last.next_tau
        grad, log_odds, stats = self._ops.erosion_grad(
            logits.values,
            self._labels,
            tau,
            None if last is None else last.log_odds,
            ignore_index=self._ignore_index,
            confidence=settings.confidence,
            front=settings.front,
            direction=settings.direction,
            radius=settings.radius,
            slope=settings.slope,
            within=settings.within,
            targeted=settings.targeted,
            class_weight=class_weight,
            align_corners=logits.align_corners,
            out=self._buffer.like(logits.values),
        )
        self._last = LastStep(log_odds, stats, tau, self._ahead(log_odds, stats, tau, step + 1))
        return grad, stats

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self._last is not None:
            self._last = LastStep(*(kept[rows] for kept in self._last))

    def _ahead(self, log_odds: Tensor, stats: Tensor, tau: Tensor, step: int) -> Tensor:
        """The width for ``step``, selected behind the backward pass of the step before."""
        settings = self._settings
        movement_unknown = settings.schedule == "movement" and step == 1
        if settings.threshold == "exact" or movement_unknown or step == settings.steps:
            return tau
        if settings.targeted and settings.confidence == "label":
            return self._side.run(lambda: self._next_tau(*_not_reached(log_odds, stats), step, tau))
        return self._side.run(lambda: self._next_tau(log_odds, stats, step, tau))

    def _tau_from_own_scores(self, logits: LogitMap, step: int) -> Tensor:
        """At the price of reading the logits twice: the confidence first, then the gradient."""
        scores = self._ops.confidence(
            logits.values,
            self._labels,
            ignore_index=self._ignore_index,
            confidence=self._settings.confidence,
            align_corners=logits.align_corners,
        )
        if self._last is not None:
            return self._next_tau(scores, self._last.stats, step, self._last.tau)
        stats = torch.zeros(len(scores), 4, dtype=widest(scores.device), device=scores.device)
        stats[:, 0] = (scores < float("inf")).sum((1, 2))
        return self._next_tau(scores, stats, step)

    def _next_tau(self, log_odds: Tensor, stats: Tensor, step: int, last: Tensor | None = None) -> Tensor:
        """The width for ``step``, from the width ``last`` of the step before and what that step measured."""
        settings, left = self._settings, self._settings.steps - step
        if settings.schedule != "movement":
            low = high = settings.rho(step)
        elif step <= 1:
            low = high = settings.rho_first
        else:
            low, high = settings.front_min, settings.front_max
            if settings.targeted:
                low = min(low * math.sqrt(left), high)
        tau = self._ops.next_tau(log_odds, stats, left, reach=settings.reach, front_min=low, front_max=high)
        if last is not None and settings.schedule == "movement" and step > 2:
            tau = torch.maximum(tau, NARROWING * math.sqrt(left / (left + 1)) * last)
        return tau


def _not_reached(log_odds: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Of a targeted attack: scores and stats with the pixels alone that are not of the wanted class yet.

    Pixels that have reached it stay near the boundary, since the front has let go of them there. The more of them there
    are, the lower every k-th value of all pixels, until the front is too narrow to move any other pixel. Of an image
    whose pixels have all reached it, they are all kept.
    """
    left = log_odds < 0
    count = left.sum((1, 2))
    any_left = count > 0
    scores = log_odds.where(left | ~any_left.view(-1, 1, 1), math.inf)
    valid = torch.where(any_left, wide(count), stats[:, 0])
    return scores, torch.cat([valid.unsqueeze(1), stats[:, 1:]], 1)


def reference_option(settings: AttackSettings) -> str | None:
    """The option of the method that only the reference computes, such as ``radius=2``; None if there is none."""
    if settings.method == "eroseg" and settings.radius > 1:
        return f"radius={settings.radius}"
    if settings.method == "eroseg" and settings.within == "class":
        return "within='class'"
    return "variant='sigmoid'" if settings.method == "cospgd" and settings.variant == "sigmoid" else None


def create(
    settings: AttackSettings,
    ops: Operations,
    labels: Tensor,
    buffer: GradientBuffer,
    ignore_index: int | None = None,
) -> MethodGradient:
    """The method that the settings name, see :class:`MethodGradient`."""
    kind = ErosionFront if METHODS[settings.method].op == "erosion_grad" else MethodGradient
    return kind(settings, ops, labels, buffer, ignore_index)
