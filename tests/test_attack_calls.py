"""Forms of input, model and call: labels, normalisation, dtypes, layouts, objects, contexts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_common import (
    EPS,
    Batch,
    MakeNet,
    backend_for,
    name_of,
    outside_ball,
    run,
    run_info,
    seeded,
)
from conftest import CLASSES, SIZE, VOID
from torch import Tensor, nn

import eroseg_ext
from eroseg_ext import StepInfo, attack
from eroseg_ext.attacks.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

# What the model gets and gives.


@pytest.mark.parametrize("classes", [1, 2, CLASSES])
def test_without_labels_the_models_prediction_is_attacked(
    make_net: MakeNet, batch: Batch, backend: str, classes: int
) -> None:
    net, images = make_net(classes).eval(), batch[0]
    logits = net(images)
    predicted = (logits[:, 0] > 0).long() if classes == 1 else logits.argmax(1)
    expected, info = run_info(net, (images, predicted), backend=backend)
    got = attack(net, images, steps=3, generator=seeded(), backend=backend)
    assert torch.equal(got, expected)
    assert (info.correct < info.valid).all()


@pytest.mark.parametrize("mean", [[0.4, 0.5, 0.6], [0.5]])
def test_mean_and_std_are_a_normalisation_before_the_model(
    net: nn.Module, batch: Batch, backend: str, mean: list[float]
) -> None:
    std = [0.2, 0.25, 0.3][: len(mean)]

    def wrapped(images: Tensor) -> Tensor:
        return net((images - images.new_tensor(mean).view(1, -1, 1, 1)) / images.new_tensor(std).view(1, -1, 1, 1))

    # wrapped is no module, so that its mode is ours to set.
    net.eval()
    expected = run(wrapped, batch, backend=backend)
    assert torch.equal(run(net, batch, backend=backend, mean=mean, std=std), expected)
    assert outside_ball(expected, batch[0], 8 / 255, "linf") <= 1


@pytest.mark.parametrize(
    "settings", [{}, {"norm": "l2", "eps": 1.0}, {"keep": "best", "restarts": 2}, {"clip": (0, 255), "eps": 8}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_images_are_attacked_as_what_they_were_and_normalised_again(
    net: nn.Module, batch: Batch, backend: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    extent = settings.get("clip", (0, 1))[1]
    images = batch[0].to(dtype).mul(255).round() * (extent / 255)
    images[:, :, :4, :4], images[:, :, 4:8, :4] = 0, extent
    mean, std = [extent * m for m in (0.485, 0.456, 0.406)], [extent * s for s in (0.229, 0.224, 0.225)]
    mean_, std_ = (images.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
    # Rounded to float32, as a loader gives them, black and white are no longer quite the ends of the range.
    normalised = ((images - mean_) / std_).float().to(dtype)
    settings = {"mean": mean, "std": std, "backend": backend, "steps": 1} | settings
    norm = settings.get("norm", "linf")
    expected = run(net, (images, batch[1]), **settings)
    found = run(net, (normalised, batch[1]), images_are_normalized=True, **settings)
    assert found.dtype == dtype
    pixels = found * std_ + mean_
    assert (pixels - expected).abs().max() <= 1e-6 * extent
    assert outside_ball(pixels / extent, (images / extent).float(), settings.get("eps", 8 / 255) / extent, norm) <= 8


def test_normalised_images_that_may_not_change_come_back_bit_for_bit(net: nn.Module, batch: Batch) -> None:
    settings = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "images_are_normalized": True}
    images, labels = (batch[0] - 0.45) / 0.25, batch[1]
    images = images.clamp(-1.8, 2.2)
    mask = torch.zeros_like(labels[:, None], dtype=torch.bool)
    mask[..., :5] = True
    found = run(net, (images, labels), mask=mask, **settings)
    assert torch.equal(found.where(~mask, 0), images.where(~mask, 0))
    assert not torch.equal(found, images)
    assert torch.equal(run(net, (images, labels), eps=0, **settings), images)


def test_autocast_runs_the_model_in_that_dtype(net: nn.Module, batch: Batch, backend: str) -> None:
    device_type = batch[0].device.type

    def wrapped(images: Tensor) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16):
            return net(images)

    seen: list[StepInfo] = []
    adversarial = run(net, batch, backend=backend, autocast=torch.bfloat16, callback=seen.append)
    assert {info.logits.dtype for info in seen} == {torch.bfloat16}
    assert adversarial.dtype == torch.float32
    net.eval()
    assert torch.equal(adversarial, run(wrapped, batch, backend=backend))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_are_attacked_in_float32_and_come_back_half(
    net: nn.Module, batch: Batch, backend: str, dtype: torch.dtype, norm: str
) -> None:
    images = batch[0].to(dtype)
    adversarial, info = run_info(net.to(dtype), (images, batch[1]), backend=backend, norm=norm, eps=EPS[norm], steps=5)
    assert adversarial.dtype == dtype
    assert outside_ball(adversarial, images, EPS[norm], norm) <= 1
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (info.correct < info.stats[0, 0, :, 1]).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_channels_last_images_stay_channels_last(pixelwise: nn.Module, batch: Batch, backend: str, norm: str) -> None:
    images, labels = batch
    expected = run(pixelwise, batch, backend=backend, norm=norm)
    adversarial = run(pixelwise, (images.to(memory_format=torch.channels_last), labels), backend=backend, norm=norm)
    assert adversarial.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=0 if norm == "linf" else 1e-6)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_one_logit_is_two_classes_the_first_of_which_is_0(
    make_net: MakeNet, batch: Batch, backend: str, method: str, targeted: bool
) -> None:
    net = make_net(1).eval()
    images, labels = batch[0], torch.where(batch[1] == VOID, VOID, batch[1] % 2)

    def two_logits(x: Tensor) -> Tensor:
        logit = net(x)
        return torch.cat([torch.zeros_like(logit), logit], 1)

    settings: dict[str, Any] = {"backend": backend, "method": method, "targeted": targeted}
    one, one_info = run_info(net, (images, labels), **settings)
    two, two_info = run_info(two_logits, (images, labels), **settings)
    assert ((one - two).abs() > 1e-6).sum() <= 12  # signs that rounding flips; seen: none
    assert torch.equal(one_info.valid, two_info.valid)
    assert ((one_info.correct - two_info.correct).abs() <= 1).all()
    assert (one_info.correct.sum() > one_info.stats[0, 0, :, 1].sum()) == targeted


def test_smaller_logits_are_upsampled_bilinearly(make_net: MakeNet, batch: Batch, backend: str) -> None:
    net = make_net(stride=2).eval()

    def wrapped(images: Tensor) -> Tensor:
        return F.interpolate(net(images), size=SIZE, mode="bilinear", align_corners=False)

    seen: list[StepInfo] = []
    adversarial = run(net, batch, backend=backend, callback=seen.append)
    assert seen[0].logits.shape == (3, CLASSES, *SIZE)
    # The backward of the upsampling is not deterministic on CUDA.
    assert ((adversarial - run(wrapped, batch, backend=backend)).abs() > 1e-6).float().mean() < 0.005


# The object form.


@pytest.mark.parametrize(
    ("kind", "keywords", "method"),
    [
        (eroseg_ext.EroSeg, {"radius": 2}, "eroseg"),
        (eroseg_ext.EroSeg, {"preset": "progressive"}, "eroseg"),
        (eroseg_ext.PGD, {}, "pgd"),
        (eroseg_ext.SegPGD, {}, "segpgd"),
        (eroseg_ext.CosPGD, {"variant": "sigmoid"}, "cospgd"),
        (eroseg_ext.MaskedCE, {}, "mce"),
        (eroseg_ext.MaskedCE, {"balanced": True}, "mce_bal"),
        (eroseg_ext.JSD, {}, "js"),
        (eroseg_ext.Tsallis, {"q": 1.5}, "tsallis"),
    ],
)
def test_an_object_is_the_function_with_its_settings_bound(
    net: nn.Module, batch: Batch, backend: str, kind: Any, keywords: dict[str, Any], method: str
) -> None:
    extra = {key: value for key, value in keywords.items() if key != "balanced"}
    settings: dict[str, Any] = {"eps": 0.02, "steps": 2, "backend": backend_for({"method": method, **extra}, backend)}
    bound = kind(net, **settings, **keywords)
    expected = attack(net, *batch, method=method, generator=seeded(), **settings, **extra)
    # Twice: a call leaves the settings as they were.
    assert torch.equal(bound(*batch, generator=seeded()), expected)
    assert torch.equal(bound(*batch, generator=seeded()), expected)
    adversarial, info = bound(*batch, generator=seeded(), return_info=True)
    assert torch.equal(adversarial, expected)
    assert info.stats.shape == (1, 2, 3, 4)
    assert info.right is info.correct
    assert bound.settings.method == method
    assert repr(bound).startswith(f"{kind.__name__}(AttackSettings(method='{method}', eps=0.02")


def test_an_object_without_labels_attacks_the_prediction(net: nn.Module, batch: Batch, backend: str) -> None:
    expected = run(net, (batch[0], net.eval()(batch[0]).argmax(1)), backend=backend)
    assert torch.equal(eroseg_ext.EroSeg(net, steps=3, backend=backend)(batch[0], generator=seeded()), expected)


# Contexts around the call.


def test_no_grad_around_the_call_changes_nothing(net: nn.Module, batch: Batch, backend: str) -> None:
    expected = run(net, batch, backend=backend)
    with torch.no_grad():
        assert torch.equal(run(net, batch, backend=backend), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": "l2"}, {"mean": [0.5], "std": [0.25]}, {"early_stop": True, "restarts": 2, "keep": "best"}],
    ids=name_of,
)
def test_inference_mode_around_the_call_changes_nothing(
    net: nn.Module, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    expected = run(net, batch, backend=backend, **settings)
    with torch.inference_mode():
        # Made in inference mode, the images are of the kind that autograd refuses.
        inference = (batch[0].clone(), batch[1].clone())
        mask = torch.ones(3, 1, *SIZE, dtype=torch.bool, device=batch[0].device)
        adversarial = run(net, inference, backend=backend, mask=mask, **settings)
        assert torch.is_inference_mode_enabled()
    assert inference[0].is_inference()
    assert torch.equal(adversarial, expected)


def test_autocast_around_the_call_is_the_models_only(net: nn.Module, batch: Batch, backend: str) -> None:
    expected = run(net, batch, backend=backend, autocast=torch.bfloat16)
    with torch.autocast(batch[0].device.type, torch.bfloat16):
        assert torch.equal(run(net, batch, backend=backend), expected)
    assert not torch.equal(run(net, batch, backend=backend), expected)
