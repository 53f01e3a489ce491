"""A model's last upsampling, put off until something looks at its result.

Most models end in a bilinear upsampling of their logits to the size of the images. The operations take logits of any
size, so the upsampled ones, and their gradient, need not exist. While a model runs under :class:`SeeThrough`,
``F.interpolate`` to that size returns a :class:`Deferred`: for autograd and for whoever asks for its shape it is the
upsampled tensor, and the first operation on its values computes them. What the model returns untouched is read at its
source instead; whatever else a model does gives what it gives without this module.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_upsample_backward = torch.ops.aten.upsample_bilinear2d_backward


class LogitMap(NamedTuple):
    """Logits as a model gives them."""

    values: Tensor
    """``[B, C, h, w]``, of the labels' size or of another, which stands for their bilinear interpolation"""
    align_corners: bool
    """of that interpolation"""

    def at(self, size: tuple[int, int]) -> Tensor:
        """``[B, C, *size]``, differentiable."""
        if self.values.shape[-2:] == size:
            return self.values
        return F.interpolate(self.values, size, mode="bilinear", align_corners=self.align_corners)


class Deferred(Tensor):
    """The bilinear interpolation of ``source``; any operation on it computes the values and marks it ``looked_at``."""

    source: Tensor
    align_corners: bool
    looked_at: bool
    _origin: Any
    _version_of_source: int
    _computed: Tensor | None

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def computed(value: Any) -> Any:
            return value.values_now() if isinstance(value, Deferred) else value

        return func(*tree_map(computed, args), **tree_map(computed, kwargs or {}))

    def values_now(self) -> Tensor:
        """The interpolated values, without autograd, which has this tensor for them."""
        self.looked_at = True
        if self._computed is None:
            self._check_source()
            with torch.autocast(self.device.type, enabled=False), torch.no_grad():
                source, size = self.source.detach().to(self.dtype), (self.shape[-2], self.shape[-1])
                self._computed = _interpolate(source, size, mode="bilinear", align_corners=self.align_corners)
        return self._computed

    def untouched(self) -> bool:
        """Whether this tensor is still what the interpolation returned, and nothing has been hung onto it."""
        return not self.looked_at and self.grad_fn is self._origin and not self._backward_hooks

    def _check_source(self) -> None:
        if self.source._version != self._version_of_source:
            raise RuntimeError(
                "the model writes to the tensor that it has upsampled before it uses the result, pass see_through=False"
            )


class _Defer(torch.autograd.Function):
    """``source -> Deferred``, with the interpolation's gradient."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype, ctx.size, ctx.align_corners = source.shape, source.dtype, size, align_corners
        is_nhwc = source.is_contiguous(memory_format=torch.channels_last) and not source.is_contiguous()
        like = torch.empty(*source.shape[:2], *size, device="meta")
        strides = like.to(memory_format=torch.channels_last).stride() if is_nhwc else like.stride()
        return Tensor._make_wrapper_subclass(Deferred, like.shape, strides, dtype=dtype, device=source.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = _upsample_backward(grads[0].contiguous(), ctx.size, ctx.shape, ctx.align_corners)
        return grad.to(ctx.dtype), None, None, None


class _OfThread(threading.local):
    """What the model of this thread runs under."""

    size: tuple[int, int] | None = None


_of_thread = _OfThread()
_lock = threading.Lock()
_running = 0
"""Models that run under ``SeeThrough``, in all threads."""
_interpolate = F.interpolate
"""What stands in ``F.interpolate``'s place while no such model runs."""


class SeeThrough:
    """A context in which ``F.interpolate`` puts off this thread's bilinear upsamplings to ``size``.

    Meanwhile another function is in its place, which does for other threads what it always does. A mode that is asked
    about every function of torch would leave it alone, but costs 1 to 7 us for each call that the model makes.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size

    def __enter__(self) -> None:
        global _interpolate, _running
        with _lock:
            if _running == 0:
                _interpolate, F.interpolate = F.interpolate, _interpolate_or_defer
            _running += 1
        self._outer, _of_thread.size = _of_thread.size, self._size

    def __exit__(self, *_: object) -> None:
        global _running
        _of_thread.size = self._outer
        with _lock:
            _running -= 1
            if _running == 0:
                F.interpolate = _interpolate


@functools.wraps(F.interpolate)
def _interpolate_or_defer(*args: Any, **kwargs: Any) -> Tensor:
    if torch.compiler.is_compiling() or _of_thread.size is None:
        return _interpolate(*args, **kwargs)
    deferred = _deferred(_of_thread.size, *args, **kwargs)
    return _interpolate(*args, **kwargs) if deferred is None else deferred


def _deferred(
    wanted: tuple[int, int],
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor | None:
    """What ``F.interpolate`` is to return for these arguments of its; None: what it does."""
    if mode != "bilinear" or antialias or type(input) is not Tensor or input.dim() != 4:
        return None
    if input.is_inference() or input.numel() == 0 or not input.is_floating_point():
        return None
    if size is None:
        # Factors that do not give these sides exactly are another interpolation than that to the size.
        factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
        if None in factors:
            return None
        size = [side * factor for side, factor in zip(input.shape[-2:], factors, strict=True)]
    size = (size, size) if isinstance(size, int) else tuple(size)
    if size != wanted or size == input.shape[-2:]:
        return None
    # Under autocast the result may have another type than the input.
    dtype = _interpolate(input.detach()[:1, :1, :1, :1], (1, 1), mode="bilinear").dtype
    found: Any = _Defer.apply(input, wanted, bool(align_corners), dtype)
    found.source, found.align_corners = input, bool(align_corners)
    found.looked_at, found._computed = False, None
    found._origin, found._version_of_source = found.grad_fn, input._version
    return found


def can_see_through(modules: list[nn.Module]) -> bool:
    """Not through compiled and scripted modules, whose calls of ``F.interpolate`` are not seen, or only half."""
    dynamo = sys.modules.get("torch._dynamo")  # not imported for this: that takes seconds
    compiled = (torch.jit.ScriptModule,) if dynamo is None else (torch.jit.ScriptModule, dynamo.OptimizedModule)
    return not any(
        isinstance(module, compiled) or module._compiled_call_impl is not None
        for root in modules
        for module in root.modules()
    )


def source_of(logits: Tensor, align_corners: bool) -> LogitMap:
    """What the logits stand for: where they are an upsampling that nobody has touched, its source."""
    if isinstance(logits, Deferred) and logits.untouched():
        logits._check_source()
        return LogitMap(logits.source, logits.align_corners)
    return LogitMap(logits, align_corners)
