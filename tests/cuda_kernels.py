"""The CUDA kernels as the functions of ``ops/fused.py``, on CPU tensors: compiled for the host (``cuda_on_host.h``).

Whatever holds of the operations is tested of the kernels themselves this way where there is no GPU. Around that, this
module looks for what a result would not show: every tensor that a kernel is given lies between guards, at an address
that is aligned to its elements only; a kernel that reads a guard gets NaN, and one that writes there is noticed.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from eroseg_ext.ops.fused import CONFIDENCES, DIRECTIONS, FRONTS, FUSED_METHODS

TESTS = Path(__file__).parent
COMPILER = shutil.which("c++")
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
LABEL_TYPES = (torch.int64, torch.int32, torch.uint8)
GUARDS = (19, 16, 18, 16)  # elements on either side: rows start anywhere within 16 bytes, or aligned
POISON = 0xFF
DEVICES = ((1, 228), (6, 100), (50, 164))
"""How many multiprocessors a device has, and KB of shared memory of each: images are cut accordingly."""

_seeds = itertools.count()
_turn = 0  # of the guards, one for all tensors of a call


def why_not() -> str | None:
    """One sentence saying what is missing to compile the kernels for the host."""
    if COMPILER is None:
        return "there is no C++ compiler"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


@functools.cache
def _built() -> ModuleType | subprocess.CalledProcessError:
    import pybind11

    build = Path(tempfile.mkdtemp(prefix="eroseg_cuda_kernels_"))
    sources = [*sorted((TESTS.parent / "csrc" / "cuda").glob("*.cu")), TESTS / "cuda_kernels_module.cpp"]
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-DEROSEG_CUDA_ON_HOST",
        "-U_FORTIFY_SOURCE",  # it takes a jump to another stack for a fault
    ]
    flags += [f"-I{TESTS.parent / 'csrc'}", f"-I{TESTS}"]
    flags += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    target = build / f"cuda_kernels_module{sysconfig.get_config_var('EXT_SUFFIX')}"

    def compile_(source: Path) -> str:
        target = build / (source.name + ".o")
        subprocess.run([str(COMPILER), *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    try:
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(compile_, sources))
        subprocess.run([str(COMPILER), "-shared", *objects, "-o", str(target)], check=True)
        spec = importlib.util.spec_from_file_location("cuda_kernels_module", target)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except subprocess.CalledProcessError as error:
        return error
    finally:
        shutil.rmtree(build)


def kernels() -> ModuleType:
    """The compiled module; built, or not, once in a process."""
    built = _built()
    if isinstance(built, subprocess.CalledProcessError):
        raise built
    return built


class Guarded:
    """A copy of a tensor, dense in its own memory layout, between guards. ``None`` has the address 0."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor
        self.address = 0
        if tensor is None:
            return
        size = tensor.element_size()
        guard = GUARDS[_turn % len(GUARDS)]
        self._begin, self._end = guard * size, (guard + tensor.numel()) * size
        self._memory = torch.full((self._end + self._begin,), POISON, dtype=torch.uint8)
        inside = self._memory[self._begin : self._end].view(tensor.dtype)
        layout = torch.channels_last if is_channels_last(tensor) else torch.contiguous_format
        strides = torch.empty_like(tensor, memory_format=layout).stride()
        self.tensor = inside.as_strided(tensor.shape, strides).copy_(tensor)
        self.address = inside.data_ptr()

    def result(self) -> Tensor:
        """What the kernel wrote."""
        assert self.tensor is not None
        assert (self._memory[: self._begin] == POISON).all(), "a kernel wrote before its tensor"
        assert (self._memory[self._end :] == POISON).all(), "a kernel wrote behind its tensor"
        return self.tensor.clone()


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def dense(tensor: Tensor) -> Tensor:
    return tensor if is_channels_last(tensor) else tensor.contiguous()


def like(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if is_channels_last(other) else torch.contiguous_format)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Guarded:
    """Where a kernel has to write every element."""
    return Guarded(torch.full(shape, 77, dtype=dtype))


def start() -> ModuleType:
    """The module, with another order of threads and another device than last time."""
    global _turn
    seed = _turn = next(_seeds)
    module = kernels()
    processors, kilobytes = DEVICES[seed % len(DEVICES)]
    module.set_machine(seed, processors, 1024 * kilobytes)
    return module


