"""The fused operations on logits of another resolution than the labels, against the reference."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ops_common
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eroseg_ext.ops import fused as ops
from eroseg_ext.ops import reference

PROPERTIES = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a unit in the last place of a gradient, which each side rounds once."""
SIDES = st.one_of(st.integers(1, 12), st.sampled_from([16, 17, 33, 64, 65, 130]))


fused = ops_common.fused


class Case(NamedTuple):
    logits: Tensor
    labels: Tensor
    align_corners: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any ratio of the sides, whole or not, above and below 1; any layout and dtype."""
    batch, classes = draw(st.integers(1, 2)), draw(st.one_of(st.integers(1, 24), st.sampled_from([63, 150, 256])))
    height, width = draw(SIDES), draw(SIDES)
    if draw(st.booleans()):
        ratio = draw(st.sampled_from([2, 4, 8]))
        size = (-(-height // ratio), -(-width // ratio))
    else:
        size = (draw(SIDES), draw(SIDES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = (torch.randn(batch, classes, *size, generator=generator) * 4).to(draw(st.sampled_from(list(ROUNDING))))
    if draw(st.booleans()):
        logits = logits.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, max(classes, 2), (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))] = 255
    return Case(logits, labels, draw(st.booleans()))


def assert_same_gradient(got: Tensor, of: Any, case: Case) -> None:
    """``of(z)`` is the reference's gradient at the labels' resolution.

    Its transposed interpolation is added up in float64: float32's rounding, as torch adds, is no bound for the fused.
    """
    sizes, low = case.labels.shape[-2:], case.logits.shape[-2:]
    full = of(F.interpolate(case.logits.float(), sizes, mode="bilinear", align_corners=case.align_corners))
    rows, columns = (
        F.interpolate(torch.eye(n)[None], m, mode="linear", align_corners=case.align_corners)[0].double()
        for n, m in zip(low, sizes, strict=True)
    )
    exact = rows @ full.double() @ columns.T
    assert got.dtype == case.logits.dtype
    assert got.stride() == case.logits.stride()
    (_, _, h, w), (_, height, width) = case.logits.shape, case.labels.shape
    summed = max(1.0, 2 * height / h) * max(1.0, 2 * width / w)
    allowed = 1e-5 + 2**-22 * summed + ROUNDING[got.dtype] * exact.abs()
    assert ((got.float() - exact).abs() <= allowed).all()


def assert_same_counts(got: Tensor, expected: Tensor, undecided: Tensor) -> None:
    """Of the pixels that rounding decides either way, each may be counted or not."""
    assert torch.equal(got[:, 0], expected[:, 0])
    assert ((got[:, 1] - expected[:, 1]).abs() <= undecided).all()


@PROPERTIES
@given(
    case=cases(),
    choices=st.fixed_dictionaries(
        {
            "confidence": st.sampled_from(ops.CONFIDENCES),
            "front": st.sampled_from(ops.FRONTS),
            "direction": st.sampled_from(ops.DIRECTIONS),
            "radius": st.sampled_from([0, 1]),
            "targeted": st.booleans(),
        }
    ),
    balanced=st.booleans(),
)
@example(Case(torch.randn(1, 3, 1, 1), torch.zeros(1, 9, 21, dtype=torch.long), False), {}, False)
@example(Case(torch.randn(1, 3, 30, 70), torch.zeros(1, 1, 1, dtype=torch.long), True), {}, False)
def test_erosion_grad_is_the_reference(fused: Any, case: Case, choices: dict[str, Any], balanced: bool) -> None:
    logits, labels, align_corners = case
    tau, previous = torch.full((len(logits),), 1.5), torch.randn(labels.shape)
    weight = reference.class_balance(labels, max(logits.shape[1], 2)) if balanced else None
    call = {"align_corners": align_corners, "class_weight": weight, **choices}
    grad, log_odds, stats = fused.erosion_grad(logits, labels, tau, previous, **call)
    _, expected, counts = reference.erosion_grad(logits, labels, tau, previous, **call)
    q = reference.erode(expected.abs(), None, choices.get("radius", 1), 2.0 * tau)
    if choices.get("front") != "hard" or not ((q - 1.5).abs() < 1e-3).any():
        assert_same_gradient(grad, lambda z: reference.erosion_grad(z, labels, tau, previous, **call)[0], case)
    torch.testing.assert_close(log_odds.abs(), expected.abs(), rtol=1e-5, atol=1e-4)
    assert_same_counts(stats, counts, (expected.abs() < 1e-4).sum((1, 2)))
    edge = ((expected.abs() - 1.5).abs() < 1e-3).sum((1, 2))
    assert ((stats[:, 2] - counts[:, 2]).abs() <= edge).all()


@PROPERTIES
@given(case=cases(), method=st.sampled_from(ops.FUSED_METHODS), balanced=st.booleans())
def test_pixel_grad_is_the_reference(fused: Any, case: Case, method: str, balanced: bool) -> None:
    logits, labels, align_corners = case
    weight = reference.class_balance(labels, max(logits.shape[1], 2)) if balanced else None
    call: dict[str, Any] = {"progress": 0.3, "align_corners": align_corners, "class_weight": weight}
    grad, stats = fused.pixel_grad(logits, labels, method, **call)
    undecided = (reference.confidence(logits, labels, align_corners=align_corners) < 1e-4).sum((1, 2))
    assert_same_counts(stats, reference.pixel_grad(logits, labels, method, **call)[1], undecided)
    # What segpgd and mce weigh depends on which pixels are correct.
    if method not in ("segpgd", "mce") or not undecided.any():
        assert_same_gradient(grad, lambda z: reference.pixel_grad(z, labels, method, **call)[0], case)


@PROPERTIES
@given(case=cases(), kind=st.sampled_from(ops.CONFIDENCES))
def test_confidence_and_confusion_are_the_reference(fused: Any, case: Case, kind: str) -> None:
    logits, labels, align_corners = case
    got, expected = (
        of.confidence(logits, labels, confidence=kind, align_corners=align_corners) for of in (fused, reference)
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    count = max(logits.shape[1], 2)
    counts, expected = (of.confusion(logits, labels, count, align_corners=align_corners) for of in (fused, reference))
    undecided = (reference.confidence(logits, labels, confidence="top", align_corners=align_corners)).isfinite()
    assert torch.equal(counts.sum(1), expected.sum(1))
    assert (counts - expected).abs().sum() <= 2 * max(2, 0.001 * undecided.sum())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(16, 16), (20, 50), (65, 64), (100, 130)])
def test_the_result_does_not_depend_on_the_number_of_threads(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    logits = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    labels = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(1))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([*ops.erosion_grad(logits, labels, torch.ones(2)), *ops.pixel_grad(logits, labels, "js")])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_logits_that_are_not_finite_break_the_pixels_that_they_reach(fused: Any) -> None:
    for value, position in itertools.product((math.nan, math.inf), ((0, 0), (2, 3), (5, 6))):
        logits = torch.randn(1, 5, 6, 7, generator=torch.Generator().manual_seed(0))
        logits[(0, 1, *position)] = value
        labels = torch.zeros(1, 24, 28, dtype=torch.long)
        got, expected = (of.erosion_grad(logits, labels, torch.ones(1)) for of in (fused, reference))
        assert torch.equal(got[1].isnan(), expected[1].isnan())
        assert got[1].isnan().any()
        assert got[2][0, 3].isnan()
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)


def test_classes_that_a_model_rules_out_are_the_references(fused: Any) -> None:
    logits = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -math.inf  # everywhere, which breaks the pixels of its label
    logits[0, 1, 2:4, 3] = -math.inf
    labels = torch.randint(0, 5, (2, 24, 31), generator=torch.Generator().manual_seed(1))
    for confidence in ops.CONFIDENCES:
        got, expected = (
            of.erosion_grad(logits, labels, torch.ones(2), confidence=confidence) for of in (fused, reference)
        )
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(got[2][:, :3], expected[2][:, :3])
    got, expected = (of.pixel_grad(logits, labels, "cospgd") for of in (fused, reference))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", [1e6, 1e30, 1e37])
def test_huge_logits_of_equal_classes_are_even(fused: Any, magnitude: float) -> None:
    logits = (torch.randn(1, 1, 5, 6, generator=torch.Generator().manual_seed(0)) * magnitude).repeat(1, 4, 1, 1)
    labels = torch.randint(0, 4, (1, 23, 18), generator=torch.Generator().manual_seed(1))
    grad, log_odds, _ = fused.erosion_grad(logits, labels, torch.ones(1), confidence="log_odds")
    torch.testing.assert_close(log_odds, torch.full_like(log_odds, -math.log(3)))
    torch.testing.assert_close(grad, reference.erosion_grad(logits, labels, torch.ones(1), confidence="log_odds")[0])


def test_empty_batches_and_labels(fused: Any) -> None:
    for batch, height in ((0, 8), (2, 0)):
        logits, labels = torch.randn(batch, 3, 4, 4), torch.zeros(batch, height, 8, dtype=torch.long)
        grad, log_odds, stats = fused.erosion_grad(logits, labels, torch.ones(batch))
        assert torch.equal(grad, torch.zeros_like(logits))
        assert (log_odds.shape, stats.shape) == (labels.shape, (batch, 4))


@pytest.mark.parametrize("name", ["erosion_grad", "pixel_grad", "confidence", "confusion"])
def test_the_schemas_hold_for_them(name: str) -> None:
    logits, labels = torch.randn(2, 3, 5, 6), torch.randint(0, 3, (2, 10, 13))
    grad = torch.empty_like(logits)
    arguments = {
        "erosion_grad": (logits, labels, torch.rand(2), None, None, grad, 255, 0, 0, 0, 1, 1.0, False, True),
        "pixel_grad": (logits, labels, None, grad, 2, 0.5, 255, False, 2.0, True),
        "confidence": (logits, labels, 255, 0, True),
        "confusion": (logits, labels, 3, 255, True),
    }
    torch.library.opcheck(getattr(torch.ops.eroseg, name).default, arguments[name])


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_simd_levels_are_the_reference_too(level: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "reference and cpu and not levels",
        str(Path(__file__).resolve()),
    ]
    environment = os.environ | {"EROSEG_CPU_LEVEL": level}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    if f"EROSEG_CPU_LEVEL is '{level}', wanted one that this CPU has" in done.stdout:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stdout
