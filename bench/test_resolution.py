"""Logits at lower resolution: what is saved where no full-size logits are made, in an operation and in a whole step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.cases import LAYOUTS, Case, Shape, Unavailable, operations, scene
from bench.conftest import Record
from bench.measure import Call, cold_copies, peak_memory, time_calls
from bench.models import MODELS, build
from bench.peers import OnlyLogits
from eroseg_ext import EroSeg
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops import reference
from eroseg_ext.ops.protocol import Operations
from eroseg_ext.training.loss import summed_loss

STRIDE, CLASSES = 4, 150
SHAPES: dict[str, dict[str, Shape]] = {
    "quick": {"PASCAL VOC": (1, 21, 256, 256)},
    "cpu": {"PASCAL VOC": (4, 21, 512, 512), "ADE20K": (1, 150, 512, 512)},
    "cuda": {"PASCAL VOC": (8, 21, 512, 512), "ADE20K": (4, 150, 512, 512)},
}
"""Of the labels, with the number of classes."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("data", SHAPES["cpu"])
def test_erosion_grad(
    record: Record, device: torch.device, data: str, dtype: torch.dtype, layout: str, quick: bool, seconds: float
) -> None:
    """``erosion_grad`` on the low logits, between an upsampling and its backward, and on full-size logits alone."""
    shape = SHAPES["quick" if quick else device.type].get(data)
    if shape is None:
        pytest.skip("not among the quick shapes")
    try:
        ops = operations("fused", device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    case = Case("erosion_grad", data, shape, dtype, layout)
    size = shape[-2:]

    def calls(seed: int) -> dict[str, Call]:
        full, labels, previous, *_ = vars(scene(case, device, seed)).values()
        low = F.interpolate(full, scale_factor=1 / STRIDE, mode="bilinear").contiguous(memory_format=LAYOUTS[layout])
        tau = torch.ones(len(full), device=device)
        out, out_of_low = torch.empty_like(full), torch.empty_like(low)

        def upsampled() -> None:
            z = F.interpolate(low, size, mode="bilinear")
            ops.erosion_grad(z, labels, tau, previous, out=out)
            torch.ops.aten.upsample_bilinear2d_backward(out, size, low.shape, False)

        return {
            "low": lambda: ops.erosion_grad(low, labels, tau, previous, out=out_of_low),
            "upsampled": upsampled,
            "full": lambda: ops.erosion_grad(full, labels, tau, previous, out=out),
        }

    copies = [calls(seed) for seed in range(cold_copies(device, case.bytes))]
    name = case.name.split("/", 1)[1].replace("/", f"/stride {STRIDE} of ")
    for way in copies[0]:
        record("resolution", name, way, time_calls([ways[way] for ways in copies], device, seconds=seconds))


@pytest.mark.parametrize("front_loss", [0, 4])
@pytest.mark.parametrize("data", SHAPES["cpu"])
def test_training_loss(
    record: Record, device: torch.device, data: str, front_loss: float, quick: bool, seconds: float
) -> None:
    """Training's loss and its gradient from low logits, and by autograd through an upsampling and a cross-entropy."""
    shape = SHAPES["quick" if quick else device.type].get(data)
    if shape is None:
        pytest.skip("not among the quick shapes")
    ways: dict[str, Operations] = {"autograd": reference}
    try:
        ways = {"fused": operations("fused", device), **ways}
    except Unavailable as reason:
        pytest.skip(str(reason))
    batch, classes, height, width = shape
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(batch, classes, height // STRIDE, width // STRIDE, generator=generator).mul(3).to(device)
    labels = torch.randint(classes, (batch, height, width), generator=generator).to(device)
    for way, ops in ways.items():

        def run(ops: Operations = ops) -> None:
            logits = LogitMap(low.detach().requires_grad_(), False)
            summed_loss(logits, labels, None, front_loss, ops).backward()

        case = f"{data}/stride {STRIDE} of {list(shape)}, front loss {front_loss}"
        record("resolution loss", case, way, time_calls([run], device, seconds=seconds), peak=peak_memory(run, device))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_step(record: Record, device: torch.device, name: str, autocast: torch.dtype | None, quick: bool) -> None:
    """A step of the attack on a model as it is, and on one whose logits are upsampled before the attack has them."""
    try:
        model = build(name, CLASSES, device)
    except ImportError as reason:
        pytest.skip(str(reason))
    side, steps = (128, 2) if quick else (512, 4)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, side, side, generator=generator).to(device)
    labels = torch.randint(CLASSES, (1, side, side), generator=generator).to(device)
    ways: dict[str, tuple[nn.Module, bool]] = {"low": (model, True), "upsampled": (OnlyLogits(model).eval(), False)}
    case = f"{name}/{list(images.shape)}, {CLASSES} classes, {'float32' if autocast is None else 'bf16 autocast'}"
    for way, (attacked, see_through) in ways.items():
        bound = EroSeg(attacked, steps=steps, autocast=autocast, see_through=see_through)

        def run(bound: EroSeg = bound) -> object:
            return bound(images, labels)

        samples = time_calls([run], device, seconds=0, least=3) / steps
        record("resolution steps", case, way, samples, peak=peak_memory(run, device))
