"""Which implementation of the operations runs: the fused kernels where they are built, else the reference."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from typing import Any, cast

import torch

from eroseg_ext.ops import reference
from eroseg_ext.ops.protocol import Operations
from eroseg_ext.utils import cuda_architectures


def _load() -> str | None:
    """Loads the extension; the reason in one sentence if there is none."""
    try:
        importlib.import_module("eroseg_ext._C")
    except ModuleNotFoundError:
        return "eroseg_ext was installed without its C++ extension (EROSEG_NO_EXT=1 was set, or nothing was compiled)"
    except ImportError as error:
        return f"the C++ extension cannot be loaded beside torch {torch.__version__}: {error}"
    return None


def _load_cuda() -> str | None:
    """Loads the CUDA kernels beside a CUDA build of torch; the reason in one sentence if they cannot run at all."""
    if _WHY_NO_CPU is not None:
        return _WHY_NO_CPU
    if torch.version.cuda is None:
        built = "there" if importlib.util.find_spec("eroseg_ext._cuda") else "not built either"
        return f"torch {torch.__version__} is built without CUDA (the CUDA kernels are {built})"
    try:
        cuda = importlib.import_module("eroseg_ext._cuda")
    except ModuleNotFoundError:
        return (
            "eroseg_ext was installed without its CUDA kernels (no usable nvcc was found, EROSEG_NO_CUDA=1 was set, or "
            "TORCH_CUDA_ARCH_LIST had nothing from 8.0 up)"
        )
    except ImportError as error:
        return f"the CUDA kernels cannot be loaded beside torch {torch.__version__}: {error}"
    runtime, driver = cuda.versions()
    if driver == 0:
        return "there is no CUDA driver"
    # A driver runs every runtime of its own major version, and older ones.
    if driver // 1000 < runtime // 1000:
        return f"the kernels are built with CUDA {_dotted(runtime)}, the driver takes up to {_dotted(driver)}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for such a list as ``8.0;9.0+PTX`` runs on a device: its major version, or newer by PTX."""
    return any(each.runs_on(capability) for each in cuda_architectures.parse(architectures))


_WHY_NO_CPU = _load()
_WHY_NO_CUDA = _load_cuda()


def _why_not_on_gpu(device: torch.device) -> str | None:
    if _WHY_NO_CUDA is not None:
        return _WHY_NO_CUDA
    architectures = importlib.import_module("eroseg_ext._cuda").architectures()
    capability = torch.cuda.get_device_capability(device)
    if _runs_on(capability, architectures):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, the kernels are "
        f"built for {architectures} (TORCH_CUDA_ARCH_LIST when eroseg_ext was installed)"
    )


def why_not_fused(device: torch.device) -> str | None:
    """One sentence saying why the fused kernels do not run on ``device``; None where they do."""
    if device.type == "cpu":
        return _WHY_NO_CPU
    if device.type == "cuda":
        return _why_not_on_gpu(device)
    return f"there are no fused kernels for {device.type} tensors"


ONLY_REFERENCE = ("radius above 1", "within='class'", "variant='sigmoid'", "more than 256 classes", "the l_2 step")
"""What the reference computes on every device, since no attack that is worth running would gain by a kernel for it."""


def select(device: torch.device, name: str = "auto", option: str | None = None) -> Operations:
    """The module whose functions are the operations: ``eroseg_ext.ops.fused`` or ``eroseg_ext.ops.reference``.

    Args:
        device: where the images are.
        name: ``fused``, ``reference``, or ``auto``: fused where it is built and takes the option.
        option: one that only the reference takes, such as ``radius=2``, or None.

    Raises:
        RuntimeError: ``fused`` was asked for and is not there, or does not take the option; says why.
        ValueError: EROSEG_CPU_LEVEL names no SIMD level that this CPU has.
    """
    why_not = why_not_fused(device) if option is None else f"{option} is computed by the reference only"
    if name == "reference" or (name == "auto" and why_not is not None):
        return reference
    if why_not is not None:
        raise RuntimeError(f"backend is 'fused', but {why_not}")
    fused = importlib.import_module("eroseg_ext.ops.fused")
    if device.type == "cpu":
        fused.cpu_level()  # raises for a wrong EROSEG_CPU_LEVEL
    return cast("Operations", fused)


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
        "reference_only": ONLY_REFERENCE,
        "cpu_level": None if _WHY_NO_CPU else importlib.import_module("eroseg_ext.ops.fused").cpu_level(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _settle_first_calls() -> None:
    """Makes the process's first calls of exp, log and sqrt with one element, which one thread computes.

    In the oneMKL of torch's CPU builds (2024.2) the first call of such a function chooses its implementation; threads
    that share that call may compute their part of it with 13 bits instead of 24
    (github.com/pytorch/pytorch/issues/188792). The reference uses exp and log, optimizers use sqrt.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for function in (torch.exp, torch.log, torch.sqrt):
            function(one)


_settle_first_calls()
