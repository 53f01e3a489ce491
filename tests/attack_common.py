"""What the tests of the attack share: short calls, and models whose behaviour is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from conftest import VOID
from torch import Tensor, nn

from eroseg_ext import AttackInfo, AttackSettings, attack
from eroseg_ext.attacks.gradients import reference_option

Batch = tuple[Tensor, Tensor]
MakeNet = Callable[..., nn.Sequential]
EPS = {"linf": 8 / 255, "l2": 0.5}


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the CPU, so that every device starts from the same noise."""
    return torch.Generator().manual_seed(seed)


def run(model: Any, batch: Batch, **settings: Any) -> Tensor:
    """A short attack with a seed of its own."""
    return attack(model, *batch, **{"steps": 3, "generator": seeded(), **settings})


def run_info(model: Any, batch: Batch, **settings: Any) -> tuple[Tensor, AttackInfo]:
    return attack(model, *batch, return_info=True, **{"steps": 3, "generator": seeded(), **settings})


def backend_for(settings: dict[str, Any], backend: str) -> str:
    """``backend``, or ``auto`` where only the reference takes the settings."""
    return "auto" if reference_option(AttackSettings.create(**settings)) else backend


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0."""
    integer = torch.int32 if left.dtype == torch.float32 else torch.int16
    return left.dtype == right.dtype and torch.equal(left.view(integer), right.view(integer))


def correct_pixels(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B]``, by brute force."""
    return ((logits.argmax(1) == labels) & (labels != VOID)).sum((1, 2)).double()


def outside_ball(adversarial: Tensor, images: Tensor, eps: float, norm: str) -> float:
    """By how much the farthest image leaves its ball, in units of the rounding allowed; at most 1 is as it should be.

    A pixel may be off by 1 ulp of the range [0, 1]: x - eps and x + eps are rounded, and so is the result when the
    images are of a half type. For the l_2 norm the pixels' errors add up to sqrt(number of pixels) such units.
    """
    delta = (adversarial.double() - images.double()).flatten(1)
    ulp = torch.finfo(images.dtype).eps
    if norm == "linf":
        return float((delta.abs().max() - eps) / ulp)
    return float((delta.norm(dim=1).max() - eps) / (ulp * math.sqrt(delta.shape[1])))


def name_of(value: Any) -> str | None:
    """A test's name from the settings it is about."""
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


class Counted(nn.Module):
    """Counts the calls of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.model(images)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Spied(nn.Module):
    """Keeps the gradient that each step takes with respect to the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gradients: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            images.register_hook(self.gradients.append)
        return self.model(images)
