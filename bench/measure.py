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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

L2_PASSES = 4
"""How many times its size passes through the L2 before a tensor is read again."""
HEAD_START_CYCLES = 20_000_000
"""About 10 ms on a GPU: the host's lead, so that launches are queued and not waited for."""


@dataclass(frozen=True)
class Timing:
    """Samples of one thing's time in seconds, in the order in which they were taken."""

    seconds: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """In seconds, interpolated linearly."""
        return float(np.percentile(self.seconds, q))

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def drift(self) -> float:
        """Relative difference between the medians of the first and the second half of the samples."""
        half = len(self.seconds) // 2
        if half == 0:
            return 0.0
        first, second = np.median(self.seconds[:half]), np.median(self.seconds[half:])
        return float(abs(first - second) / min(first, second))

    def scaled(self, factor: float) -> Timing:
        """The same samples, each multiplied."""
        return Timing(tuple(factor * value for value in self.seconds))

    def to_json(self) -> dict[str, float]:
        """Milliseconds, as results hold them."""
        ms = {f"p{q}": round(1000 * self.percentile(q), 6) for q in (20, 50, 80)}
        return {**ms, "rounds": len(self.seconds), "drift": round(self.drift, 4)}


class Clock:
    """Marks on a device's time line: the host's clock for the CPU, events for CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Now, or for CUDA: when the device has come to here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds between successive marks; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def time_calls(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 1.0, least: int = 5, most: int = 200
) -> Timing:
    """Times calls that do the same on different tensors, in turn.

    Args:
        calls: one, or as many as :func:`cold_copies` asks for.
        device: where they run.
        seconds: about so long, after the warm-up.
        least, most: bounds of the number of samples.
    """
    for call in calls:
        call()
    wait_for(device)
    start = time.perf_counter()
    calls[0]()
    wait_for(device)
    rounds = min(max(int(seconds / max(time.perf_counter() - start, 1e-9)), least), most)
    clock = Clock(device)
    with no_garbage_collection():
        if device.type == "cuda":
            torch.cuda._sleep(HEAD_START_CYCLES)
        for index in range(rounds):
            call = calls[index % len(calls)]
            clock.mark()
            call()
            clock.mark()
        laps = clock.laps()
    return Timing(tuple(laps[::2]))


def cold_copies(device: torch.device, nbytes: int) -> int:
    """How many copies of a call's tensors keep them out of the L2; 1 on the CPU, whose cache the loop finds warm."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(math.ceil(L2_PASSES * l2 / max(nbytes, 1)), 1), 64)


@cache
def copy_timing(device: torch.device, nbytes: int, seconds: float = 0.5) -> Timing:
    """Time of ``out.copy_(source)`` that reads and writes ``nbytes`` in sum: the floor of whatever has that traffic."""
    elements = max(nbytes // 8, 1)
    pairs = [
        (torch.zeros(elements, device=device), torch.ones(elements, device=device))
        for _ in range(cold_copies(device, nbytes))
    ]
    return time_calls(
        [lambda out=out, source=source: out.copy_(source) for out, source in pairs], device, seconds=seconds
    )


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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
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
