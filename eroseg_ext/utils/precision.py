"""Double precision where the device has it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """float64; float32 on a device that has none, such as MPS, where counts are exact up to 2^24."""
    # A compiler's fake tensors have float64 on any device, and nothing could be learnt from them.
    return torch.float64 if torch.compiler.is_compiling() or has_float64(device) else torch.float32


@functools.cache
def has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(2, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def wide(values: Tensor) -> Tensor:
    """The values in that type."""
    return values.to(widest(values.device))
