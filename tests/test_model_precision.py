"""Images and models of any precision, under any default dtype: the ball holds, and what is counted is what is given."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from attack_common import EPS, Batch, correct_pixels, run, run_info, same_bits, seeded
from conftest import SIZE, VOID, Pixelwise
from torch import Tensor, nn

from eroseg_ext import StepInfo, attack, evaluate, strong_attack
from eroseg_ext.attacks.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

ATTACKS = [attack, strong_attack]
Under = Callable[[Callable[[], Any]], Any]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HALVES = [torch.float16, torch.bfloat16]


def beyond(adversarial: Tensor, images: Tensor, norm: str) -> float:
    """By how much the farthest image leaves its ball, relative to its radius."""
    delta = (adversarial.double() - images.double()).flatten(1)
    return float(delta.norm(dim=1, p=torch.inf if norm == "linf" else 2).max()) / EPS[norm] - 1


# The ball.


@pytest.mark.parametrize("attacks", ATTACKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ball_holds_whatever_the_type_of_the_images(
    net: nn.Module, batch: Batch, backend: str, attacks: Any, norm: str, dtype: torch.dtype, model_dtype: torch.dtype
) -> None:
    images = batch[0].to(dtype)
    settings = {"backend": backend, "norm": norm, "eps": EPS[norm], "steps": 6}
    adversarial = attacks(net.to(model_dtype), images, batch[1], **settings)
    assert adversarial.dtype == dtype
    # float64 is rounded in float64, the rest in float32, where 1 ulp of a pixel is 2e-6 of the radius.
    assert -0.1 < beyond(adversarial, images, norm) <= (1e-12 if dtype == torch.float64 else 4e-6)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("attacks", ATTACKS)
@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_counted_is_what_is_returned(batch: Batch, attacks: Any, dtype: torch.dtype) -> None:
    model, images = Pixelwise().to(batch[0].device), batch[0].to(dtype)
    settings = {"keep": "best", "restarts": 2} if attacks is attack else {}
    adversarial, info = attacks(model, images, batch[1], steps=6, return_info=True, **settings)
    assert torch.equal(info.correct, correct_pixels(model(adversarial.float()), batch[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_that_may_not_change_stay_to_the_bit(net: nn.Module, batch: Batch, dtype: torch.dtype) -> None:
    # As float32 has none of them.
    images, labels = torch.rand(3, 3, *SIZE, dtype=torch.float64).to(batch[0].device, dtype), batch[1]
    images[:, :, ::4] = -0.0
    mask = torch.rand(3, 1, *SIZE, device=images.device) < 0.5
    labels[1] = VOID
    for attacks in ATTACKS:
        adversarial = attacks(net, images, labels, steps=2, mask=mask)
        assert _bits_equal(adversarial.where(~mask, 0), images.where(~mask, 0))
        assert _bits_equal(adversarial[1], images[1])
        assert _bits_equal(attacks(net, images, labels, steps=2, eps=0), images)


def _bits_equal(left: Tensor, correct: Tensor) -> bool:
    return torch.equal(left, correct) and torch.equal(left.signbit(), correct.signbit())


@pytest.mark.parametrize(
    ("dtype", "settings"), [(torch.bfloat16, {"eps": 0.5 / 255}), (torch.float16, {"eps": 0.01, "norm": "l2"})]
)
def test_a_ball_that_the_images_type_hardly_resolves_warns(
    net: nn.Module, batch: Batch, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    with pytest.warns(UserWarning, match=r"^images is torch\.b?float16, whose values are up to .* wanted float32"):
        run(net, (batch[0].to(dtype), batch[1]), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, batch, **settings)
        run(net, (batch[0].to(dtype), batch[1]))
        run(net, (batch[0].to(dtype), batch[1]), eps=0)


# What the model is given, and what it may return.


@pytest.mark.parametrize("mean", [None, 0.5])
@pytest.mark.parametrize("attacks", ATTACKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_dtype", DTYPES)
def test_a_model_is_given_its_own_type(
    net: nn.Sequential, batch: Batch, attacks: Any, dtype: torch.dtype, model_dtype: torch.dtype, mean: float | None
) -> None:
    seen: set[torch.dtype] = set()
    net.to(model_dtype).register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    settings = {} if mean is None else {"mean": [mean], "std": [0.25]}
    adversarial = attacks(net, batch[0].to(dtype), None, steps=2, **settings)
    assert seen == {model_dtype}
    assert (adversarial != batch[0].to(dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_without_parameters_is_given_the_images_type(
    pixelwise: nn.Module, batch: Batch, dtype: torch.dtype
) -> None:
    seen: set[torch.dtype] = set()
    pixelwise.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    for attacks in ATTACKS:
        attacks(pixelwise, batch[0].to(dtype), batch[1], steps=2)
    assert seen == {dtype}


def test_parameters_of_types_that_are_no_pixels_are_passed_over(net: nn.Sequential, batch: Batch) -> None:
    expected = run(net, batch)
    quantised = nn.Module()
    quantised.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    assert torch.equal(run(nn.Sequential(_Ahead(quantised), net), batch), expected)


class _Ahead(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize("method", METHODS)
def test_logits_in_float64_give_the_attack_of_float32(
    pixelwise: nn.Module, batch: Batch, backend: str, method: str
) -> None:
    seen: list[StepInfo] = []
    expected, info = run_info(pixelwise, batch, backend=backend, method=method)
    found, found_info = run_info(
        lambda images: pixelwise(images).double(), batch, backend=backend, method=method, callback=seen.append
    )
    assert torch.equal(found, expected)
    assert torch.equal(found_info.stats, info.stats)
    assert {step.logits.dtype for step in seen} == {torch.float32}


# The default dtype.


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def under_default(request: pytest.FixtureRequest) -> Under:
    """Runs a function under another default dtype."""

    def call(function: Callable[[], Any]) -> Any:
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)

    return call


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_changes_nothing(
    net: nn.Module, batch: Batch, backend: str, under_default: Under, method: str, norm: str
) -> None:
    shared = {"method": method, "norm": norm, "eps": EPS[norm], "steps": 4, "backend": backend, "return_info": True}

    def plain() -> Any:
        return attack(net, *batch, keep="best", generator=seeded(), **shared)

    def strong() -> Any:
        return strong_attack(net, *batch, radii="shrinking", **shared)

    for work in (plain, strong):
        expected, expected_info = work()
        found, info = under_default(work)
        assert same_bits(found, expected)
        for now, before in zip(astuple(info), astuple(expected_info), strict=True):
            assert (now is None and before is None) or (now.dtype == before.dtype and torch.equal(now, before))


def test_the_default_dtype_changes_no_evaluation(net: nn.Module, batch: Batch, under_default: Under) -> None:
    data = list(zip(*batch, strict=True))

    def work() -> Any:
        return evaluate(net, data, attacks=["eroseg", "segpgd"], steps=3, sanity=2, mean=[0.5], std=[0.5]).as_json()

    assert under_default(work) == work()
