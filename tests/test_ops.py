"""The fused operations against the reference: on every device they are built for, and the CUDA kernels on the host.

The tests that take ``fused`` hold for all of these; they give it CPU tensors and get CPU tensors back.
"""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eroseg_ext.ops import fused as ops
from eroseg_ext.ops import reference

# Largest deviations seen over 20,000 random cases on an AVX-512 CPU: float32 gradient 2e-6 relative; the half types
# are off by one rounding of the result, half a unit in the last place each way.
GRADIENT = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-7},
    torch.float16: {"rtol": 2**-10, "atol": 1e-7},
}
FLOAT_TYPES = list(GRADIENT)
LABEL_TYPES = [torch.int64, torch.int32, torch.uint8]

PROPERTIES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


fused = ops_common.fused


class Case(NamedTuple):
    logits: Tensor
    labels: Tensor
    ignore_index: int


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(FLOAT_TYPES)) -> Case:
    """Batches of any shape and layout, also empty, void, saturated or nearly flat ones."""
    batch = draw(st.integers(0, 3))
    classes = draw(st.one_of(st.integers(1, 24), st.sampled_from([63, 150, 256])))
    height, width = draw(st.integers(0, 20)), draw(st.one_of(st.integers(0, 40), st.sampled_from([64, 65, 130])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    # Beyond these scales a float16 logit is no longer finite, or no longer distinguishable from 0.
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0] if dtype == torch.float16 else [1e-6, 1e-2, 1.0, 30.0, 1e4]))
    shift = draw(st.sampled_from([0.0, 0.0, -50.0, 1000.0]))
    logits = (torch.randn(batch, classes, height, width, generator=generator) * scale + shift).to(dtype)
    layout = draw(st.sampled_from(["nchw", "channels_last", "strided"]))
    if layout == "channels_last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        logits = logits.transpose(2, 3).contiguous().transpose(2, 3)
    ignore_index = draw(st.sampled_from([255, -1, -100, 0]))
    labels = torch.randint(0, max(classes, 2), (batch, height, width), generator=generator)
    void = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    label_type = draw(st.sampled_from(LABEL_TYPES))
    if label_type == torch.uint8 and ignore_index < 0:
        ignore_index = 255
    return Case(logits, labels.masked_fill(void, ignore_index).to(label_type), ignore_index)


def front_width(case: Case, confidence: str, fraction: float) -> Tensor:
    """A tau as the attack would take it: between the scores of the image."""
    scores = reference.confidence(case.logits, case.labels, ignore_index=case.ignore_index, confidence=confidence)
    stats = torch.zeros(len(scores), 4, dtype=torch.float64)
    stats[:, 0] = (scores < math.inf).sum((1, 2))
    # Not a score itself: whether the k-th pixel is within its own threshold is a matter of rounding.
    return reference.next_tau(scores, stats, 1, front_min=fraction, front_max=fraction) * 1.001


def rounding_of_log_odds(case: Case) -> float:
    """Log-odds near 0 are a difference of terms of a few units, one the log of a sum of C terms added in a row."""
    return 2e-6 + case.logits.shape[1] * 2**-25


