"""What an attack guarantees: ball and range, what stays untouched, randomness, counts."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from attack_common import (
    EPS,
    Batch,
    correct_pixels,
    outside_ball,
    run,
    run_info,
    same_bits,
    seeded,
)
from conftest import SIZE, VOID
from torch import Tensor, nn

from eroseg_ext import StepInfo, attack
from eroseg_ext.attacks.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

# The ball, the range, and what must not change.


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_result_is_in_the_ball_and_in_the_range(
    net: nn.Module, batch: Batch, backend: str, method: str, norm: str, targeted: bool
) -> None:
    images, labels = batch
    images[:, :, :5], images[:, :, 5:10] = 0, 1  # where the range cuts the ball
    eps = EPS[norm]
    # Steps as long as the radius press against the boundary.
    settings: dict[str, Any] = {"norm": norm, "eps": eps, "step_size": eps, "method": method, "targeted": targeted}
    adversarial = run(net, (images, labels), backend=backend, **settings)
    assert outside_ball(adversarial, images, eps, norm) <= 1
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (adversarial - images).abs().flatten(1).amax(1).min() > 0
    assert adversarial.shape == images.shape
    assert not adversarial.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_result_reaches_the_boundary_of_the_ball_and_no_farther(
    net: nn.Module, batch: Batch, backend: str, norm: str
) -> None:
    images = 0.3 + 0.4 * batch[0]  # the range cuts nothing
    eps = EPS[norm]
    adversarial = run(net, (images, batch[1]), backend=backend, norm=norm, eps=eps, step_size=eps)
    assert abs(outside_ball(adversarial, images, eps, norm)) <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_clip_is_the_range_of_the_pixel_values(net: nn.Module, batch: Batch, backend: str, norm: str) -> None:
    images, labels = batch[0] * 255, batch[1]
    eps = EPS[norm] * 255
    adversarial = run(net, (images, labels), backend=backend, clip=(0, 255), eps=eps, step_size=eps, norm=norm)
    assert outside_ball(adversarial / 255, images / 255, EPS[norm], norm) <= 2  # the divisions round as well
    assert adversarial.min() == 0
    assert adversarial.max() == 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("settings", [{}, {"restarts": 2, "keep": "best"}, {"return_info": True}])
def test_eps_0_returns_the_input_bit_for_bit(
    net: nn.Module, batch: Batch, backend: str, norm: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    images = batch[0].to(dtype)
    images[:, :, 0] = -0.0
    result = run(net.to(dtype), (images, batch[1]), backend=backend, eps=0, norm=norm, **settings)
    adversarial = result[0] if "return_info" in settings else result
    assert same_bits(adversarial, images)
    assert adversarial.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("settings", [{}, {"restarts": 2, "keep": "best"}, {"early_stop": True}])
@pytest.mark.parametrize("model_mode", ["eval", "train"])
def test_an_image_without_valid_pixels_comes_back_unchanged(
    net: nn.Module, batch: Batch, backend: str, norm: str, settings: dict[str, Any], model_mode: str
) -> None:
    images, labels = batch
    labels[1] = VOID
    images[1, :, 0] = -0.0  # 0.0 added to it makes it 0.0
    # In train mode the other images' gradients reach it through the batch's statistics.
    adversarial = run(net, batch, backend=backend, norm=norm, eps=EPS[norm], model_mode=model_mode, **settings)
    assert same_bits(adversarial[1], images[1])
    assert (adversarial - images)[[0, 2]].abs().flatten(1).amax(1).min() > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_only_pixels_inside_the_mask_change(
    net: nn.Module, batch: Batch, backend: str, norm: str, random_start: bool
) -> None:
    images, labels = batch
    images[:, :, ::4] = -0.0
    mask = torch.zeros(3, 1, *SIZE, dtype=torch.bool, device=images.device)
    mask[0, :, 5:15, 3:9], mask[1, :, ::2] = True, True
    settings: dict[str, Any] = {"norm": norm, "eps": EPS[norm], "mask": mask, "random_start": random_start}
    adversarial = run(net, (images, labels), backend=backend, **settings)
    outside = ~mask.expand_as(images)
    assert same_bits(adversarial[outside], images[outside])
    changed = (adversarial != images) & mask
    assert changed.flatten(1).any(1).tolist() == [True, True, False]
    # Most of the inside moves; pixels at the range's ends may not.
    assert changed.sum() > 0.7 * 3 * mask.sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inputs_are_not_written_to(net: nn.Module, batch: Batch, backend: str, norm: str) -> None:
    images, labels = batch
    mask = torch.ones(3, 1, *SIZE, dtype=torch.bool, device=images.device)
    before = [tensor.clone() for tensor in (images, labels, mask)]
    run(net, batch, backend=backend, norm=norm, random_start=False, mask=mask, early_stop=True, keep="best")
    assert all(torch.equal(old, new) for old, new in zip(before, (images, labels, mask), strict=True))


def test_images_that_require_grad_get_none(net: nn.Module, batch: Batch, backend: str) -> None:
    images = batch[0].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adversarial = run(net, (images, batch[1]), backend=backend)
    assert images.grad is None
    assert not adversarial.requires_grad


# Randomness.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_result_and_another_seed_another(
    net: nn.Module, batch: Batch, backend: str, method: str, norm: str
) -> None:
    first, again, other = (
        run(net, batch, backend=backend, method=method, norm=norm, steps=2, generator=seeded(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_generator_is_the_default(net: nn.Module, batch: Batch, backend: str) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(net, batch, backend=backend, generator=None))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_without_a_random_start_the_first_forward_sees_the_clean_images(
    net: nn.Module, batch: Batch, backend: str
) -> None:
    seen: list[StepInfo] = []
    run(net, batch, backend=backend, random_start=False, callback=seen.append)
    assert torch.equal(seen[0].logits, net.eval()(batch[0]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(batch: Batch, norm: str) -> None:
    images, labels = torch.full_like(batch[0], 0.5), batch[1]
    starts: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        starts.append(x.detach().clone())
        return torch.cat([x, x[:, :1]], 1)

    attack(model, images, labels, norm=norm, eps=EPS[norm], steps=1, restarts=20, generator=seeded())
    # Each restart calls the model once for its step and once to judge its result.
    delta = torch.stack(starts[::2]).sub(0.5).flatten(2)
    if norm == "linf":
        assert delta.abs().max() <= EPS[norm] * (1 + 1e-5)
        assert delta.std().item() == pytest.approx(EPS[norm] / math.sqrt(3), rel=0.02)
    else:
        # In d dimensions the radius is eps * u^(1/d): nearly all volume is at the surface.
        assert delta.norm(dim=2).max() <= EPS[norm] * (1 + 1e-5)
        assert delta.norm(dim=2).min() > EPS[norm] * 0.98
    assert len(delta.flatten(0, 1).unique(dim=0)) == 60


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_model_sees_no_image_outside_the_ball_or_the_range(
    net: nn.Module, batch: Batch, backend: str, norm: str
) -> None:
    images = batch[0]
    images[:, :, :10], images[:, :, 10:] = 0, 1
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    run_info(net, batch, backend=backend, norm=norm, eps=EPS[norm], restarts=2)
    assert len(seen) == 8  # starts, iterates, results
    for shown in seen:
        assert outside_ball(shown, images, EPS[norm], norm) <= 1
        assert shown.min() >= 0
        assert shown.max() <= 1


# What is counted.


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_void_pixels_change_nothing(net: nn.Module, batch: Batch, backend: str, method: str) -> None:
    void = (batch[1] == VOID).unsqueeze(1)

    def scrambled(images: Tensor) -> Tensor:
        logits = net(images)
        return torch.where(void, 7 - 30 * logits.flip(1), logits)

    def broken(images: Tensor) -> Tensor:
        return net(images).masked_fill(void, math.nan)

    net.eval()
    expected, info = run_info(net, batch, backend=backend, method=method, keep="best")
    for other in (scrambled, broken):
        adversarial, other_info = run_info(other, batch, backend=backend, method=method, keep="best")
        assert torch.equal(adversarial, expected)
        assert torch.equal(other_info.stats, info.stats)
        assert torch.equal(other_info.correct, info.correct)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_brute_force(
    net: nn.Module, batch: Batch, backend: str, method: str, targeted: bool
) -> None:
    labels = batch[1]
    steps: list[StepInfo] = []
    adversarial, info = run_info(net, batch, backend=backend, method=method, targeted=targeted, callback=steps.append)
    valid = (labels != VOID).sum((1, 2)).double()
    assert torch.equal(info.valid, valid)
    assert torch.equal(info.correct, correct_pixels(net.eval()(adversarial), labels))
    for step in steps:
        assert torch.equal(step.stats[:, 0], valid)
        assert torch.equal(step.stats[:, 1], correct_pixels(step.logits, labels))


@pytest.mark.parametrize("ignore_index", [-1, -100, 2, 255])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ignore_index_and_the_type_of_labels_are_free(
    net: nn.Module, batch: Batch, backend: str, ignore_index: int, dtype: torch.dtype
) -> None:
    images, labels = batch
    # A model's class may be the void one; then no other label is void.
    labels = torch.where(labels == VOID, 0 if ignore_index < 0 and dtype == torch.uint8 else ignore_index, labels)
    _, info = run_info(net, (images, labels.to(dtype)), backend=backend, ignore_index=ignore_index)
    assert torch.equal(info.valid, (labels != ignore_index).sum((1, 2)).double())
    assert (info.stats[..., 0] == info.valid).all()
