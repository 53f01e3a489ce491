"""Ways to attack: ours, and other people's loops as they ship them or as everyone writes them, behind one signature.

Each is given the same model, images, labels with void pixels, eps, step size and number of steps, and returns
adversarial images; ImportError if its package is not installed. Their own random start stays theirs; the global
generator is seeded before every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eroseg_ext
from eroseg_ext import PGD, EroSeg
from eroseg_ext.models.adapter import Logits


@dataclass(frozen=True)
class Budget:
    """What every attack may spend."""

    eps: float = 2 / 255
    steps: int = 10
    ignore_index: int = 255
    classes: int = 8

    @property
    def alpha(self) -> float:
        return self.eps / 4


Attack = Callable[[nn.Module, Tensor, Tensor, Budget], Tensor]


def ours(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget, *, method: str) -> Tensor:
    """``eroseg_ext.attack`` with its defaults."""
    settings: dict[str, Any] = {"eps": budget.eps, "steps": budget.steps, "ignore_index": budget.ignore_index}
    return eroseg_ext.attack(model, images, labels, method=method, **settings)


def textbook(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """PGD as everyone writes it: the mean cross-entropy, and ``.backward()`` through weights and all."""
    x_adv = (images + torch.empty_like(images).uniform_(-budget.eps, budget.eps)).clamp(0, 1)
    for _ in range(budget.steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), labels, ignore_index=budget.ignore_index)
        model.zero_grad()
        loss.backward()
        assert x_adv.grad is not None
        x_adv = x_adv + budget.alpha * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, images - budget.eps), images + budget.eps).clamp(0, 1)
    return x_adv.detach()


def cospgd_package(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget, *, method: str) -> Tensor:
    """The functions of the PyPI package ``cospgd`` in the order that its README gives them.

    Source: Agnihotri et al., ICML 2024; package cospgd 0.1.3.
    """
    from cospgd import functions

    x_adv = functions.init_linf(images, budget.eps)
    for step in range(budget.steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        loss = F.cross_entropy(logits, labels, ignore_index=budget.ignore_index, reduction="none")
        if method == "cospgd":
            loss = functions.cospgd_scale(logits, labels, loss, num_classes=budget.classes).mean()
        else:
            loss = functions.segpgd_scale(logits, labels, loss, step, budget.steps)
        model.zero_grad()
        loss.backward()
        assert x_adv.grad is not None
        x_adv = functions.step_inf(x_adv, budget.eps, x_adv.grad, images, budget.alpha, False)
    return x_adv.detach()


def torchattacks_pgd(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """``torchattacks.PGD``, whose loss takes segmentation logits once void pixels bear the index that torch ignores."""
    import torchattacks

    attack = torchattacks.PGD(model, eps=budget.eps, alpha=budget.alpha, steps=budget.steps)
    wanted = labels.masked_fill(labels == budget.ignore_index, nn.CrossEntropyLoss().ignore_index)
    result: Tensor = attack(images, wanted)
    return result


PEERS: dict[str, Attack] = {
    **{f"eroseg_ext {method}": partial(ours, method=method) for method in ("eroseg", "cospgd", "segpgd", "pgd")},
    "cospgd package, CosPGD": partial(cospgd_package, method="cospgd"),
    "cospgd package, SegPGD": partial(cospgd_package, method="segpgd"),
    "torchattacks PGD": torchattacks_pgd,
    "textbook PGD loop": textbook,
}

WAYS: dict[str, tuple[type[EroSeg] | type[PGD] | None, dict[str, Any]]] = {
    "EroSeg": (EroSeg, {}),
    "EroSeg, graph=True": (EroSeg, {"graph": True}),
    "EroSeg, backend='reference'": (EroSeg, {"backend": "reference"}),
    "EroSeg, bf16 autocast": (EroSeg, {"autocast": torch.bfloat16}),
    "PGD": (PGD, {}),
    "PGD, graph=True": (PGD, {"graph": True}),
    "textbook PGD loop": (None, {}),
}
"""Attack objects that are called for batch after batch, with their options; None is the textbook's loop."""


class OnlyLogits(nn.Module):
    """The model as the textbook's loop wants it: its output the logits at the images' size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        return Logits(self.model, see_through=False)(images, size).at(size)