def assert_same_maps(got: Tensor, expected: Tensor, case: Case) -> None:
    """Log-odds or confidences to rounding, equal infinities and NaNs."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=rounding_of_log_odds(case), equal_nan=True)


@PROPERTIES
@given(
    case=cases(),
    fraction=st.sampled_from([0.03, 0.3, 1.0]),
    has_previous=st.booleans(),
    choices=st.fixed_dictionaries(
        {
            "confidence": st.sampled_from(ops.CONFIDENCES),
            "direction": st.sampled_from(ops.DIRECTIONS),
            "radius": st.sampled_from([0, 1]),
            "slope": st.sampled_from([0.0, 0.5, 1.0]),
            "targeted": st.booleans(),
        }
    ),
    balanced=st.booleans(),
)
def test_soft_erosion_grad_is_the_reference(
    fused: Any, case: Case, fraction: float, has_previous: bool, choices: dict[str, Any], balanced: bool
) -> None:
    if balanced:
        classes = max(case.logits.shape[1], 2)
        choices["class_weight"] = reference.class_balance(case.labels, classes, ignore_index=case.ignore_index) ** 0.3
    tau = front_width(case, choices["confidence"], fraction)
    scores = reference.confidence(
        case.logits, case.labels, ignore_index=case.ignore_index, confidence=choices["confidence"]
    )
    previous = scores * torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)) if has_previous else None
    arguments = (case.logits, case.labels, tau, previous)
    grad, log_odds, stats = fused.erosion_grad(*arguments, ignore_index=case.ignore_index, **choices)
    expected = reference.erosion_grad(*arguments, ignore_index=case.ignore_index, **choices)
    assert grad.dtype == case.logits.dtype
    # The rounding of log-odds divided by the width of the front is in the exponent of w. It shows where most logits
    # are equal: log-odds, and so the width, are then 0 but for that rounding.
    noise = 1e-5 + torch.expm1(rounding_of_log_odds(case) / tau)
    relative = (GRADIENT[grad.dtype]["rtol"] + noise).view(-1, 1, 1, 1)
    assert ((grad.float() - expected[0].float()).abs() <= relative * expected[0].float().abs() + 1e-7).all()
    assert (grad.float().abs() <= 1 + 2**-22).all()
    assert_same_maps(log_odds, expected[1], case)
    assert torch.equal(stats[:, :2], expected[2][:, :2])
    # A pixel's own rounding decides whether it is in the front: at most those so near to tau, none in most cases.
    edge = ((expected[1].abs() / tau.view(-1, 1, 1) - 1).abs() < noise.view(-1, 1, 1)).sum((1, 2))
    assert ((stats[:, 2] - expected[2][:, 2]).abs() <= edge).all()
    if not edge.any():
        scale = 1e-5 * expected[2][:, 3].abs() + 3e-6 * expected[2][:, 2]
        assert ((stats[:, 3] - expected[2][:, 3]).abs() <= scale + 1e-5 * expected[2][:, 2] * tau).all()


@PROPERTIES
@given(case=cases(dtypes=(torch.float32,)), fraction=st.sampled_from([0.03, 0.3]), radius=st.sampled_from([0, 1]))
def test_hard_erosion_grad_differs_only_on_the_edge_of_the_front(
    fused: Any, case: Case, fraction: float, radius: int
) -> None:
    tau = front_width(case, "label", fraction)
    arguments: dict[str, Any] = {"ignore_index": case.ignore_index, "front": "hard", "radius": radius, "slope": 0.37}
    grad, log_odds, _ = fused.erosion_grad(case.logits, case.labels, tau, **arguments)
    expected, signed, _ = reference.erosion_grad(case.logits, case.labels, tau, **arguments)
    assert_same_maps(log_odds, signed, case)
    q = reference.erode(signed.abs(), None, radius, 0.37 * tau)
    # Where all confidences are nearly equal (tiny logits), all pixels are on the edge; otherwise hardly any.
    edge = (q / tau.view(-1, 1, 1) - 1).abs() < 1e-5
    spread = signed.abs()[signed.isfinite()]
    if spread.numel() > 1 and spread.std() > 0.1 * spread.mean():
        assert edge.sum() <= 0.01 * edge.numel() + 9 * radius + 3
    torch.testing.assert_close(
        grad.where(~edge.unsqueeze(1), 0), expected.where(~edge.unsqueeze(1), 0), rtol=1e-5, atol=1e-7
    )


@PROPERTIES
@given(
    case=cases(),
    method=st.sampled_from(ops.FUSED_METHODS),
    progress=st.sampled_from([0.0, 0.35, 0.9]),
    targeted=st.booleans(),
    balanced=st.booleans(),
)
def test_pixel_grad_is_the_reference(
    fused: Any, case: Case, method: str, progress: float, targeted: bool, balanced: bool
) -> None:
    classes = max(case.logits.shape[1], 2)
    weight = reference.class_balance(case.labels, classes, ignore_index=case.ignore_index) if balanced else None
    arguments: dict[str, Any] = {"ignore_index": case.ignore_index, "targeted": targeted, "class_weight": weight}
    grad, stats = fused.pixel_grad(case.logits, case.labels, method, progress, **arguments)
    expected, expected_stats = reference.pixel_grad(case.logits, case.labels, method, progress, **arguments)
    tolerance = GRADIENT[grad.dtype]
    if method == "cospgd":
        # 1 - cosine cancels where a targeted pixel is nearly there, in either implementation.
        tolerance = tolerance | {"atol": 1e-6, "rtol": max(tolerance["rtol"], 2e-5)}
    torch.testing.assert_close(grad, expected, **tolerance)
    assert torch.equal(stats, expected_stats)


@PROPERTIES
@given(case=cases(), kind=st.sampled_from(ops.CONFIDENCES))
def test_confidence_is_the_reference(fused: Any, case: Case, kind: str) -> None:
    arguments: dict[str, Any] = {"ignore_index": case.ignore_index, "confidence": kind}
    assert_same_maps(
        fused.confidence(case.logits, case.labels, **arguments),
        reference.confidence(case.logits, case.labels, **arguments),
        case,
    )


@PROPERTIES
@given(case=cases())
def test_confusion_is_the_reference(fused: Any, case: Case) -> None:
    classes = max(case.logits.shape[1], 2)
    expected = reference.confusion(case.logits, case.labels, classes, ignore_index=case.ignore_index)
    assert torch.equal(fused.confusion(case.logits, case.labels, classes, ignore_index=case.ignore_index), expected)
    z = case.logits
    predicted = (z[:, 0] > 0).long() if z.shape[1] == 1 else z.argmax(1)
    assert torch.equal(fused.confusion(predicted, case.labels, classes, ignore_index=case.ignore_index), expected)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("classes", [1, 2, 5, 30, 150])
def test_classes_that_a_model_rules_out_are_the_references(
    fused: Any, classes: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(2, classes, 5, 37, generator=generator) * 4
    labels = torch.randint(max(classes, 2), (2, 5, 37), generator=generator)
    # In every pixel others, in some of them the label or all the rest: these are broken.
    logits[torch.rand(logits.shape, generator=generator) < 0.5] = -math.inf
    logits[0, :, 0] = -math.inf
    logits = logits.to(dtype).contiguous(memory_format=layout)
    tau = torch.tensor([1.0, 3.0])
    for confidence in ops.CONFIDENCES:
        got = fused.erosion_grad(logits, labels, tau, confidence=confidence)
        expected = reference.erosion_grad(logits, labels, tau, confidence=confidence)
        torch.testing.assert_close(got[0], expected[0], **GRADIENT[dtype])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=4e-6 + classes * 2**-25, equal_nan=True)
        assert torch.equal(got[2][:, :3], expected[2][:, :3])
    for method in ops.FUSED_METHODS:
        got, expected = (kind.pixel_grad(logits, labels, method) for kind in (fused, reference))
        torch.testing.assert_close(got[0], expected[0], **GRADIENT[dtype])
        assert torch.equal(got[1].nan_to_num(-1), expected[1].nan_to_num(-1))


def test_the_package_of_the_operations_has_them_by_name() -> None:
    from eroseg_ext import ops as package

    assert len(package.__all__) == 10
    assert all(getattr(package, name) is getattr(ops, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'dilate'"):
        _ = package.dilate


def test_confusion_leaves_out_predictions_that_are_no_class(fused: Any) -> None:
    """Void in a prediction is common; what lies outside [0, classes) must not reach memory outside the matrix."""
    labels = torch.randint(0, 5, (2, 9, 37), generator=torch.Generator().manual_seed(0))
    predicted = labels.clone()
    for x, value in enumerate((-1, 5, 255, 10**9, 2**32, -(2**63), 2**63 - 1)):
        predicted[:, :, x] = value
    expected = torch.diag(torch.bincount(labels[:, :, 7:].flatten(), minlength=5))
    assert torch.equal(fused.confusion(predicted, labels, 5), expected)
    assert torch.equal(reference.confusion(predicted, labels, 5), expected)


@PROPERTIES
@given(
    rows=st.integers(0, 3),
    length=st.sampled_from([0, 1, 2, 17, 1000, 5000]),
    kind=st.sampled_from(["random", "equal", "two values", "sorted", "tiny", "huge range", "infinite"]),
    seed=st.integers(0, 1000),
    masked=st.booleans(),
)
def test_kth_value_is_exact(fused: Any, rows: int, length: int, kind: str, seed: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, length, generator=generator)
    if kind == "equal":
        scores = torch.full_like(scores, 0.1)
    elif kind == "two values":
        scores = (scores > 0.5).float() + 1
    elif kind == "sorted":
        scores = scores.sort(1).values
    elif kind == "tiny":
        scores = scores * 1e-42
    elif kind == "huge range":
        scores = (scores * 170 - 85).exp()
    elif kind == "infinite":
        scores = scores.masked_fill(scores > 0.5, math.inf)
    valid = torch.rand(rows, length, generator=generator) > 0.4 if masked else None
    k = torch.randint(-1, length + 3, (rows, 4), generator=generator)
    assert torch.equal(fused.kth_value(scores, k, valid), reference.kth_value(scores, k, valid))


@PROPERTIES
@given(
    case=cases(),
    steps_left=st.integers(0, 9),
    reach=st.sampled_from([0.5, 1.0]),
    bounds=st.sampled_from([(0.03, 0.4), (0.2, 0.2), (0.0, 1.0)]),
)
def test_next_tau_is_the_reference(
    fused: Any, case: Case, steps_left: int, reach: float, bounds: tuple[float, float]
) -> None:
    width = torch.ones(case.logits.shape[0])
    previous = torch.zeros(case.labels.shape)
    _, log_odds, stats = reference.erosion_grad(
        case.logits, case.labels, width, previous, ignore_index=case.ignore_index, targeted=True
    )
    arguments: dict[str, Any] = {"reach": reach, "front_min": bounds[0], "front_max": bounds[1]}
    tau = fused.next_tau(log_odds, stats, steps_left, **arguments)
    expected = reference.next_tau(log_odds, stats, steps_left, **arguments)
    torch.testing.assert_close(tau, expected, rtol=1e-6, atol=0)
    assert (tau >= reference.TAU_FLOOR).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (1, 1, 1, 1), (0, 3, 4, 4), (2, 4, 0, 5), (1, 3, 190, 201)])
def test_steps_are_the_reference(fused: Any, shape: tuple[int, ...], layout: torch.memory_format, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).contiguous(memory_format=layout)
    grad = torch.randn(shape, generator=generator)
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    start = (x + 0.02 * torch.randn(shape, generator=generator)).clamp(0, 1)
    mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.5 if masked else None
    a, b = start.clone(), start.clone()
    fused.linf_step_(a, x, grad, 0.03, 0.01, 0.1, 0.9, mask)
    reference.linf_step_(b, x, grad, 0.03, 0.01, 0.1, 0.9, mask)
    assert torch.equal(a, b)


def test_a_nan_gradient_makes_a_nan_pixel(fused: Any) -> None:
    x = torch.full((1, 1, 5, 5), 0.5)
    grad = torch.ones_like(x)
    grad[0, 0, 2, 3] = math.nan
    assert torch.equal(fused.linf_step_(x.clone(), x, grad, 0.1, 0.1).isnan(), grad.isnan())
    # Its norm is NaN too, so the whole image is.
    assert reference.l2_step_(x.clone(), x, grad, 0.1, 0.1).isnan().all()


@pytest.mark.parametrize("classes", [1, 2, 5, 50])
def test_of_tied_classes_the_lowest_is_predicted(fused: Any, classes: int) -> None:
    logits = torch.zeros(1, classes, 6, 40)
    logits[..., 20:] = torch.randint(0, 2, (1, classes, 6, 20), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, max(classes, 2), (1, 6, 40), generator=torch.Generator().manual_seed(1))
    correct = reference.pixel_grad(logits, labels, "pgd")[1][:, 1]
    assert torch.equal(fused.erosion_grad(logits, labels, torch.ones(1))[2][:, 1], correct)
    assert torch.equal(fused.pixel_grad(logits, labels, "pgd")[1][:, 1], correct)
    top = fused.confidence(logits, labels, confidence="top")
    torch.testing.assert_close(top, reference.confidence(logits, labels, confidence="top"), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(
    ("classes", "channel", "value"),
    [
        *itertools.product((50, 256), (2, 3, 49), (math.nan, math.inf)),
        *((classes, 2, -math.inf) for classes in (50, 256)),  # the label's: another class may be ruled out
    ],
)
def test_logits_that_are_not_finite_are_told_in_the_stats(
    fused: Any, classes: int, channel: int, value: float, dtype: torch.dtype
) -> None:
    logits = torch.randn(3, classes, 6, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.full((3, 6, 70), 2)
    labels[2, 4, 66] = -1
    logits[1:, channel, 4, 66] = value  # image 1 at a valid pixel, image 2 at a void one
    tau = torch.ones(3)
    for radius in (0, 1):
        got, expected = (who.erosion_grad(logits, labels, tau, radius=radius) for who in (fused, reference))
        assert_nan_is_of_one_image(got, expected)
        assert got[1].isnan().nonzero().tolist() == [[1, 4, 66]]
    assert_nan_is_of_one_image(fused.pixel_grad(logits, labels, "pgd"), reference.pixel_grad(logits, labels, "pgd"))


def assert_nan_is_of_one_image(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got[0], expected[0], **GRADIENT[got[0].dtype])
    assert got[-1][:, 3].isnan().tolist() == expected[-1][:, 3].isnan().tolist() == [False, True, False]
    assert (got[0][1, :, 4, 66] == 0).all()


def test_more_classes_than_the_kernels_take_are_the_references() -> None:
    logits = torch.randn(2, ops.MAX_CLASSES + 1, 5, 6)
    labels = torch.randint(0, logits.shape[1], (2, 5, 6), generator=torch.Generator().manual_seed(0))
    calls = (
        lambda who: who.erosion_grad(logits, labels, torch.ones(2), ignore_index=-1, targeted=True),
        lambda who: who.pixel_grad(logits, labels, "js", ignore_index=-1),
        lambda who: (who.confidence(logits, labels, ignore_index=-1, confidence="top"),),
        lambda who: (who.confusion(logits, labels, logits.shape[1], ignore_index=-1),),
    )
    for call in calls:
        assert all(torch.equal(a, b) for a, b in zip(call(ops), call(reference), strict=True))


def test_choices_that_only_the_reference_takes_are_named() -> None:
    logits, labels = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="within is 'class', wanted one of any"):
        ops.erosion_grad(logits, labels, torch.ones(1), within="class")
    with pytest.raises(ValueError, match="method is 'cospgd_sigmoid', wanted one of pgd, "):
        ops.pixel_grad(logits, labels, "cospgd_sigmoid")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_goes_into_a_kept_buffer(layout: torch.memory_format) -> None:
    logits = torch.randn(2, 5, 9, 70).contiguous(memory_format=layout)
    labels = torch.randint(0, 5, (2, 9, 70))
    tau = torch.ones(2)
    fresh, _, _ = ops.erosion_grad(logits, labels, tau)
    for out in (torch.full_like(logits, 7.0), torch.full((2, 5, 9, 140), 7.0)[..., ::2]):
        grad, _, _ = ops.erosion_grad(logits, labels, tau, out=out)
        assert grad is out
        assert torch.equal(out, fresh)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_large_enough_to_be_streamed_past_the_cache_is_the_reference(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    logits = torch.randn(1, 33, 512, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = logits.contiguous(memory_format=layout)
    labels = torch.randint(0, 33, (1, 512, 512))
    grad, _, _ = ops.erosion_grad(logits, labels, torch.ones(1))
    torch.testing.assert_close(grad, reference.erosion_grad(logits, labels, torch.ones(1))[0], **GRADIENT[dtype])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    logits = torch.randn(2, 7, 130, 50)
    labels = torch.randint(0, 7, (2, 130, 50))
    previous = torch.randn(2, 130, 50)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.erosion_grad(logits, labels, torch.ones(2), previous))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LEVEL_CHECK = """
