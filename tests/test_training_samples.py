"""What training reads: class maps, layouts of files, augmentation, the order of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eroseg_ext import datasets
from eroseg_ext.datasets import VOID, class_map
from eroseg_ext.training.samples import Augmentation, Batch, Batches, Key, Reader, Samples

HERE = Path("label.png")


@pytest.mark.parametrize(
    ("dataset", "values", "classes"),
    [
        ("voc", [0, 20, 255], [0, 20, VOID]),
        ("camvid", [0, 10, 11], [0, 10, VOID]),
        ("ade20k", [0, 1, 150], [VOID, 0, 149]),
        ("cityscapes", [0, 6, 7, 8, 9, 11, 26, 29, 31, 33], [VOID, VOID, 0, 1, VOID, 2, 13, VOID, 16, 18]),
        ("folder", [0, 4, 9], [0, 4, VOID]),
    ],
)
def test_class_maps(dataset: str, values: list[int], classes: list[int]) -> None:
    to_class = class_map(dataset, 5, ignore_index=9)
    assert to_class(np.array([values]), HERE).tolist() == [classes]


@pytest.mark.parametrize(
    ("dataset", "wrong"),
    [
        ("voc", 21),
        ("camvid", 12),
        ("camvid", 255),
        ("ade20k", 151),
        ("cityscapes", 34),
        ("folder", 5),
        ("folder", 70000),
    ],
)
def test_a_label_out_of_range_names_the_file(dataset: str, wrong: int) -> None:
    to_class = class_map(dataset, 5, ignore_index=9)
    with pytest.raises(ValueError, match=rf"label\.png has the label {wrong} at row 1, column 2, wanted classes"):
        to_class(np.array([[1, 1, 1], [1, 1, wrong]]), HERE)


def test_number_of_classes() -> None:
    assert [class_map(name, None, 255).classes for name in ("voc", "cityscapes", "ade20k", "camvid")] == [
        21,
        19,
        150,
        11,
    ]
    assert len(class_map("cityscapes", None, 255).names) == 19


def put(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6)).save(root / path)


LAYOUTS = {
    "voc": ("JPEGImages/a.jpg", "SegmentationClass/a.png"),
    "cityscapes": ("leftImg8bit/train/bonn/b_1_leftImg8bit.png", "gtFine/train/bonn/b_1_gtFine_labelIds.png"),
    "ade20k": ("images/training/a.jpg", "annotations/training/a.png"),
    "camvid": ("train/a.png", "trainannot/a.png"),
}


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_layouts_as_published(tmp_path: Path, dataset: str) -> None:
    put(tmp_path, *LAYOUTS[dataset])
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    found = datasets.find(dataset, tmp_path, "train")
    assert found == [tuple(tmp_path / path for path in LAYOUTS[dataset])]
    with pytest.raises(FileNotFoundError, match="is missing"):
        datasets.find(dataset, tmp_path, "val")
    found[0][1].unlink()
    with pytest.raises(FileNotFoundError, match=f"has no label map: .*{found[0][1].name} is missing"):
        datasets.find(dataset, tmp_path, "train")


@pytest.mark.parametrize("dataset", ["folder", *LAYOUTS])
def test_images_and_labels_folders_serve_every_data_set(tmp_path: Path, dataset: str) -> None:
    put(tmp_path, "images/b.jpg", "labels/b.png", "images/a.png", "labels/a.png")
    names = [(image.name, label.name) for image, label in datasets.find(dataset, tmp_path, "train")]
    assert names == [("a.png", "a.png"), ("b.jpg", "b.png")]


def test_counting_classes_and_median_frequency(tmp_path: Path) -> None:
    for number, row in enumerate([[0, 0, 0, 3], [0, 0, 9, 9]]):
        put(tmp_path, f"images/{number}.png")
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(np.array([row] * 6, np.uint8).repeat(2, 1)).save(tmp_path / "labels" / f"{number}.png")
    pairs = datasets.find("folder", tmp_path, "train")
    assert datasets.count_classes(pairs, 9) == 4
    # Class 0: 60 of 72 valid pixels, class 3: 12 of the 48 of its image.
    weights = datasets.median_frequency_weights(pairs, class_map("folder", 4, 9))
    median = (60 / 72 + 12 / 48) / 2
    assert weights.tolist() == pytest.approx([median / (60 / 72), 1, 1, median / (12 / 48)])


@pytest.fixture
def striped(tmp_path: Path) -> Reader:
    """An image whose colour tells the class of its pixels: 20 columns of each of 4 classes, in 40 rows."""
    put(tmp_path, "images/a.png", "labels/a.png")
    classes = np.arange(4, dtype=np.uint8).repeat(20)[None].repeat(40, 0)
    Image.fromarray(np.stack([150 + classes * 30] * 3, -1)).save(tmp_path / "images" / "a.png")
    Image.fromarray(classes).save(tmp_path / "labels" / "a.png")
    return Reader(datasets.find("folder", tmp_path, "train"), class_map("folder", 4, 255), None, cache=False)


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
    batches = list(Batches(images=12, batch_size=4, seed=0, first=0, last=9))
    epochs = [[key for keys in batches[start : start + 3] for key in keys] for start in (0, 3, 6)]
    for number, keys in enumerate(epochs):
        assert sorted(key.image for key in keys) == list(range(12))
        assert {key.epoch for key in keys} == {number}
    assert [key.image for key in epochs[0]] != [key.image for key in epochs[1]]


def test_processes_share_the_batches_of_one() -> None:
    whole = list(Batches(11, 4, 5, 0, 7))
    parts = [list(Batches(11, 4, 5, 0, 7, rank, 2)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_a_later_start_continues_the_same_order() -> None:
    assert list(Batches(11, 4, 5, 3, 7)) == list(Batches(11, 4, 5, 0, 7))[3:]
