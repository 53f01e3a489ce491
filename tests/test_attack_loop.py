"""The loop: how the work is divided, which iterate is returned, what is told on the way."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from attack_common import (
    EPS,
    Batch,
    Counted,
    Spied,
    correct_pixels,
    name_of,
    run,
    run_info,
    seeded,
)
from conftest import SIZE, VOID
from torch import Tensor, nn

from eroseg_ext import StepInfo, attack, strong_attack
from eroseg_ext.attacks.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

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
    assert torch.equal(parts_info.correct, whole_info.correct)
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
    assert info.correct.shape == (0,)


VARIANTS: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    *({"method": method, "targeted": True} for method in METHODS),
    {"method": "tsallis", "q": 1.5},
    {"norm": "l2", "eps": EPS["l2"]},
    {"confidence": "top"},
    {"front": "hard"},
    {"direction": "ce"},
    {"threshold": "exact"},
    {"schedule": "geometric"},
    {"radius": 0},
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
    assert ((fused_info.correct - plain_info.correct).abs() <= 2).all()
    assert torch.equal(fused_info.valid, plain_info.valid)


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"radius": 3, "slope": 0.25}, "radius=3"),
        ({"within": "class"}, "within='class'"),
        ({"method": "cospgd", "variant": "sigmoid"}, "variant='sigmoid'"),
    ],
    ids=name_of,
)
def test_an_option_that_is_not_fused_is_computed_by_the_reference(
    net: nn.Module, batch: Batch, fused: str, settings: dict[str, Any], option: str
) -> None:
    results = [run(net, batch, backend=name, **settings) for name in ("auto", "reference")]
    assert torch.equal(*results)
    model = Spied(net)
    for call in (attack, strong_attack):
        with pytest.raises(RuntimeError, match=f"^backend is 'fused', but {option} is computed by the reference only$"):
            call(model, *batch, backend=fused, **settings)
    assert not model.gradients


# Which iterate is returned.


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_best_is_never_worse_than_last(net: nn.Module, batch: Batch, backend: str, method: str, targeted: bool) -> None:
    # Steps as long as the ball's diameter jump to and fro, so that the last iterate is often not the best.
    settings: dict[str, Any] = {"backend": backend, "method": method, "targeted": targeted, "step_size": 16 / 255}
    _, last = run_info(net, batch, **settings)
    adversarial, best = run_info(net, batch, keep="best", **settings)
    assert torch.equal(best.correct, correct_pixels(net.eval()(adversarial), batch[1]))
    assert torch.equal(best.stats, last.stats)
    seen = torch.cat([last.stats[0, :, :, 1], last.correct[None]])
    assert torch.equal(best.correct, seen.amax(0) if targeted else seen.amin(0))


def test_an_image_keeps_its_best_restart(net: nn.Module, batch: Batch, backend: str) -> None:
    ends: list[Tensor] = []

    def note(info: StepInfo) -> None:
        if info.step == 2:
            ends.append(info.adversarial.clone())

    adversarial, info = run_info(net, batch, backend=backend, restarts=4, callback=note)
    correct = torch.stack([correct_pixels(net.eval()(end), batch[1]) for end in ends])
    assert correct.unique(dim=0).shape[0] > 1  # the restarts are not all the same
    assert torch.equal(info.correct, correct.amin(0))
    assert torch.equal(correct_pixels(net(adversarial), batch[1]), info.correct)


def test_the_first_restart_is_the_attack_without_restarts(net: nn.Module, batch: Batch, backend: str) -> None:
    _, one = run_info(net, batch, backend=backend)
    _, three = run_info(net, batch, backend=backend, restarts=3)
    assert torch.equal(three.stats[:1], one.stats)
    assert (three.correct <= one.correct).all()


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


@pytest.fixture(params=[False, True], ids=["images leave the batch", "images stay in the batch"])
def stays(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether images that are done stay in the batch, as they do where the host would wait to know; on a GPU always."""
    if device.type != "cpu" and not request.param:
        pytest.skip("reading the counts would make the host wait")
    module = importlib.import_module("eroseg_ext.attacks.pgd")  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "_host_waits", lambda device: request.param)
    return bool(request.param)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_early_stop_freezes_images_that_are_done_and_no_others(
    halves: Batch, backend: str, norm: str, targeted: bool, micro_batch: int | None, stays: bool
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
    assert full_info.correct[1] != done
    for image in (0, 2):
        # The step at which the image was found done; its images before that step are what it keeps.
        end = int((full_info.stats[0, :, image, 1] == done).nonzero()[0])
        assert 0 < end < 6
        assert torch.equal(stopped[image], iterates[end - 1][image])
        assert info.correct[image] == done
        assert torch.equal(info.stats[0, : end + 1, image], full_info.stats[0, : end + 1, image])
        assert not info.stats[0, end + 1 :, image].any()
        assert stays or sum(image in images for images in seen) == end + 1
    assert sum(1 in images for images in seen) == 6


def test_early_stop_ends_when_every_image_is_done(halves: Batch, backend: str, stays: bool) -> None:
    model = Counted(Halves())
    images, labels = halves[0][:1], halves[1][:1]
    attack(model, images, labels, steps=50, random_start=False, early_stop=True, backend=backend)
    # Done is what the second pass finds; where images stay in the batch, the host learns it a pass later or more.
    assert model.calls == 2 if not stays else 2 < model.calls < 50


def test_early_stop_goes_on_with_each_images_own_mask_labels_and_front(
    pixelwise: nn.Module, batch: Batch, backend: str, stays: bool
) -> None:
    images, labels = batch
    labels[0] = VOID  # done at once: the others' rows move up
    mask = torch.rand(3, 1, *SIZE, generator=seeded()).to(images.device) < 0.8
    for method in ("eroseg", "mce_bal"):
        settings: dict[str, Any] = {"backend": backend, "mask": mask, "method": method}
        assert torch.equal(
            run(pixelwise, (images, labels), early_stop=True, **settings), run(pixelwise, (images, labels), **settings)
        )


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
    assert (info.correct.shape, info.correct.dtype) == ((3,), torch.float64)
    assert (info.valid.shape, info.valid.dtype) == ((3,), torch.float64)
    if method == "eroseg":
        assert info.tau is not None
        assert (info.tau.shape, info.tau.dtype) == ((2, 3, 3), torch.float32)
        assert (info.tau > 0).all()
    else:
        assert info.tau is None
    assert {tensor.device for tensor in (info.stats, info.correct, info.valid)} == {batch[0].device}


def test_info_does_not_change_the_result(net: nn.Module, batch: Batch, backend: str) -> None:
    assert torch.equal(run_info(net, batch, backend=backend)[0], run(net, batch, backend=backend))


def test_info_of_an_attack_of_no_radius_counts_the_clean_images(net: nn.Module, batch: Batch, backend: str) -> None:
    _, info = run_info(net, batch, backend=backend, eps=0)
    assert torch.equal(info.correct, correct_pixels(net.eval()(batch[0]), batch[1]))


@pytest.mark.parametrize("settings", [{}, {"restarts": 2, "micro_batch": 2}])
def test_progress_shows_a_bar_that_ends_full(
    net: nn.Module, batch: Batch, capfd: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    run(net, batch, progress=True, **settings)
    total = 3 * settings.get("restarts", 1) * (2 if settings else 1)
    assert f"{total}/{total}" in capfd.readouterr().err
    run(net, batch, **settings)
    assert capfd.readouterr().err == ""


def test_progress_ends_full_after_an_early_stop(halves: Batch, stays: bool, capfd: pytest.CaptureFixture[str]) -> None:
    attack(Halves(), halves[0][:1], halves[1][:1], steps=20, early_stop=True, progress=True)
    assert "20/20" in capfd.readouterr().err
