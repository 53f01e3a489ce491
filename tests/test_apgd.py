"""The evaluation-grade attack: its guarantees, its schedule, and that it is stronger than plain steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attack_common import Batch, Counted, outside_ball, right_pixels, same_bits, seeded
from conftest import VOID
from test_attack_costs import HostSyncs
from torch import Tensor, nn

from eroseg_ext import attack, strong_attack
from eroseg_ext.apgd import NOT_OF_APGD, RADII, _checkpoints, phases
from eroseg_ext.data import generated_scenes
from eroseg_ext.demo import DemoSettings, load_task, train
from eroseg_ext.settings import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = {"linf": 8 / 255, "l2": 0.5}


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained for some seconds on drawn scenes, with four scenes that it has not seen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task = load_task(DemoSettings(quick=True, size=(48, 64)))
    model = train(task, 60, 0, torch.device("cpu"))
    scenes = generated_scenes(4, (48, 64), seed=99)
    torch.set_num_threads(threads)
    return model, scenes.images, scenes.labels


@pytest.mark.parametrize("radii", RADII)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 100])
def test_phases_share_the_steps(steps: int, radii: str) -> None:
    found = phases(0.5, steps, radii)
    assert sum(phase.steps for phase in found) == steps
    assert found[0].first == 0
    assert all(after.first == before.first + before.steps for before, after in pairwise(found))
    # However few steps there are, some are taken in the ball that counts.
    assert found[-1].radius == 0.5
    assert all(phase.steps > 0 for phase in found)


def test_phases_of_sea() -> None:
    found = phases(1.0, 300, "shrinking")
    assert [(phase.radius, phase.steps) for phase in found] == [(2.0, 90), (1.5, 90), (1.0, 120)]
    assert phases(1.0, 0) == []


def test_checkpoints_of_apgd() -> None:
    # Croce & Hein 2020, with 100 steps: after 22 %, then intervals that shorten by 3 % down to 6 %.
    assert _checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)


@pytest.mark.parametrize("radii", RADII)
@pytest.mark.parametrize("method", METHODS)
def test_stays_in_the_ball(net: nn.Module, batch: Batch, method: str, radii: str, backend: str) -> None:
    found = strong_attack(net, *batch, method=method, steps=7, radii=radii, backend=backend)
    assert outside_ball(found, batch[0], EPS["linf"], "linf") <= 1
    assert found.amin() >= 0
    assert found.amax() <= 1
    assert not torch.equal(found, batch[0])


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_larger_balls_end_in_the_ball(net: nn.Module, batch: Batch, norm: str, steps: int) -> None:
    found = strong_attack(net, *batch, eps=EPS[norm], norm=norm, steps=steps, radii="shrinking")
    assert outside_ball(found, batch[0], EPS[norm], norm) <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_mask_void_and_zero_eps_keep_the_input(net: nn.Module, batch: Batch, norm: str) -> None:
    images, labels = batch
    labels = labels.clone()
    labels[1] = VOID
    mask = torch.zeros(3, 1, *images.shape[-2:], dtype=torch.bool, device=images.device)
    mask[..., 5:] = True
    found = strong_attack(net, images, labels, eps=EPS[norm], norm=norm, steps=6, mask=mask)
    assert same_bits(found[1], images[1])
    assert same_bits(found[..., :5], images[..., :5])
    assert not torch.equal(found[0], images[0])
    assert same_bits(strong_attack(net, images, labels, eps=0, norm=norm, steps=6), images)


@pytest.mark.parametrize("radii", RADII)
def test_returns_the_best_iterate_in_the_ball(net: nn.Module, batch: Batch, radii: str) -> None:
    net.eval()
    found, info = strong_attack(net, *batch, steps=20, restarts=2, radii=radii, return_info=True)
    right = right_pixels(net(found), batch[1])
    assert torch.equal(right, info.right)
    # Iterates of the larger balls may have had fewer; those of the last phase may not.
    last = phases(8 / 255, 20, radii)[-1].first
    assert (right <= info.stats[:, last:, :, 1].amin((0, 1))).all()
    assert torch.equal(info.valid, (batch[1] != VOID).sum((1, 2)).double())


def test_fused_is_the_reference(net: nn.Module, batch: Batch, fused: str) -> None:
    one = strong_attack(net, *batch, steps=4, backend=fused, return_info=True)[1]
    two = strong_attack(net, *batch, steps=4, backend="reference", return_info=True)[1]
    # A sign of a gradient near zero may differ, and moves pixels.
    assert (one.stats[0, 0, :, 1] == two.stats[0, 0, :, 1]).all()
    assert ((one.stats[..., 1] - two.stats[..., 1]).abs() <= 0.02 * one.valid).all()


def test_noise_depends_on_seed_and_index_only(pixelwise: nn.Module, batch: Batch) -> None:
    images, labels = batch
    together = strong_attack(pixelwise, images, labels, steps=5, restarts=2, indices=[7, 8, 9])
    for i in range(3):
        alone = strong_attack(pixelwise, images[i : i + 1], labels[i : i + 1], steps=5, restarts=2, indices=[7 + i])
        assert same_bits(together[i : i + 1], alone)
    turned = strong_attack(pixelwise, images.flip(0), labels.flip(0), steps=5, restarts=2, indices=[9, 8, 7])
    assert same_bits(together, turned.flip(0))
    assert not torch.equal(together, strong_attack(pixelwise, images, labels, steps=5, restarts=2, seed=1))


def test_leaves_the_global_generator_and_the_model_alone(net: nn.Module, batch: Batch) -> None:
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    strong_attack(net, *batch, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_costs_a_pass_per_step_and_one(net: nn.Module, batch: Batch) -> None:
    counted = Counted(net)
    strong_attack(counted, *batch, steps=10, restarts=2)
    assert counted.calls == 2 * 11


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"radii": "shrinking"}, {"norm": "l2", "eps": 0.5}], ids=str)
def test_steps_do_not_wait_for_the_device(
    net: nn.Module, batch: Batch, backend: str, settings: dict[str, Any], method: str
) -> None:
    mask = torch.ones_like(batch[0][:, :1], dtype=torch.bool)
    counts = []
    # Both take all phases and have checkpoints.
    for steps in (5, 25):
        with HostSyncs() as syncs:
            strong_attack(net, *batch, steps=steps, backend=backend, mask=mask, method=method, **settings)
        counts.append(+syncs.seen)
    assert counts[0] == counts[1]


def test_step_sizes_are_halved_where_nothing_improves(batch: Batch, device: torch.device) -> None:
    """One right pixel decides; the attack overshoots with large steps unless it halves them, image by image."""

    class Narrow(nn.Module):
        """Wrong only where a channel lies within a narrow band above its clean value."""

        def __init__(self, clean: Tensor) -> None:
            super().__init__()
            self.register_buffer("clean", clean)

        def forward(self, images: Tensor) -> Tensor:
            moved = (images - self.clean)[:, :1] * 255
            margin = (moved - 1).abs() - 0.3
            return torch.cat([margin, torch.zeros_like(margin)], 1)

    images = torch.full((1, 3, 8, 8), 0.5, device=device)
    labels = torch.zeros(1, 8, 8, dtype=torch.int64, device=device)
    settings = {"eps": 8 / 255, "method": "pgd"}
    coarse = attack(
        Narrow(images), images, labels, steps=60, step_size=16 / 255, generator=seeded(), keep="best", **settings
    )
    fine = strong_attack(Narrow(images), images, labels, steps=60, **settings)
    counts = [right_pixels(Narrow(images)(found), labels).item() for found in (coarse, fine)]
    assert counts[1] < counts[0] / 2


@pytest.mark.parametrize("method", ["pgd", "js", "mce", "eroseg"])
def test_is_stronger_than_plain_steps(trained: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, images, labels = trained
    settings = {"method": method, "eps": 2 / 255, "steps": 40}
    plain = attack(model, images, labels, generator=seeded(), **settings)
    strong = strong_attack(model, images, labels, **settings)
    with torch.no_grad():
        assert right_pixels(model(strong), labels).sum() < right_pixels(model(plain), labels).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images(pixelwise: nn.Module, batch: Batch, dtype: torch.dtype) -> None:
    images = batch[0].to(dtype)
    found = strong_attack(pixelwise, images, batch[1], steps=6)
    assert found.dtype == dtype
    assert outside_ball(found, images, EPS["linf"], "linf") <= 1


def test_labels_of_its_own(net: nn.Module, batch: Batch) -> None:
    net.eval()
    found = strong_attack(net, batch[0], steps=6)
    with torch.no_grad():
        assert (net(found).argmax(1) != net(batch[0]).argmax(1)).any()


@pytest.mark.parametrize("name", NOT_OF_APGD)
def test_settings_that_are_not_its_own(net: nn.Module, batch: Batch, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is not a setting of strong_attack"):
        strong_attack(net, *batch, **{name: None})


def test_radii_are_checked(net: nn.Module, batch: Batch) -> None:
    with pytest.raises(ValueError, match="radii is 'shrunk', wanted one of fixed, shrinking"):
        strong_attack(net, *batch, radii="shrunk")


def test_indices_go_with_the_images(net: nn.Module, batch: Batch) -> None:
    with pytest.raises(ValueError, match="indices has 2 numbers, wanted 3"):
        strong_attack(net, *batch, indices=[0, 1])


def test_broken_gradients_are_told(batch: Batch) -> None:
    class Root(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([0 * (images - images.detach()).sqrt(), images[:, :1]], 1)

    with pytest.raises(RuntimeError, match="NaN or infinite at step 1 for image 0"):
        strong_attack(Root(), *batch, steps=3)
