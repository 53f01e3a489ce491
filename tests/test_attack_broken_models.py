"""Models that return NaN, infinity or probabilities, or whose gradient is NaN."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_common import (
    Batch,
    MakeNet,
    name_of,
    run,
    run_info,
)
from conftest import CLASSES, VOID
from torch import Tensor, nn

from eroseg_ext import attack, strong_attack
from eroseg_ext.attacks.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


class Sabotaged(nn.Module):
    """A model one value of whose logits is ``value`` for one image in one call."""

    def __init__(self, model: nn.Module, call: int, image: int, value: float) -> None:
        super().__init__()
        self.model, self.call, self.image, self.value = model, call, image, value
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        if self.calls == self.call:
            logits = logits.clone()
            logits[self.image, 1, 10, 12] = self.value
        self.calls += 1
        return logits


@pytest.fixture
def all_valid(batch: Batch) -> Batch:
    return batch[0], torch.where(batch[1] == VOID, 0, batch[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0, 2, 4])
def test_logits_that_are_not_finite_are_reported_at_the_end(
    net: nn.Module, all_valid: Batch, backend: str, method: str, step: int, value: float
) -> None:
    model = Sabotaged(net, step, 1, value)
    with pytest.raises(RuntimeError, match=rf"logits are NaN or infinite at step {step} for image 1$"):
        run(model, all_valid, backend=backend, method=method, steps=5)
    assert model.calls == 5


class RulesOut(nn.Module):
    """A fifth class that is none."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        return torch.cat([logits, torch.full_like(logits[:, :1], -math.inf)], 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_the_model_rules_out_changes_nothing(
    net: nn.Module, all_valid: Batch, backend: str, method: str
) -> None:
    adversarial = run(RulesOut(net), all_valid, backend=backend, method=method)
    moved = (adversarial - run(net, all_valid, backend=backend, method=method)).abs()
    assert (moved > 1e-6).float().mean() < 0.01  # a sign step turns a rounding error of one pixel into a step


def test_a_label_that_the_model_rules_out_is_reported(net: nn.Module, all_valid: Batch, backend: str) -> None:
    labels = all_valid[1].clone()
    labels[1, 5, 5] = 4
    with pytest.raises(RuntimeError, match=r"logits are NaN or infinite at step 0 for image 1$"):
        run(RulesOut(net), (all_valid[0], labels), backend=backend)


@pytest.mark.parametrize("settings", [{"threshold": "exact"}, {"schedule": "linear"}, {"keep": "best"}], ids=name_of)
def test_broken_logits_are_reported_under_other_settings(
    net: nn.Module, all_valid: Batch, backend: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match=r"at step 1 for image 2$"):
        run(Sabotaged(net, 1, 2, math.nan), all_valid, backend=backend, **settings)


def test_broken_logits_name_image_and_restart_whatever_the_division(
    net: nn.Module, all_valid: Batch, backend: str
) -> None:
    # Three steps and a judgement per part of one image: call 12 + 4 + 2 is image 1's last step in restart 1.
    model = Sabotaged(net, 18, 0, math.nan)
    with pytest.raises(RuntimeError, match=r"at step 2 for image 1 of restart 1$"):
        run(model, all_valid, backend=backend, restarts=2, micro_batch=1)


def test_broken_logits_of_the_final_images_are_reported(net: nn.Module, all_valid: Batch, backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"NaN or infinite after the last step for image 0$"):
        run_info(Sabotaged(net, 3, 0, math.inf), all_valid, backend=backend)


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, broken: bool) -> Tensor:
        ctx.broken = broken
        return images.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        if ctx.broken:
            grad[1, 0, 3, 4] = math.nan
        return grad, None


class BrokenBackward(nn.Module):
    """Finite logits whatever the images; the gradient of the image 1 is NaN in one call."""

    def __init__(self, model: nn.Module, call: int) -> None:
        super().__init__()
        self.model, self.call, self.calls = model, call, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.model(_BrokenBackward.apply(images.nan_to_num(), self.calls - 1 == self.call))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("settings", [{}, {"keep": "best"}, {"restarts": 2}], ids=name_of)
@pytest.mark.parametrize("step", [0, 2])
def test_a_nan_gradient_is_reported_at_the_end(
    net: nn.Module, all_valid: Batch, backend: str, norm: str, step: int, settings: dict[str, Any]
) -> None:
    model = BrokenBackward(net, step)
    with pytest.raises(RuntimeError, match="gradient with respect to image 1 is NaN"):
        run(model, all_valid, backend=backend, norm=norm, **settings)
    assert model.calls == (4 if "keep" in settings else 8 if "restarts" in settings else 3)


