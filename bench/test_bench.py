"""What ``pytest bench/`` measures: operations, whole attacks and their parts, attacks by others, the demo.

Both sides of a comparison run in one process, one after the other, on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cases
from bench.cases import Case, Unavailable
from bench.conftest import Record
from bench.measure import Call, median, peak_memory, time_calls
from bench.models import MODELS, build, trained
from bench.peers import PEERS, WAYS, Budget, OnlyLogits, textbook
from eroseg_ext.cli import demo
from eroseg_ext.models.adapter import frozen

CLASSES = 21
IMAGES = {"quick": (1, 3, 96, 96), "cpu": (1, 3, 192, 192), "cuda": (8, 3, 512, 512)}
"""On a GPU smaller shapes would measure its launches."""


def test_operation(
    record: Record,
    device: torch.device,
    case: Case,
    implementation: str,
    quick: bool,
    seconds: float,
    compile_seconds: float,
) -> None:
    """The reference eager and under ``torch.compile``, the fused kernels, and a copy of as many bytes: the floor."""
    if implementation == "compiled" and not cases.is_compiled(case, quick):
        pytest.skip("the run does not wait for torch.compile here")
    try:
        samples = cases.timed(case, implementation, device, seconds, compile_seconds)
    except Unavailable as reason:
        pytest.skip(str(reason))
    record("operations", case.name, implementation, samples, bytes=case.bytes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_parts(record: Record, device: torch.device, name: str, way: str, quick: bool) -> None:
    """A whole attack on a whole model: time per step, the model's part and ours, memory beyond the model's own."""
    make, options = WAYS[way]
    if options.get("graph") and device.type != "cuda":
        pytest.skip("a CUDA graph needs CUDA")
    try:
        model = build(name, CLASSES, device)
    except ImportError as reason:
        pytest.skip(str(reason))
    shape, steps = IMAGES["quick" if quick else device.type], 3 if quick else 5
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

    def time_of(call: Call) -> float:
        return median(time_calls([call], device, seconds=0, least=5))

    samples = time_calls([attacking(model, steps)], device, seconds=0, least=3) / steps
    more: dict[str, float] = {"peak": peak_memory(attacking(model, 2), device)}
    if make is not None and "graph" not in options:
        kept = torch.randn(shape[0], CLASSES, *shape[2:], generator=generator).to(device)
        with torch.no_grad():
            more["forward_p50"] = time_of(lambda: whole(images))
        more["backward_p50"] = time_of(backward) - more["forward_p50"]
        few, many = (time_of(attacking(demo.known_logits(kept), count)) for count in (2, 2 + steps))
        more |= {"ours_p50": (many - few) / steps, "logits": kept.nbytes, "model_peak": peak_memory(backward, device)}
    record("parts", f"{name}/{list(shape)}, {steps} steps", way, samples, **more)


@pytest.mark.parametrize("name", ["none", *PEERS])
def test_attack(record: Record, device: torch.device, name: str, quick: bool, seconds: float) -> None:
    """Our attacks and others' loops on one trained network: ms per step, peak memory, and what each leaves."""
    model, data = trained(quick, device)
    images, labels = data.test_images.to(device), data.test_labels.to(device)
    budget = Budget(ignore_index=data.ignore_index, classes=len(data.classes))
    size = f"{images.shape[-2]}x{images.shape[-1]}"
    case = f"light net, {len(images)} images {size}, eps 2/255, {budget.steps} steps"
    if name == "none":
        record("attacks", case, name, **demo.evaluate(model, images, labels, data))
        return

    def run() -> Tensor:
        torch.manual_seed(0)
        return PEERS[name](model, images, labels, budget)

    try:
        adversarial = run()
    except ImportError as reason:
        pytest.skip(str(reason))
    assert (adversarial - images).abs().max() <= budget.eps + 1e-6
    scores = demo.evaluate(model, adversarial, labels, data)
    samples = time_calls([run], device, seconds=5 * seconds) / budget.steps
    model.zero_grad(set_to_none=True)
    record("attacks", case, name, samples, peak=peak_memory(run, device), **scores)
    model.zero_grad(set_to_none=True)


def test_demo(record: Record, device: torch.device, quick: bool, tmp_path: Path) -> None:
    """What ``eroseg demo`` prints."""
    settings = demo.DemoSettings(quick=quick, out=tmp_path, device=str(device))
    result = demo.run(settings)
    size = "x".join(map(str, result["settings"]["size"]))
    kind = "--quick: " if quick else ""
    case = (
        f"{kind}{result['task']['test']} images {size}, {len(result['task']['classes'])} classes, eps 2/255, 10 steps"
    )
    record("demo", case, "none", **result["unattacked"])
    for method, row in result["methods"].items():
        times = {"fused_p50": row["fused_ms"], "reference_p50": row["reference_ms"]}
        scores = {name: row[name] for name in ("miou", "accuracy")}
        record("demo", case, method, **scores, **{name: value for name, value in times.items() if value is not None})
