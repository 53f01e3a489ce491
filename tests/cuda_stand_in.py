"""What ``torch.cuda`` has for CUDA graphs, on the CPU: the logic around them is tested where there is no GPU."""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eroseg_ext.attacks import inputs

FIRST_ERROR = "operation not permitted when stream is capturing"
LATER_ERROR = "operation failed due to a previous error during capture"


@dataclasses.dataclass(eq=False)
class Stream:
    """``is_default``: the one that is current until another is made so, on which nothing can be captured."""

    device: torch.device
    is_default: bool = False

    @property
    def device_index(self) -> torch.device:
        return self.device

    def wait_stream(self, other: Stream) -> None:
        pass


class Recording(TorchDispatchMode):
    """Keeps each operation with the very tensors that it reads and writes, as a capture does."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.has_failed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.has_failed = True
            raise RuntimeError(f"CUDA error: {FIRST_ERROR}\nand more lines")
        result = func(*args, **(kwargs or {}))
        read = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [
            leaf if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in read else None
            for leaf in tree_leaves(result)
        ]
        self.operations.append((func, args, kwargs or {}, fresh))
        return result


class Cuda:
    """The images' device is the CPU; the current one is another. Fails as torch 2.11 does, leaving all as it is."""

    def __init__(self) -> None:
        self.current_device = torch.device("cuda:0")
        self.current_streams = {d: Stream(d, is_default=True) for d in (self.current_device, torch.device("cpu"))}
        self.captured_on: list[Stream] = []
        self.error_modes: set[str] = set()
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.open_pools: set[int] = set()
        self.pool_users: dict[int, int] = {}
        self.generator_is_captured = False
        self.replays = 0

    @property
    def captures(self) -> int:
        return len(self.captured_on)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current_device = self.current_device, device
        try:
            yield
        finally:
            self.current_device = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_streams[stream.device]
        self.current_streams[stream.device] = stream
        try:
            with self.device(stream.device):
                yield
        finally:
            self.current_streams[stream.device] = before

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return self.current_streams[device or self.current_device]

    def make_stream(self, device: torch.device | None = None) -> Stream:
        return Stream(device or self.current_device)

    def graph_pool_handle(self) -> int:
        self.pool_users[len(self.pool_users)] = 0
        return len(self.pool_users) - 1

    def end_allocate_to_pool(self, device: torch.device, pool: int) -> None:
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)

    def release_pool(self, device: torch.device, pool: int) -> None:
        self.pool_users[pool] -= 1
        assert self.pool_users[pool] >= 0

    def make_graph(self) -> Graph:
        return Graph(self)


class Graph:
    """A capture executes nothing, so what it has made is NaN until a replay."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._recording = Recording()
        self._pool: int | None = None
        cuda.graphs.add(self)

    def capture_begin(self, pool: int, capture_error_mode: str = "global") -> None:
        cuda, stream = self._cuda, self._cuda.current_stream()
        assert not stream.is_default
        assert not cuda.open_pools
        cuda.captured_on.append(stream)
        cuda.error_modes.add(capture_error_mode)
        cuda.open_pools.add(pool)
        cuda.pool_users[pool] += 1
        cuda.generator_is_captured = True
        self._stream, self._opened = stream, pool
        self._recording.__enter__()

    def capture_end(self) -> None:
        assert self._cuda.current_stream() is self._stream
        self._recording.__exit__(None, None, None)
        if self._recording.has_failed:
            raise RuntimeError(f"CUDA error: {LATER_ERROR}")
        self._cuda.open_pools.remove(self._opened)
        self._cuda.generator_is_captured = False
        self._pool = self._opened
        for *_, fresh in self._recording.operations:
            for tensor in fresh:
                if tensor is not None and tensor.is_floating_point():
                    tensor.data.fill_(torch.nan)

    def replay(self) -> None:
        assert self._pool is not None
        self._cuda.replays += 1
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, fresh in self._recording.operations:
                for old, new in zip(fresh, tree_leaves(func(*args, **kwargs)), strict=True):
                    if old is not None:
                        old.data.copy_(new)

    def reset(self) -> None:
        if self._pool is not None:
            self._cuda.release_pool(self._stream.device, self._pool)
            self._pool = None

    def __del__(self) -> None:
        self.reset()


def install(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Makes ``graph=True`` run on images on the CPU."""
    cuda = Cuda()
    for name in ("device", "stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "Stream", cuda.make_stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", cuda.make_graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release_pool)
    check = inputs.check
    monkeypatch.setattr(
        inputs,
        "check",
        lambda images, labels, mask, config: check(images, labels, mask, dataclasses.replace(config, graph=False)),
    )
    # On the CPU images that are done leave the batch, which a graph of all of them cannot follow.
    monkeypatch.setattr(importlib.import_module("eroseg_ext.attacks.pgd"), "_host_waits", lambda device: True)
    return cuda
