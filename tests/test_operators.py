"""The operators themselves, below ``ops/fused.py``: their schemas, and the arguments that they refuse."""

import math
from typing import Any

import pytest
import torch
from ops_common import ops
from torch import Tensor


def op_arguments() -> dict[str, tuple[Any, ...]]:
    logits = torch.randn(2, 3, 5, 6)
    labels = torch.randint(0, 3, (2, 5, 6))
    maps, rows, weight = torch.rand(2, 5, 6), torch.rand(2), torch.rand(2, 3)
    x = torch.rand(2, 3, 5, 6)
    stats = torch.ones(2, 4, dtype=torch.float64)
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    return {
        "erosion_grad": (
            logits,
            labels,
            rows,
            maps,
            weight,
            torch.empty_like(logits),
            255,
            0,
            0,
            0,
            1,
            1.0,
            False,
            False,
        ),
        "pixel_grad": (logits, labels, weight, torch.empty_like(logits), 2, 0.5, 255, False, 2.0, False),
        "confidence": (logits, labels, 255, 0, False),
        "kth_value": (maps.flatten(1), torch.ones(2, 2, dtype=torch.long), None),
        "next_tau": (maps, stats, 3, 1.0, 0.03, 0.4),
        "linf_step_": (x.clone(), x, torch.randn_like(x), 0.1, 0.1, 0.0, 1.0, mask),
        "confusion": (logits, labels, 3, 255, False),
    }


@pytest.mark.parametrize("name", list(op_arguments()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.eroseg, name).default, op_arguments()[name])


def test_every_schema_has_an_opcheck() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("eroseg::")}
    assert names == set(op_arguments())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: ops.erosion_grad(z.double(), y, torch.ones(1)), "logits are Double"),
        (lambda z, y: ops.erosion_grad(z, y.float(), torch.ones(1)), "labels are Float"),
        (lambda z, y: ops.erosion_grad(z, y.repeat(2, 1, 1), torch.ones(1)), "labels has another shape"),
        (lambda z, y: ops.erosion_grad(z, y, torch.ones(2)), "tau has another shape"),
        (lambda z, y: ops.erosion_grad(z, y, torch.ones(1), radius=2), "radius is 2, wanted 0 to 1"),
        (
            lambda z, y: torch.ops.eroseg.confidence(z.new_ones(1, 257, 4, 4), y, 255, 0, False),
            "logits have 257 channels",
        ),
        (lambda z, y: ops.confidence(z[..., :0], y), "logits have no pixel, wanted at least one"),
        (lambda z, y: ops.confusion(z, y, 7), "logits have 3 classes, wanted classes = 7"),
        (lambda z, y: ops.linf_step_(z, z[..., 1:], z, 0.1, 0.1), "differ in shape"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))


def called_with(name: str, **changes: Any) -> Any:
    """Calls an operator itself, some arguments changed."""
    op = getattr(torch.ops.eroseg, name).default
    names = [argument.name for argument in op._schema.arguments]
    return op(*(dict(zip(names, op_arguments()[name], strict=True)) | changes).values())


def shifted_view(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two tensors of a shape, each in most of the other's memory."""
    memory = torch.zeros(math.prod(shape) + 1)
    return memory[:-1].view(shape), memory[1:].view(shape)


@pytest.mark.parametrize("name", ["erosion_grad", "pixel_grad", "linf_step_"])
def test_what_is_written_may_not_overlap_what_is_read(name: str) -> None:
    written, read = ("x_adv", "x") if name.endswith("_") else ("grad", "logits")
    for left, correct in (shifted_view((2, 3, 5, 6)), shifted_view((2, 3, 5, 6))[::-1], [torch.zeros(2, 3, 5, 6)] * 2):
        with pytest.raises(RuntimeError, match=f"{written} is written and overlaps a tensor that is read"):
            called_with(name, **{written: left, read: correct})
    if name == "erosion_grad":
        logits, labels, tau = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), torch.ones(1)
        with pytest.raises(RuntimeError, match="overlaps"):
            ops.erosion_grad(logits, labels, tau, out=logits)


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        *(("erosion_grad", choice, (-1, 2, 2**40)) for choice in ("front", "direction")),
        ("erosion_grad", "confidence", (-1, 3, 2**40)),
        ("erosion_grad", "radius", (-1, 2)),
        ("erosion_grad", "slope", (math.nan, -1.0, math.inf)),
        ("pixel_grad", "method", (-1, 6)),
        ("pixel_grad", "progress", (math.nan, -0.1, 1.1)),
        ("pixel_grad", "q", (math.nan, math.inf)),
        ("confidence", "confidence", (-1, 3)),
        ("next_tau", "steps_left", (-1,)),
        *(("next_tau", number, (math.nan, -0.1, math.inf)) for number in ("reach", "front_min", "front_max")),
        *(("linf_step_", number, (math.nan, -1.0)) for number in ("eps", "alpha")),
        ("linf_step_", "low", (math.nan,)),
        ("linf_step_", "high", (math.nan, -0.5)),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, argument: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(RuntimeError, match=f"{name}: {argument} is .*, wanted"):
            called_with(name, **{argument: value})


def test_counts_that_cannot_be_are_no_rank_beyond_the_scores() -> None:
    for valid in (math.inf, 1e300, 1e6):
        stats = torch.tensor([[valid, 0.0, 0.0, 0.0]] * 2, dtype=torch.float64)
        maps = torch.rand(2, 5, 6)
        tau = called_with("next_tau", log_odds=maps, stats=stats, front_min=1.0, front_max=1.0)
        assert torch.equal(tau, maps.flatten(1).amax(1))


@pytest.mark.parametrize("name", list(op_arguments()))
def test_a_tensor_on_the_meta_device_beside_real_ones_is_refused(name: str) -> None:
    op = getattr(torch.ops.eroseg, name).default
    names = [argument.name for argument in op._schema.arguments]
    tensors = [argument for argument, value in zip(names, op_arguments()[name], strict=True) if torch.is_tensor(value)]
    for argument in tensors:
        moved = dict(zip(names, op_arguments()[name], strict=True))[argument].to("meta")
        with pytest.raises(RuntimeError, match="the tensors are on cpu and meta, wanted one device"):
            called_with(name, **{argument: moved})


@pytest.mark.parametrize("name", ["erosion_grad", "pixel_grad", "linf_step_"])
def test_a_write_is_noticed_by_autograd(name: str) -> None:
    argument = "x_adv" if name.endswith("_") else "grad"
    written = torch.zeros(2, 3, 5, 6)
    before = written._version
    called_with(name, **{argument: written})
    assert written._version == before + 1
    with pytest.raises(RuntimeError, match=f"{name}: {argument} requires grad, wanted"):
        called_with(name, **{argument: torch.zeros(2, 3, 5, 6, requires_grad=True)})
    with torch.no_grad():  # as torch's own in-place functions allow it
        called_with(name, **{argument: torch.zeros(2, 3, 5, 6, requires_grad=True)})
