"""What ``pytest bench/`` measures: operations, whole attacks and their parts, attacks by others, growth, the demo.

Both sides of a comparison run in one process, one after the other, on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cases
from bench.cases import VOID, Case, Scene, Unavailable, operations, scene
from bench.conftest import Record
from bench.measure import Call, cold_copies, peak_memory, time_calls
from bench.models import MODELS, Trained, build, trained
from bench.peers import PEERS, WAYS, Budget, OnlyLogits, textbook
from eroseg_ext.cli import demo
from eroseg_ext.models.adapter import frozen
from eroseg_ext.ops import backend

CLASSES = 21
STEPS = {"quick": 3, "default": 5, "full": 10}
IMAGES = {"quick": (1, 3, 96, 96), "default": (1, 3, 192, 192), "full": (2, 3, 512, 512), "cuda": (8, 3, 512, 512)}
BASE = {"quick": (1, 21, 128, 128), "default": (2, 21, 256, 256), "full": (4, 21, 512, 512), "cuda": (4, 21, 512, 512)}
"""Every axis of growth starts here; on a GPU smaller shapes would measure its launches."""


def test_operation(
    record: Record,
    device: torch.device,
    case: Case,
    implementation: str,
    profile: str,
    seconds: float,
    compile_seconds: float,
) -> None:
    """The reference eager and under ``torch.compile``, the fused kernels, and a copy of as many bytes: the floor."""
    if implementation == "compiled" and not cases.is_compiled(case, profile):
        pytest.skip(f"a {profile} run does not wait for torch.compile here")
    try:
        timing = cases.timed(case, implementation, device, seconds, compile_seconds)
    except Unavailable as reason:
        pytest.skip(str(reason))
    record("operations", case.name, implementation, timing, bytes=case.bytes)


def _of(sizes: dict[str, tuple[int, int, int, int]], profile: str, device: torch.device) -> tuple[int, int, int, int]:
    return sizes["cuda" if device.type == "cuda" and profile != "quick" else profile]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_parts(record: Record, device: torch.device, name: str, way: str, profile: str) -> None:
    """A whole attack on a whole model: time per step, the model's part and ours, memory beyond the model's own."""
    make, options = WAYS[way]
    if options.get("graph") and device.type != "cuda":
        pytest.skip("a CUDA graph needs CUDA")
    try:
        model, description = build(name, CLASSES, device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    shape, steps = _of(IMAGES, profile, device), STEPS[profile]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator).to(device)
    labels = torch.randint(CLASSES, (shape[0], *shape[2:]), generator=generator).to(device)
    whole = OnlyLogits(model).eval()

    def attacking(target: Callable[[Tensor], Tensor], count: int) -> Call:
        if make is None:
            return lambda: textbook(whole, images, labels, Budget(steps=count, classes=CLASSES))
        bound = make(target, steps=count, **options)
        return lambda: bound(images, labels)

    def backward() -> None:
        with frozen(model, "eval"):
            leaf = images.detach().requires_grad_()
            torch.autograd.grad(whole(leaf), leaf, kept)

    timing = time_calls([attacking(model, steps)], device, seconds=0, least=3).scaled(1 / steps)
    more: dict[str, float] = {"peak": peak_memory(attacking(model, 2), device)}
    if make is not None and "graph" not in options:
        kept = torch.randn(shape[0], CLASSES, *shape[2:], generator=generator).to(device)
        with torch.no_grad():
            more["forward_p50"] = time_calls([lambda: whole(images)], device, seconds=0, least=5).to_json()["p50"]
        more["backward_p50"] = time_calls([backward], device, seconds=0, least=5).to_json()["p50"] - more["forward_p50"]
        ours = [
            time_calls([attacking(demo.known_logits(kept), n)], device, seconds=0, least=5).median
            for n in (2, 2 + steps)
        ]
        more |= {"ours_p50": 1000 * (ours[1] - ours[0]) / steps, "logits": kept.nbytes}
        more["model_peak"] = peak_memory(backward, device)
    record("parts", f"{description}/{list(shape)}, {steps} steps", way, timing, **more)


@pytest.fixture(scope="module")
def networks(profile: str, pytestconfig: pytest.Config) -> Callable[[torch.device], Trained]:
    """Trained networks by device, trained when first asked for."""
    assert pytestconfig.cache is not None
    folder, made = pytestconfig.cache.mkdir("eroseg-bench"), {}

    def network(device: torch.device) -> Trained:
        if device not in made:
            made[device] = trained(profile == "quick", device, folder)
        return made[device]

    return network


@pytest.mark.parametrize("name", ["none", *PEERS])
def test_attack(
    record: Record, networks: Callable[[torch.device], Trained], device: torch.device, name: str, seconds: float
) -> None:
    """Our attacks and others' loops on one trained network: ms per step, peak memory, and what each leaves."""
    model, task = networks(device)
    images, labels = task.test_images.to(device), task.test_labels.to(device)
    budget = Budget(ignore_index=task.ignore_index, classes=len(task.classes))
    size = f"{images.shape[-2]}x{images.shape[-1]}"
    case = f"light net, {len(images)} images {size}, eps 2/255, {budget.steps} steps"
    if name == "none":
        record("attacks", case, name, **demo.evaluate(model, images, labels, task))
        return

    def run() -> Tensor:
        torch.manual_seed(0)
        return PEERS[name](model, images, labels, budget)

    try:
        adversarial = run()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert (adversarial - images).abs().max() <= budget.eps + 1e-6
    scores = demo.evaluate(model, adversarial, labels, task)
    timing = time_calls([run], device, seconds=5 * seconds).scaled(1 / budget.steps)
    model.zero_grad(set_to_none=True)
    record("attacks", case, name, timing, peak=peak_memory(run, device), **scores)
    model.zero_grad(set_to_none=True)