def _input(module: ModuleType, logits: Guarded, labels: Guarded, ignore_index: int, align_corners: bool) -> object:
    assert logits.tensor is not None
    assert labels.tensor is not None
    return module.Input(
        list(logits.tensor.shape),
        logits.address,
        FLOAT_TYPES.index(logits.tensor.dtype),
        not logits.tensor.is_contiguous(),
        list(labels.tensor.shape),
        labels.address,
        LABEL_TYPES.index(labels.tensor.dtype),
        ignore_index,
        align_corners,
    )


def _stats(batch: int) -> Guarded:
    return unwritten(batch, 4, dtype=torch.float64)


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
    targeted: bool = False,
    class_weight: Tensor | None = None,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    module = start()
    z, y, widths, before, weight = (Guarded(t) for t in (dense(logits), labels, tau, previous, class_weight))
    grad = Guarded(torch.full_like(dense(logits), 77))
    log_odds, stats = unwritten(*labels.shape), _stats(len(logits))
    module.erosion_grad(
        _input(module, z, y, ignore_index, align_corners),
        widths.address,
        before.address,
        weight.address,
        grad.address,
        log_odds.address,
        stats.address,
        CONFIDENCES.index(confidence),
        FRONTS.index(front),
        DIRECTIONS.index(direction),
        radius,
        slope,
        targeted,
    )
    return grad.result(), log_odds.result(), stats.result()


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
) -> tuple[Tensor, Tensor]:
    module = start()
    z, y, weight = Guarded(dense(logits)), Guarded(labels), Guarded(class_weight)
    grad, stats = Guarded(torch.full_like(dense(logits), 77)), _stats(len(logits))
    module.pixel_grad(
        _input(module, z, y, ignore_index, align_corners),
        weight.address,
        grad.address,
        stats.address,
        FUSED_METHODS.index(method),
        targeted,
        progress / 2,
        q - 1,
    )
    return grad.result(), stats.result()


def confidence(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, confidence: str = "label", align_corners: bool = False
) -> Tensor:
    module = start()
    z, y, out = Guarded(dense(logits)), Guarded(labels), unwritten(*labels.shape)
    module.confidence(_input(module, z, y, ignore_index, align_corners), CONFIDENCES.index(confidence), out.address)
    return out.result()


def confusion(
    prediction: Tensor, labels: Tensor, classes: int, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    module = start()
    y, counts = Guarded(labels), Guarded(torch.zeros(classes, classes, dtype=torch.int64))
    if prediction.dim() == 4:
        z, predicted = Guarded(dense(prediction)), Guarded(None)
    else:
        batch, height, width = prediction.shape
        z = Guarded(torch.empty(batch, classes, height, width))
        predicted = Guarded(prediction)
    module.confusion(_input(module, z, y, ignore_index, align_corners), predicted.address, classes, counts.address)
    return counts.result()


def kth_value(scores: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    module = start()
    values, mask, ranks, out = Guarded(scores), Guarded(valid), Guarded(k), unwritten(*k.shape)
    module.kth_value(values.address, mask.address, *scores.shape, ranks.address, k.shape[1], out.address)
    return out.result()


def next_tau(
    log_odds: Tensor,
    stats: Tensor,
    steps_left: int,
    *,
    reach: float = 1.0,
    front_min: float = 0.03,
    front_max: float = 0.4,
) -> Tensor:
    module = start()
    scores, counts, tau = Guarded(log_odds), Guarded(stats), unwritten(len(log_odds))
    n = log_odds.shape[1] * log_odds.shape[2]
    module.next_tau(
        scores.address, counts.address, len(log_odds), n, steps_left, reach, front_min, front_max, tau.address
    )
    return tau.result()


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
    module = start()
    moved = Guarded(dense(x_adv))
    assert moved.tensor is not None
    held = [Guarded(tensor) for tensor in (like(x, moved.tensor), like(grad, moved.tensor), mask)]
    batch, channels, height, width = x_adv.shape
    shape = (batch, channels, height * width, not moved.tensor.is_contiguous())
    module.linf_step(moved.address, *(guarded.address for guarded in held), *shape, eps, alpha, low, high)
    return x_adv.copy_(moved.result())
