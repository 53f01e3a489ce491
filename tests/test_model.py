"""The user's model during an attack: left as it was found, and read whatever the form of its output."""

from __future__ import annotations

import collections
import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import CLASSES, SIZE
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eroseg_ext import StepInfo, attack, strong_attack
from eroseg_ext.models.adapter import Logits

pytestmark = pytest.mark.usefixtures("one_thread")

Batch = tuple[Tensor, Tensor]
MakeNet = Callable[..., nn.Sequential]
RUNS: list[dict[str, Any]] = [
    {},
    {"model_mode": "train"},
    {"model_mode": "keep"},
    {"restarts": 2, "keep": "best", "micro_batch": 2, "return_info": True},
]


def run(model: Any, batch: Batch, **settings: Any) -> Any:
    return attack(model, *batch, **{"steps": 3, "generator": torch.Generator().manual_seed(0), **settings})


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


# Forms of output.


class Output(collections.OrderedDict):
    """As the transformers library returns it: an ordered dict whose values are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


Pair = collections.namedtuple("Pair", "main aux")

OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dict with out": lambda z: {"aux": 0 * z, "out": z},
    "ordered dict with out": lambda z: collections.OrderedDict(out=z, aux=0 * z),
    "dict with logits": lambda z: {"logits": z},
    "object with logits": lambda z: SimpleNamespace(logits=z, loss=None),
    "transformers": lambda z: Output(loss=z.mean(), logits=z),
    "tuple": lambda z: (z, z.mean()),
    "list": lambda z: [z, None],
    "tuple with features": lambda z: (z, [0 * z, 0 * z]),
    "tuple with a class per image": lambda z: (z, z.mean((2, 3))),
    "tuple with an image only": lambda z: (z, z[:1]),
    "named tuple": lambda z: Pair(z, None),
    "tuple of dict": lambda z: ({"out": z}, None),
}


class Formed(nn.Module):
    def __init__(self, model: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, images: Tensor) -> Any:
        return self.form(self.model(images))


@pytest.mark.parametrize("form", OUTPUTS.values(), ids=OUTPUTS)
def test_forms_of_output(net: nn.Sequential, batch: Batch, form: Callable[[Tensor], Any]) -> None:
    assert torch.equal(run(Formed(net, form), batch), run(net, batch))


UNUSABLE: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "None": (lambda z: None, TypeError, "the model's output is a NoneType, wanted logits: a tensor, a dict"),
    "empty tuple": (lambda z: (), TypeError, "the model's output is a tuple, wanted logits"),
    "other dict": (lambda z: {"seg": z, "loss": 0}, TypeError, "output is a dict with keys seg, loss, wanted logits"),
    "dict of two": (
        lambda z: {"seg": z, "aux": z[:, :, ::2, ::2]},
        ValueError,
        r"several entries that could be the logits, 'seg' of shape \[3, 4, 20, 24\], 'aux' of shape \[3, 4, 10, 12\]: "
        "choose one by output_key=, or by logits=",
    ),
    "two of one size": (lambda z: (z, 0 * z), ValueError, r"could be the logits, 0 of shape .*, 1 of shape .*: choose"),
    "pyramid": (lambda z: [z[..., ::4, ::4], z[..., ::2, ::2], z], ValueError, "0 of shape .*, 1 .*, 2 of shape"),
    "two within one": (lambda z: ((z, z), None), ValueError, "several entries that could be the logits"),
    "features first": (lambda z: [z.repeat(1, 4, 1, 1)[..., ::2, ::2], z], ValueError, "several entries that could"),
    "channels last": (
        lambda z: z[:, :, ::2, :10].permute(0, 2, 3, 1),
        ValueError,
        r"shape \[3, 10, 10, 4\], whose 10 x 4 pixels have not the aspect ratio of the images' 20 x 24; they look like "
        r"\[B, H, W, C\]: pass logits=lambda output: output.permute\(0, 3, 1, 2\)$",
    ),
    "channels last, many": (
        lambda z: z.repeat(1, 8, 1, 1).permute(0, 2, 3, 1),
        ValueError,
        r"logits are \[24, 32\] pixels, wanted at most the labels' \[20, 24\]; they look like \[B, H, W, C\]",
    ),
    "another aspect": (
        lambda z: z[..., :12],
        ValueError,
        "20 x 12 pixels have not the aspect ratio of the images' 20 x",
    ),
    "array": (lambda z: z.detach().cpu().numpy(), TypeError, "the model's output is a ndarray, wanted logits"),
    "object": (lambda z: SimpleNamespace(loss=z), TypeError, "output is a SimpleNamespace, wanted logits"),
    "classes": (
        lambda z: z.argmax(1),
        ValueError,
        r"logits have shape \[3, 20, 24\], wanted \[B, C, H, W\] with B = 3",
    ),
    "vector": (lambda z: z.mean((2, 3)), ValueError, r"logits have shape \[3, 4\], wanted \[B, C, H, W\] with B = 3"),
    "too few images": (lambda z: z[:2], ValueError, r"shape \[2, 4, 20, 24\], wanted \[B, C, H, W\] with B = 3"),
    "no classes": (lambda z: z[:, :0], ValueError, r"shape \[3, 0, 20, 24\], wanted \[B, C, H, W\]"),
    "integers": (lambda z: z.long(), TypeError, "logits are torch.int64, wanted float32, float16, bfloat16 or float64"),
    "too large": (
        lambda z: F.interpolate(z, scale_factor=2),
        ValueError,
        r"logits are \[40, 48\] pixels, wanted at most the labels' \[20, 24\]",
    ),
    "detached": (
        lambda z: z.detach(),
        ValueError,
        "do not depend on images by autograd, wanted a differentiable model",
    ),
}


@pytest.mark.parametrize(("form", "kind", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_outputs_are_told_in_one_sentence(
    net: nn.Sequential, batch: Batch, backend: str, form: Callable[[Tensor], Any], kind: type[Exception], message: str
) -> None:
    calls: list[int] = []

    def counted(z: Tensor) -> Any:
        calls.append(1)
        return form(z)

    with pytest.raises(kind, match=message) as raised:
        run(Formed(net, counted), batch, backend=backend)
    assert "\n" not in str(raised.value)
    assert len(calls) == 1


KEYS: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any]]] = {
    "second": (lambda z: [0 * z, z], {"output_key": 1}),
    "last": (lambda z: [z[..., ::4, ::4], z], {"output_key": -1}),
    "name": (lambda z: {"seg": z, "aux": 0 * z}, {"output_key": "seg"}),
    "beside out": (lambda z: {"out": 0 * z, "aux": z}, {"output_key": "aux"}),
    "number in a dict": (lambda z: {0: 0 * z, 1: z}, {"output_key": 1}),
    "field": (lambda z: Pair(0 * z, z), {"output_key": "aux"}),
    "attribute": (lambda z: SimpleNamespace(seg=z), {"output_key": "seg"}),
    "dict in a tuple": (lambda z: (None, {"out": z}), {"output_key": 1}),
    "callable": (lambda z: {"a": [0 * z, z]}, {"logits": lambda output: output["a"][1]}),
    "channels last": (lambda z: z.permute(0, 2, 3, 1), {"logits": lambda output: output.permute(0, 3, 1, 2)}),
}


@pytest.mark.parametrize(("form", "settings"), KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("call", [attack, strong_attack])
def test_the_logits_are_those_that_are_named(
    net: nn.Sequential, batch: Batch, form: Callable[[Tensor], Any], settings: dict[str, Any], call: Callable[..., Any]
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = call(net, *batch, steps=2)
        torch.manual_seed(0)
        assert torch.equal(call(Formed(net, form), *batch, steps=2, **settings), expected)


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        (
            lambda z: [z, z],
            {"output_key": 2},
            "^output_key is 2, and the model's output is a list of 2 entries, wanted",
        ),
        (lambda z: [z, z], {"output_key": "out"}, "^output_key is 'out', and the model's output is a list, wanted one"),
        (
            lambda z: {"a": z},
            {"output_key": "b"},
            "^output_key is 'b', and the model's output is a dict with keys 'a',",
        ),
        (
            lambda z: z,
            {"output_key": 0},
            "^output_key is 0, and the model's output is a Tensor, wanted one that it has$",
        ),
        (lambda z: z, {"output_key": 1.5}, "^output_key is 1.5, wanted a number or a name$"),
        (lambda z: z, {"output_key": 0, "logits": len}, "^output_key is 0, wanted None beside logits=$"),
        (lambda z: z, {"logits": 3}, "^logits is 3, wanted a callable from the model's output$"),
        (lambda z: z, {"align_corners": 1}, "^align_corners is 1, wanted True or False$"),
    ],
)
def test_keys_that_do_not_fit(
    net: nn.Sequential, batch: Batch, form: Callable[[Tensor], Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(Formed(net, form), batch, **settings)
    with pytest.raises(TypeError, match=r"^logits gives a list of the model's output, wanted a tensor$"):
        run(net, batch, logits=lambda output: [output])


class Sized(nn.Module):
    """Logits of one size, whatever that of the images."""

    def __init__(self, h: int, w: int) -> None:
        super().__init__()
        self.size = h, w

    def forward(self, images: Tensor) -> Tensor:
        return 5 * F.interpolate(images, self.size)


@pytest.mark.parametrize(
    ("size", "of_the_model"),
    [
        ((20, 24), [(20, 24), (10, 12), (7, 8), (5, 6), (2, 3), (1, 1)]),
        ((97, 129), [(49, 65), (25, 33), (13, 17), (12, 16), (24, 32)]),
        ((1, 50), [(1, 50), (1, 25), (1, 12)]),
    ],
)
def test_sizes_that_strides_give(size: tuple[int, int], of_the_model: list[tuple[int, int]]) -> None:
    images, labels = torch.rand(1, 3, *size), torch.zeros(1, *size, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for h, w in of_the_model:
            attack(Sized(h, w), images, labels, steps=1)


@pytest.mark.parametrize(("size", "of_the_model"), [((64, 64), (60, 60)), ((64, 64), (36, 36)), ((20, 24), (19, 23))])
def test_a_size_that_no_stride_gives_is_warned_of(size: tuple[int, int], of_the_model: tuple[int, int]) -> None:
    images, labels = torch.rand(1, 3, *size), torch.zeros(1, *size, dtype=torch.int64)
    h, w = of_the_model
    message = (
        f"logits are {h} x {w} pixels for images of {size[0]} x {size[1]}, which no stride gives: .* pad its input"
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        attack(Sized(h, w), images, labels, steps=3)
    assert len(seen) == 1
    assert re.search(message, str(seen[0].message))
    assert seen[0].filename == __file__


@pytest.mark.parametrize("align_corners", [False, True])
def test_smaller_logits_are_upsampled_as_asked(make_net: MakeNet, batch: Batch, align_corners: bool) -> None:
    small = make_net(stride=2)

    def upsampled(images: Tensor) -> Tensor:
        return F.interpolate(small(images), SIZE, mode="bilinear", align_corners=align_corners)

    small.eval()
    assert torch.equal(run(small, batch, align_corners=align_corners), run(upsampled, batch))
    assert not torch.equal(run(small, batch, align_corners=not align_corners), run(upsampled, batch))


# Outputs in other units.


def signed(logits: Tensor) -> Tensor:
    """Of the two classes' difference, one logit."""
    return logits[:, 1:2] - logits[:, :1]


