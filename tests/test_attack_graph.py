"""``graph=True``: the model from CUDA graphs; on the CPU with a stand-in for what torch.cuda has for them."""

from __future__ import annotations

import copy
import importlib
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import cuda_stand_in
import pytest
import torch
from attack_common import Batch, MakeNet, name_of, run, run_info, seeded
from cuda_stand_in import FIRST_ERROR, Cuda
from torch import Tensor, nn

import eroseg_ext
from eroseg_ext import EroSeg, StepInfo
from eroseg_ext.attacks import graphs

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: list[dict[str, Any]] = [
    {},
    {"method": "segpgd"},
    {"norm": "l2", "eps": 0.5, "restarts": 2, "keep": "best"},
    {"micro_batch": 2},
    {"early_stop": True},
    {"autocast": torch.bfloat16},
    {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)},
    {"model_mode": "train"},
]


@pytest.fixture
def cuda(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    if device.type != "cpu":
        pytest.skip("the stand-in is for the CPU")
    return cuda_stand_in.install(monkeypatch)


@pytest.fixture
def on_cuda(batch: Batch) -> Batch:
    if batch[0].device.type != "cuda":
        pytest.skip("CUDA graphs want a GPU")
    return batch


@pytest.fixture
def either(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs on a GPU, their stand-in on the CPU."""
    if device.type == "cpu":
        cuda_stand_in.install(monkeypatch)


@pytest.fixture
def still(make_net: MakeNet) -> nn.Sequential:
    """Without Dropout, whose numbers would differ between eager mode and a graph's warm-up passes."""
    net = make_net()
    net[3].p = 0.0
    return net


def attacked(attacker: Callable[..., Tensor], batch: Batch) -> Tensor:
    return attacker(*batch, generator=seeded())


# The passes: each test on a GPU with graphs, on the CPU with the stand-in.


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_graph_changes_nothing(still: nn.Module, batch: Batch, backend: str, settings: dict[str, Any]) -> None:
    eager, eager_info = run_info(still, batch, backend=backend, steps=6, **settings)
    graphed, info = run_info(still, batch, backend=backend, steps=6, graph=True, **settings)
    assert torch.equal(eager, graphed)
    assert torch.equal(eager_info.stats, info.stats)
    assert torch.equal(eager_info.correct, info.correct)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_kept_graphs_see_new_images_labels_and_weights(
    still: nn.Module, batch: Batch, autocast: torch.dtype | None
) -> None:
    settings: dict[str, Any] = {"steps": 3, "autocast": autocast}
    graphed, eager = EroSeg(still, graph=True, **settings), EroSeg(still, **settings)
    optimizer = torch.optim.SGD(still.parameters(), lr=0.1)
    seen = []
    for flip in (False, True):
        images, labels = (batch[0].flip(2), batch[1].flip(2)) if flip else batch
        seen.append(attacked(graphed, (images, labels)))
        assert torch.equal(seen[-1], attacked(eager, (images, labels)))
        still(images).square().mean().backward()
        optimizer.step()
        assert torch.equal(attacked(graphed, (images, labels)), attacked(eager, (images, labels)))
    assert not torch.equal(seen[0], seen[1])


class Hidden(nn.Module):
    """A weight that is no parameter: it still requires grad in an attack, so that autocast would keep its cast."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.hidden = [torch.eye(4, device=device)[..., None, None].clone().requires_grad_()]

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(self.model(images), self.hidden[0])


@pytest.mark.usefixtures("either")
def test_autocast_around_the_call_leaves_no_old_cast_in_the_graph(
    still: nn.Module, batch: Batch, device: torch.device
) -> None:
    model = Hidden(still, device)
    graphed, eager = EroSeg(model, steps=3, graph=True), EroSeg(model, steps=3)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(attacked(graphed, batch), attacked(eager, batch))
        assert torch.equal(attacked(graphed, batch), attacked(eager, batch))
        with torch.no_grad():
            model.hidden[0].mul_(torch.tensor([1.0, 2.0, -1.0, 3.0], device=device).view(4, 1, 1, 1))


@pytest.mark.usefixtures("either")
def test_labels_are_checked_also_with_kept_graphs(net: nn.Module, batch: Batch) -> None:
    attacker = EroSeg(net, steps=2, graph=True)
    attacker(*batch)
    with pytest.raises(ValueError, match="labels has the value 7, wanted classes from 0 to 3"):
        attacker(batch[0], torch.full_like(batch[1], 7))


def test_the_warning_of_probabilities_points_at_an_objects_caller(net: nn.Module, batch: Batch) -> None:
    with pytest.warns(UserWarning, match="probabilities") as seen:
        EroSeg(lambda images: net(images).softmax(1), steps=1)(*batch)
    assert seen[0].filename == __file__


def reads_on_the_host(images: Tensor) -> Tensor:
    return images * float(images.detach().mean() > -1)


class BackwardReadsOnTheHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reads_on_the_host(grad)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("reads", [reads_on_the_host, BackwardReadsOnTheHost.apply], ids=["forward", "backward"])
def test_after_a_capture_that_failed_all_goes_on(
    still: nn.Module, batch: Batch, reads: Callable[[Tensor], Tensor]
) -> None:
    eager = run(still.eval(), batch)
    with pytest.raises(RuntimeError, match=f"graph is True, but the model cannot be captured.*: .*{FIRST_ERROR}"):
        run(lambda images: still(reads(images)), batch, graph=True)
    assert torch.equal(run(still, batch), eager)
    assert torch.equal(run(still, batch, graph=True), eager)
    assert run(still, batch, generator=None, graph=True).isfinite().all()  # the device's own random numbers


def test_a_graph_of_images_on_the_cpu_is_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="graph is True and images is on cpu"):
        run(net.cpu(), (torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)), graph=True)


def test_a_graph_of_images_on_another_device_than_the_current_one(make_net: MakeNet, on_cuda: Batch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    net, batch = make_net().to("cuda:1"), (on_cuda[0].to("cuda:1"), on_cuda[1].to("cuda:1"))
    for settings in ({}, {"early_stop": True}):
        assert torch.equal(run(net, batch, graph=True, **settings), run(net, batch, **settings))


# The captures: with the stand-in only.


def test_captures_are_on_a_stream_of_the_images_device(net: nn.Module, batch: Batch, cuda: Cuda) -> None:
    before = dict(cuda.current_streams), cuda.current_device
    run(net, batch, graph=True)
    assert [stream.device.type for stream in cuda.captured_on] == ["cpu", "cpu"]
    assert cuda.captured_on[0] is cuda.captured_on[1]
    assert cuda.error_modes == {"thread_local"}
    assert (cuda.current_streams, cuda.current_device) == before


@pytest.mark.parametrize("reads", [reads_on_the_host, BackwardReadsOnTheHost.apply], ids=["forward", "backward"])
def test_a_capture_that_failed_is_undone(
    net: nn.Module, batch: Batch, cuda: Cuda, reads: Callable[[Tensor], Tensor]
) -> None:
    before = dict(cuda.current_streams), cuda.current_device
    with pytest.raises(RuntimeError, match=FIRST_ERROR):
        run(lambda images: net(reads(images)), batch, graph=True)
    assert (cuda.current_streams, cuda.current_device) == before
    assert not cuda.open_pools
    assert not cuda.generator_is_captured


def test_memory_of_graphs_is_released(net: nn.Module, batch: Batch, cuda: Cuda) -> None:
    class Stubborn(nn.Module):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 2:
                raise RuntimeError("not a third time")
            return images

    run(net, batch, graph=True)
    for fails, reason in ((reads_on_the_host, FIRST_ERROR), (Stubborn(), "not a third time")):
        with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph: .*{reason}"):
            run(lambda images, fails=fails: net(fails(images)), batch, graph=True)
    assert len(cuda.pool_users) == 1 + 2 * 2
    assert not any(cuda.pool_users.values())


def test_the_function_captures_in_every_call_and_the_object_once(net: nn.Module, batch: Batch, cuda: Cuda) -> None:
    for _ in range(2):
        run(net, batch, graph=True)
    assert cuda.captures == 4
    attacker = EroSeg(net, steps=2, graph=True)
    for _ in range(3):
        attacker(*batch)
    assert cuda.captures == 4 + 2
    assert cuda.replays == 2 * 2 * 3 + 3 * 2 * 2
    assert len(cuda.graphs) == 2
    del attacker
    assert not cuda.graphs


def test_a_callable_that_is_no_module_is_captured_in_every_call(net: nn.Module, batch: Batch, cuda: Cuda) -> None:
    attacker = EroSeg(lambda images: net(images), steps=1, graph=True)
    for _ in range(2):
        attacker(*batch)
    assert cuda.captures == 4


def replace_a_weight(attacker: EroSeg, net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(net[0].weight.detach() * 2)


def replace_a_buffer(attacker: EroSeg, net: nn.Sequential) -> None:
    net[1].running_mean = net[1].running_mean + 0.5


def swap_a_submodule(attacker: EroSeg, net: nn.Sequential) -> None:
    net[2] = nn.GELU()


def change_a_submodules_mode(attacker: EroSeg, net: nn.Sequential) -> None:
    net[1].train()


def bind_another_model(attacker: EroSeg, net: nn.Sequential) -> None:
    attacker.model = nn.Sequential(net, nn.Softplus())


@pytest.mark.parametrize(
    "change", [replace_a_weight, replace_a_buffer, swap_a_submodule, change_a_submodules_mode, bind_another_model]
)
def test_graphs_of_another_model_are_let_go(
    still: nn.Sequential, batch: Batch, cuda: Cuda, change: Callable[[EroSeg, nn.Sequential], None]
) -> None:
    attacker = EroSeg(still.eval(), steps=2, graph=True, model_mode="keep")
    first = attacked(attacker, batch)
    change(attacker, still)
    second = attacked(attacker, batch)
    assert cuda.captures == 4
    assert len(cuda.graphs) == 2
    assert torch.equal(second, attacked(EroSeg(attacker.model, steps=2, model_mode="keep"), batch))
    assert not torch.equal(first, second)


def test_each_form_of_images_has_graphs_of_its_own(still: nn.Module, batch: Batch, cuda: Cuda) -> None:
    settings: dict[str, Any] = {"steps": 2, "autocast": torch.bfloat16}
    attacker, (images, labels) = EroSeg(still, graph=True, **settings), batch
    forms = [(images, labels), (images[..., 4:], labels[..., 4:]), (images.bfloat16(), labels)]
    for index, form in enumerate(forms, 1):
        assert torch.equal(attacked(attacker, form), attacked(EroSeg(still, **settings), form))
        assert cuda.captures == 2 * index


def test_the_graphs_unused_for_longest_are_let_go(net: nn.Module, batch: Batch, cuda: Cuda) -> None:
    attacker = EroSeg(net, steps=1, graph=True)
    parts = [(batch[0][:count], batch[1][:count]) for count in (1, 2, 3)]
    captured = []
    for part in (0, 1, 0, 2, 0, 1):
        attacker(*parts[part])
        captured.append(cuda.captures // 2)
        assert len(cuda.graphs) <= 2 * graphs.KEPT
    assert captured == [1, 2, 2, 3, 3, 4]


def test_graphs_keep_no_tensor_of_a_call(net: nn.Module, batch: Batch, cuda: Cuda) -> None:
    attacker = EroSeg(net, steps=1, graph=True)
    images, labels = batch[0].clone(), batch[1].clone()
    called_with = weakref.ref(images), weakref.ref(labels)
    attacker(images, labels)
    del images, labels
    assert [tensor() for tensor in called_with] == [None, None]
    assert cuda.graphs


class Stop(Exception):
    pass


def test_a_call_that_fails_leaves_the_graphs_in_order(still: nn.Module, batch: Batch, cuda: Cuda) -> None:
    attacker = EroSeg(still, steps=2, graph=True)
    expected = attacked(EroSeg(still, steps=2), batch)
    weight = still[0].weight

    def stop(info: StepInfo) -> None:
        raise Stop

    def spoil(info: StepInfo) -> None:
        info.logits.fill_(torch.nan)
        with torch.no_grad():
            weight.fill_(torch.nan)

    with pytest.raises(Stop):
        attacker(*batch, callback=stop)
    assert torch.equal(attacked(attacker, batch), expected)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="NaN or infinite at step 1"):
        attacker(*batch, callback=spoil)
    with torch.no_grad():
        weight.copy_(before)
    assert torch.equal(attacked(attacker, batch), expected)
    assert cuda.captures == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda attacker: pickle.loads(pickle.dumps(attacker))])
def test_a_copy_of_an_object_captures_its_own(
    still: nn.Module, batch: Batch, cuda: Cuda, copied: Callable[[EroSeg], EroSeg]
) -> None:
    attacker = EroSeg(still, steps=2, graph=True)
    expected = attacked(attacker, batch)
    assert torch.equal(attacked(copied(attacker), batch), expected)
    assert cuda.captures == 4


def test_strong_attack_refuses_a_graph(net: nn.Module, batch: Batch) -> None:
    with pytest.raises(TypeError, match=r"graph is not a setting of strong_attack"):
        eroseg_ext.strong_attack(net, *batch, graph=True)


class Event:
    def record(self, stream: cuda_stand_in.Stream | None = None) -> None:
        self.stream = stream or torch.cuda.current_stream()

    def query(self) -> bool:
        return True


def test_the_event_of_early_stop_is_on_a_stream_of_the_images_device(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, dtype, **elsewhere: ones(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    leavers = importlib.import_module("eroseg_ext.attacks.pgd")._Leavers(2, torch.device("cuda", 1))
    leavers.update(torch.tensor([True, False]))
    assert leavers._copied.stream is cuda.current_streams[torch.device("cpu")]
    assert cuda.current_stream() is not leavers._copied.stream
