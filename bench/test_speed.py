"""Time of the operations: the reference eager and under ``torch.compile``, and the fused kernels, in one run.

    pytest bench/

Groups stand for one case each; within a group the factor in parentheses is the time relative to the fastest. All write
into a kept gradient buffer, as the attack loop does. ``copy`` is the floor of the traffic: the logits read and the
gradient written once, as ``out.copy_(logits)`` does it.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from eroseg_ext import AttackSettings, backend, reference

CPU = torch.device("cpu")
CASES = {
    "voc float32": ((4, 21, 512, 512), torch.float32, torch.contiguous_format),
    "voc float32 channels_last": ((4, 21, 512, 512), torch.float32, torch.channels_last),
    "voc bfloat16": ((4, 21, 512, 512), torch.bfloat16, torch.contiguous_format),
    "ade20k float32": ((1, 150, 512, 512), torch.float32, torch.contiguous_format),
    "binary float32": ((8, 1, 512, 512), torch.float32, torch.contiguous_format),
}
IMPLEMENTATIONS = ["copy", "reference", "compiled", "fused"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    why_not = backend.why_not_fused(CPU)
    if request.param == "fused" and why_not is not None:
        pytest.skip(why_not)
    return str(request.param)


def function(implementation: str, name: str) -> Callable[..., object]:
    """The operation ``name`` as that implementation has it."""
    if implementation == "fused":
        return getattr(backend.select(CPU, "fused"), name)  # type: ignore[no-any-return]
    eager: Callable[..., object] = getattr(reference, name)
    return torch.compile(eager) if implementation == "compiled" else eager


def measure(benchmark: BenchmarkFixture, group: str, rounds: int, run: Callable[[], object]) -> None:
    benchmark.group = f"{group}, {torch.get_num_threads()} threads"
    benchmark.extra_info["cpu"] = torch.backends.cpu.get_cpu_capability()
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=3)


def scene(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with void pixels, and log-odds of a step before."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * 4).to(dtype).contiguous(memory_format=layout)
    labels = torch.randint(0, max(shape[1], 2), (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = 255
    return logits, labels, torch.randn(labels.shape, generator=generator) * 4


@pytest.mark.parametrize("case", CASES)
def test_erosion_grad(benchmark: BenchmarkFixture, case: str, implementation: str) -> None:
    shape, dtype, layout = CASES[case]
    logits, labels, previous = scene(shape, dtype, layout)
    out, tau = torch.empty_like(logits), torch.ones(shape[0])
    weight = reference.class_balance(labels, max(shape[1], 2)) ** AttackSettings().balance
    if implementation == "copy":
        measure(benchmark, f"erosion_grad {case}", 20, lambda: out.copy_(logits))
        return
    run = function(implementation, "erosion_grad")
    rounds = 20 if implementation == "fused" else 5
    measure(
        benchmark,
        f"erosion_grad {case}",
        rounds,
        lambda: run(logits, labels, tau, previous, class_weight=weight, out=out),
    )


@pytest.mark.parametrize("method", ["pgd", "cospgd"])
def test_pixel_grad(benchmark: BenchmarkFixture, method: str, implementation: str) -> None:
    logits, labels, _ = scene(*CASES["voc float32"])
    out = torch.empty_like(logits)
    if implementation == "copy":
        measure(benchmark, f"pixel_grad {method}", 20, lambda: out.copy_(logits))
        return
    run = function(implementation, "pixel_grad")
    rounds = 20 if implementation == "fused" else 5
    measure(benchmark, f"pixel_grad {method}", rounds, lambda: run(logits, labels, method, 0.5, out=out))


@pytest.mark.parametrize("name", ["linf_step_", "l2_step_"])
def test_step(benchmark: BenchmarkFixture, name: str, implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 512, 512, generator=generator)
    grad = torch.randn(x.shape, generator=generator)
    x_adv = x.clone()
    if implementation == "copy":
        measure(benchmark, name, 50, lambda: x_adv.copy_(x))
        return
    run = function(implementation, name)
    measure(benchmark, name, 50, lambda: run(x_adv, x, grad, 8 / 255, 2 / 255))


def test_next_tau(benchmark: BenchmarkFixture, implementation: str) -> None:
    if implementation in ("copy", "compiled"):
        pytest.skip("a selection has no such floor, and torch.compile calls the same sort")
    logits, labels, previous = scene(*CASES["voc float32"])
    _, log_odds, stats = reference.erosion_grad(logits, labels, torch.ones(len(logits)), previous)
    run = function(implementation, "next_tau")
    measure(benchmark, "next_tau", 10, lambda: run(log_odds, stats, 5))
