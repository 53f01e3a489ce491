"""What an attack returns, tells on the way, and raises; and the best iterates that it has found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eroseg_ext.utils.precision import widest


@dataclass(frozen=True)
class AttackInfo:
    """What happened, on the images' device; R restarts, T steps, B images.

    ``stats[r, t, b]`` describes the images before step t moved them; rows of steps that an image did not take (see
    ``early_stop``) are 0.
    """

    stats: Tensor
    """``[R, T, B, 4]`` float64: valid pixels, correct pixels, front pixels, summed movement of the front"""
    tau: Tensor | None
    """``[R, T, B]`` float32, width of the front in log-odds; None for methods that have no front"""
    correct: Tensor
    """``[B]`` float64, correct pixels of the returned images"""
    valid: Tensor
    """``[B]`` float64, valid pixels"""
    without_gradient: Tensor
    """``[B]`` bool, images with pixels left to attack whose gradient was 0 everywhere in the first step"""

    @property
    def right(self) -> Tensor:
        """``correct``, by the name that the first users' code has."""
        return self.correct


@dataclass(frozen=True)
class StepInfo:
    """What a callback is given after each step. The tensors are on the images' device: reading one synchronises."""

    restart: int
    step: int
    images: Tensor
    """``[b]`` int64: which images of the batch these are (see ``micro_batch`` and ``early_stop``)"""
    stats: Tensor
    """``[b, 4]`` float64, of the images before this step: valid, correct, front pixels, movement"""
    tau: Tensor | None
    """``[b]`` float32; None for methods that have no front"""
    logits: Tensor
    """``[b, C, H, W]`` of the images before this step, detached; with ``graph``, the next step overwrites them"""
    adversarial: Tensor
    """``[b, K, H, W]`` float32, the images after this step; the next step overwrites them"""


Callback = Callable[[StepInfo], None]


class NotFiniteError(RuntimeError):
    """The model's logits or gradients are NaN or infinite."""


class BestIterates:
    """Of each image the iterate with the fewest correct pixels so far (the most, if targeted); never synchronises."""

    def __init__(self, clean: Tensor, targeted: bool) -> None:
        self.images = clean.clone()
        self._sign = -1 if targeted else 1
        self._score = torch.full((clean.shape[0],), float("inf"), dtype=widest(clean.device), device=clean.device)

    @property
    def correct(self) -> Tensor:
        """``[B]`` float64, correct pixels of ``images``."""
        return self._sign * self._score

    def offer(self, rows: slice | Tensor, images: Tensor, correct: Tensor) -> None:
        """Keeps those of ``images`` (numbers ``rows`` of the batch) that beat what is held; ties keep the earlier."""
        score, held = self._sign * correct, self._score[rows]
        better = score < held
        self._score[rows] = torch.where(better, score, held)
        self.images[rows] = torch.where(better.view(-1, 1, 1, 1), images, self.images[rows])