import torch
from eroseg_ext.ops import fused as ops, reference
torch.manual_seed(0)
print(ops.cpu_level())
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
    for layout in (torch.contiguous_format, torch.channels_last):
        logits = (torch.randn(2, 21, 20, 75) * 4).to(dtype).contiguous(memory_format=layout)
        labels = torch.randint(0, 22, (2, 20, 75))
        for kind in ("label", "top", "log_odds"):
            options = {"ignore_index": 21, "confidence": kind, "class_weight": torch.rand(2, 21)}
            got = ops.erosion_grad(logits, labels, torch.ones(2), **options)
            want = reference.erosion_grad(logits, labels, torch.ones(2), **options)
            torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=1e-7)
            torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=2e-6)
        for method in ops.FUSED_METHODS:
            got = ops.pixel_grad(logits, labels, method, 0.3, ignore_index=21)
            want = reference.pixel_grad(logits, labels, method, 0.3, ignore_index=21)
            torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=1e-6)
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_simd_levels_are_the_reference_too(level: str, tmp_path: Path) -> None:
    environment = os.environ | {"EROSEG_CPU_LEVEL": level}
    command = [sys.executable, "-c", LEVEL_CHECK]
    # From another folder: python -c would find the sources in this one before the package that is installed.
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    if f"EROSEG_CPU_LEVEL is '{level}', wanted one that this CPU has" in done.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == level


