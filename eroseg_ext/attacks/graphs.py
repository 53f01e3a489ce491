"""The model from CUDA graphs, and the graphs that are kept from one attack to the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor, nn

from eroseg_ext.models.adapter import Model, Pass
from eroseg_ext.models.see_through import LogitMap

Result = TypeVar("Result")
KEPT = 2
"""How many graphs are kept, as each holds the model's memory: those of full batches and of a last, smaller one."""
_failed: list[torch.cuda.CUDAGraph] = []
"""Never freed: torch 2.11's allocator of pinned memory goes on asking a failed graph which streams it captures."""


class GraphedPass:
    """As ``adapter.Pass``, from two CUDA graphs: one launch instead of one for each of its kernels.

    Steps: two warm-up passes on a side stream, as capture wants them; then, on the same stream, the forward pass is
    captured, and the backward pass with its memory. A replay reads and writes the tensors of the capture: logits and
    gradient are valid until the next ``logits``, and the weights are those that are in the model's memory by then.

    Raises RuntimeError, naming the reason, for a model that cannot be captured; the device is fit for use then.
    """

    def __init__(self, forward: Callable[[Tensor], LogitMap], images: Tensor) -> None:
        self._captured = forward  # kept, as the graphs read what it holds
        self._leaf = images.detach().clone().requires_grad_()
        kind = images.device.type
        # With autocast's cache, casts of the images and weights could be taken from the warm-up, never to change again.
        uncached = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.cuda.device(images.device), uncached:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                warm_up = Pass(forward)
                for _ in range(2):
                    warm_up.gradient(torch.zeros_like(warm_up.logits(images).values))
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graphs have memory of their own, which cannot come from what is cached
            pool = torch.cuda.graph_pool_handle()
            try:
                self._forward, self._logits = _capture(lambda: forward(self._leaf), stream, pool)
                values = self._logits.values
                self.grad_logits = torch.zeros_like(values)
                self._backward, self._grad = _capture(
                    lambda: torch.autograd.grad(values, self._leaf, self.grad_logits)[0], stream, pool
                )
            except RuntimeError as error:
                with suppress(RuntimeError):
                    # In torch 2.11 the device draws no random numbers after a failed capture until another succeeds.
                    _capture(lambda: torch.zeros(1, device=images.device), stream, torch.cuda.graph_pool_handle())
                reason = str(error).strip().splitlines()[0]
                raise RuntimeError(
                    f"graph is True, but the model cannot be captured in a CUDA graph: {reason}"
                ) from error

    def logits(self, images: Tensor) -> LogitMap:
        """As :meth:`Pass.logits`, for images of the shape that was captured."""
        with torch.no_grad():
            self._leaf.copy_(images)
        self._forward.replay()
        return self._logits._replace(values=self._logits.values.detach())

    def gradient(self, grad_logits: Tensor) -> Tensor:
        """As :meth:`Pass.gradient`; ``grad_logits`` best is the attribute of that name itself."""
        if grad_logits is not self.grad_logits:
            self.grad_logits.copy_(grad_logits)
        self._backward.replay()
        return self._grad


def _capture(
    work: Callable[[], Result], stream: torch.cuda.Stream, pool: torch.cuda._POOL_HANDLE
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of the work, with its memory from the pool, and the result, which a replay writes.

    torch.cuda.graph does the same, but leaves the thread on the capture's stream, and the pool open, where the capture
    fails, and its error then hides the one that made it fail.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            # thread_local: another thread may pin memory meanwhile, as a data loader's does.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # tells no more than that there was an error before
                    graph.capture_end()
                raise
            graph.capture_end()
    except BaseException:
        graph.reset()
        with suppress(RuntimeError):  # torch 2.11 leaves the pool open, later versions close it and raise here
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        _failed.append(graph)
        raise
    return graph, result


class Graphs:
    """The graphs of one model under the same settings, for the forms of images that came last."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], GraphedPass] = {}
        self._state: object = None

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()  # a copy captures its own

    def expect(self, model: Model) -> None:
        """Lets the graphs go unless the model is as it was; its weights may have changed where they are."""
        state = _state(model)
        if state is None or state != self._state:
            self._kept.clear()
        self._state = state

    def of(self, forward: Callable[[Tensor], LogitMap], images: Tensor, dtype: torch.dtype) -> GraphedPass:
        """The passes over images of this form, which the model is given as ``dtype``; captured if they are new."""
        kind = images.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = images.shape, images.device, dtype, autocast
        graphed = self._kept.pop(key, None)
        if graphed is None:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            graphed = GraphedPass(forward, images)
        self._kept[key] = graphed  # at the end: the first is the one unused for longest
        return graphed


def _state(model: Model) -> object:
    """What a model's graphs depend on, to be compared; None where it cannot be known, for what is no nn.Module."""
    if not isinstance(model, nn.Module):
        return None
    tensors = itertools.chain(model.parameters(), model.buffers())
    return (
        [(module, module.training) for module in model.modules()],
        [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors],
    )
