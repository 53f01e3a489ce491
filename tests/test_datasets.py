"""Data sets known by name: class maps, layouts of files, what they give to an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from folders import write_blank, write_labels
from PIL import Image

from eroseg_ext.data.datasets import class_map
from eroseg_ext.data.layouts import find
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.sources import NamedDataset, SegmentationFolder
from eroseg_ext.training import labels

HERE = "label.png"


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
    assert to_class(torch.tensor([values]), HERE).tolist() == [classes]


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
        to_class(torch.tensor([[1, 1, 1], [1, 1, wrong]]), HERE)


def test_reduced_zero_label() -> None:
    to_class = class_map("folder", 3, ignore_index=255, reduce_zero_label=True)
    assert to_class(torch.tensor([[0, 1, 3, 255, -1]]), HERE).tolist() == [[VOID, 0, 2, VOID, VOID]]
    with pytest.raises(ValueError, match=r"has the label 4 .*, wanted classes 1 to 3, or 0, 255 for void"):
        to_class(torch.tensor([[4]]), HERE)
    assert labels.count_classes({"a": {0: 3, 1: 1, 150: 2}}, {}, class_map("folder", reduce_zero_label=True)) == 150


def test_number_of_classes() -> None:
    assert [class_map(name, None, 255).classes for name in ("voc", "cityscapes", "ade20k", "camvid")] == [
        21,
        19,
        150,
        11,
    ]
    assert len(class_map("cityscapes", None, 255).names) == 19


LAYOUTS = {
    "voc": ("JPEGImages/a.jpg", "SegmentationClass/a.png"),
    "cityscapes": ("leftImg8bit/train/bonn/b_1_leftImg8bit.png", "gtFine/train/bonn/b_1_gtFine_labelIds.png"),
    "ade20k": ("images/training/a.jpg", "annotations/training/a.png"),
    "camvid": ("train/a.png", "trainannot/a.png"),
}


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_layouts_as_published(tmp_path: Path, dataset: str) -> None:
    write_blank(tmp_path, *LAYOUTS[dataset])
    if dataset == "voc":
        lists = tmp_path / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("a\n")
    found = find(tmp_path, "train")
    assert found == [tuple(tmp_path / path for path in LAYOUTS[dataset])]
    with pytest.raises(FileNotFoundError, match=r"is missing|images/val/.*, but has .*train"):
        find(tmp_path, "val")
    found[0][1].unlink()
    name = found[0][1].stem.removesuffix("_gtFine_labelIds")
    with pytest.raises(FileNotFoundError, match=rf"has no label map: .*/{name}\.png is missing"):
        find(tmp_path, "train")


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/a.png", "labels/a.png"),
        ("images/a.jpg", "masks/a_mask.gif"),
        ("images/train/a.jpg", "labels/train/a.png"),
        ("images/train/x/a.jpg", "annotations/train/x/a.png"),
        ("img_dir/train/a.jpg", "ann_dir/train/a.png"),
        ("train/images/a.jpg", "train/masks/a.png"),
        ("train/a.png", "train_labels/a_L.png"),
    ],
)
def test_layouts_of_folders(tmp_path: Path, image: str, label: str) -> None:
    write_blank(tmp_path, image, label)
    assert find(tmp_path, "train") == [(tmp_path / image, tmp_path / label)]
    if "train" in image:
        with pytest.raises(FileNotFoundError, match=r"must hold the folders .*images/val/.*, but has .*train/"):
            find(tmp_path, "val")


def test_a_split_is_read_alone(tmp_path: Path) -> None:
    write_blank(
        tmp_path, *(f"{part}/{split}/a.png" for part in ("images", "labels") for split in ("train", "valid", "test"))
    )
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert SegmentationFolder(tmp_path, split=split).images == [tmp_path / "images" / folder / "a.png"]
    assert SegmentationFolder(tmp_path).images == [tmp_path / "images" / "valid" / "a.png"]


def test_hidden_files_and_other_versions_of_the_images_are_no_images_of_cityscapes(tmp_path: Path) -> None:
    folder = "leftImg8bit/train/bonn"
    write_blank(tmp_path, *LAYOUTS["cityscapes"], f"{folder}/b_1_leftImg8bit_foggy_beta_0.01.png")
    for name in (f"{folder}/._b_1_leftImg8bit.png", "leftImg8bit/train/.DS_Store"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    found = find(tmp_path, "train")
    assert found == [tuple(tmp_path / path for path in LAYOUTS["cityscapes"])]


def test_counting_classes_and_median_frequency(tmp_path: Path) -> None:
    for number, row in enumerate([[0, 0, 0, 3], [0, 0, 9, 9]]):
        write_blank(tmp_path, f"images/{number}.png")
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(np.array([row] * 6, np.uint8).repeat(2, 1)).save(tmp_path / "labels" / f"{number}.png")
    counts = SegmentationFolder(tmp_path).label_counts(range(2))
    assert counts[str(tmp_path / "labels" / "1.png")] == {0: 24, 9: 24}
    assert labels.count_classes(counts, {}, class_map("folder", None, 9)) == 4
    # Class 0: 60 of 72 valid pixels, class 3: 12 of the 48 of its image.
    weights = labels.median_frequency_weights(counts, class_map("folder", 4, 9))
    median = (60 / 72 + 12 / 48) / 2
    assert weights.tolist() == pytest.approx([median / (60 / 72), 1, 1, median / (12 / 48)])


def test_values_of_every_kind_of_label_map_are_counted(tmp_path: Path) -> None:
    values = np.array([[0, 1, 1], [3, 3, 3]], np.uint8)
    grey, palette = Image.fromarray(values), Image.fromarray(values)
    palette.putpalette(bytes(range(255, 243, -1)))
    wide, signed = Image.fromarray(values * np.uint16(20000)), Image.fromarray(values * np.int32(-70000))
    bits = Image.fromarray(values > 1)
    wanted = [{0: 1, 1: 2, 3: 3}] * 2 + [{0: 1, 20000: 2, 60000: 3}, {0: 1, -70000: 2, -210000: 3}, {0: 3, 1: 3}]
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number, image in enumerate((grey, palette, wide, signed, bits)):
        for part in ("images", "labels"):
            image.save(tmp_path / part / f"{number}.tif")
    assert list(SegmentationFolder(tmp_path).label_counts(range(5)).values()) == wanted


@pytest.mark.parametrize("void", [[], [255]])
def test_train_ids_are_not_taken_for_label_ids(tmp_path: Path, void: list[int]) -> None:
    write_labels(tmp_path, list(range(10)), [*range(9, 19), *void])
    with pytest.raises(
        ValueError, match=rf"train ids \(values 0, 1, .*, {[18, *void][-1]}\), wanted label ids, or data"
    ):
        NamedDataset("cityscapes", tmp_path)
    assert len(find(tmp_path, "train")) == 2


def test_255_is_no_label_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train ids \(values 7, 8, 11, 255\)"):
        NamedDataset("cityscapes", write_labels(tmp_path, [7, 8, 11, 255]))


def test_train_ids_are_known_by_their_names(tmp_path: Path) -> None:
    write_blank(tmp_path, "images/a_leftImg8bit.png", "labels/a_gtFine_labelTrainIds.png")
    with pytest.raises(ValueError, match="train ids"):
        NamedDataset("cityscapes", tmp_path)


@pytest.mark.parametrize("values", [[7, 8, 11], [0, 7, 7, 8], [1, 2, 3, 21], [4]])
def test_label_ids_are_not_taken_for_train_ids(tmp_path: Path, values: list[int]) -> None:
    assert len(NamedDataset("cityscapes", write_labels(tmp_path, values))) == 1


def test_items_of_a_named_data_set(tmp_path: Path) -> None:
    write_blank(tmp_path, "images/a.png", "labels/a.png")
    values = np.array([[7, 8, 0, 33], [26, 6, 11, 1]], np.uint8)
    Image.fromarray(np.full((2, 4, 3), 51, np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(values).save(tmp_path / "labels" / "a.png")
    data = NamedDataset("cityscapes", tmp_path)
    image, labels = data[0]
    assert len(data) == 1
    assert image.shape == (3, 2, 4)
    assert image.unique().tolist() == pytest.approx([0.2])
    assert labels.tolist() == [[0, 1, VOID, 18], [13, VOID, 2, VOID]]
    assert NamedDataset("cityscapes", tmp_path, size=(1, 2))[0][1].shape == (1, 2)
    assert data.digest(0) != NamedDataset("cityscapes", tmp_path, size=(1, 2)).digest(0)
    with pytest.raises(ValueError, match=r"a\.png has the label 33 at row 0, column 3"):
        NamedDataset("voc", tmp_path)[0]
    with pytest.raises(ValueError, match="dataset is 'folder', wanted one of camvid, voc, cityscapes, ade20k"):
        NamedDataset("folder", tmp_path)


def test_the_val_split_of_a_publishers_folder_is_evaluated(tmp_path: Path) -> None:
    write_blank(tmp_path, "train/a.png", "trainannot/a.png", "val/b.png", "valannot/b.png")
    assert [path.name for path in NamedDataset("camvid", str(tmp_path)).images] == ["b.png"]
    assert [path.name for path in NamedDataset("camvid", tmp_path, "train").images] == ["a.png"]
