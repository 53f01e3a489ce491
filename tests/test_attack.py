"""What :func:`eroseg_ext.attack` guarantees, on every device and with both backends."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, SIZE, VOID
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import eroseg_ext
from eroseg_ext import AttackInfo, StepInfo, attack, reference
from eroseg_ext.settings import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

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


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0."""
    integer = torch.int32 if left.dtype == torch.float32 else torch.int16
    return left.dtype == right.dtype and torch.equal(left.view(integer), right.view(integer))


def right_pixels(logits: Tensor, labels: Tensor) -> Tensor:
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


class Pixelwise(nn.Module):
    """Four classes that read one channel each: no sum is long enough for its order to matter.

    An image's result then depends neither on its neighbours in the batch nor on the memory layout, to the last bit,
    which convolutions do not promise.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([4.0, 3.0, 5.0, -2.0]).view(1, 4, 1, 1))
        self.register_buffer("bias", torch.tensor([0.0, 0.25, -0.5, 2.5]).view(1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, images[:, :1]], 1) * self.gain + self.bias


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


@pytest.fixture
def pixelwise(device: torch.device) -> nn.Module:
    return Pixelwise().to(device)


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
        assert torch.equal(other_info.right, info.right)


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
    assert torch.equal(info.right, right_pixels(net.eval()(adversarial), labels))
    for step in steps:
        assert torch.equal(step.stats[:, 0], valid)
        assert torch.equal(step.stats[:, 1], right_pixels(step.logits, labels))


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

    run(model, (batch[0], labels), backend=backend, targeted=targeted, ignore_index=ignore_index, **settings)
    assert len(pairs) == 3
    if "balanced" in options:
        options = {"class_weight": reference.class_balance(labels, CLASSES, ignore_index=ignore_index)}
    for step, (logits, grad) in enumerate(pairs):
        expected, _ = reference.pixel_grad(
            logits, labels, op_method, step / 3, ignore_index=ignore_index, targeted=targeted, **options
        )
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


# How the work is divided.


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
@pytest.mark.parametrize("settings", [{}, {"method": "mce_bal"}, {"norm": "l2"}, {"restarts": 2, "keep": "best"}])
def test_micro_batches_give_the_whole_batchs_result(
    pixelwise: nn.Module, batch: Batch, backend: str, micro_batch: int, settings: dict[str, Any]
) -> None:
    mask = torch.rand(3, 1, *SIZE, generator=seeded()).to(batch[0].device) < 0.8
    whole, whole_info = run_info(pixelwise, batch, backend=backend, mask=mask, **settings)
    parts, parts_info = run_info(pixelwise, batch, backend=backend, mask=mask, micro_batch=micro_batch, **settings)
    assert torch.equal(parts, whole)
    assert torch.equal(parts_info.right, whole_info.right)
    assert torch.equal(parts_info.stats, whole_info.stats)
    if whole_info.tau is not None and parts_info.tau is not None:
        assert torch.equal(parts_info.tau, whole_info.tau)


def test_micro_batch_is_the_largest_number_of_images_in_a_forward(net: nn.Module, batch: Batch, backend: str) -> None:
    sizes = []
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    attack(net, batch[0], None, steps=2, micro_batch=2, backend=backend, return_info=True)
    assert set(sizes) == {1, 2}


@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_of_no_images_comes_back(pixelwise: nn.Module, batch: Batch, backend: str, labelled: bool) -> None:
    images, labels = batch[0][:0], batch[1][:0]
    adversarial, info = attack(pixelwise, images, labels if labelled else None, return_info=True, backend=backend)
    assert adversarial.shape == images.shape
    assert info.right.shape == (0,)


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


VARIANTS: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    *({"method": method, "targeted": True} for method in METHODS),
    {"method": "cospgd", "variant": "sigmoid"},
    {"method": "tsallis", "q": 1.5},
    {"norm": "l2", "eps": EPS["l2"]},
    {"confidence": "top"},
    {"front": "hard"},
    {"direction": "ce"},
    {"within": "class"},
    {"threshold": "exact"},
    {"schedule": "geometric"},
    {"radius": 3, "slope": 0.25},
    {"preset": "progressive"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=name_of)
def test_fused_equals_reference_in_the_first_step(
    net: nn.Module, batch: Batch, fused: str, settings: dict[str, Any]
) -> None:
    images, labels = batch
    gradients, results, infos = [], [], []
    for name in (fused, "reference"):
        model = Spied(net)
        adversarial, info = run_info(model, (images, labels), backend=name, steps=1, random_start=False, **settings)
        gradients.append(model.gradients[0])
        results.append(adversarial)
        infos.append(info)
    assert torch.equal(infos[0].stats[..., :2], infos[1].stats[..., :2])
    if infos[0].tau is not None and infos[1].tau is not None:
        torch.testing.assert_close(infos[0].tau, infos[1].tau, rtol=1e-5, atol=0)
    # The network sums a few dozen entries of G per pixel: rounding is that of the largest terms, not of the sum.
    rounding = 1e-5 * gradients[1].abs().amax((1, 2, 3), keepdim=True)
    assert ((gradients[0] - gradients[1]).abs() <= rounding).all()
    # A sign step may differ only where the gradient's sign is within that rounding.
    differs = (results[0] - results[1]).abs() > 1e-6
    assert (gradients[1].abs() <= rounding)[differs].all()


@pytest.mark.parametrize("settings", VARIANTS, ids=name_of)
def test_fused_equals_reference_over_several_steps(
    net: nn.Module, batch: Batch, fused: str, settings: dict[str, Any]
) -> None:
    (result, fused_info), (plain, plain_info) = (
        run_info(net, batch, backend=name, steps=6, **settings) for name in (fused, "reference")
    )
    # A sign that rounding flips moves a pixel by 2 alpha, and its neighbours' gradients follow a little: a dozen of the
    # 4320 values may differ. Seen over four networks: none.
    assert ((result - plain).abs() > 1e-5).sum() <= 12
    assert ((fused_info.right - plain_info.right).abs() <= 2).all()
    assert torch.equal(fused_info.valid, plain_info.valid)


# Which iterate is returned.


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_best_is_never_worse_than_last(net: nn.Module, batch: Batch, backend: str, method: str, targeted: bool) -> None:
    # Steps as long as the ball's diameter jump to and fro, so that the last iterate is often not the best.
    settings: dict[str, Any] = {"backend": backend, "method": method, "targeted": targeted, "step_size": 16 / 255}
    _, last = run_info(net, batch, **settings)
    adversarial, best = run_info(net, batch, keep="best", **settings)
    assert torch.equal(best.right, right_pixels(net.eval()(adversarial), batch[1]))
    assert torch.equal(best.stats, last.stats)
    seen = torch.cat([last.stats[0, :, :, 1], last.right[None]])
    assert torch.equal(best.right, seen.amax(0) if targeted else seen.amin(0))


def test_an_image_keeps_its_best_restart(net: nn.Module, batch: Batch, backend: str) -> None:
    ends: list[Tensor] = []

    def note(info: StepInfo) -> None:
        if info.step == 2:
            ends.append(info.adversarial.clone())

    adversarial, info = run_info(net, batch, backend=backend, restarts=4, callback=note)
    right = torch.stack([right_pixels(net.eval()(end), batch[1]) for end in ends])
    assert right.unique(dim=0).shape[0] > 1  # the restarts are not all the same
    assert torch.equal(info.right, right.amin(0))
    assert torch.equal(right_pixels(net(adversarial), batch[1]), info.right)


def test_the_first_restart_is_the_attack_without_restarts(net: nn.Module, batch: Batch, backend: str) -> None:
    _, one = run_info(net, batch, backend=backend)
    _, three = run_info(net, batch, backend=backend, restarts=3)
    assert torch.equal(three.stats[:1], one.stats)
    assert (three.right <= one.right).all()


class Halves(nn.Module):
    """Two classes, decided by whether the first channel is above one half."""

    def forward(self, images: Tensor) -> Tensor:
        above = 8 * (images[:, :1] - 0.5)
        return torch.cat([-above, above], 1)


@pytest.fixture
def halves(device: torch.device) -> Batch:
    """For :class:`Halves`: image 0 flips in the first steps, image 1 never, image 2 in later steps."""
    side = torch.where(torch.rand(3, 1, *SIZE, generator=seeded()) < 0.5, -1.0, 1.0)
    distance = torch.tensor([0.002, 0.2, 0.018]).view(3, 1, 1, 1)
    return (0.5 + side * distance).expand(3, 3, -1, -1).contiguous().to(device), (side[:, 0] > 0).long().to(device)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_early_stop_freezes_images_that_are_done_and_no_others(
    halves: Batch, backend: str, norm: str, targeted: bool, micro_batch: int | None
) -> None:
    images, labels = halves
    labels = 1 - labels if targeted else labels
    eps = 8 / 255 * (1 if norm == "linf" else math.sqrt(SIZE[0] * SIZE[1]))
    settings: dict[str, Any] = {"norm": norm, "eps": eps, "steps": 6, "targeted": targeted, "backend": backend}
    settings |= {"random_start": False, "micro_batch": micro_batch}
    done = labels[0].numel() if targeted else 0
    iterates: list[Tensor] = []
    full, full_info = run_info(
        Halves(), (images, labels), callback=lambda info: iterates.append(info.adversarial.clone()),
        **settings | {"micro_batch": None},
    )  # fmt: skip
    seen: list[list[int]] = []
    stopped, info = run_info(
        Halves(), (images, labels), callback=lambda step: seen.append(step.images.tolist()), early_stop=True, **settings
    )
    assert torch.equal(stopped[1], full[1])
    assert full_info.right[1] != done
    for image in (0, 2):
        # The step at which the image was found done; its images before that step are what it keeps.
        end = int((full_info.stats[0, :, image, 1] == done).nonzero()[0])
        assert 0 < end < 6
        assert torch.equal(stopped[image], iterates[end - 1][image])
        assert info.right[image] == done
        assert torch.equal(info.stats[0, : end + 1, image], full_info.stats[0, : end + 1, image])
        assert not info.stats[0, end + 1 :, image].any()
        assert sum(image in images for images in seen) == end + 1
    assert sum(1 in images for images in seen) == 6


def test_early_stop_ends_when_every_image_is_done(halves: Batch, backend: str) -> None:
    model = Counted(Halves())
    images, labels = halves[0][:1], halves[1][:1]
    attack(model, images, labels, steps=50, random_start=False, early_stop=True, backend=backend)
    assert model.calls == 2


def test_early_stop_goes_on_with_each_images_own_mask_labels_and_front(
    pixelwise: nn.Module, batch: Batch, backend: str
) -> None:
    images, labels = batch
    labels[0] = VOID  # done at once: the others' rows move up
    mask = torch.rand(3, 1, *SIZE, generator=seeded()).to(images.device) < 0.8
    for method in ("eroseg", "mce_bal"):
        settings: dict[str, Any] = {"backend": backend, "mask": mask, "method": method}
        assert torch.equal(
            run(pixelwise, (images, labels), early_stop=True, **settings), run(pixelwise, (images, labels), **settings)
        )


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
    assert (info.right < info.valid).all()


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
    assert (info.right < info.stats[0, 0, :, 1]).all()


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
    assert ((one_info.right - two_info.right).abs() <= 1).all()
    assert (one_info.right.sum() > one_info.stats[0, 0, :, 1].sum()) == targeted


def test_smaller_logits_are_upsampled_bilinearly(make_net: MakeNet, batch: Batch, backend: str) -> None:
    net = make_net(stride=2).eval()

    def wrapped(images: Tensor) -> Tensor:
        return F.interpolate(net(images), size=SIZE, mode="bilinear", align_corners=False)

    seen: list[StepInfo] = []
    adversarial = run(net, batch, backend=backend, callback=seen.append)
    assert seen[0].logits.shape == (3, CLASSES, *SIZE)
    # The backward of the upsampling is not deterministic on CUDA.
    assert ((adversarial - run(wrapped, batch, backend=backend)).abs() > 1e-6).float().mean() < 0.005


# What is told.


@pytest.mark.parametrize("method", ["eroseg", "segpgd"])
def test_callback_is_told_what_step_info_says(net: nn.Module, batch: Batch, backend: str, method: str) -> None:
    seen: list[StepInfo] = []
    ends: list[Tensor] = []

    def callback(info: StepInfo) -> None:
        seen.append(info)
        ends.append(info.adversarial.clone())

    adversarial, info = run_info(
        net, batch, backend=backend, method=method, restarts=2, micro_batch=2, callback=callback
    )
    order = [(s.restart, s.step, s.images.tolist()) for s in seen]
    assert order == [(r, t, part) for r in range(2) for part in ([0, 1], [2]) for t in range(3)]
    net.eval()
    for index, step in enumerate(seen):
        assert torch.equal(step.stats, info.stats[step.restart, step.step, step.images])
        if info.tau is None:
            assert step.tau is None
        else:
            assert step.tau is not None
            assert torch.equal(step.tau, info.tau[step.restart, step.step, step.images])
        assert not step.logits.requires_grad
        assert ends[index].dtype == torch.float32
        if step.step > 0:
            # The logits are those of the images that the step before left.
            assert torch.equal(step.logits, net(ends[index - 1]))
    # The last iterates of the two restarts: each image keeps one of them.
    lasts = [torch.cat([ends[3 * part + 2] for part in (2 * restart, 2 * restart + 1)]) for restart in range(2)]
    assert all(any(torch.equal(adversarial[i], last[i]) for last in lasts) for i in range(3))


@pytest.mark.parametrize("method", METHODS)
def test_info_has_a_row_per_restart_step_and_image(net: nn.Module, batch: Batch, backend: str, method: str) -> None:
    _, info = run_info(net, batch, backend=backend, method=method, restarts=2)
    assert (info.stats.shape, info.stats.dtype) == ((2, 3, 3, 4), torch.float64)
    assert (info.right.shape, info.right.dtype) == ((3,), torch.float64)
    assert (info.valid.shape, info.valid.dtype) == ((3,), torch.float64)
    if method == "eroseg":
        assert info.tau is not None
        assert (info.tau.shape, info.tau.dtype) == ((2, 3, 3), torch.float32)
        assert (info.tau > 0).all()
    else:
        assert info.tau is None
    assert {tensor.device for tensor in (info.stats, info.right, info.valid)} == {batch[0].device}


def test_info_does_not_change_the_result(net: nn.Module, batch: Batch, backend: str) -> None:
    assert torch.equal(run_info(net, batch, backend=backend)[0], run(net, batch, backend=backend))


def test_info_of_an_attack_of_no_radius_counts_the_clean_images(net: nn.Module, batch: Batch, backend: str) -> None:
    _, info = run_info(net, batch, backend=backend, eps=0)
    assert torch.equal(info.right, right_pixels(net.eval()(batch[0]), batch[1]))


@pytest.mark.parametrize("settings", [{}, {"restarts": 2, "micro_batch": 2}])
def test_progress_shows_a_bar_that_ends_full(
    net: nn.Module, batch: Batch, capfd: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    run(net, batch, progress=True, **settings)
    total = 3 * settings.get("restarts", 1) * (2 if settings else 1)
    assert f"{total}/{total}" in capfd.readouterr().err
    run(net, batch, **settings)
    assert capfd.readouterr().err == ""


def test_progress_ends_full_after_an_early_stop(halves: Batch, capfd: pytest.CaptureFixture[str]) -> None:
    attack(Halves(), halves[0][:1], halves[1][:1], steps=20, early_stop=True, progress=True)
    assert "20/20" in capfd.readouterr().err


# EroSeg's settings.


def test_preset_progressive_is_the_settings_it_stands_for(net: nn.Module, batch: Batch, backend: str) -> None:
    spelled = {"confidence": "top", "front": "hard", "direction": "ce", "radius": 1, "schedule": "linear"}
    expected = run(net, batch, backend=backend, **spelled)
    assert torch.equal(run(net, batch, backend=backend, preset="progressive"), expected)
    assert not torch.equal(run(net, batch, backend=backend), expected)


def test_a_keyword_beside_a_preset_wins(net: nn.Module, batch: Batch, backend: str) -> None:
    spelled = {"confidence": "top", "front": "soft", "direction": "ce", "radius": 1, "schedule": "linear"}
    expected = run(net, batch, backend=backend, **spelled)
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
def test_the_front_is_as_wide_as_the_movement_that_is_left(
    net: nn.Module, batch: Batch, backend: str, threshold: str, targeted: bool
) -> None:
    labels = batch[1]
    n = (labels != VOID).sum((1, 2))
    seen: list[StepInfo] = []
    bounds = {"front_first": 0.25, "front_min": 0.02, "front_max": 0.9, "reach": 0.5}
    run(net, batch, backend=backend, steps=6, threshold=threshold, targeted=targeted, callback=seen.append, **bounds)

    def kth(info: StepInfo, rho: float) -> Tensor:
        scores = reference.confidence(info.logits, labels).flatten(1)
        return reference.kth_value(scores, (rho * n).round().long()[:, None])[:, 0]

    within = 0
    for step, info in enumerate(seen):
        assert info.tau is not None
        known = info if threshold == "exact" else seen[max(step - 1, 0)]
        if step < 2:
            expected = kth(known if threshold == "exact" else seen[0], 0.25)
        else:
            last = seen[step - 1].stats
            movement = (last[:, 3] / last[:, 2]).clamp(min=0)
            reach = (0.5 * movement * math.sqrt(6 - step)).float()
            low, high = kth(known, 0.02), kth(known, 0.9)
            expected = reach.clamp(low, high)
            within += int(((low < reach) & (reach < high)).sum())
        torch.testing.assert_close(info.tau, expected, rtol=1e-5, atol=1e-6)
    assert within > 0  # or only the bounds were tried


@pytest.mark.parametrize("targeted", [False, True])
def test_stats_hold_the_front_and_how_far_its_pixels_moved_in_a_step(
    net: nn.Module, batch: Batch, backend: str, targeted: bool
) -> None:
    labels = batch[1]
    seen: list[StepInfo] = []
    run(net, batch, backend=backend, targeted=targeted, callback=seen.append)
    log_odds = [reference.pixel_terms(info.logits, labels, VOID).log_odds for info in seen]
    assert not seen[0].stats[:, 3].any()  # nothing has moved yet
    for step in (1, 2):
        stats, tau = seen[step].stats, seen[step].tau
        assert tau is not None
        in_front = (log_odds[step].abs() <= tau.view(-1, 1, 1)) & (labels != VOID)
        lost = ((log_odds[step - 1] - log_odds[step]) * in_front).double().sum((1, 2))
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
        {"schedule": "linear", "rho_range": (0.3, 0.1)},
    ],
    ids=name_of,
)
def test_each_setting_of_the_front_has_an_effect(
    net: nn.Module, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    adversarial, info = run_info(net, batch, backend=backend, steps=4, **settings)
    assert not torch.equal(adversarial, run(net, batch, backend=backend, steps=4))
    assert (info.right < info.stats[0, 0, :, 1]).all()
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
    return float(right_pixels(net(images), labels).sum() / (labels != VOID).sum())


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
    settings: dict[str, Any] = {"eps": 0.02, "steps": 2, "backend": backend}
    bound = kind(net, **settings, **keywords)
    extra = {key: value for key, value in keywords.items() if key != "balanced"}
    expected = attack(net, *batch, method=method, generator=seeded(), **settings, **extra)
    # Twice: a call leaves the settings as they were.
    assert torch.equal(bound(*batch, generator=seeded()), expected)
    assert torch.equal(bound(*batch, generator=seeded()), expected)
    adversarial, info = bound(*batch, generator=seeded(), return_info=True)
    assert torch.equal(adversarial, expected)
    assert info.stats.shape == (1, 2, 3, 4)
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


# Broken models.


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0, 2, 4])
def test_logits_that_are_not_finite_are_reported_at_the_end(
    net: nn.Module, all_valid: Batch, backend: str, method: str, step: int, value: float
) -> None:
    model = Sabotaged(net, step, 1, value)
    with pytest.raises(RuntimeError, match=rf"logits are NaN or infinite at step {step} for image 1$"):
        run(model, all_valid, backend=backend, method=method, steps=5)
    assert model.calls == 5


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


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 1, "restarts": 2, "keep": "best"}], ids=name_of)
def test_probabilities_are_warned_of_once(net: nn.Module, batch: Batch, backend: str, settings: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(lambda images: net(images).softmax(1), batch, backend=backend, **settings)
    assert [warning.category for warning in seen] == [UserWarning]
    assert "looks like probabilities" in str(seen[0].message)


def test_the_warning_of_probabilities_points_at_the_caller(net: nn.Module, batch: Batch) -> None:
    with pytest.warns(UserWarning, match="probabilities") as seen:
        attack(lambda images: net(images).softmax(1), *batch, steps=1)
    assert seen[0].filename == __file__


def test_logits_are_not_warned_of(net: nn.Module, batch: Batch, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, batch, backend=backend)
        run(lambda images: net(images).abs(), batch, backend=backend)


# What the loop costs.


class HostSyncs(TorchDispatchMode):
    """Counts what makes the host wait for the device, or the device for the host.

    Reading a value (``_local_scalar_dense`` is ``.item()``), shapes that depend on data (``nonzero`` and indexing by a
    bool mask), copies between devices, and tensors made from Python values (``lift_fresh``: an upload).
    """

    NAMES: ClassVar[set[str]] = {
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
        *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "lift_fresh"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name in self.NAMES:
            self.seen[name] += 1
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            self.seen["index by mask"] += any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
            source = args[1] if name == "copy_" else args[0]
            self.seen["copy between devices"] += source.device != result.device
        return result


LOOPS: list[dict[str, Any]] = [
    {},
    {"method": "mce_bal"},
    {"norm": "l2", "eps": EPS["l2"]},
    {"keep": "best", "restarts": 2},
    {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]},
    {"threshold": "exact", "confidence": "top", "within": "class"},
    {"preset": "progressive"},
    {"autocast": torch.bfloat16, "micro_batch": 2},
]


@pytest.mark.parametrize("settings", LOOPS, ids=name_of)
def test_steps_do_not_wait_for_the_device(
    make_net: MakeNet, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    net = make_net(stride=2)
    mask = torch.ones(3, 1, *SIZE, dtype=torch.bool, device=batch[0].device)
    counts = []
    for steps in (2, 7):
        with HostSyncs() as syncs:
            run(net, batch, backend=backend, mask=mask, steps=steps, callback=lambda info: None, **settings)
        counts.append(+syncs.seen)
    assert counts[0] == counts[1]
    assert counts[0].total() > 0  # the checks before and after the loop do read values


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA itself")
@pytest.mark.parametrize("settings", LOOPS, ids=name_of)
def test_cuda_sees_no_synchronisation_in_the_steps(
    make_net: MakeNet, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    if batch[0].device.type != "cuda":
        pytest.skip("asks CUDA itself")
    counts = []
    for steps in (2, 2, 7):  # the first run also loads libraries
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(make_net(), batch, backend=backend, steps=steps, generator=None, **settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in seen))
    assert counts[1] == counts[2]


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once in storages of at least ``least`` bytes made under this mode.

    A storage counts from the operation that returns it until its last tensor is gone. What an operation allocates and
    frees inside itself is not seen.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least = least
        self._known: dict[int, weakref.ref] = {}
        self._live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size < self._least or key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self._live -= size

        self._known[key] = weakref.ref(storage, gone)
        self._live += size
        self.peak = max(self.peak, self._live)


@pytest.mark.parametrize("upsampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"threshold": "exact", "confidence": "top", "within": "class"},
        {"method": "mce_bal", "norm": "l2"},
        {"keep": "best", "restarts": 2, "return_info": True},
        {"labels": None},
        {"labels": None, "micro_batch": 1},
    ],
    ids=name_of,
)
def test_no_step_holds_more_than_one_buffer_of_the_logits_size_beyond_the_models_own(
    make_net: MakeNet, batch: Batch, fused: str, settings: dict[str, Any], dtype: torch.dtype, upsampled: bool
) -> None:
    """The attack's peak against that of the barest loop, counting storages as large as the logits or larger.

    The bare loop is what the user's model costs by itself: a forward pass and a backward pass to the images from a
    gradient that exists before, with the logits dropped in between. The attack may add its gradient buffer, and nothing
    else of that size: not a copy of the logits, not those of the step before. Maps without a class dimension (log-odds)
    and images are smaller, by the number of classes, and left out; so are tensors of a step's own that die inside one
    operation. The reference makes one such tensor per line and is not meant to hold this.
    """
    # So many that even an image's logits in half precision are larger than the whole batch of images in float32.
    classes = 32
    net = make_net(classes, stride=2 if upsampled else 1).eval().to(dtype)
    images, labels = batch[0].to(dtype), batch[1]
    together = settings.get("micro_batch", 3)
    size = (together, classes, *SIZE)
    one = math.prod(size) * dtype.itemsize
    for parameter in net.parameters():
        parameter.requires_grad_(False)

    def forward(x: Tensor) -> Tensor:
        logits = net(x)
        return F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False) if upsampled else logits

    kept = torch.randn(size, device=images.device).to(dtype)
    with LiveBytes(one) as bare:
        for _ in range(3):
            leaf = images[:together].detach().requires_grad_()
            logits = forward(leaf)
            torch.autograd.grad(logits, leaf, kept)
            del logits
    assert bare.peak >= one
    arguments: dict[str, Any] = {"labels": labels, "steps": 4, "backend": fused} | settings
    with LiveBytes(one) as attacked:
        attack(net, images, **arguments)
    assert attacked.peak <= bare.peak + one


def test_the_gradient_buffer_is_kept_over_the_steps(net: nn.Module, batch: Batch, fused: str) -> None:
    """A fresh buffer costs more in page faults than filling it does."""
    addresses = set()
    original = torch.autograd.grad

    def spy(outputs: Tensor, inputs: Tensor, grad_outputs: Tensor) -> tuple[Tensor, ...]:
        addresses.add(grad_outputs.data_ptr())
        return original(outputs, inputs, grad_outputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", spy)
        run(net, batch, backend=fused, steps=5, restarts=2)
    assert len(addresses) == 1
