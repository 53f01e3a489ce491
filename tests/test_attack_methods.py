"""What each method ascends, EroSeg's settings, and how strong the methods are."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_common import (
    Batch,
    MakeNet,
    Spied,
    Times,
    backend_for,
    correct_pixels,
    name_of,
    outside_ball,
    run,
    run_info,
    seeded,
)
from conftest import CLASSES, SIZE, VOID
from torch import Tensor, nn

from eroseg_ext import StepInfo, attack
from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

# What is ascended.


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("settings", "op_method", "options"),
    [
        ({"method": "pgd"}, "pgd", {}),
        ({"method": "segpgd"}, "segpgd", {}),
        ({"method": "cospgd"}, "cospgd", {}),
        ({"method": "cospgd", "variant": "sigmoid"}, "cospgd_sigmoid", {}),
        ({"method": "mce"}, "mce", {}),
        ({"method": "mce_bal"}, "mce", {"balanced": True}),
        ({"method": "js"}, "js", {}),
        ({"method": "tsallis"}, "tsallis", {"q": 2.0}),
        ({"method": "tsallis", "q": 1.3}, "tsallis", {"q": 1.3}),
    ],
    ids=name_of,
)
def test_a_method_ascends_its_own_gradient_at_every_step(
    net: nn.Module,
    batch: Batch,
    backend: str,
    settings: dict[str, Any],
    op_method: str,
    options: dict[str, Any],
    targeted: bool,
) -> None:
    ignore_index = 2
    labels = torch.where(batch[1] == VOID, ignore_index, batch[1])
    pairs: list[tuple[Tensor, Tensor]] = []

    def model(images: Tensor) -> Tensor:
        logits = net(images)
        # Cloned, since the buffer is written to again in the next step.
        logits.register_hook(lambda grad: pairs.append((logits.detach(), grad.clone())))
        return logits

    backend = backend_for(settings, backend)
    run(model, (batch[0], labels), backend=backend, targeted=targeted, ignore_index=ignore_index, **settings)
    assert len(pairs) == 3
    if "balanced" in options:
        options = {"class_weight": reference.class_balance(labels, CLASSES, ignore_index=ignore_index)}
    for step, (logits, grad) in enumerate(pairs):
        expected, _ = reference.pixel_grad(
            logits, labels, op_method, step / 3, ignore_index=ignore_index, targeted=targeted, **options
        )
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


# EroSeg's settings.

PROGRESSIVE: dict[str, Any] = {
    "confidence": "top",
    "front": "hard",
    "direction": "ce",
    "radius": 1,
    "schedule": "linear",
    "balance": 0.0,
}


def test_preset_progressive_is_the_settings_it_stands_for(net: nn.Module, batch: Batch, backend: str) -> None:
    expected = run(net, batch, backend=backend, **PROGRESSIVE)
    assert torch.equal(run(net, batch, backend=backend, preset="progressive"), expected)
    assert not torch.equal(run(net, batch, backend=backend), expected)


def test_a_keyword_beside_a_preset_wins(net: nn.Module, batch: Batch, backend: str) -> None:
    expected = run(net, batch, backend=backend, **{**PROGRESSIVE, "front": "soft"})
    assert torch.equal(run(net, batch, backend=backend, preset="progressive", front="soft"), expected)


@pytest.mark.parametrize("confidence", ["label", "top"])
@pytest.mark.parametrize("threshold", ["lagged", "exact"])
@pytest.mark.parametrize(
    ("schedule", "rho_range", "rhos"),
    [
        ("linear", None, [0.1, 0.4, 0.7, 1.0]),
        ("linear", (0.5, 0.2), [0.5, 0.4, 0.3, 0.2]),
        ("geometric", None, [0.4, 0.2, 0.1, 0.05]),
    ],
)
def test_a_schedule_takes_a_fraction_of_the_pixels_at_each_step(
    net: nn.Module,
    batch: Batch,
    backend: str,
    schedule: str,
    rho_range: tuple[float, float] | None,
    rhos: list[float],
    threshold: str,
    confidence: str,
) -> None:
    labels = batch[1]
    seen: list[StepInfo] = []
    settings: dict[str, Any] = {"schedule": schedule, "threshold": threshold, "confidence": confidence}
    run(net, batch, backend=backend, steps=4, rho_range=rho_range, callback=seen.append, **settings)
    for step, (info, rho) in enumerate(zip(seen, rhos, strict=True)):
        # "lagged" knows the scores of the step before, except in the first step.
        known = info if threshold == "exact" else seen[max(step - 1, 0)]
        scores = reference.confidence(known.logits, labels, confidence=confidence).flatten(1)
        k = (rho * (labels != VOID).sum((1, 2))).round().clamp(min=1).long()
        assert info.tau is not None
        torch.testing.assert_close(info.tau, reference.kth_value(scores, k[:, None])[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("threshold", ["lagged", "exact"])
@pytest.mark.parametrize("steps", [6, 16])
def test_the_front_is_as_wide_as_the_movement_that_is_left(
    net: nn.Module, batch: Batch, backend: str, steps: int, threshold: str, targeted: bool
) -> None:
    labels = batch[1]
    n = (labels != VOID).sum((1, 2))
    seen: list[StepInfo] = []
    factor = 8.0 if targeted else 0.5
    bounds: dict[str, Any] = {"front_first": 0.25, "front_min": 0.005, "front_max": 0.9, "reach": factor}
    bounds |= {"threshold": threshold, "targeted": targeted}
    run(net, batch, backend=backend, steps=steps, callback=seen.append, **bounds)

    def kth(info: StepInfo, rho: float) -> Tensor:
        scores = reference.confidence(info.logits, labels).flatten(1)
        return reference.kth_value(scores, (rho * n).round().long().clamp(min=1)[:, None])[:, 0]

    def kth_of_those_left(info: StepInfo, rho: float) -> Tensor:
        terms = reference.pixel_terms(info.logits, labels, VOID)
        log_odds = reference.signed_confidence(terms, "label").flatten(1)
        left = (log_odds < 0) & (labels != VOID).flatten(1)
        k = (rho * left.sum(1)).round().long().clamp(min=1)[:, None]
        return reference.kth_value(log_odds.abs().where(left, math.inf), k)[:, 0]

    within = held = 0
    for step, info in enumerate(seen):
        assert info.tau is not None
        known = info if threshold == "exact" else seen[max(step - 1, 0)]
        if step < 2:
            first = 0.25 * max(1, math.sqrt(steps / 10))
            expected = kth(known if threshold == "exact" else seen[0], first)
        else:
            last = seen[step - 1].stats
            movement = (last[:, 3] / last[:, 2]).clamp(min=0)
            reach = (factor * movement * math.sqrt(steps - step)).float()
            of_all_or_left = kth_of_those_left if targeted and threshold == "lagged" else kth
            lowest = 0.005 * math.sqrt(steps - step) if targeted else 0.005
            low, high = of_all_or_left(known, lowest), of_all_or_left(known, 0.9)
            expected = reach.clamp(low, high)
            within += int(((low < reach) & (reach < high)).sum())
            before = seen[step - 1].tau
            if step > 2 and before is not None:
                narrowest = 0.9 * math.sqrt((steps - step) / (steps - step + 1)) * before
                held += int((expected < narrowest).sum())
                expected = expected.maximum(narrowest)
        torch.testing.assert_close(info.tau, expected, rtol=1e-5, atol=1e-6)
    assert min(within, held) > 0  # or only the bounds were tried, or none


def test_a_targeted_attack_in_l2_goes_on_while_pixels_are_left() -> None:
    """It comes to 80 % of pgd's pixels, and to 60 % with a floor that does not fall and k-th values of all pixels.

    Those at the boundary then starve the others. With k-th values of the pixels left alone it is 69 %, with the floor
    alone 76 %.
    """
    reached = {"eroseg": 0.0, "pgd": 0.0}
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Conv2d(channels, 16, 3, padding=1) for channels in (3, 16)]
            last = nn.Conv2d(16, 5, 3, padding=1)
            nn.init.normal_(last.weight, std=0.5)
        net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), last)
        images = torch.rand(2, 3, 24, 24, generator=seeded())
        labels = net(images).topk(2, 1).indices[:, 1]
        for method in reached:
            settings = {"method": method, "norm": "l2", "eps": 8.0, "steps": 100, "targeted": True}
            _, info = attack(net, images, labels, generator=seeded(), return_info=True, **settings)
            reached[method] += float((info.correct / info.valid).mean())
    assert reached["eroseg"] > 0.72 * reached["pgd"]


@pytest.mark.parametrize("targeted", [False, True])
def test_stats_hold_the_front_and_how_far_its_pixels_moved_in_a_step(
    net: nn.Module, batch: Batch, backend: str, targeted: bool
) -> None:
    labels = batch[1]
    seen: list[StepInfo] = []
    run(net, batch, backend=backend, targeted=targeted, callback=seen.append)
    log_odds = [reference.signed_confidence(reference.pixel_terms(info.logits, labels, VOID), "label") for info in seen]
    assert not seen[0].stats[:, 3].any()  # nothing has moved yet
    for step in (1, 2):
        stats, tau = seen[step].stats, seen[step].tau
        assert tau is not None
        in_front = (log_odds[step].abs() <= tau.view(-1, 1, 1)) & (labels != VOID)
        lost = (log_odds[step - 1] - log_odds[step]).where(in_front, 0.0).double().sum((1, 2))
        assert torch.equal(stats[:, 2], in_front.sum((1, 2)).double())
        torch.testing.assert_close(stats[:, 3], -lost if targeted else lost, rtol=1e-5, atol=1e-4)
        assert (stats[:, 3] > 0).all()  # the attack goes the right way


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": "exact"},
        {"schedule": "geometric"},
        {"schedule": "linear"},
        {"within": "class", "radius": 2},
        {"confidence": "top"},
        {"front": "hard"},
        {"direction": "ce"},
        {"radius": 0},
        {"slope": 0.3},
        {"front_first": 0.05},
        {"front_min": 0.3},
        {"balance": 0.0},
        {"schedule": "linear", "rho_range": (0.3, 0.1)},
    ],
    ids=name_of,
)
def test_each_setting_of_the_front_has_an_effect(
    net: nn.Module, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    backend = backend_for(settings, backend)
    adversarial, info = run_info(net, batch, backend=backend, steps=4, **settings)
    assert not torch.equal(adversarial, run(net, batch, backend=backend, steps=4))
    assert (info.correct < info.stats[0, 0, :, 1]).all()
    assert outside_ball(adversarial, batch[0], 8 / 255, "linf") <= 1


@pytest.mark.parametrize(("classes", "base", "rounding"), [(1, 1, 1e-5), (2, 1, 1e-5), (4, 25, 0.01)])
def test_multiplied_logits_widen_the_front_and_leave_its_directions(
    make_net: MakeNet, batch: Batch, backend: str, classes: int, base: float, rounding: float
) -> None:
    """25 times the logits are 25 times the log-odds: exactly so with two classes.

    With more of them to within log(C-1), which becomes small beside the logits of a sure model (``base``).
    """
    labels = torch.where(batch[1] == VOID, VOID, batch[1] % max(classes, 2))
    taus: list[Any] = []
    signs: list[Tensor] = []
    for factor in (base, 25 * base):
        model = Spied(nn.Sequential(make_net(classes), Times(factor)))
        info = run_info(model, (batch[0], labels), backend=backend, steps=1, random_start=False)[1]
        taus.append(info.tau)
        signs.append(model.gradients[0].sign())
    torch.testing.assert_close(taus[1], 25 * taus[0], rtol=rounding, atol=0)
    same = (signs[0] == signs[1]).float().mean()
    assert same > (0.999 if classes < 4 else 0.95)  # seen: 1.0 and 0.98


def test_multiplied_logits_turn_the_directions_of_cospgd(make_net: MakeNet, batch: Batch, backend: str) -> None:
    """What the test above is about: the weight of a method that reads probabilities saturates."""
    labels = torch.where(batch[1] == VOID, VOID, batch[1] % 2)
    signs = []
    for factor in (1, 25):
        model = Spied(nn.Sequential(make_net(2), Times(factor)))
        run(model, (batch[0], labels), backend=backend, steps=1, random_start=False, method="cospgd")
        signs.append(model.gradients[0].sign())
    same = (signs[0] == signs[1]).float().mean()
    assert same < 0.8  # seen: 0.65


# Strength.


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has learnt which of three channels is locally the brightest; images and labels to attack."""
    torch.manual_seed(0)
    images = torch.rand(12, 3, *SIZE)
    images = F.avg_pool2d(images, 5, 1, 2) + 0.05 * (images - 0.5)
    labels = F.avg_pool2d(images, 3, 1, 1).argmax(1)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        loss = F.cross_entropy(net(images[:8]), labels[:8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels[:, :2] = VOID
    return net.eval(), images[8:], labels[8:]


def on(device: torch.device, fitted: tuple[nn.Module, Tensor, Tensor]) -> tuple[nn.Module, Batch]:
    net, images, labels = fitted
    return copy.deepcopy(net).to(device), (images.to(device), labels.to(device))


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float(correct_pixels(net(images), labels).sum() / (labels != VOID).sum())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_far_stronger_than_noise(
    fitted: tuple[nn.Module, Tensor, Tensor], device: torch.device, backend: str, method: str, norm: str
) -> None:
    net, (images, labels) = on(device, fitted)
    # In l_2 the same mean square as in l_inf.
    eps = 0.05 if norm == "linf" else 0.05 * math.sqrt(images[0].numel())
    settings: dict[str, Any] = {"backend": backend, "method": method, "eps": eps, "norm": norm, "steps": 6}
    sign = torch.rand(images.shape, generator=seeded()).to(device).sub(0.5).sign()
    noise = accuracy(net, (images + 0.05 * sign).clamp(0, 1), labels)
    attacked = accuracy(net, run(net, (images, labels), **settings), labels)
    assert accuracy(net, images, labels) > 0.85  # seen: 0.87
    assert noise > 0.8  # seen: 0.83
    assert attacked < noise - 0.3  # seen: 0.16 to 0.45


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_pixels_to_the_wanted_class(
    fitted: tuple[nn.Module, Tensor, Tensor], device: torch.device, backend: str, method: str
) -> None:
    net, (images, labels) = on(device, fitted)
    wanted = torch.where(labels == VOID, VOID, (labels + 1) % 3)
    adversarial = run(net, (images, wanted), backend=backend, method=method, eps=0.05, steps=6, targeted=True)
    before, after = accuracy(net, images, wanted), accuracy(net, adversarial, wanted)
    assert after > before + 0.3  # seen: 0.07 before, 0.54 to 0.61 after
