"""The operations that are timed: shapes, inputs, least traffic, and the implementations that stand side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.measure import Call, Samples, cold_copies, time_calls, time_copy, time_limit
from eroseg_ext import AttackSettings
from eroseg_ext.ops import backend, reference

Shape = tuple[int, int, int, int]

SHAPES: dict[str, dict[str, Shape]] = {
    "quick": {
        "PASCAL VOC": (1, 21, 256, 256),
        "Cityscapes": (1, 19, 256, 512),
        "ADE20K": (1, 150, 128, 128),
        "binary": (4, 1, 256, 256),
    },
    "cpu": {
        "PASCAL VOC": (4, 21, 512, 512),
        "Cityscapes": (1, 19, 1024, 2048),
        "ADE20K": (1, 150, 512, 512),
        "binary": (8, 1, 512, 512),
    },
    "cuda": {
        "PASCAL VOC": (8, 21, 512, 512),
        "Cityscapes": (2, 19, 1024, 2048),
        "ADE20K": (4, 150, 512, 512),
        "binary": (8, 1, 512, 512),
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"progressive": {"confidence": "top", "front": "hard", "direction": "ce"}}
"""Of ``erosion_grad``, which have kernels of their own on a GPU: as ``preset="progressive"`` has it."""
COMPILE_SECONDS = 120.0
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
METHODS = tuple(method for method in reference.PIXEL_METHODS if method != "cospgd_sigmoid")
"""Of ``pixel_grad``, those that are fused."""
VOID = 255


class Unavailable(Exception):
    """Why an implementation, a peer or a model cannot be measured here; one sentence."""


@dataclass(frozen=True)
class Case:
    """One operation on one kind of input."""

    op: str
    """an operation of ``ops/reference.py``, or ``step``: next_tau, erosion_grad and linf_step_ as in the loop"""
    data: str
    """whose shape it is"""
    shape: Shape
    """``[B, C, H, W]`` of the logits"""
    dtype: torch.dtype = torch.float32
    layout: str = "NCHW"
    method: str | None = None
    """of ``pixel_grad``; of ``erosion_grad``, one of ``VARIANTS``"""
    labels: torch.dtype = torch.int64

    @property
    def name(self) -> str:
        """Operation, data, and logits, divided by slashes: three columns of a table."""
        kind = str(self.dtype).removeprefix("torch.") + (" NHWC" if self.layout == "channels_last" else "")
        labels = "" if self.labels == torch.int64 else f", {self.labels} labels".replace("torch.", "")
        op = f"{self.op} {self.method}" if self.method else self.op
        return f"{op}/{self.data}{labels}/{str(list(self.shape)).replace(' ', '')} {kind}"

    @property
    def bytes(self) -> int:
        """The least traffic: every input read and every output written once."""
        batch, classes, height, width = self.shape
        pixels = batch * height * width
        logits = classes * pixels * self.dtype.itemsize
        label, score, image = self.labels.itemsize * pixels, 4 * pixels, 4 * 3 * pixels
        return {
            "erosion_grad": 2 * logits + label + 2 * score,
            "pixel_grad": 2 * logits + label,
            "confidence": logits + label + score,
            "next_tau": score,
            "kth_value": score,
            "linf_step_": 4 * image,
            "confusion": logits + label,
            "step": 2 * logits + label + 2 * score + 4 * image,
        }[self.op]


def operation_cases(shapes: dict[str, Shape]) -> list[Case]:
    """All cases, on one of ``SHAPES``."""
    batch, classes, height, width = voc = shapes["PASCAL VOC"]
    half = Case("erosion_grad", "PASCAL VOC", voc, torch.bfloat16)
    return [
        *(
            Case("erosion_grad", data, shape, dtype, layout)
            for data, shape in shapes.items()
            for dtype in (torch.float32, torch.bfloat16)
            for layout in LAYOUTS
            if shape[1] > 1 or layout == "NCHW"  # one class has one layout
        ),
        *(Case("step", data, shape) for data, shape in shapes.items()),
        *(Case("pixel_grad", "PASCAL VOC", voc, method=method) for method in METHODS),
        *(Case(op, "PASCAL VOC", voc) for op in ("next_tau", "kth_value", "confidence", "linf_step_", "confusion")),
        *(replace(half, method=variant) for variant in VARIANTS),
        replace(half, labels=torch.uint8),
        replace(half, data="batch 1", shape=(1, classes, height, width)),
        replace(half, data="odd width", shape=(batch, classes, height | 1, width | 1)),
    ]


def is_compiled(case: Case, quick: bool) -> bool:
    """Whether a run takes the time that torch.compile needs: seconds for each case on a CPU, minutes on a GPU."""
    usual = case.data in SHAPES["cpu"] and case.labels == torch.int64 and case.method not in VARIANTS
    if quick:
        return usual and case.data == "PASCAL VOC" and (case.op, case.dtype) == ("step", torch.float32)
    return usual and case.method in (None, "cospgd")


@dataclass(frozen=True)
class Scene:
    """Inputs of any operation."""

    logits: Tensor
    labels: Tensor
    """with 5 % void pixels"""
    previous: Tensor
    """log-odds of the step before"""
    images: Tensor
    gradient: Tensor
    """with respect to the images"""


def scene(case: Case, device: torch.device, seed: int = 0) -> Scene:
    """Random inputs, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, classes, height, width = case.shape
    maps, images = (batch, height, width), (batch, 3, height, width)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    logits = (normal(case.shape) * 4).to(case.dtype).contiguous(memory_format=LAYOUTS[case.layout])
    labels = torch.randint(0, max(classes, 2), maps, generator=generator, device=device)
    labels[torch.rand(maps, generator=generator, device=device) < 0.05] = VOID
    pixels = torch.rand(images, generator=generator, device=device)
    return Scene(logits, labels.to(case.labels), normal(maps) * 4, pixels, normal(images))


