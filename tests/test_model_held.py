"""Whatever stands around a module, an attack leaves it as it was; what a module does to its input reaches nobody."""

from __future__ import annotations

import functools
import gc
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attack_common import Batch, MakeNet, outside_ball, run, run_info, same_bits
from conftest import Pixelwise
from test_model import Snapshot
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from eroseg_ext import StepInfo, attack, evaluate, strong_attack
from eroseg_ext.models.modules import modules_behind

pytestmark = pytest.mark.usefixtures("one_thread")

ATTACKS = [attack, strong_attack]


# Modules behind a callable.


class Caller:
    """An object that can be called, as adapters around a model are."""

    def __init__(self, net: nn.Module) -> None:
        self.nets = [net]

    def __call__(self, images: Tensor) -> Tensor:
        return self.nets[0](images)

    def through_another_method(self, images: Tensor) -> Tensor:
        return self(images)


class Holder:
    """An object that cannot be called, as trainers are."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def predict(self, images: Tensor) -> Tensor:
        return self.net(images)


def keyword(*, pixel_values: Tensor, net: nn.Module) -> Tensor:
    return net(pixel_values)


def keyword_for(call: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: call(pixel_values=images)


GLOBAL: dict[str, nn.Module] = {}


def from_global(images: Tensor) -> Tensor:
    return GLOBAL["net"](images)


def of_global(net: nn.Module) -> Callable[[Tensor], Tensor]:
    GLOBAL["net"] = net
    return lambda images: from_global(images)


def of_holder(net: nn.Module) -> Callable[[Tensor], Tensor]:
    holder = Holder(net)
    return lambda images: holder.net(images)


def of_holders_method(net: nn.Module) -> Callable[[Tensor], Tensor]:
    holder = Holder(net)
    return lambda images: holder.predict(images)


CALLABLES: dict[str, Callable[[nn.Module], Any]] = {
    "lambda": lambda net: lambda images: net(images),
    "lambda in a lambda": lambda net: lambda images: (lambda inner: net(inner))(images),
    "default argument": lambda net: lambda images, net=net: net(images),
    "partial": lambda net: functools.partial(net.forward),
    "partial with keywords": lambda net: functools.partial(lambda images, net: net(images), net=net),
    "partial in a lambda": lambda net: keyword_for(functools.partial(keyword, net=net)),
    "bound method": lambda net: net.forward,
    "ensemble": lambda net: lambda images, nets=(net, {"other": net}): nets[1]["other"](images),
    "object": Caller,
    "method of an object": lambda net: Caller(net).through_another_method,
    "method of a holder": lambda net: Holder(net).predict,
    "attribute": of_holder,
    "method in a lambda": of_holders_method,
    "global": of_global,
    "wrapped": lambda net: functools.wraps(net.forward)(lambda images: net(images)),
}


@pytest.mark.parametrize("make", CALLABLES.values(), ids=CALLABLES)
def test_a_module_behind_a_callable_is_held_as_a_module_is(
    net: nn.Sequential, batch: Batch, make: Callable[[nn.Module], Any]
) -> None:
    expected = run(net, batch)
    before = Snapshot(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(make(net), batch), expected)
        strong_attack(make(net), *batch, steps=2)
    before.assert_unchanged()


def test_plain_functions_have_no_modules_and_no_warning(batch: Batch) -> None:
    weight = torch.randn(4, 3, 1, 1, device=batch[0].device)

    def plain(images: Tensor) -> Tensor:
        return F.conv2d(images, weight)

    assert modules_behind(plain) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(plain, batch)


def test_a_variable_without_a_value_and_a_circle_are_looked_through(net: nn.Module) -> None:
    def first(images: Tensor) -> Tensor:
        return second(images)

    assert modules_behind(first) == []

    def second(images: Tensor) -> Tensor:
        return first(images) + net(images)

    assert modules_behind(first) == [net]


def test_a_function_whose_parameters_are_nowhere_to_be_seen_warns_once(net: nn.Sequential, batch: Batch) -> None:
    with pytest.warns(UserWarning, match="the nn.Module of its parameters was not found") as caught:
        run(hidden_in(net), batch)
    assert len(caught) == 1


def hidden_in(net: nn.Module) -> Callable[[Tensor], Tensor]:
    networks = iter(lambda: net, None)
    return lambda images: next(networks)(images)


# Models that write to their input.


class InPlace(Pixelwise):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.sub_(0.5).div_(0.25))


class ThroughData(Pixelwise):
    def forward(self, images: Tensor) -> Tensor:
        images.data.add_(10)
        return super().forward(images)


class FirstLayerInPlace(Pixelwise):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.relu(images, inplace=True))


@pytest.mark.parametrize("labels", ["given", "None"])
@pytest.mark.parametrize("attacks", ATTACKS)
@pytest.mark.parametrize("kind", [InPlace, ThroughData, FirstLayerInPlace])
def test_a_model_may_write_to_what_it_is_given(
    batch: Batch, attacks: Callable[..., Tensor], kind: Callable[[], nn.Module], labels: str
) -> None:
    images, given = batch
    before = images.clone()
    model = kind().to(images.device)
    adversarial = attacks(model, images, given if labels == "given" else None, steps=3)
    assert same_bits(images, before)
    assert outside_ball(adversarial, images, 8 / 255, "linf") <= 1
    assert (adversarial != images).any()


def test_a_callback_that_writes_to_the_images_does_not_lead_out_of_the_ball(pixelwise: nn.Module, batch: Batch) -> None:
    adversarial = run(pixelwise, batch, callback=lambda info: info.adversarial.add_(0.5))
    assert outside_ball(adversarial, batch[0], 8 / 255, "linf") <= 1
    assert adversarial.max() <= 1


# Checkpoints.


class Checkpointed(nn.Module):
    """Recomputes its body in the backward pass, the head after it does not."""

    def __init__(self, net: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = net[:-1], net[-1], reentrant

    def forward(self, images: Tensor) -> Tensor:
        if not images.requires_grad:
            return self.head(self.body(images))
        return self.head(checkpoint(self.body, images, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attacks", ATTACKS)
def test_models_with_checkpoints_are_attacked_as_those_without(
    make_net: MakeNet, batch: Batch, attacks: Callable[..., Tensor], reentrant: bool
) -> None:
    net = make_net()
    model = Checkpointed(net, reentrant)
    before = Snapshot(model)
    settings = {"steps": 3, "random_start": False}
    assert torch.equal(attacks(model, *batch, **settings), attacks(net, *batch, **settings))
    before.assert_unchanged()


def test_other_errors_in_the_backward_pass_are_not_taken_for_checkpoints(pixelwise: nn.Module, batch: Batch) -> None:
    calls: list[int] = []

    def fail(grad: Tensor) -> None:
        raise RuntimeError("out of luck")

    def failing(images: Tensor) -> Tensor:
        calls.append(1)
        images.register_hook(fail)
        return pixelwise(images)

    with pytest.raises(RuntimeError, match="out of luck"):
        run(failing, batch)
    assert len(calls) == 1


# Threads.


def in_threads(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("shared", ["the model", "a part of it"])
def test_a_second_thread_waits_for_the_first(net: nn.Sequential, batch: Batch, shared: str) -> None:
    modes: list[bool] = []
    second_calls, first_is_done = threading.Event(), threading.Event()
    steps = (3, 9)  # the second is still on its way when the first is done
    expected = [run(net, batch, steps=count) for count in steps]
    before = Snapshot(net)
    net.register_forward_pre_hook(lambda module, inputs: modes.append(net[1].training))
    models = [net, net] if shared == "the model" else [net, nn.Sequential(net, nn.Identity())]
    found: dict[int, Tensor] = {}

    def first() -> None:
        found[0] = run(models[0], batch, steps=steps[0], callback=wait)
        first_is_done.set()

    def wait(info: StepInfo) -> None:
        assert second_calls.wait(60)
        time.sleep(0.02)  # in which the second would begin

    def second() -> None:
        while not modes:
            time.sleep(0.001)
        second_calls.set()
        found[1] = run(models[1], batch, steps=steps[1], callback=lambda info: first_is_done.wait(60))

    in_threads(first, second)
    assert modes == [False] * sum(steps)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    before.assert_unchanged()


def test_an_attack_within_an_attack_does_not_wait_for_itself(net: nn.Sequential, batch: Batch) -> None:
    before = Snapshot(net)
    inner: list[Tensor] = []

    def work() -> None:
        run(net, batch, callback=lambda info: inner.append(run(net, batch)))

    in_threads(work)
    assert len(inner) == 3
    before.assert_unchanged()


def test_a_model_is_let_go_after_its_attacks(make_net: MakeNet, batch: Batch) -> None:
    net = make_net()
    gone = weakref.ref(net)
    run(net, batch)
    del net
    gc.collect()
    assert gone() is None


# Distributed modules.


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


distributed = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.usefixtures("process_group"),
]


def in_turn(model: Any, trained: nn.Module, batch: Batch, attacked: Callable[[Any], object]) -> None:
    """Attack and training step in turn: every step's gradients are those of a step without an attack."""
    images, labels = batch
    for _ in range(3):
        attacked(model)
        assert all(parameter.requires_grad for parameter in trained.parameters())
        trained.zero_grad()
        F.cross_entropy(trained(images), labels, ignore_index=255).backward()
        assert all(parameter.grad is not None for parameter in trained.parameters())


