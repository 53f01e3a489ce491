"""Time, bandwidth and memory, by the same code on the CPU and on CUDA.

CUDA: events on the device's own time line around every call, one synchronisation at the end, and a cold L2: the calls
rotate over so many copies of their tensors that one returns only after several times the L2's size has passed.
"""

from __future__ import annotations

import gc
import json
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
Samples = npt.NDArray[np.float64]
"""Seconds that one call took, each time."""

L2_PASSES = 4
"""How many times its size passes through the L2 before a tensor is read again."""
HEAD_START_CYCLES = 20_000_000
"""About 10 ms on a GPU: the host's lead, so that launches are queued and not waited for."""


def percentiles(samples: Samples) -> dict[str, float]:
    """``p20``, ``p50`` and ``p80`` in milliseconds, as results hold them."""
    return {f"p{q}": round(1000 * float(np.percentile(samples, q)), 6) for q in (20, 50, 80)}


def median(samples: Samples) -> float:
    """In milliseconds."""
    return percentiles(samples)["p50"]


def time_calls(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 1.0, least: int = 5, most: int = 200
) -> Samples:
    """Times calls that do the same on different tensors, as many as :func:`cold_copies` asks for, in turn.

    Takes about so many seconds after the warm-up, and from ``least`` to ``most`` samples.
    """
    cuda = device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def mark() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    for call in calls:
        call()
    wait()
    start = time.perf_counter()
    calls[0]()
    wait()
    rounds = min(max(int(seconds / max(time.perf_counter() - start, 1e-9)), least), most)
    marks = []
    gc.collect()
    gc.disable()
    try:
        if cuda:
            torch.cuda._sleep(HEAD_START_CYCLES)
        for index in range(rounds):
            before = mark()
            calls[index % len(calls)]()
            marks.append((before, mark()))
        wait()
    finally:
        gc.enable()
    return np.array([a.elapsed_time(b) / 1000 if cuda else b - a for a, b in marks])


def cold_copies(device: torch.device, nbytes: int) -> int:
    """How many copies of a call's tensors keep them out of the L2; 1 on the CPU, whose cache the loop finds warm."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(math.ceil(L2_PASSES * l2 / max(nbytes, 1)), 1), 64)


@cache
def time_copy(device: torch.device, nbytes: int, seconds: float = 0.5) -> Samples:
    """Time of ``out.copy_(source)`` that reads and writes ``nbytes`` in sum: the floor of whatever has that traffic."""

    def copying() -> Call:
        source = torch.ones(max(nbytes // 8, 1), device=device)
        out = torch.zeros_like(source)
        return lambda: out.copy_(source)

    return time_calls([copying() for _ in range(cold_copies(device, nbytes))], device, seconds=seconds)


def peak_memory(run: Call, device: torch.device) -> int:
    """The most bytes that torch's allocator had given out at once during ``run``, beyond what it had before.

    Runs twice: what a first call allocates for good does not count.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return int(max(np.cumsum([0, *(size for _, size in changes)])))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread once the block has run that long."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    former = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