@pytest.mark.parametrize(
    ("form", "output", "bare"),
    [
        (lambda z: z.softmax(1), "probabilities", lambda z: z.log_softmax(1)),
        (lambda z: z.sigmoid(), "sigmoid", lambda z: z),
        (lambda z: signed(z).sigmoid(), "sigmoid", signed),
        (lambda z: signed(z).sigmoid(), "probabilities", signed),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_probabilities_are_converted_exactly(
    make_net: MakeNet,
    batch: Batch,
    backend: str,
    form: Callable[[Tensor], Tensor],
    output: str,
    bare: Callable[[Tensor], Tensor],
    stride: int,
) -> None:
    net = make_net(stride=stride).eval()
    labels = batch[1].clamp(max=1).where(batch[1] != 255, 255)
    found: list[tuple[Tensor, Tensor]] = []
    for model, settings in ((Formed(net, bare), {}), (Formed(net, form), {"output": output})):
        leaf = batch[0].clone().requires_grad_()
        logits = Logits(model, **settings)(leaf, SIZE).at(SIZE)
        generator = torch.Generator().manual_seed(0)
        weight = torch.rand(logits.shape, generator=generator).to(logits.device)
        found.append((logits.detach(), torch.autograd.grad(logits, leaf, weight)[0]))
    for left, correct in zip(*found, strict=True):
        torch.testing.assert_close(left, correct, rtol=1e-4, atol=1e-4)
    settings = {"backend": backend, "return_info": True, "method": "pgd"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info, expected = (
            run(Formed(net, wrapped), (batch[0], labels), **settings, output=units)[1]
            for wrapped, units in ((form, output), (bare, "logits"))
        )
    assert torch.allclose(info.correct, expected.correct, atol=5)
    assert torch.equal(info.stats[0, 0], expected.stats[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output", ["probabilities", "sigmoid"])
def test_conversion_at_0_and_1_is_finite(dtype: torch.dtype, output: str) -> None:
    z = torch.tensor([-1e4, -90.0, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0, 1e4]).view(1, 1, 3, 3)
    z = torch.cat([z, 0 * z], 1).to(dtype).requires_grad_()
    p = z.softmax(1) if output == "probabilities" else z.sigmoid()
    assert (p == 0).any()
    assert (p == 1).any()
    logits = Logits(lambda x: p, output=output)(torch.zeros(1, 3, 12, 12), (12, 12)).at((12, 12))
    (grad,) = torch.autograd.grad(logits[:, 0].sum(), z)
    assert logits.isfinite().all()
    assert grad.isfinite().all()
    assert grad[0, 0, 1, 1] > 0
    assert (logits[:, :1] > logits[:, 1:])[0, 0, -1, -1]


@pytest.mark.parametrize(
    ("form", "output", "message"),
    [
        (
            lambda z: z,
            "sigmoid",
            "^output is 'sigmoid', and the model's output has values from -.*, wanted values within",
        ),
        (lambda z: z, "probabilities", "^output is 'probabilities', and the model's output has values from -"),
        (
            lambda z: z.sigmoid(),
            "probabilities",
            "^output is 'probabilities', and a pixel's classes do not sum to 1 in",
        ),
        (lambda z: z, "scores", "^output is 'scores', wanted one of logits, probabilities, sigmoid"),
    ],
)
@pytest.mark.parametrize("call", [attack, strong_attack])
def test_outputs_in_other_units_than_said(
    net: nn.Sequential, batch: Batch, form: Callable[[Tensor], Any], output: str, message: str, call: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        call(Formed(net, form), *batch, steps=1, output=output)


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


def test_classes_are_read_from_the_logits(make_net: MakeNet, batch: Batch) -> None:
    images, labels = batch
    assert run(make_net(CLASSES + 3), batch).shape == images.shape
    with pytest.raises(ValueError, match="labels has the value 3, wanted classes from 0 to 2 or ignore_index=255"):
        run(make_net(CLASSES - 1), (images, labels))