def test_demo(record: Record, device: torch.device, profile: str, tmp_path: Path) -> None:
    """What ``eroseg demo`` prints."""
    settings = demo.DemoSettings(quick=profile == "quick", out=tmp_path, device=str(device))
    result = demo.run(settings)
    size = "x".join(map(str, result["settings"]["size"]))
    quick = "--quick: " if settings.quick else ""
    case = (
        f"{quick}{result['task']['test']} images {size}, {len(result['task']['classes'])} classes, eps 2/255, 10 steps"
    )
    record("demo", case, "none", **result["unattacked"])
    for method, row in result["methods"].items():
        times = {"fused_p50": row["fused_ms"], "reference_p50": row["reference_ms"]}
        scores = {name: row[name] for name in ("miou", "accuracy")}
        record("demo", case, method, **scores, **{name: value for name, value in times.items() if value is not None})


def _same(value: Tensor) -> Tensor:
    return value


CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": _same,
    "all zero": torch.zeros_like,
    "logits times 1000": lambda z: z * 1000,
    "one class everywhere": lambda z: torch.zeros_like(z).index_fill_(1, torch.tensor([0], device=z.device), 30.0),
}
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": _same,
    "all equal": torch.ones_like,
    "sorted": lambda s: s.sort(1).values,
    "saturated": lambda s: torch.full_like(s, torch.finfo(torch.float32).max),
    "nearly equal": lambda s: 3 + s / 1000,
    "two neighbouring floats": lambda s: torch.where(s < 2, 1.0, 1.0 + torch.finfo(torch.float32).eps),
    "all void": lambda s: torch.full_like(s, math.inf),
}
AXES: list[tuple[str, float | str]] = [
    *(("pixels", factor) for factor in (1, 4, 16)),
    *(("classes", classes) for classes in (2, 8, 21, 64, 192)),
    *(("batch", factor) for factor in (1, 2, 4, 8)),
    *(("radius", radius) for radius in (0, 1)),
    *(("valid share", share) for share in (0.0, 0.01, 0.5, 1.0)),
    *(("content", content) for content in CONTENTS),
    *(("selection", distribution) for distribution in DISTRIBUTIONS),
]


@pytest.mark.parametrize(("axis", "x"), AXES)
def test_scaling(record: Record, device: torch.device, profile: str, seconds: float, axis: str, x: float | str) -> None:
    """How ``erosion_grad`` and ``next_tau`` grow with sizes, and that they do not depend on what the pixels hold."""
    batch, classes, height, width = _of(BASE, profile, device)
    if axis == "pixels":
        height, width = round(height * math.sqrt(x)), round(width * math.sqrt(x))
    batch, classes = batch * x if axis == "batch" else batch, x if axis == "classes" else classes
    case = Case("erosion_grad", axis, (batch, classes, height, width))
    name = "fused" if backend.why_not_fused(device) is None else "reference"
    ops = operations(name, device)

    def call(inputs: Scene) -> Call:
        logits, labels, scores = inputs.logits, inputs.labels, inputs.previous
        if axis == "valid share":
            chance = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).to(device)
            labels.remainder_(classes).masked_fill_(chance >= x, VOID)
        if axis == "content":
            logits.copy_(CONTENTS[x](logits))
        if axis == "selection":
            scores = DISTRIBUTIONS[x](scores.abs().flatten(1)).view_as(scores).contiguous()
            pixels = float(scores[0].numel())
            stats = torch.tensor([[pixels, 0.0, pixels / 4, pixels]] * batch, dtype=torch.float64, device=device)
            return lambda: ops.next_tau(scores, stats, 5)
        out, tau = torch.empty_like(logits), torch.ones(batch, device=device)
        radius = x if axis == "radius" else 1

        def run() -> None:
            _, log_odds, stats = ops.erosion_grad(logits, labels, tau, scores, radius=radius, out=out)
            ops.next_tau(log_odds, stats, 5)

        return run

    calls = [call(scene(case, device, seed)) for seed in range(cold_copies(device, case.bytes))]
    timing = time_calls(calls, device, seconds=seconds, least=9)
    size = {"pixels": height * width, "classes": classes, "batch": batch}.get(axis, x)
    record("scaling", f"{axis}/{size}", name, timing, peak=peak_memory(calls[0], device))
