"""The operations: ``ops.erosion_grad(logits, labels, tau)`` and the others, as ``reference.py`` defines them.

These names are the fused kernels where the extension is built, else the reference. ``ops.fused`` and ``ops.reference``
are each of the two; :mod:`eroseg_ext.ops.backend` chooses one for a device.
"""

from collections.abc import Callable
from typing import Any

import torch

from eroseg_ext.ops import backend
from eroseg_ext.ops.protocol import Operations

__all__ = sorted(name for name in vars(Operations) if not name.startswith("_"))


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    operation: Callable[..., Any] = getattr(backend.select(torch.device("cpu")), name)
    return operation
