"""Models that upsample their logits as their last operation: the attack does without it, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from eroseg_ext import attack, evaluate, strong_attack
from eroseg_ext.attacks.result import StepInfo
from eroseg_ext.models.adapter import Logits
from eroseg_ext.models.see_through import Deferred, SeeThrough
from eroseg_ext.ops import backend as backends

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, SIZE, LOW = 5, (32, 40), (8, 10)
Batch = tuple[Tensor, Tensor]


def upsampled(z: Tensor, **options: Any) -> Tensor:
    return F.interpolate(z, size=SIZE, mode="bilinear", **options)


def shifted_in_place(z: Tensor) -> Tensor:
    z = upsampled(z)
    z += 0.25
    z[:, 0] -= 0.5
    return z


UNTOUCHED: dict[str, Callable[[Tensor], Any]] = {
    "size": upsampled,
    "align_corners": lambda z: upsampled(z, align_corners=True),
    "scale_factor": lambda z: F.interpolate(z, scale_factor=4, mode="bilinear"),
    "module": nn.Upsample(scale_factor=4, mode="bilinear"),
    "smp": nn.UpsamplingBilinear2d(scale_factor=4),
    "dict": lambda z: {"out": upsampled(z), "aux": upsampled(z * 2)},
    "tuple": lambda z: (upsampled(z), z.mean()),
}
TOUCHED: dict[str, Callable[[Tensor], Any]] = {
    "log_softmax": lambda z: upsampled(z).log_softmax(1),
    "slice": lambda z: upsampled(z)[:, 1:],
    "sum of two": lambda z: upsampled(z) + upsampled(z.tanh()),
    "in place": shifted_in_place,
    "nearest": lambda z: F.interpolate(z, size=SIZE),
    "imported by name": lambda z: interpolate(z, size=SIZE, mode="bilinear"),
    "bicubic": lambda z: F.interpolate(z, size=SIZE, mode="bicubic"),
    "twice": lambda z: upsampled(F.interpolate(upsampled(z), size=(20, 20), mode="bilinear")).relu(),
    "mean beside": lambda z: (lambda full: {"out": full, "mean": full.mean()})(upsampled(z)),
}


class Net(nn.Module):
    """Logits at a quarter of the resolution, and what is done to them."""

    def __init__(self, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.GELU(), nn.Conv2d(8, CLASSES, 1))
            nn.init.normal_(self.body[-1].weight, std=2.0)
        self.last = last

    def forward(self, images: Tensor) -> Any:
        return self.last(self.body(images))


@pytest.fixture
def data() -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES - 1, (2, *SIZE), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return torch.rand(2, 3, *SIZE, generator=generator), labels


def taken(model: nn.Module, images: Tensor, **settings: Any) -> Tensor:
    """The logits that an attack works on."""
    return Logits(model, **settings)(images.clone().requires_grad_(), SIZE).values


def both(model: nn.Module, data: Batch, **settings: Any) -> list[Any]:
    found = []
    for see_through in (True, False):
        start = torch.Generator().manual_seed(0)
        call: dict[str, Any] = {"steps": 4, "return_info": True, "generator": start, "see_through": see_through}
        found.append(attack(model, *data, **call, **settings))
    return found


@pytest.mark.parametrize("method", ["eroseg", "cospgd"])
@pytest.mark.parametrize("last", UNTOUCHED)
def test_an_untouched_upsampling_is_left_out_and_the_attack_is_the_same(last: str, method: str, data: Batch) -> None:
    model = Net(UNTOUCHED[last])
    assert taken(model, data[0]).shape[-2:] == LOW
    assert taken(model, data[0], see_through=False).shape[-2:] == SIZE
    (ours, info), (full, expected) = both(model, data, method=method)
    # A gradient that is 0 but for rounding may have either sign.
    assert ((ours - full).abs() > 1e-6).float().mean() < 0.01
    assert ((info.stats - expected.stats).abs()[..., :2] <= 3).all()


@pytest.mark.parametrize("last", TOUCHED)
def test_whatever_else_a_model_does_gives_the_same_to_the_last_bit(last: str, data: Batch) -> None:
    model = Net(TOUCHED[last])
    assert type(taken(model, data[0])) is Tensor or last == "in place" or last == "mean beside"
    (ours, info), (full, expected) = both(model, data)
    assert torch.equal(ours, full)
    assert torch.equal(info.stats, expected.stats)


def test_gradients_are_those_of_the_interpolation(data: Batch) -> None:
    """Of the deferred tensor itself, and through operations on it."""
    low = torch.randn(2, CLASSES, *LOW, requires_grad=True)
    weight = torch.randn(2, CLASSES, *SIZE)
    for align_corners in (False, True):
        for of in (lambda z: z, lambda z: z.exp(), lambda z: z.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2)):
            with SeeThrough(SIZE):
                deferred = upsampled(low, align_corners=align_corners)
            assert isinstance(deferred, Deferred)
            real = upsampled(low, align_corners=align_corners)
            assert (deferred.shape, deferred.dtype, deferred.stride()) == (real.shape, real.dtype, real.stride())
            (got,) = torch.autograd.grad(of(deferred), low, weight)
            (expected,) = torch.autograd.grad(of(real), low, weight)
            torch.testing.assert_close(got, expected)


def test_only_upsamplings_to_the_images_size_are_put_off(data: Batch) -> None:
    z = torch.randn(1, 2, *LOW)
    with SeeThrough(SIZE):
        for other in (
            F.interpolate(z, size=(16, 20), mode="bilinear"),
            F.interpolate(z, scale_factor=2, mode="bilinear"),
            F.interpolate(z, size=SIZE),
            F.interpolate(z, size=SIZE, mode="bilinear", antialias=True),
            F.interpolate(z[0], size=40, mode="linear"),
        ):
            assert type(other) is Tensor
    assert type(upsampled(z)) is Tensor


def test_upsamplings_of_other_threads_are_torchs_own() -> None:
    """Also where contexts of two threads overlap; afterwards everything is as it was."""
    torchs_own, z = F.interpolate, torch.randn(1, 2, *LOW)
    entered, ended = threading.Event(), threading.Event()

    def other(size: tuple[int, int]) -> type:
        with SeeThrough(size):
            entered.set()
            assert ended.wait(10)
            return type(upsampled(z))

    with ThreadPoolExecutor(2) as pool:
        with SeeThrough(SIZE):
            assert type(pool.submit(upsampled, z).result()) is Tensor
            assert type(upsampled(z)) is Deferred
            waiting = [pool.submit(other, size) for size in (SIZE, (16, 20))]
            assert entered.wait(10)
        assert type(upsampled(z)) is Tensor
        ended.set()
        assert [future.result() for future in waiting] == [Deferred, Tensor]
    assert F.interpolate is torchs_own


def test_autocast(data: Batch) -> None:
    """Under autocast on the CPU an interpolation returns float32; what is taken is the bfloat16 before it."""
    model = Net(upsampled)
    assert taken(model, data[0], autocast=torch.bfloat16).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), SeeThrough(SIZE):
        deferred = model(data[0])
    assert deferred.dtype == upsampled_under_autocast(model, data[0]).dtype
    (ours, info), (full, expected) = both(model, data, autocast=torch.bfloat16)
    assert ((ours - full).abs() > 1e-6).float().mean() < 0.02
    assert ((info.stats - expected.stats).abs()[..., :2] <= 5).all()


def upsampled_under_autocast(model: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(images)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(use_reentrant: bool, data: Batch) -> None:
    class Checkpointed(Net):
        def forward(self, images: Tensor) -> Any:
            return checkpoint(super().forward, images, use_reentrant=use_reentrant)

    (ours, info), (full, expected) = both(Checkpointed(upsampled), data)
    assert ((ours - full).abs() > 1e-6).float().mean() < 0.01
    assert ((info.stats - expected.stats).abs()[..., :2] <= 3).all()


def test_compiled_and_scripted_models_are_run_as_they_are(data: Batch) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net(upsampled).body

        def forward(self, images: Tensor) -> Tensor:
            z = self.body(images)
            return F.interpolate(z, size=[32, 40], mode="bilinear")

    compiled = Plain()
    compiled.compile(backend="eager")
    for model in (torch.compile(Plain(), backend="eager"), compiled, torch.jit.trace(Plain(), data[0])):
        assert taken(model, data[0]).shape[-2:] == SIZE
        attack(model, *data, steps=1)


def test_a_compiled_function_in_a_model_is_run_as_it_is(data: Batch) -> None:
    compiled = torch.compile(upsampled, backend="eager", fullgraph=True)
    assert type(taken(Net(compiled), data[0])) is Tensor
    (ours, _), (full, _) = both(Net(compiled), data)
    assert torch.equal(ours, full)


def test_a_users_hooks_see_what_the_model_returns(data: Batch) -> None:
    """The dict stays what it was; a hook on the values gets them, and one on their gradient is called."""
    model, seen, gradients = Net(UNTOUCHED["dict"]), [], []

    def look(module: nn.Module, arguments: Any, output: dict[str, Tensor]) -> None:
        assert list(output) == ["out", "aux"]
        assert output["out"].shape == (2, CLASSES, *SIZE)
        seen.append(output["out"].detach().numpy().mean())

    def hang(module: nn.Module, arguments: Any, output: dict[str, Tensor]) -> None:
        if output["out"].requires_grad:
            output["out"].register_hook(lambda grad: gradients.append(grad.shape))

    for hook in (look, hang):
        with model.register_forward_hook(hook):
            (ours, _), (full, _) = both(model, data)
            assert torch.equal(ours, full)
    assert len(seen) == 10
    assert gradients == [(2, CLASSES, *SIZE)] * 8


def test_a_callback_gets_logits_at_the_images_size(data: Batch) -> None:
    found: list[tuple[Tensor, Tensor]] = []

    def keep(step: StepInfo) -> None:
        found.append((step.logits, step.adversarial.clone()))

    attack(Net(upsampled), *data, steps=2, callback=keep)
    assert [logits.shape for logits, _ in found] == [(2, CLASSES, *SIZE)] * 2
    torch.testing.assert_close(found[1][0], Net(upsampled)(found[0][1]).detach())


def test_a_source_that_was_written_to_is_told() -> None:
    def rewritten(z: Tensor) -> Tensor:
        full = upsampled(z)
        z.mul_(2)
        return full

    images, labels = torch.rand(1, 3, *SIZE), torch.zeros(1, *SIZE, dtype=torch.long)
    with pytest.raises(RuntimeError, match="see_through=False"):
        attack(Net(rewritten), images, labels, steps=1)
    attack(Net(rewritten), images, labels, steps=1, see_through=False)


def test_the_other_front_doors(data: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither strong_attack nor evaluate makes full-size logits; the figures are the same."""
    model, items = Net(upsampled), [(image, labels) for image, labels in zip(*data, strict=True)]
    whole = evaluate(model, items, attacks=["eroseg"], steps=3, sanity=0, see_through=False)
    expected = strong_attack(model, *data, steps=3, see_through=False)
    sizes: set[tuple[int, ...]] = set()
    ops: Any = backends.select(torch.device("cpu"))
    for name in ("erosion_grad", "pixel_grad", "confusion", "confidence"):
        operation = getattr(ops, name)

        def spied(logits: Tensor, *arguments: Any, operation: Any = operation, **options: Any) -> Any:
            sizes.add(tuple(logits.shape[-2:]))
            return operation(logits, *arguments, **options)

        monkeypatch.setattr(ops, name, spied)
    found = evaluate(model, items, attacks=["eroseg"], steps=3, sanity=0)
    assert ((strong_attack(model, *data, steps=3) - expected).abs() > 1e-6).float().mean() < 0.01
    assert sizes == {LOW}
    assert found.clean == whole.clean
    assert found.rows[0].scores.aacc == pytest.approx(whole.rows[0].scores.aacc, abs=0.2)
