"""What a model returns, read whatever its form, its size and its units."""

from __future__ import annotations

import collections
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_common import Batch, MakeNet, run
from conftest import CLASSES, SIZE
from torch import Tensor, nn

from eroseg_ext import attack, strong_attack
from eroseg_ext.models.adapter import Logits

pytestmark = pytest.mark.usefixtures("one_thread")


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
        r"24 x 32 pixels have not the aspect ratio of the images' 20 x 24; they look like \[B, H, W, C\]",
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


def test_classes_are_read_from_the_logits(make_net: MakeNet, batch: Batch) -> None:
    images, labels = batch
    assert run(make_net(CLASSES + 3), batch).shape == images.shape
    with pytest.raises(ValueError, match="labels has the value 3, wanted classes from 0 to 2 or ignore_index=255"):
        run(make_net(CLASSES - 1), (images, labels))