@pytest.mark.parametrize("call", [attack, strong_attack])
def test_a_nan_gradient_is_told_from_the_nan_logits_that_follow(
    net: nn.Module, all_valid: Batch, backend: str, call: Callable[..., Any]
) -> None:
    class Root(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return net(images + 0 * (images - images.detach()).sqrt())

    with pytest.raises(RuntimeError, match=r"gradient with respect to image 0 is NaN at step 0$"):
        call(Root(), *all_valid, steps=3, backend=backend)


class Quantised(nn.Module):
    """Rounds some images of the batch."""

    def __init__(self, model: nn.Module, rounded: list[bool]) -> None:
        super().__init__()
        self.model, self.rounded = model, torch.tensor(rounded).view(-1, 1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(torch.where(self.rounded.to(images.device), (images * 32).round() / 32, images))


@pytest.mark.parametrize("call", [attack, strong_attack])
@pytest.mark.parametrize(("rounded", "named"), [([True] * 3, "0, 1, 2"), ([False, True, False], "1")])
def test_images_without_a_gradient_are_warned_of(
    net: nn.Module, all_valid: Batch, backend: str, call: Callable[..., Any], rounded: list[bool], named: str
) -> None:
    message = f"^the model's gradient with respect to image {named} is 0 everywhere in the first step"
    with pytest.warns(UserWarning, match=message) as seen:
        _, info = call(Quantised(net, rounded), *all_valid, steps=2, backend=backend, return_info=True)
    assert [warning.filename for warning in seen] == [__file__]
    assert info.without_gradient.tolist() == rounded


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 1}, {"early_stop": True, "restarts": 2}], ids=name_of)
def test_a_gradient_of_0_is_warned_of_once(net: nn.Module, all_valid: Batch, settings: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="image 0, 2 is 0 everywhere") as seen:
        run(Quantised(net, [True, False, True]) if "micro_batch" not in settings else Alone(net), all_valid, **settings)
    assert len(seen) == 1


class Alone(nn.Module):
    """Rounds the images number 0 and 2 of a batch that comes one by one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.model((images * 32).round() / 32 if (self.calls - 1) // 3 != 1 else images)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targeted", [False, True])
def test_an_attack_with_nothing_left_to_do_is_not_warned_of(
    net: nn.Module, batch: Batch, backend: str, method: str, targeted: bool
) -> None:
    predicted = net.eval()(batch[0]).argmax(1)
    done = predicted if targeted else (predicted + 1) % CLASSES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, (batch[0], done), backend=backend, method=method, targeted=targeted, random_start=False)
        run(net, (batch[0], torch.full_like(done, VOID)), backend=backend, method=method)


def test_a_callable_that_detaches_is_refused(net: nn.Module, batch: Batch) -> None:
    with pytest.raises(
        ValueError, match=r"do not depend on images by autograd, wanted .*: if a part of it runs under torch.no_grad"
    ):
        run(lambda images: net(images.detach()), batch)


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 1, "restarts": 2, "keep": "best"}], ids=name_of)
def test_probabilities_are_warned_of_once(net: nn.Module, batch: Batch, backend: str, settings: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(lambda images: net(images).softmax(1), batch, backend=backend, **settings)
    assert [warning.category for warning in seen] == [UserWarning]
    assert "looks like probabilities" in str(seen[0].message)
    assert "remove the model's softmax, or pass output='probabilities'" in str(seen[0].message)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("call", [attack, strong_attack])
def test_a_sigmoid_is_warned_of(make_net: MakeNet, batch: Batch, call: Callable[..., Any], classes: int) -> None:
    net, labels = make_net(classes), batch[1].clamp(max=1)
    with pytest.warns(UserWarning, match="remove the model's sigmoid, or pass output='sigmoid'") as seen:
        call(lambda images: net(images).sigmoid(), batch[0], labels, steps=1)
    assert [warning.filename for warning in seen] == [__file__]


def test_the_warning_of_probabilities_points_at_the_caller(net: nn.Module, batch: Batch) -> None:
    with pytest.warns(UserWarning, match="probabilities") as seen:
        attack(lambda images: net(images).softmax(1), *batch, steps=1)
    assert seen[0].filename == __file__


def test_logits_are_not_warned_of(net: nn.Module, batch: Batch, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, batch, backend=backend)
        run(lambda images: net(images).abs(), batch, backend=backend)
