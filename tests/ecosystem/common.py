"""A small batch, and what every row of the models' table shows: that an attack works and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eroseg_ext

VOID = 255


def batch(size: tuple[int, int] = (64, 64), classes: int = 5, count: int = 2) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], and labels with a band of void pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, *size, generator=generator)
    labels = torch.randint(classes, (count, *size), generator=generator)
    labels[:, :4] = VOID
    return images, labels


def settled(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """The random network with the batch's statistics in its BatchNorm, without which its signal fades to nothing."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model.train()(batch()[0] if images is None else images)
    return model


def check_attacks(model: Any, images: Tensor | None = None, labels: Tensor | None = None, **settings: Any) -> None:
    """Two methods raise the loss within the ball, eroseg that of correct pixels, and the model is as it was."""
    if images is None or labels is None:
        images, labels = batch()
    before = {}
    if isinstance(model, nn.Module):
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in ("pgd", "eroseg"):
        losses: list[float] = []
        counted: list[Tensor] = []

        def callback(
            step: eroseg_ext.StepInfo,
            method: str = method,
            labels: Tensor = labels,
            losses: list[float] = losses,
            counted: list[Tensor] = counted,
        ) -> None:
            z = step.logits.double()
            z = torch.cat([0 * z, z], 1) if z.shape[1] == 1 else z
            if not counted:
                counted.append(labels.long().where((z.argmax(1) == labels) | (method == "pgd"), VOID))
            losses.append(float(F.cross_entropy(z, counted[0], ignore_index=VOID)))

        given = {"method": method, "eps": 0.03, "steps": 4, "random_start": False, "ignore_index": VOID} | settings
        adversarial = eroseg_ext.attack(model, images, labels, callback=callback, **given)
        assert losses[-1] > losses[0], (method, losses)
        assert float((adversarial - images).abs().amax((1, 2, 3)).min()) > 0
        assert float((adversarial - images).abs().max()) <= given["eps"] + 1e-6
    if isinstance(model, nn.Module):
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
