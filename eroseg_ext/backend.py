"""Which implementation of the operations runs: the fused kernels where they are built, else the reference."""

from __future__ import annotations

import importlib
import platform
from types import ModuleType
from typing import Any

import torch

from eroseg_ext import reference


def _load() -> str | None:
    """Loads the extension; the reason in one sentence if there is none."""
    try:
        importlib.import_module("eroseg_ext._C")
    except ModuleNotFoundError:
        return "eroseg_ext was installed without its C++ extension (EROSEG_NO_EXT=1 was set, or nothing was compiled)"
    except ImportError as error:
        return f"the C++ extension cannot be loaded beside torch {torch.__version__}: {error}"
    return None


_WHY_NO_CPU = _load()
_WHY_NO_CUDA = "this version has no CUDA kernels; CUDA tensors take the reference path"


def why_not_fused(device: torch.device) -> str | None:
    """One sentence saying why the fused kernels do not run on ``device``; None where they do."""
    if device.type == "cpu":
        return _WHY_NO_CPU
    if device.type == "cuda":
        return _WHY_NO_CUDA
    return f"there are no fused kernels for {device.type} tensors"


def select(device: torch.device, name: str = "auto") -> ModuleType:
    """The module whose functions are the operations: ``eroseg_ext.ops`` or ``eroseg_ext.reference``.

    Args:
        device: where the images are.
        name: ``fused``, ``reference``, or ``auto``: fused where it is built.

    Raises:
        RuntimeError: ``fused`` was asked for and is not there; says why.
    """
    why_not = why_not_fused(device)
    if name == "reference" or (name == "auto" and why_not is not None):
        return reference
    if why_not is not None:
        raise RuntimeError(f"backend is 'fused', but {why_not}")
    return importlib.import_module("eroseg_ext.ops")


def report() -> dict[str, Any]:
    """Versions, devices and backends, as plain values for printing or JSON."""
    backends: dict[str, str] = {"reference": "active"}
    for kind in ("cpu", "cuda"):
        backends[f"fused {kind}"] = why_not_fused(torch.device(kind)) or "active"
    from eroseg_ext import __version__

    return {
        "eroseg_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backends": backends,
        "cpu_level": None if _WHY_NO_CPU else importlib.import_module("eroseg_ext.ops").cpu_level(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
