"""What training reads: samples, augmentation, the order of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from folders import write_blank
from PIL import Image

from eroseg_ext.data.datasets import class_map
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.sources import SegmentationFolder
from eroseg_ext.training.samples import Augmentation, Batch, Key, Reader, Samples, batches


@pytest.fixture
def striped(tmp_path: Path) -> Reader:
    """An image whose colour tells the class of its pixels: 20 columns of each of 4 classes, in 40 rows."""
    write_blank(tmp_path, "images/a.png", "labels/a.png")
    classes = np.arange(4, dtype=np.uint8).repeat(20)[None].repeat(40, 0)
    Image.fromarray(np.stack([150 + classes * 30] * 3, -1)).save(tmp_path / "images" / "a.png")
    Image.fromarray(classes).save(tmp_path / "labels" / "a.png")
    return Reader(SegmentationFolder(tmp_path), class_map("folder", 4, 255), cache=False)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.4, 0.9), (1.1, 3.0)])
def test_labels_follow_their_pixels(striped: Reader, scale: tuple[float, float]) -> None:
    samples = Samples(striped, Augmentation(0, (32, 48), scale, flip=True))
    shown = set()
    for epoch in range(12):
        sample = samples[Key(0, epoch)]
        assert isinstance(sample, Batch)
        assert sample.images.shape == (1, 3, 32, 48)
        labels, colour = sample.labels[0], sample.images[0, 0].int()
        outside = labels == VOID
        assert torch.equal(outside, colour == 128)
        # Interpolation mixes colours beside a border between classes, and nowhere else.
        right = (colour == 150 + labels.int() * 30) | outside
        borders = (labels[:, 1:] != labels[:, :-1]).any(0).sum().item()
        assert (~right).any(0).sum() <= 6 * borders
        inside = labels[~outside]
        assert inside.numel() > 0
        shown.add(bool((inside.view(-1)[0] > inside.view(-1)[-1]).item()))
        reaches_out = scale[1] < 1 and 40 * scale[1] < 32
        assert outside.any() or not reaches_out
    assert shown == {True, False}


def test_without_augmentation_a_sample_is_the_file(striped: Reader) -> None:
    sample, whole = (
        Samples(striped, Augmentation(0, (40, 80), (1, 1), flip=False))[Key(0, 3)],
        Samples(striped, None)[Key(0)],
    )
    assert isinstance(sample, Batch)
    assert isinstance(whole, Batch)
    assert torch.equal(sample.images, whole.images)
    assert torch.equal(sample.labels, whole.labels)
    assert whole.labels[0, 0].tolist() == [0] * 20 + [1] * 20 + [2] * 20 + [3] * 20


def test_augmentation_is_a_function_of_seed_epoch_and_image(striped: Reader) -> None:
    def images(seed: int, epoch: int) -> torch.Tensor:
        sample = Samples(striped, Augmentation(seed, (32, 48), (0.5, 2), flip=True))[Key(0, epoch)]
        assert isinstance(sample, Batch)
        return sample.images

    assert torch.equal(images(1, 2), images(1, 2))
    assert not torch.equal(images(1, 2), images(1, 3))
    assert not torch.equal(images(1, 2), images(2, 2))


def test_every_epoch_visits_every_image_once() -> None:
    found = list(batches(images=12, batch_size=4, seed=0, first=0, last=9))
    epochs = [[key for keys in found[start : start + 3] for key in keys] for start in (0, 3, 6)]
    for number, keys in enumerate(epochs):
        assert sorted(key.image for key in keys) == list(range(12))
        assert {key.epoch for key in keys} == {number}
    assert [key.image for key in epochs[0]] != [key.image for key in epochs[1]]


def test_processes_share_the_batches_of_one() -> None:
    whole = list(batches(11, 4, 5, 0, 7))
    parts = [list(batches(11, 4, 5, 0, 7, rank, 2)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_a_later_start_continues_the_same_order() -> None:
    assert list(batches(11, 4, 5, 3, 7)) == list(batches(11, 4, 5, 0, 7))[3:]
