"""What only the CUDA kernels have, shown on the host; that they compute the reference, tests/test_ops.py shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eroseg_ext.ops import backend, reference
from eroseg_ext.ops.fused import CONFIDENCES

if backend.why_not_fused(torch.device("cpu")):
    pytest.skip(str(backend.why_not_fused(torch.device("cpu"))), allow_module_level=True)

import cuda_kernels

if why_not := cuda_kernels.why_not():
    pytest.skip(why_not, allow_module_level=True)

# What erosion_grad has other kernels for.
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"confidence": "top"})

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def scene(batch: int, classes: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Logits, labels with void pixels, tau and log-odds of a step before."""
    generator = torch.Generator().manual_seed(classes + width)
    logits = (torch.randn(batch, classes, height, width, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, max(classes, 2), (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255 if classes <= 255 else -1
    return logits, labels, torch.linspace(0.5, 2, batch), torch.randn(labels.shape, generator=generator) * 4


def test_the_host_notices_planted_faults() -> None:
    module = cuda_kernels.kernels()
    rotated = [*range(1, 64), 0]
    module.set_machine(0, 1, 1 << 16)
    assert module.rotate(0) == rotated
    assert module.rotate(1) != rotated
    with pytest.raises(RuntimeError, match="not reached by all threads"):
        module.rotate(2)
    with pytest.raises(RuntimeError, match="wrote beyond its shared memory"):
        module.rotate(3)


def test_a_kernel_is_allowed_as_much_shared_memory_for_a_small_launch_as_for_a_large_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a small launch of one host thread would take away what another thread's large one is about to use."""
    monkeypatch.setattr(cuda_kernels, "DEVICES", ((1, 228),))
    for classes, width in ((150, 300), (150, 80), (60, 200)):
        cuda_kernels.erosion_grad(*scene(1, classes, 2, width))
        assert set(cuda_kernels.kernels().shared_limits()) <= {227 * 1024}
    cuda_kernels.erosion_grad(*scene(1, 150, 2, 300))
    assert cuda_kernels.kernels().shared_limits() == [227 * 1024]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [69, 70, 72])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 21, 24, 25, 49, 97, 150, 256])
def test_every_way_to_share_classes_among_threads_and_to_copy_rows(
    classes: int, width: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    logits, labels, tau, previous = scene(1, classes, 4, width, dtype)
    logits = logits.contiguous(memory_format=layout)
    ignore_index = 255 if classes <= 255 else -1
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2**-7, "atol": 1e-7}
    for options in OPTIONS:
        got = cuda_kernels.erosion_grad(logits, labels, tau, previous, ignore_index=ignore_index, **options)
        expected = reference.erosion_grad(logits, labels, tau, previous, ignore_index=ignore_index, **options)
        torch.testing.assert_close(got[0], expected[0], **tolerance)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=2e-6 + classes * 2**-25)
    grad, stats = cuda_kernels.pixel_grad(logits, labels, "cospgd", ignore_index=ignore_index)
    expected_grad, expected_stats = reference.pixel_grad(logits, labels, "cospgd", ignore_index=ignore_index)
    torch.testing.assert_close(grad, expected_grad, **tolerance)
    assert torch.equal(stats, expected_stats)


@pytest.mark.parametrize("options", [*OPTIONS, {"radius": 0}], ids=str)
@pytest.mark.parametrize("processors", [1, 7, 1000])
@pytest.mark.parametrize("width", [255, 256, 257, 600, 1031])
def test_pixels_do_not_feel_the_borders_of_tiles(
    width: int, processors: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "DEVICES", ((processors, 100), (processors, 228)))
    logits, labels, tau, previous = scene(1, 3, 13, width)
    got = cuda_kernels.erosion_grad(logits, labels, tau, previous, **options)
    expected = reference.erosion_grad(logits, labels, tau, previous, **options)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=2e-6)
    assert torch.equal(got[2][:, :3], expected[2][:, :3])
    torch.testing.assert_close(got[2][:, 3], expected[2][:, 3], rtol=1e-5, atol=1e-3)


def test_results_are_the_same_to_the_last_bit_in_any_order_of_threads() -> None:
    arguments = scene(2, 30, 9, 75)
    runs = [cuda_kernels.erosion_grad(*arguments) for _ in range(3 * len(cuda_kernels.DEVICES))]
    # Runs on like devices cut the images alike, and so add up in one order.
    for first, other in zip(runs, runs[len(cuda_kernels.DEVICES) :], strict=False):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(5, 7), (4, 300), (40, 3)])
