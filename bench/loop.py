"""The attack's loop with its habits switchable, and marks between its parts.

``eroseg_ext.attack`` has every good habit built in. To tell what each is worth, this loop has the same steps, spelt
out, and can drop them one at a time.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import Clock
from eroseg_ext import AttackSettings
from eroseg_ext.attacks import gradients
from eroseg_ext.models.adapter import Logits, frozen

PARTS = ("forward", "ours: gradient of the logits", "backward", "ours: step")


@dataclass(frozen=True)
class Habits:
    """What the loop does well by default."""

    input_gradient_only: bool = True
    """parameters frozen and ``autograd.grad``; else ``.backward()``, which computes every weight gradient as well"""
    kept_buffer: bool = True
    """one gradient buffer for all steps; else a fresh one in each"""


BEST = Habits()


class _FreshBuffer(gradients.GradientBuffer):
    def like(self, logits: Tensor) -> Tensor:
        return torch.empty_like(logits)


@dataclass
class Split:
    """Seconds of the parts of every step."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def add(self, laps: list[float]) -> None:
        """Laps of a run of :func:`run`: a mark before each part, and one at the end of each step."""
        for index, lap in enumerate(laps):
            position = index % (len(PARTS) + 1)
            if position < len(PARTS):  # the last is the way from one step to the next
                self.parts[PARTS[position]].append(lap)

    def steps(self) -> list[float]:
        """Seconds of every step."""
        return [sum(step) for step in zip(*self.parts.values(), strict=True)]

    def ours(self) -> list[float]:
        """Seconds of every step besides the model."""
        mine = [times for part, times in self.parts.items() if part.startswith("ours")]
        return [sum(step) for step in zip(*mine, strict=True)]


def run(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: AttackSettings,
    ops: Any,
    habits: Habits = BEST,
    clock: Clock | None = None,
) -> Tensor:
    """The adversarial images of ``attack(model, images, labels, random_start=False, ...)``.

    Args:
        model: in eval mode.
        images: ``[B, 3, H, W]`` float32.
        labels: ``[B, H, W]`` int64.
        config: method, eps, steps and autocast are used.
        ops: the operations, a module or a namespace.
        habits: which to keep.
        clock: is marked before each part and at the end of each step.
    """

    def mark() -> None:
        if clock is not None:
            clock.mark()

    forward = Logits(model, autocast=config.autocast)
    buffer = gradients.GradientBuffer() if habits.kept_buffer else _FreshBuffer()
    method = gradients.create(config, ops, labels, buffer)
    size = (images.shape[-2], images.shape[-1])
    x_adv = images.clone()
    with frozen(model, "eval") if habits.input_gradient_only else nullcontext():
        for step in range(config.steps):
            mark()
            leaf = x_adv.detach().requires_grad_()
            logits = forward(leaf, size)
            mark()
            grad_logits, _ = method.gradient(logits.detach(), step)
            mark()
            if habits.input_gradient_only:
                (grad,) = torch.autograd.grad(logits, leaf, grad_logits)
            else:
                model.zero_grad(set_to_none=True)
                logits.backward(grad_logits)
                assert leaf.grad is not None
                grad = leaf.grad
            mark()
            ops.linf_step_(x_adv, images, grad, config.eps, config.alpha)
            mark()
            del logits
    if not habits.input_gradient_only:
        model.zero_grad(set_to_none=True)
    return x_adv


def model_only(model: nn.Module, images: Tensor, grad_logits: Tensor, config: AttackSettings) -> None:
    """What the model costs by itself: its forward and its backward pass to the images, from a gradient that exists."""
    forward = Logits(model, autocast=config.autocast)
    with frozen(model, "eval"):
        for _ in range(config.steps):
            leaf = images.detach().requires_grad_()
            logits = forward(leaf, (images.shape[-2], images.shape[-1]))
            torch.autograd.grad(logits, leaf, grad_logits.to(logits.dtype))
            del logits


def split(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: AttackSettings,
    ops: Any,
    habits: Habits,
    rounds: int,
) -> Split:
    """Times the parts over ``rounds`` runs after a short one that is not timed; each run's first step is left out."""
    run(model, images, labels, replace(config, steps=2), ops, habits)
    result = Split()
    for _ in range(rounds):
        clock = Clock(images.device)
        run(model, images, labels, config, ops, habits, clock)
        result.add(clock.laps()[len(PARTS) + 1 :])
    return result
