"""The evaluation-grade attack: its guarantees, its schedule, and that it is stronger than plain steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attack_common import Batch, Counted, correct_pixels, outside_ball, same_bits, seeded
from conftest import VOID
from test_attack_costs import HostSyncs
from torch import Tensor, nn

from eroseg_ext import attack, strong_attack
from eroseg_ext.attacks.apgd import NOT_OF_APGD, RADII, _checkpoints, noise_seed, phases
from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.attacks.result import NotFiniteError
from eroseg_ext.cli.demo import DemoSettings, load_data, train
from eroseg_ext.data.scenes import generated_scenes
from eroseg_ext.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = {"linf": 8 / 255, "l2": 0.5}


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained for some seconds on drawn scenes, with four scenes that it has not seen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task = load_data(DemoSettings(quick=True, size=(48, 64)))
    model = train(task, 200, 0, torch.device("cpu"))
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
    correct = correct_pixels(net(found), batch[1])
    assert torch.equal(correct, info.correct)
    # Iterates of the larger balls may have had fewer; those of the last phase may not.
    last = phases(8 / 255, 20, radii)[-1].first
    assert (correct <= info.stats[:, last:, :, 1].amin((0, 1))).all()
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


def first_seen(images: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """The first images that the model is given, less the clean ones."""
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return torch.cat([x, x[:, :1]], 1)

    strong_attack(model, images, labels, steps=1, **settings)
    return seen[0] - images


def test_starts_of_l2_are_uniform_in_the_ball_of_the_pixels_that_may_change(batch: Batch) -> None:
    """With one pixel of three channels to change, a third of the ball's radius holds 1/27 of its volume."""
    images, labels = torch.full((400, *batch[0].shape[1:]), 0.5), batch[1][:1].repeat(400, 1, 1).cpu()
    mask = torch.zeros(1, 1, *images.shape[-2:], dtype=torch.bool)
    mask[..., 7, 9] = True
    start = first_seen(images, labels, norm="l2", eps=0.3, mask=mask.expand(400, -1, -1, -1))
    assert not start[~mask.expand_as(start)].any()
    volume = (start.flatten(1).norm(dim=1).double() / 0.3) ** 3
    assert volume.max() <= 1 + 1e-5
    # The mean of 400 uniform numbers has a standard deviation of 0.014.
    assert volume.mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_drawn_image_by_image(batch: Batch, norm: str) -> None:
    """The numbers of an image's own generator on the CPU, whatever the batch."""
    images, labels = torch.full_like(batch[0], 0.5), batch[1]
    found = first_seen(images, labels, norm=norm, eps=EPS[norm], seed=5, indices=[4, 8, 1]).cpu()
    for i, index in enumerate((4, 8, 1)):
        generator = torch.Generator().manual_seed(noise_seed(5, index, 0))
        if norm == "linf":
            wanted = torch.empty(images.shape[1:]).uniform_(-EPS[norm], EPS[norm], generator=generator)
        else:
            draw = torch.randn(images.shape[1:], generator=generator)
            length = torch.rand((), generator=generator).double() ** (1 / draw.numel())
            wanted = draw * (EPS[norm] * length / draw.double().norm()).float()
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("find", [attack, strong_attack])
def test_of_equally_good_iterates_the_earliest_is_kept(batch: Batch, find: Any) -> None:
    """All pixels stay correct, so the random start, which the model sees first, is as good as any later iterate."""
    seen: list[Tensor] = []

    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return torch.cat([x[:, :1] + 9, x], 1)

    best = {"keep": "best"} if find is attack else {}
    found = find(Sure(), batch[0], torch.zeros_like(batch[1]), steps=3, restarts=2, **best)
    assert torch.equal(found, seen[0])
    assert not torch.equal(seen[1], seen[0])


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


class Band(nn.Module):
    """A pixel is wrong while its first channel has moved by about ``target`` 255ths; further on it is correct again."""

    def __init__(self, clean: Tensor, target: Tensor) -> None:
        super().__init__()
        self.register_buffer("clean", clean)
        self.register_buffer("target", target)

    def forward(self, images: Tensor) -> Tensor:
        margin = ((images - self.clean)[:, :1] * 255 - self.target).abs() - 0.5
        return torch.cat([margin, torch.zeros_like(margin)], 1)


def band(images: int) -> tuple[Band, Tensor, Tensor]:
    clean = torch.full((images, 3, 12, 12), 0.5)
    generator = torch.Generator().manual_seed(0)
    # Images differ in how far their targets lie, and so in when their step sizes should be halved.
    target = torch.rand(images, 1, 12, 12, generator=generator) * torch.arange(1.0, images + 1).view(-1, 1, 1, 1)
    return Band(clean, target), clean, torch.zeros(images, 12, 12, dtype=torch.int64)


