"""Weights and losses of the PyPI package ``cospgd``, by its authors, against ours: the gradients must agree."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eroseg_ext.ops import reference

cospgd = pytest.importorskip("cospgd", reason="the PyPI package cospgd is not installed")


def case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 9, 11, generator=generator) * 3
    return logits.requires_grad_(), torch.randint(0, 7, (2, 9, 11), generator=generator)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("step", [0, 3, 9])
def test_segpgd(step: int, targeted: bool) -> None:
    logits, labels = case()
    loss = F.cross_entropy(logits, labels, reduction="none")
    loss = cospgd.functions.segpgd_scale(logits, labels, loss, step, 10, targeted=targeted)
    (theirs,) = torch.autograd.grad(loss, logits)
    ours, _ = reference.pixel_grad(logits.detach(), labels, "segpgd", step / 10, targeted=targeted)
    # Their loss is a mean over the pixels of an image, and their step descends it where targeted.
    pixels = labels[0].numel()
    torch.testing.assert_close(ours / pixels * (-1 if targeted else 1), theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("targeted", [False, True])
def test_cospgd(targeted: bool) -> None:
    logits, labels = case()
    loss = F.cross_entropy(logits, labels, reduction="none")
    loss = cospgd.functions.cospgd_scale(logits, labels, loss, num_classes=7, targeted=targeted).sum()
    (theirs,) = torch.autograd.grad(loss, logits)
    ours, _ = reference.pixel_grad(logits.detach(), labels, "cospgd", targeted=targeted)
    torch.testing.assert_close(ours * (-1 if targeted else 1), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_linf_step(targeted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.rand(2, 3, 5, 5, generator=generator), torch.randn(2, 3, 5, 5, generator=generator)
    start = (x + 0.02 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    theirs = cospgd.functions.step_inf(start.clone(), 0.03, grad, x, 0.01, targeted)
    ours = reference.linf_step_(start.clone(), x, -grad if targeted else grad, 0.03, 0.01)
    torch.testing.assert_close(ours, theirs)