WRONG_LEVEL = """
import torch
from eroseg_ext import attack
from eroseg_ext.cli import main as cli
x, labels = torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
import eroseg_ext.ops.fused
for call in (
    lambda: attack(lambda images: images, x, labels),
    lambda: torch.ops.eroseg.confidence(x, labels, 255, 0, False),
    lambda: torch.ops.eroseg.linf_step_(x, x.clone(), x.clone(), 0.1, 0.1, 0.0, 1.0, None),
    lambda: torch.ops.eroseg.confusion(x, labels, 3, 255, False),
):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        print(error)
raise SystemExit(cli.main(["info"]))
"""


def test_a_wrong_simd_level_is_told(tmp_path: Path) -> None:
    """By an attack, by the operators and by the command."""
    done = subprocess.run(
        [sys.executable, "-c", WRONG_LEVEL],
        env=os.environ | {"EROSEG_CPU_LEVEL": "typo"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    sentence = "EROSEG_CPU_LEVEL is 'typo', wanted one that this CPU has: "
    assert [line.partition("baseline")[0].partition("avx")[0] for line in done.stdout.splitlines()] == [sentence] * 4
    assert done.stderr.startswith(f"eroseg: {sentence}")
    assert done.stderr.count("\n") == 1


def test_choices_are_numbered_as_in_the_kernels(fused: Any) -> None:
    """A wrong order of names in ops.py would compute another choice: each gives a gradient of its own here."""
    logits = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(3))
    labels = torch.randint(0, 4, (1, 12, 12), generator=torch.Generator().manual_seed(4))
    tau = torch.full((1,), 0.3)
    grads = []
    for kind, front, direction in itertools.product(ops.CONFIDENCES, ops.FRONTS, ops.DIRECTIONS):
        choices = {"confidence": kind, "front": front, "direction": direction, "slope": 0.3}
        grad, _, _ = fused.erosion_grad(logits, labels, tau, **choices)
        torch.testing.assert_close(
            grad, reference.erosion_grad(logits, labels, tau, **choices)[0], rtol=1e-5, atol=1e-7
        )
        grads.append(grad)
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(grads, 2))
