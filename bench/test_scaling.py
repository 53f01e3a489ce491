"""How time and memory grow with pixels, classes, batch and radius, and that they do not depend on what the pixels hold.

``erosion_grad`` and ``next_tau``, fused where there are kernels, are measured as one: what a step adds to the model.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.cases import VOID, Case, Scene, operations, scene
from bench.conftest import Record
from bench.measure import Call, cold_copies, peak_memory, time_calls
from bench.results import Figure
from eroseg_ext.ops import backend

INF = float("inf")
BASE = {"quick": (1, 21, 128, 128), "default": (2, 21, 256, 256), "full": (4, 21, 512, 512)}
"""Every axis starts here; CUDA starts at ``full``, or its launches would be what is measured."""
FACTORS = {
    "pixels": (1, 4, 16),
    "classes": (2 / 21, 8 / 21, 1, 64 / 21, 192 / 21),
    "batch": (1, 2, 4, 8),
}
RADII = (0, 1)


def _base(profile: str, device: torch.device) -> tuple[int, int, int, int]:
    return BASE["full" if device.type == "cuda" and profile != "quick" else profile]


def _scaled(axis: str, factor: float, base: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    batch, classes, height, width = base
    if axis == "pixels":
        return batch, classes, round(height * math.sqrt(factor)), round(width * math.sqrt(factor))
    if axis == "classes":
        return batch, round(classes * factor), height, width
    return round(batch * factor), classes, height, width


def _step(inputs: Scene, ops: object, radius: int = 1) -> Call:
    """Selection and gradient, as every step of the loop has them."""
    logits, labels = inputs.logits, inputs.labels
    out = torch.empty_like(logits)
    tau = torch.ones(len(logits), device=logits.device)

    def run() -> None:
        _, log_odds, stats = ops.erosion_grad(logits, labels, tau, inputs.previous, radius=radius, out=out)  # type: ignore[attr-defined]
        ops.next_tau(log_odds, stats, 5)  # type: ignore[attr-defined]

    return run


@pytest.fixture
def implementation(device: torch.device) -> str:
    return "fused" if backend.why_not_fused(device) is None else "reference"


@pytest.fixture
def measured(
    record: Record, device: torch.device, implementation: str, seconds: float
) -> Callable[[str, object, Case, Callable[[Scene], Call]], None]:
    """Times the call that is made of a case's scenes, and records it as the point ``x`` of an axis."""

    def measure(axis: str, x: object, case: Case, make: Callable[[Scene], Call]) -> None:
        calls = [make(scene(case, device, seed)) for seed in range(cold_copies(device, case.bytes))]
        timing = time_calls(calls, device, seconds=seconds, least=9)
        figure = Figure(
            suite="scaling",
            case=f"{axis}: {x}",
            implementation=implementation,
            device=device.type,
            shape=list(case.shape),
            ms=timing.to_json(),
            extra={"axis": axis, "x": x, "peak_bytes": peak_memory(calls[0], device)},
        )
        record(figure, timing)

    return measure


Measured = Callable[[str, object, Case, Callable[[Scene], Call]], None]


@pytest.mark.parametrize(
    ("axis", "factor"), [(axis, factor) for axis, factors in FACTORS.items() for factor in factors]
)
def test_size(
    measured: Measured, device: torch.device, implementation: str, profile: str, axis: str, factor: float
) -> None:
    shape = _scaled(axis, factor, _base(profile, device))
    x = {"pixels": shape[2] * shape[3], "classes": shape[1], "batch": shape[0]}[axis]
    ops = operations(implementation, device)
    measured(axis, x, Case("erosion_grad", axis, shape), lambda inputs: _step(inputs, ops))


@pytest.mark.parametrize("radius", RADII)
def test_radius(measured: Measured, device: torch.device, implementation: str, profile: str, radius: int) -> None:
    ops = operations(implementation, device)
    case = Case("erosion_grad", "radius", _base(profile, device))
    measured("radius", radius, case, lambda inputs: _step(inputs, ops, radius))


@pytest.mark.parametrize("valid", [0.0, 0.01, 0.5, 1.0])
def test_valid_pixels(
    measured: Measured, device: torch.device, implementation: str, profile: str, valid: float
) -> None:
    """The share of valid pixels, scattered."""
    ops = operations(implementation, device)

    def make(inputs: Scene) -> Call:
        chance = torch.rand(inputs.labels.shape, generator=torch.Generator().manual_seed(1)).to(device)
        inputs.labels.remainder_(inputs.logits.shape[1]).masked_fill_(chance >= valid, VOID)
        return _step(inputs, ops)

    measured("valid share", valid, Case("erosion_grad", "valid", _base(profile, device)), make)


CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda z: z,
    "all zero": torch.zeros_like,
    "logits times 1000": lambda z: z * 1000,
    "logits over 1000": lambda z: z / 1000,
    "one class everywhere": lambda z: torch.zeros_like(z).index_fill_(1, torch.tensor([0], device=z.device), 30.0),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_content(measured: Measured, device: torch.device, implementation: str, profile: str, content: str) -> None:
    ops = operations(implementation, device)

    def make(inputs: Scene) -> Call:
        inputs.logits.copy_(CONTENTS[content](inputs.logits))
        return _step(inputs, ops)

    measured("content", content, Case("erosion_grad", "content", _base(profile, device)), make)


DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda s: s,
    "all equal": torch.ones_like,
    "sorted": lambda s: s.sort(1).values,
    "sorted backwards": lambda s: s.sort(1, descending=True).values,
    "saturated": lambda s: torch.full_like(s, torch.finfo(torch.float32).max),
    "nearly equal": lambda s: 3 + s / 1000,
    "two values": lambda s: torch.where(s < 2, 0.5, 20.0),
    "two neighbouring floats": lambda s: torch.where(s < 2, 1.0, 1.0 + torch.finfo(torch.float32).eps),
    "all void": lambda s: torch.full_like(s, INF),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_selection(
    measured: Measured, device: torch.device, implementation: str, profile: str, distribution: str
) -> None:
    """``next_tau`` alone on the distributions of confidence that would hurt a selection."""
    ops = operations(implementation, device)
    case = Case("next_tau", "selection", _base(profile, device))

    def make(inputs: Scene) -> Call:
        scores = DISTRIBUTIONS[distribution](inputs.previous.abs().flatten(1)).view_as(inputs.previous).contiguous()
        pixels = float(scores[0].numel())
        stats = torch.tensor([[pixels, 0.0, pixels / 4, pixels]], dtype=torch.float64, device=device)
        stats = stats.repeat(len(scores), 1)
        return lambda: ops.next_tau(scores, stats, 5)

    measured("selection", distribution, case, make)