def test_interpolated_logits_give_the_same_bits_on_any_device(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    """However the logits are cut into blocks, also where a row of them has more than a block's threads."""
    _, labels, tau, previous = scene(2, 6, 13, 620)
    logits = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    expected = reference.erosion_grad(logits, labels, tau, previous)
    runs = [cuda_kernels.erosion_grad(logits, labels, tau, previous) for _ in range(2 * len(cuda_kernels.DEVICES))]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    torch.testing.assert_close(runs[0][0], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(runs[0][1], expected[1], rtol=1e-5, atol=1e-4)


def test_a_block_goes_on_to_further_rows_where_there_are_more_of_logits_than_blocks() -> None:
    _, labels, tau, _ = scene(2, 2, 5, 16)
    logits = torch.randn(2, 2, 200, 7, generator=torch.Generator().manual_seed(0))
    got, expected = (of.erosion_grad(logits, labels, tau) for of in (cuda_kernels, reference))
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[2][:, :3], expected[2][:, :3])


@pytest.mark.parametrize("batch", [1, 2, 9, 300])
def test_the_last_block_adds_up_every_image(batch: int) -> None:
    logits, labels, tau, previous = scene(batch, 3, 7, 20 if batch < 300 else 2)
    got = cuda_kernels.erosion_grad(logits, labels, tau, previous)[2]
    expected = reference.erosion_grad(logits, labels, tau, previous)[2]
    assert torch.equal(got[:, :3], expected[:, :3])
    torch.testing.assert_close(got[:, 3], expected[:, 3], rtol=1e-5, atol=1e-3)


def test_selection_reads_ties_and_few_distinct_values_right() -> None:
    scores = torch.tensor([[0.25] * 700 + [0.5] * 300, [1e-44] * 999 + [3e38]])
    k = torch.tensor([[1, 700, 701, 1000, 5], [1, 999, 1000, 0, 2000]])
    assert torch.equal(cuda_kernels.kth_value(scores, k), reference.kth_value(scores, k))


def test_a_thread_goes_on_to_its_next_pixel_where_an_image_has_more_than_threads() -> None:
    logits, labels, _, _ = scene(1, 2, 3, 40_000)
    assert torch.equal(cuda_kernels.confusion(logits, labels, 2), reference.confusion(logits, labels, 2))


@pytest.mark.parametrize("n", [16384, 16385, 50_001])
def test_blocks_that_share_a_row_select_as_one(n: int) -> None:
    scores = torch.rand(2, n, generator=torch.Generator().manual_seed(n)).pow(8)
    scores[1] = scores[1].mul(40).round()  # many ties
    k = torch.tensor([[1, n // 3, n], [n // 2, n // 2, n - 1]])
    assert torch.equal(cuda_kernels.kth_value(scores, k), reference.kth_value(scores, k))
    valid = torch.rand(2, n) < 0.7
    assert torch.equal(cuda_kernels.kth_value(scores, k, valid), reference.kth_value(scores, k, valid))
    maps = scores.view(2, 1, n)
    stats = torch.tensor([[n, 0, 5, 1e-3], [n, 0, 5, 3.0]], dtype=torch.float64)
    assert torch.equal(cuda_kernels.next_tau(maps, stats, 4), reference.next_tau(maps, stats, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("classes", [3, 21, 30])
def test_pixels_do_not_feel_neighbours_that_are_not_finite(
    classes: int, layout: torch.memory_format, dtype: torch.dtype, value: float
) -> None:
    logits, labels, tau, previous = scene(1, classes, 5, 60, dtype)
    labels[:] = 1
    logits[:, 0, :, 1::7] = value  # in another place of a word in each row, as the first class of its pixel ...
    logits[:, -1, :, 4::7] = value  # ... and as the last
    logits = logits.contiguous(memory_format=layout)
    for confidence in CONFIDENCES:
        got = cuda_kernels.erosion_grad(logits, labels, tau, previous, confidence=confidence)
        expected = reference.erosion_grad(logits, labels, tau, previous, confidence=confidence)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-7)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=4e-6, equal_nan=True)
        assert torch.equal(got[2][:, [0, 2]], expected[2][:, [0, 2]])


@pytest.mark.parametrize("classes", [2, 21, 30])
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        *((dtype, magnitude) for dtype in (torch.float32, torch.bfloat16) for magnitude in (1e6, 1e9, 1e30, 1e37)),
        (torch.float16, 4e3),
        (torch.float16, -6e4),
    ],
)
def test_huge_logits_are_told_apart(magnitude: float, dtype: torch.dtype, classes: int) -> None:
    logits, labels, _, _ = scene(1, classes, 5, 40, torch.float32)
    logits = (logits * magnitude).clamp(-abs(torch.finfo(dtype).max), torch.finfo(dtype).max).to(dtype)
    logits[:, :, 2] = magnitude  # all classes equal: what is subtracted must not be more than they are
    tau = torch.full((1,), abs(magnitude))
    got = cuda_kernels.erosion_grad(logits, labels, tau)
    expected = reference.erosion_grad(logits, labels, tau)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-7)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=2e-6 + classes * 2**-25)
    assert torch.equal(got[2][:, :2], expected[2][:, :2])
