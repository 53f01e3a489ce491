"""The user's model during an attack: left as it was found, whatever wraps it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attack_common import Batch, MakeNet, run
from conftest import SIZE
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eroseg_ext import StepInfo

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS: list[dict[str, Any]] = [
    {},
    {"model_mode": "train"},
    {"model_mode": "keep"},
    {"restarts": 2, "keep": "best", "micro_batch": 2, "return_info": True},
]


class Snapshot:
    """All that an attack could leave behind in a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modes = [m.training for m in module.modules()]
        self._state = copy.deepcopy(module.state_dict())
        self._parameters = [(p, p.requires_grad, p.grad, copy.deepcopy(p.grad)) for p in module.parameters()]
        self._buffers = list(module.buffers())

    def assert_unchanged(self) -> None:
        module = self._module
        assert [m.training for m in module.modules()] == self._modes
        state = module.state_dict()
        assert list(state) == list(self._state)
        for name, before in self._state.items():
            assert torch.equal(state[name], before), name
        for now, (parameter, requires_grad, grad, value) in zip(module.parameters(), self._parameters, strict=True):
            assert now is parameter
            assert now.requires_grad == requires_grad
            assert now.grad is grad
            assert grad is None or torch.equal(grad, value)
        assert all(now is before for now, before in zip(module.buffers(), self._buffers, strict=True))


@pytest.fixture
def used_net(net: nn.Sequential) -> nn.Sequential:
    """A network in the middle of its life: mixed modes, a frozen parameter, gradients on some, statistics gathered."""
    net.train()(torch.rand(2, 3, *SIZE, device=next(net.parameters()).device)).sum().backward()
    net[0].bias.grad = None
    net[0].weight.requires_grad_(False)
    net[1].eval()
    return net


# Left as it was.


