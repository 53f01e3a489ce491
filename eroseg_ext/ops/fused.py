"""The fused operations: same names, arguments and results as in ``reference.py``, which documents them.

This module brings tensors to the memory layouts that the kernels read (NCHW or channels_last logits need no copy) and
names to the integers that cross the operator schemas (``csrc/ops.cpp``). What is not worth a kernel is the reference's:
``class_balance``, ``erode``, ``l2_step_``, and every operation on more than ``MAX_CLASSES`` classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from eroseg_ext import _C
from eroseg_ext.ops import reference
from eroseg_ext.ops.reference import class_balance as class_balance
from eroseg_ext.ops.reference import erode as erode
from eroseg_ext.ops.reference import l2_step_ as l2_step_
from eroseg_ext.utils.validate import check_choice

# The orders of csrc/enums.h.
CONFIDENCES = ("label", "top", "log_odds")
FRONTS = ("soft", "hard")
DIRECTIONS = ("log_odds", "ce")
FUSED_METHODS = ("pgd", "segpgd", "cospgd", "mce", "js", "tsallis")
MAX_CLASSES = 256

_eroseg = torch.ops.eroseg
Operation = TypeVar("Operation", bound=Callable[..., Any])


def cpu_level() -> str:
    """The SIMD level of the CPU kernels in use: ``avx512``, ``avx2`` or ``baseline``.

    Raises ValueError if the environment variable EROSEG_CPU_LEVEL names none that this CPU has.
    """
    return _C.cpu_level()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _dense(tensor: Tensor) -> Tensor:
    return tensor if _is_channels_last(tensor) else tensor.contiguous()


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    layout = torch.channels_last if _is_channels_last(other) else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def _gradient_for(logits: Tensor, out: Tensor | None) -> Tensor:
    """Where the kernel writes: ``out`` itself if its layout is the logits'."""
    if out is not None and out.stride() == logits.stride() and out.dtype == logits.dtype and out.shape == logits.shape:
        return out
    return torch.empty_like(logits)


def _delivered(grad: Tensor, out: Tensor | None) -> Tensor:
    return grad if out is None or out is grad else out.copy_(grad)


def _of_reference_elsewhere(operation: Operation) -> Operation:
    """The operation; the reference's for more classes than the kernels take."""
    of_reference = getattr(reference, operation.__name__)

    @functools.wraps(operation)
    def chosen(logits: Tensor, labels: Tensor, *arguments: Any, **options: Any) -> Any:
        batches = logits.dim() == 4 and labels.dim() == 3 and len(logits) == len(labels)
        elsewhere = batches and logits.shape[1] > MAX_CLASSES
        return (of_reference if elsewhere else operation)(logits, labels, *arguments, **options)

    return chosen  # type: ignore[return-value]