def test_step_sizes_are_halved_where_nothing_improves() -> None:
    model, images, labels = band(2)
    settings = {"eps": 8 / 255, "steps": 60, "method": "pgd"}
    coarse = attack(model, images, labels, step_size=16 / 255, generator=seeded(), keep="best", **settings)
    fine = strong_attack(model, images, labels, **settings)
    counts = [correct_pixels(model(found), labels).sum().item() for found in (coarse, fine)]
    assert counts[1] < counts[0] / 2


def apgd_with_decisions(model: nn.Module, clean: Tensor, label: Tensor, start: Tensor, eps: float, steps: int) -> list:
    """Correct pixels of each iterate of one image: APGD as its paper's Algorithm 1 tells it, with the host deciding."""
    low, high = (clean - eps).clamp(0, 1), (clean + eps).clamp(0, 1)
    x = before = start.clamp(low, high)
    size, history, best, improved, at_check, was_halved, last_check = 2 * eps, [], None, 0, None, True, 0
    previous = 0.0
    for t in range(steps):
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        gradient, stats = reference.pixel_grad(logits.detach(), label, "pgd")
        (grad,) = torch.autograd.grad(logits, leaf, gradient)
        correct = stats[0, 1].item()
        improved += correct < previous
        history.append(previous := correct)
        if best is None or correct < best[0]:
            best = correct, x, grad
        if t == 0:
            at_check = correct
        if t in _checkpoints(steps):
            not_enough = improved <= 0.75 * (t - last_check)
            no_better = not was_halved and best[0] == at_check
            was_halved = not_enough or no_better
            if was_halved:
                size /= 2
                previous, x, grad = best
                before = x
            at_check, improved, last_check = best[0], 0, t
        moved = (x + size * grad.sign()).clamp(low, high)
        if t > 0:
            moved = (x.lerp(moved, 0.75) + 0.25 * (x - before)).clamp(low, high)
        x, before = moved, x
    return history


def start_of(images: Tensor, index: int, eps: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(noise_seed(seed, index, 0))
    return images + torch.empty(images.shape[1:]).uniform_(-eps, eps, generator=generator)


def test_each_image_goes_as_if_it_were_alone() -> None:
    """Batched decisions by ``torch.where`` against decisions by ``if``."""
    model, images, labels = band(7)
    eps, steps = 8 / 255, 80
    _, info = strong_attack(model, images, labels, method="pgd", eps=eps, steps=steps, seed=3, return_info=True)
    ways = set()
    for i in range(len(images)):
        alone = Band(model.clean[i : i + 1], model.target[i : i + 1])
        image = images[i : i + 1]
        wanted = apgd_with_decisions(alone, image, labels[i : i + 1], start_of(image, i, eps, 3), eps, steps)
        assert info.stats[0, :, i, 1].tolist() == wanted
        ways.add(tuple(wanted))
    assert len(ways) == len(images)


@pytest.mark.parametrize("steps", [10, 25, 60])
@pytest.mark.parametrize("index", range(3))
def test_a_network_is_attacked_as_the_algorithm_says(
    trained: tuple[nn.Module, Tensor, Tensor], index: int, steps: int
) -> None:
    """One image at a time, so that the network's sums are the same to the last bit."""
    model, images, labels = trained
    image, label = images[index : index + 1], labels[index : index + 1]
    eps = 4 / 255
    _, info = strong_attack(
        model, image, label, method="pgd", eps=eps, steps=steps, backend="reference", return_info=True
    )
    assert info.stats[0, :, 0, 1].tolist() == apgd_with_decisions(
        model, image, label, start_of(image, 0, eps, 0), eps, steps
    )


@pytest.mark.parametrize("method", ["pgd", "js", "mce", "eroseg"])
def test_is_stronger_than_plain_steps(trained: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, images, labels = trained
    settings = {"method": method, "eps": 4 / 255, "steps": 40}
    plain = attack(model, images, labels, generator=seeded(), **settings)
    strong = strong_attack(model, images, labels, **settings)
    with torch.no_grad():
        assert correct_pixels(model(strong), labels).sum() < correct_pixels(model(plain), labels).sum()


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

    with pytest.raises(NotFiniteError, match=r"gradient with respect to image 0 is NaN at step 0$"):
        strong_attack(Root(), *batch, steps=3)