class TestDistributed:
    pytestmark = distributed

    def test_a_distributed_module_behind_a_callable_trains_on(self, net: nn.Sequential, batch: Batch) -> None:
        wrapped = DistributedDataParallel(net)
        before = Snapshot(net)
        with pytest.MonkeyPatch.context() as patch:
            # Other processes, which may take fewer steps, would have to take part in it.
            patch.setattr(wrapped, "_sync_buffers", lambda: pytest.fail("the buffers were broadcast"))
            run(lambda images: wrapped(images), batch, model_mode="train", return_info=True)
        before.assert_unchanged()
        in_turn(lambda images: wrapped(images), wrapped, batch, lambda model: run(model, batch, restarts=2))
        in_turn(lambda images: wrapped(images), wrapped, batch, lambda model: run(model, batch, window=12))

    @pytest.mark.parametrize(
        "attacked",
        [
            lambda model, batch: run(model, batch),
            lambda model, batch: run(model, batch, return_info=True),
            lambda model, batch: run(model, batch, keep="best", restarts=2),
            lambda model, batch: run(lambda images: model(images), batch, keep="best"),
            lambda model, batch: strong_attack(model, *batch, steps=2),
            lambda model, batch: run(model, batch, window=12),
            lambda model, batch: model(batch[0]).detach(),
            lambda model, batch: _without_gradient(model, batch),
        ],
        ids=["plain", "info", "best", "callable", "strong", "windows", "forward alone", "after a look at clean images"],
    )
    def test_a_sharded_module_trains_on(self, net: nn.Sequential, batch: Batch, attacked: Any) -> None:
        net[3] = nn.Identity()
        ways: list[dict[str, Any]] = [{}, {"window": 12}]
        expected = [run(net, batch, **way) for way in ways]
        model = _sharded(net)
        assert all(torch.equal(run(model, batch, **way), wanted) for way, wanted in zip(ways, expected, strict=True))
        in_turn(model, model, batch, lambda model: attacked(model, batch))

    @pytest.mark.parametrize("looks_first", [False, True])
    def test_no_gradient_of_a_sharded_module_is_computed(
        self, net: nn.Sequential, batch: Batch, looks_first: bool
    ) -> None:
        model, wanted = _sharded(net), []
        if looks_first:
            with torch.no_grad():
                model(batch[0])  # leaves the whole parameters in place
        net[-1].register_forward_pre_hook(lambda module, inputs: wanted.append(module.weight.requires_grad))
        run(model, batch)
        assert wanted == [False] * 3
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_sharded_module_takes_all_steps(self, batch: Batch) -> None:
        """Other processes' images may still be correct, and every pass of a sharded module waits for them."""
        images, labels = batch[0], torch.zeros_like(batch[1])
        net = nn.Sequential(nn.Conv2d(3, 4, 1))
        with torch.no_grad():
            net[0].weight.zero_()
            net[0].bias.copy_(torch.tensor([-9.0, 9.0, 0.0, 0.0]))  # no pixel is correct from the start
        net.to(images.device)
        seen: list[StepInfo] = []
        settings: dict[str, Any] = {"early_stop": True, "steps": 4, "random_start": False, "callback": seen.append}
        expected, info = run_info(net, (images, labels), **settings)
        seen.clear()
        found, found_info = run_info(_sharded(net), (images, labels), **settings)
        assert [step.step for step in seen] == [0, 1, 2, 3]
        assert torch.equal(found, expected)
        assert torch.equal(found_info.stats, info.stats)

    def test_sharded_modules_are_evaluated(self, net: nn.Sequential, batch: Batch) -> None:
        data = list(zip(*batch, strict=True))
        settings: dict[str, Any] = {"attacks": ["pgd"], "steps": 2, "sanity": 0}
        expected = evaluate(net, data, **settings)
        found = evaluate(_sharded(net), data, **settings)
        assert (found.clean, found.rows) == (expected.clean, expected.rows)


def _without_gradient(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        model(batch[0])
    run(model, batch)


def _sharded(net: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh(next(net.parameters()).device.type, (1,))
    if len(net) > 1:
        fully_shard(net[0], mesh=mesh)
    return fully_shard(net, mesh=mesh)


class InterruptsItsRestoring(nn.Module):
    """Sends Ctrl-C when its mode is set for the time that ``at`` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.times = self.at = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and "times" in self.__dict__:
            self.times += 1
            if self.times == self.at:
                signal.raise_signal(signal.SIGINT)
        super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.norm(self.first(images)))


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_model_is_restored_whole_when_ctrl_c_comes_in_between(at: int, mode: str) -> None:
    net = InterruptsItsRestoring().train(mode == "eval")  # the other mode than the attack's
    net.times, net.at = 0, at
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images, labels = torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        attack(net, images, labels, steps=2, model_mode=mode)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [module.training for module in net.modules()] == [mode == "eval"] * 4
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