@pytest.mark.parametrize("settings", RUNS)
def test_an_attack_leaves_the_model_as_it_was(
    used_net: nn.Sequential, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    before = Snapshot(used_net)
    run(used_net, batch, backend=backend, **settings)
    before.assert_unchanged()


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("settings", RUNS)
def test_batchnorm_statistics_stay(net: nn.Sequential, batch: Batch, settings: dict[str, Any], mode: bool) -> None:
    # All in one mode, so that "keep" and "train" do update the statistics during the attack.
    before = Snapshot(net.train(mode))
    run(net, batch, **settings)
    before.assert_unchanged()


class Tally(nn.Module):
    """Replaces its buffer where BatchNorm writes into its own, as hand-written running means do."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        return x


def test_buffers_that_the_model_replaces_are_put_back(net: nn.Sequential, batch: Batch) -> None:
    model = nn.Sequential(net, Tally()).to(batch[0].device)
    before = Snapshot(model)
    run(model, batch, model_mode="train")
    before.assert_unchanged()


@pytest.mark.parametrize("call", [0, 2, 3])
@pytest.mark.parametrize("settings", RUNS)
def test_the_model_is_restored_when_it_raises(
    used_net: nn.Sequential, batch: Batch, settings: dict[str, Any], call: int
) -> None:
    calls: list[int] = []

    def fail(module: nn.Module, inputs: Any, output: Tensor) -> None:
        calls.append(1)
        if len(calls) > call:
            raise ArithmeticError("out of luck")

    before = Snapshot(used_net)
    used_net[-1].register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="out of luck"):
        run(used_net, batch, **{"steps": 5} | settings)
    before.assert_unchanged()


@pytest.mark.parametrize("settings", RUNS)
def test_the_model_is_restored_after_an_interrupt(
    used_net: nn.Sequential, batch: Batch, settings: dict[str, Any]
) -> None:
    def interrupt(info: StepInfo) -> None:
        if info.step == 1:
            raise KeyboardInterrupt

    before = Snapshot(used_net)
    with pytest.raises(KeyboardInterrupt):
        run(used_net, batch, callback=interrupt, **settings)
    before.assert_unchanged()


@pytest.mark.parametrize("bad", ["labels", "output"])
def test_the_model_is_restored_after_an_error_of_ours(used_net: nn.Sequential, batch: Batch, bad: str) -> None:
    before = Snapshot(used_net)
    images, labels = batch
    model = used_net if bad == "labels" else nn.Sequential(used_net, nn.Flatten())
    with pytest.raises(ValueError, match=bad if bad == "labels" else "logits"):
        run(model, (images, labels + 1 if bad == "labels" else labels))
    before.assert_unchanged()


def test_no_gradient_of_a_parameter_is_computed(net: nn.Sequential, batch: Batch, backend: str) -> None:
    wanted: list[bool] = []
    net[-1].register_forward_hook(lambda module, inputs, output: wanted.append(module.weight.requires_grad))
    run(net, batch, backend=backend)
    assert wanted == [False] * 3


@pytest.mark.parametrize(("mode", "expected"), [("eval", [False]), ("train", [True]), ("keep", [True, False])])
def test_the_attack_runs_in_the_mode_asked_for(
    net: nn.Sequential, batch: Batch, mode: str, expected: list[bool]
) -> None:
    modes: set[tuple[bool, ...]] = set()
    net.register_forward_hook(lambda module, inputs, output: modes.add((net[0].training, net[1].training)))
    net[1].eval()
    run(net, batch, model_mode=mode)
    assert modes == {tuple(expected * 2)[:2]}


def test_train_mode_uses_the_batchs_statistics(make_net: MakeNet, batch: Batch) -> None:
    # Without the Dropout, whose noise would be a difference of its own.
    def make() -> nn.Sequential:
        net = make_net()
        net[3] = nn.Identity()
        return net

    evaluated, trained = run(make(), batch), run(make(), batch, model_mode="train")
    assert not torch.equal(evaluated, trained)
    assert torch.equal(run(make(), batch, model_mode="keep"), trained)


def test_training_goes_on_after_an_attack(net: nn.Sequential, batch: Batch) -> None:
    images, labels = batch
    net.train()
    run(net, batch)
    F.cross_entropy(net(images), labels, ignore_index=255).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_callable_that_is_no_module_is_left_alone(used_net: nn.Sequential, batch: Batch) -> None:
    used_net.eval()
    before = Snapshot(used_net)
    expected = run(used_net, batch)
    assert torch.equal(run(lambda images: used_net(images), batch), expected)
    before.assert_unchanged()


# Wrapped models.


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("settings", RUNS)
def test_a_distributed_model_is_attacked_as_the_bare_one_and_trains_on(
    net: nn.Sequential, batch: Batch, backend: str, settings: dict[str, Any]
) -> None:
    images, labels = batch
    net[3] = nn.Identity()  # Dropout's noise differs from call to call
    expected = run(net, batch, backend=backend, **settings)
    wrapped = DistributedDataParallel(net)
    forwards: list[int] = []
    wrapped.register_forward_hook(lambda module, inputs, output: forwards.append(1))
    # As in adversarial training: attack and update in turn. The reducer must not count the attack's backward passes.
    for turn in range(2):
        forwards.clear()
        before = Snapshot(wrapped)
        got = run(wrapped, batch, backend=backend, **settings)
        before.assert_unchanged()
        # The wrapper's forward broadcasts the buffers: it would wait for processes that take fewer steps.
        assert not forwards
        if turn == 0:
            assert torch.equal(*(r[0] if isinstance(r, tuple) else r for r in (got, expected)))
            assert all(parameter.grad is None for parameter in net.parameters())
        F.cross_entropy(wrapped(images), labels, ignore_index=255).backward()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("settings", RUNS)
def test_a_compiled_model_is_attacked_as_the_bare_one(
    net: nn.Sequential, batch: Batch, settings: dict[str, Any]
) -> None:
    net[3] = nn.Identity()
    net[1].eval()
    expected = run(net, batch, **settings)
    # The backend "eager" traces as any other and compiles nothing.
    compiled = torch.compile(net, backend="eager")
    before = Snapshot(compiled)
    got = run(compiled, batch, **settings)
    assert torch.equal(*(r[0] if isinstance(r, tuple) else r for r in (got, expected)))
    before.assert_unchanged()


@pytest.mark.usefixtures("fresh_dynamo", "process_group")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("order", ["compiled outside", "compiled inside"])
def test_a_model_may_be_both_compiled_and_distributed(net: nn.Sequential, batch: Batch, order: str) -> None:
    expected = run(net, batch)
    if order == "compiled outside":
        model = torch.compile(DistributedDataParallel(net), backend="eager")
    else:
        model = DistributedDataParallel(torch.compile(net, backend="eager"))
    before = Snapshot(model)
    assert torch.equal(run(model, batch), expected)
    before.assert_unchanged()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_scripted_model_is_left_as_it_was(net: nn.Sequential, batch: Batch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit as a whole is on its way out
        scripted = torch.jit.script(net.train())
    before = Snapshot(scripted)
    with torch.jit.optimized_execution(False):  # which on a GPU fuses operations, and so rounds otherwise
        run(scripted, batch, model_mode="train")
        assert torch.equal(run(scripted, batch), run(net, batch))
    before.assert_unchanged()
