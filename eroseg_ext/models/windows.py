"""Sliding windows, for images that are too large for the model: its logits of overlapping parts, averaged.

They are the logits of mmsegmentation's ``mode="slide"``. The forward pass keeps no activations, and the backward pass
runs the model once more on each window, so that no more than one window's are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from eroseg_ext.utils.validate import check_integer, check_size, require

if TYPE_CHECKING:
    from eroseg_ext.models.adapter import Pass

Sides = int | tuple[int, int]
Places = list[tuple[slice, slice]]


def check_window(window: Sides | None, stride: Sides | None) -> None:
    """Raises ValueError for settings of these names that are not allowed."""
    for name, value in (("window", window), ("stride", stride)):
        if isinstance(value, (tuple, list)):
            check_size(name, value)
        elif value is not None:
            check_integer(name, value, 1)
    if stride is not None:
        require(window is not None, "stride", stride, "None without window")
        fits = all(step <= side for step, side in zip(_sides(stride), _sides(window), strict=True))
        require(fits, "stride", stride, f"at most window = {window}, as pixels between windows would have no logits")


def places(size: tuple[int, int], window: Sides, stride: Sides | None) -> Places:
    """Rows and columns of each window in an image of ``size``; the last ones end at its border.

    Along a side that is no longer than the window there is one window, of that side's length.
    """
    steps = _sides(stride) if stride is not None else [max(3 * side // 4, 1) for side in _sides(window)]
    rows, columns = (
        [slice(begin, begin + min(length, side)) for begin in _begins(max(side - length, 0), step)]
        for side, length, step in zip(size, _sides(window), steps, strict=True)
    )
    return [(row, column) for row in rows for column in columns]


def averaged(passes: Pass, images: Tensor, at: Places) -> Tensor:
    """Logits ``[B, C, H, W]`` float32, differentiable with respect to the images.

    Args:
        passes: of windows; their logits have the windows' size.
        images: ``[B, K, H, W]``.
        at: what :func:`places` gave.
    """
    found: Tensor = _Averaged.apply(images, passes, at)
    return found


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, passes: Pass, at: Places) -> Tensor:
        ctx.passes, ctx.at = passes, at
        if ctx.needs_input_grad[0]:
            ctx.as_now = _as_now(images)
        count = images.new_zeros(images.shape[-2:], dtype=torch.float32)
        total = count
        for rows, columns in at:
            logits = passes.forward(images[:, :, rows, columns]).values
            if total is count:
                total = count.new_zeros(*logits.shape[:2], *count.shape)
            total[:, :, rows, columns] += logits
            count[rows, columns] += 1
        ctx.save_for_backward(images, count)
        return total.div_(count)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        images, count = ctx.saved_tensors
        total = torch.zeros_like(images)
        with ctx.as_now(), torch.enable_grad():
            for rows, columns in ctx.at:
                dtype = ctx.passes.logits(images[:, :, rows, columns]).values.dtype
                grad = grads[0][:, :, rows, columns] / count[rows, columns]
                total[:, :, rows, columns] += ctx.passes.gradient(grad.to(dtype))
        return total, None, None


def _as_now(images: Tensor) -> Callable[[], AbstractContextManager[None]]:
    """In its contexts a model draws the random numbers that it would draw now, and autocast is as it is now."""
    kind = images.device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    state, (devices, states) = torch.get_rng_state(), get_device_states(images)

    @contextmanager
    def as_now() -> Iterator[None]:
        with torch.random.fork_rng(devices, device_type=kind), torch.autocast(kind, dtype, enabled):
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=kind)
            yield

    return as_now


def _sides(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, (tuple, list)) else (value, value)
    return height, width


def _begins(last: int, step: int) -> list[int]:
    return [min(begin, last) for begin in range(0, last + step, step)]
