"""The loss of training: which pixels count, and that images, pieces and backends do not change what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eroseg_ext.data.palettes import VOID
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops import backend as backends
from eroseg_ext.ops import reference
from eroseg_ext.training import TrainSettings
from eroseg_ext.training.loss import pixel_factor, summed_loss


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 20, 30, generator=generator) * 4
    labels = torch.randint(0, 5, (3, 20, 30), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = VOID
    labels[2] = VOID
    return logits, labels


def full(logits: torch.Tensor) -> LogitMap:
    return LogitMap(logits, False)


def factor_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    scores = reference.confidence(logits, labels, ignore_index=VOID)
    return pixel_factor(scores, labels, 4.0, None, reference)[0]


def test_without_front_it_is_the_cross_entropy(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    weights = torch.linspace(0.5, 2, 5)
    expected = F.cross_entropy(logits, labels, weights, ignore_index=VOID, reduction="sum")
    torch.testing.assert_close(summed_loss(full(logits), labels, weights, 0.0, reference), expected)


def test_of_one_logit_it_is_the_binary_cross_entropy(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch[0][:, :1], batch[1].clamp(max=1)
    valid = labels != VOID
    losses = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float(), reduction="none")
    torch.testing.assert_close(summed_loss(full(logits), labels, None, 0.0, reference), losses[valid].sum())


def test_undecided_pixels_count_most_and_every_image_as_before(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    factor = factor_of(logits, labels)
    valid = labels != VOID
    assert (factor[~valid] == 0).all()
    assert torch.allclose(factor.sum((1, 2)), valid.sum((1, 2)).float(), rtol=1e-5)
    scores = reference.confidence(logits, labels, ignore_index=VOID)
    for image in range(2):
        inside = valid[image]
        order = scores[image][inside].argsort()
        ranked = factor[image][inside][order]
        assert ranked[:20].mean() > 1.2 * ranked[-20:].mean()
        assert 1 < ranked.max() / ranked.min() <= 5.001


def test_a_sure_network_far_from_the_front_learns_from_all_pixels_alike() -> None:
    labels = torch.zeros(1, 40, 40, dtype=torch.long)
    logits = torch.zeros(1, 3, 40, 40)
    logits[:, 0] = 50
    logits[:, 0, :20] = 1
    factor = factor_of(logits, labels)[0]
    assert factor[22:].max() - factor[22:].min() < 1e-5
    assert factor[:20].min() > 2 * factor[22:].max()
    # The erosion lends to the sure row beside undecided ones.
    assert factor[20].min() > 1.5 * factor[22:].max()


def test_class_weights_hold_beside_the_front(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    leaf = logits.clone().requires_grad_()
    summed_loss(full(leaf), labels, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), 4.0, reference).backward()
    assert leaf.grad is not None
    felt = (leaf.grad != 0).any(1)
    assert not felt[labels == 2].any()
    assert felt[(labels != 2) & (labels != VOID)].all()


def test_pieces_of_a_batch_add_up(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    whole = summed_loss(full(logits), labels, None, 4.0, reference)
    pieces = sum(summed_loss(full(logits[i : i + 1]), labels[i : i + 1], None, 4.0, reference) for i in range(3))
    torch.testing.assert_close(pieces, whole)


def test_rare_classes_count_more_and_every_image_as_before(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    labels[:, :15][labels[:, :15] != VOID] = 0  # so that class 0 is the most common
    leaf = logits.clone().requires_grad_()
    losses = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="none")
    for balance in (0.5, 1.0):
        loss = summed_loss(full(leaf), labels, None, 0.0, reference, balance)
        expected = torch.zeros(())
        for image in range(2):
            count = labels[image][labels[image] != VOID].bincount(minlength=5)
            weight = (count.clamp(min=1).float() ** -balance)[labels[image].clamp(min=0)] * (labels[image] != VOID)
            expected += (losses[image] * weight).sum() * (labels[image] != VOID).sum() / weight.sum()
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("front_loss", [0.0, 4.0])
@pytest.mark.parametrize(("weighted", "balance"), [(False, 0.0), (True, 0.0), (False, 0.5)])
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize(("size", "align_corners"), [((20, 30), False), ((5, 8), False), ((7, 10), True)])
def test_both_backends_give_the_same_loss_and_gradient(
    fused: str,
    front_loss: float,
    weighted: bool,
    balance: float,
    classes: int,
    size: tuple[int, int],
    align_corners: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, classes, *size, generator=generator) * 4
    labels = torch.randint(0, max(classes, 2), (3, 20, 30), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = VOID
    labels[2] = VOID
    weights = torch.linspace(0.5, 7, max(classes, 2)) if weighted else None
    found = []
    for name in (fused, "reference"):
        leaf = logits.clone().requires_grad_()
        ops = backends.select(torch.device("cpu"), name)
        loss = summed_loss(LogitMap(leaf, align_corners), labels, weights, front_loss, ops, balance)
        (loss / 3).backward()
        assert leaf.grad is not None
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert (found[0][1][2] == 0).all()


def test_bfloat16_logits_give_a_gradient_of_theirs(batch: tuple[torch.Tensor, torch.Tensor], fused: str) -> None:
    logits, labels = batch[0].bfloat16(), batch[1]
    found = []
    for name in (fused, "reference"):
        leaf = logits.clone().requires_grad_()
        summed_loss(full(leaf), labels, None, 4.0, backends.select(torch.device("cpu"), name)).backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_a_broken_logit_breaks_the_loss(batch: tuple[torch.Tensor, torch.Tensor], fused: str, backend: str) -> None:
    logits, labels = batch
    logits[0, 3, 4, 5], labels[0, 4, 5] = float("nan"), 3
    ops = backends.select(torch.device("cpu"), fused if backend == "fused" else backend)
    assert not summed_loss(full(logits), labels, None, 4.0, ops).isfinite()


@pytest.mark.parametrize(
    ("settings", "front_loss", "balance"),
    [
        ({}, 4.0, 1.0),
        ({"front_loss": 0.0, "attack_options": {"balance": 0.3}}, 0.0, 0.3),
        ({"attack_options": {"preset": "progressive"}}, 4.0, 0.0),
        ({"attack": "pgd"}, 0.0, 0.15),
        ({"attack": "pgd", "front_loss": 2}, 2.0, 0.15),
    ],
)
def test_what_training_against_eroseg_takes(settings: dict[str, Any], front_loss: float, balance: float) -> None:
    checked = TrainSettings(data=Path("data"), out=Path("out"), **settings)
    attack = checked.attack_settings()
    assert attack is not None
    assert (checked.front_loss_in_force, attack.balance) == (front_loss, balance)


def test_a_negative_factor_is_refused() -> None:
    with pytest.raises(ValueError, match="front_loss is -1"):
        TrainSettings(data=Path("data"), out=Path("out"), front_loss=-1)