@_of_reference_elsewhere
def erosion_grad(
    logits: Tensor,
    labels: Tensor,
    tau: Tensor,
    previous: Tensor | None = None,
    *,
    ignore_index: int = 255,
    confidence: str = "label",
    front: str = "soft",
    direction: str = "log_odds",
    radius: int = 1,
    slope: float = 2.0,
    within: str = "any",
    targeted: bool = False,
    class_weight: Tensor | None = None,
    align_corners: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`eroseg_ext.ops.reference.erosion_grad`; ``radius`` is 0 or 1, and ``within`` is ``any``."""
    check_choice("within", within, ("any",))
    logits = _dense(logits)
    grad = _gradient_for(logits, out)
    log_odds, stats = _eroseg.erosion_grad(
        logits,
        labels.contiguous(),
        tau.contiguous(),
        None if previous is None else previous.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        grad,
        ignore_index,
        CONFIDENCES.index(confidence),
        FRONTS.index(front),
        DIRECTIONS.index(direction),
        radius,
        slope,
        targeted,
        align_corners,
    )
    return _delivered(grad, out), log_odds, stats


@_of_reference_elsewhere
def pixel_grad(
    logits: Tensor,
    labels: Tensor,
    method: str,
    progress: float = 0.0,
    *,
    ignore_index: int = 255,
    targeted: bool = False,
    q: float = 2.0,
    class_weight: Tensor | None = None,
    align_corners: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`eroseg_ext.ops.reference.pixel_grad`; ``method`` is one of ``FUSED_METHODS``."""
    check_choice("method", method, FUSED_METHODS)
    logits = _dense(logits)
    grad = _gradient_for(logits, out)
    weight = None if class_weight is None else class_weight.contiguous()
    stats = _eroseg.pixel_grad(
        logits,
        labels.contiguous(),
        weight,
        grad,
        FUSED_METHODS.index(method),
        progress,
        ignore_index,
        targeted,
        q,
        align_corners,
    )
    return _delivered(grad, out), stats


@_of_reference_elsewhere
def confidence(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    confidence: str = "label",
    align_corners: bool = False,
) -> Tensor:
    """See :func:`eroseg_ext.ops.reference.confidence`."""
    kind = CONFIDENCES.index(confidence)
    return _eroseg.confidence(_dense(logits), labels.contiguous(), ignore_index, kind, align_corners)


def kth_value(scores: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """See :func:`eroseg_ext.ops.reference.kth_value`."""
    return _eroseg.kth_value(scores.contiguous(), k.contiguous(), None if valid is None else valid.contiguous())


def next_tau(
    log_odds: Tensor,
    stats: Tensor,
    steps_left: int,
    *,
    reach: float = 1.0,
    front_min: float = 0.03,
    front_max: float = 0.4,
) -> Tensor:
    """See :func:`eroseg_ext.ops.reference.next_tau`."""
    return _eroseg.next_tau(log_odds.contiguous(), stats.contiguous(), steps_left, reach, front_min, front_max)


def linf_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    alpha: float,
    low: float = 0.0,
    high: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """See :func:`eroseg_ext.ops.reference.linf_step_`."""
    moved = _dense(x_adv)
    mask = None if mask is None else mask.contiguous()
    _eroseg.linf_step_(moved, _like(x, moved), _like(grad, moved), eps, alpha, low, high, mask)
    return x_adv if moved is x_adv else x_adv.copy_(moved)


@_of_reference_elsewhere
def confusion(
    prediction: Tensor, labels: Tensor, classes: int, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    """See :func:`eroseg_ext.ops.reference.confusion`."""
    prediction = _dense(prediction) if prediction.dim() == 4 else prediction.contiguous()
    return _eroseg.confusion(prediction, labels.contiguous(), classes, ignore_index, align_corners)


# What an operator writes raises its version counter, so that autograd notices, and may not require grad itself.

_library = torch.library.Library("eroseg", "IMPL")


def _notice_writes(name: str, position: int, argument: str) -> None:
    op = getattr(_eroseg, name).default

    def noticed(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        written = arguments[position]
        if written.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: {argument} requires grad, wanted a tensor that may be written to")
        torch.autograd.graph.increment_version(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    _library.impl(name, noticed, "ADInplaceOrView", with_keyset=True)


_notice_writes("erosion_grad", 5, "grad")
_notice_writes("pixel_grad", 3, "grad")
_notice_writes("linf_step_", 0, "x_adv")


# Shapes and dtypes of the results, for torch.compile and meta tensors.


def _check_devices(*arguments: object) -> None:
    """A real tensor beside one on the meta device comes here, too, and would get memory that nobody has written."""
    devices = {str(value.device) for value in arguments if isinstance(value, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"the tensors are on {' and '.join(sorted(devices))}, wanted one device")


@torch.library.register_fake("eroseg::erosion_grad")
def _(logits: Tensor, labels: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    _check_devices(logits, labels, *arguments)
    log_odds = logits.new_empty(labels.shape, dtype=torch.float32)
    return log_odds, logits.new_empty(logits.shape[0], 4, dtype=torch.float64)


@torch.library.register_fake("eroseg::pixel_grad")
def _(logits: Tensor, labels: Tensor, class_weight: Tensor | None, grad: Tensor, *settings: object) -> Tensor:
    _check_devices(logits, labels, class_weight, grad)
    return logits.new_empty(logits.shape[0], 4, dtype=torch.float64)


@torch.library.register_fake("eroseg::confidence")
def _(logits: Tensor, labels: Tensor, *settings: object) -> Tensor:
    _check_devices(logits, labels)
    return logits.new_empty(labels.shape, dtype=torch.float32)


@torch.library.register_fake("eroseg::kth_value")
def _(scores: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
    _check_devices(scores, k, valid)
    return scores.new_empty(k.shape)


@torch.library.register_fake("eroseg::next_tau")
def _(log_odds: Tensor, stats: Tensor, *settings: object) -> Tensor:
    _check_devices(log_odds, stats)
    return log_odds.new_empty(log_odds.shape[0])


@torch.library.register_fake("eroseg::linf_step_")
def _(x_adv: Tensor, x: Tensor, grad: Tensor, *settings: object) -> None:
    _check_devices(x_adv, x, grad, *settings)


@torch.library.register_fake("eroseg::confusion")
def _(prediction: Tensor, labels: Tensor, classes: int, *settings: object) -> Tensor:
    _check_devices(prediction, labels)
    return prediction.new_empty(classes, classes, dtype=torch.int64)