def call_of(case: Case, ops: Any, inputs: Scene) -> Call:
    """The call to be timed: one operation of ``ops`` (a module or a namespace) on the inputs, into kept buffers."""
    logits, labels, previous, images, grad = vars(inputs).values()
    settings, classes = AttackSettings(), max(logits.shape[1], 2)
    tau, scores = torch.ones(len(logits), device=logits.device), previous.abs().flatten(1)
    x_adv, out = images.clone(), torch.empty_like(logits)
    weight = reference.class_balance(labels, classes) ** settings.balance
    variant = VARIANTS.get(case.method or "", {})
    pixels = scores.shape[1]
    stats = torch.tensor([[pixels, 0.5, 0.3 * pixels, 0.1 * pixels]] * len(logits), dtype=torch.float64)
    stats = stats.to(logits.device)
    # The two ranks that the loop asks for in every step.
    ranks = [max(round(rho * pixels), 1) for rho in (settings.front_min, settings.front_max)]
    k = torch.tensor([ranks] * len(logits), device=logits.device)

    def erosion_grad() -> Any:
        return ops.erosion_grad(logits, labels, tau, previous, class_weight=weight, out=out, **variant)

    def linf_step() -> None:
        ops.linf_step_(x_adv, images, grad, settings.eps, settings.alpha)

    def step() -> None:
        """What the loop does besides the model, in a step in its middle."""
        _, log_odds, stats = erosion_grad()
        ops.next_tau(log_odds, stats, 5)
        linf_step()

    return {
        "erosion_grad": erosion_grad,
        "pixel_grad": lambda: ops.pixel_grad(logits, labels, case.method, 0.5, out=out),
        "step": step,
        "next_tau": lambda: ops.next_tau(previous, stats, 5),
        "kth_value": lambda: ops.kth_value(scores, k),
        "linf_step_": linf_step,
        "confusion": lambda: ops.confusion(logits, labels, classes),
        "confidence": lambda: ops.confidence(logits, labels),
    }[case.op]


IMPLEMENTATIONS = ("copy", "reference", "compiled", "fused")
"""What a case is measured for, ``copy`` being the floor of its traffic."""


def operations(implementation: str, device: torch.device) -> Any:
    """The operations as ``reference``, ``compiled`` (the reference under torch.compile) or ``fused`` has them.

    Raises Unavailable with the reason.
    """
    if implementation == "fused":
        if why_not := backend.why_not_fused(device):
            raise Unavailable(why_not)
        return backend.select(device, "fused")
    if implementation == "reference":
        return reference
    torch.compiler.reset()
    # No CUDA graphs: they hand out the same memory again for log-odds that the next step still reads.
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    names = ("erosion_grad", "pixel_grad", "confidence", "next_tau", "kth_value", "linf_step_", "confusion")
    compiled = {name: torch.compile(getattr(reference, name), dynamic=False, mode=mode) for name in names}
    return SimpleNamespace(**compiled, class_balance=reference.class_balance)


def timed(
    case: Case, implementation: str, device: torch.device, seconds: float, compile_seconds: float = COMPILE_SECONDS
) -> Samples:
    """Measures one implementation of a case; raises Unavailable with the reason where it cannot."""
    if implementation == "copy":
        return time_copy(device, case.bytes, seconds)
    ops = operations(implementation, device)
    try:
        if implementation == "compiled":
            with time_limit(compile_seconds):
                call_of(case, ops, scene(case, device))()
        seeds = range(cold_copies(device, case.bytes))
        return time_calls([call_of(case, ops, scene(case, device, seed)) for seed in seeds], device, seconds=seconds)
    except Exception as error:  # whatever torch.compile stumbles over is its result
        if implementation != "compiled":
            raise
        first_line = next(iter(str(error).splitlines()), "")
        raise Unavailable(f"torch.compile: {type(error).__name__}: {first_line[:120]}") from error
