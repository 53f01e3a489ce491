"""torchvision's and Hugging Face's data sets, in ``evaluate`` and ``train``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import eroseg_ext

vision = pytest.importorskip("torchvision")
v2 = pytest.importorskip("torchvision.transforms.v2")
hugging = pytest.importorskip("datasets")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (24, 32)


def pictures(count: int, values: list[int]) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Noise, with label maps of these values in which each of them occurs."""
    random = np.random.default_rng(0)
    for _ in range(count):
        labels = random.permutation(np.resize(np.array(values, np.uint8), SIZE[0] * SIZE[1])).reshape(SIZE)
        yield Image.fromarray(random.integers(0, 256, (*SIZE, 3), np.uint8)), Image.fromarray(labels)


def save(root: Path, pair: tuple[Image.Image, Image.Image], *paths: str) -> None:
    for image, path in zip(pair, paths, strict=True):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / path)


def check(data: Any, classes: int, labelled: int, **settings: Any) -> eroseg_ext.Evaluation:
    """An evaluation finds all pixels and so many classes; the attack lowers the accuracy."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, classes, 1)
    nn.init.normal_(model.weight, std=5)
    found = eroseg_ext.evaluate(model, data, attacks=["pgd"], steps=3, sanity=0, eps=16 / 255, **settings)
    assert len(found.images) == len(data)
    assert sum(iou is not None for iou in found.clean.iou) == labelled
    assert found.rows[0].scores.aacc < found.clean.aacc
    return found


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    names = []
    for number, (image, labels) in enumerate(pictures(2, [0, 1, 20, 255])):
        labels.putpalette(bytes(range(256)) * 3)
        save(root, (image, labels), f"JPEGImages/{number}.jpg", f"SegmentationClass/{number}.png")
        names.append(str(number))
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
    return tmp_path


def transformed(voc: Path) -> Any:
    """VOC as tensors: images float32 in [0, 1], and labels."""
    to_float = v2.ToDtype({vision.tv_tensors.Image: torch.float32, "others": None}, scale=True)
    data = vision.datasets.VOCSegmentation(voc, image_set="val", transforms=v2.Compose([v2.ToImage(), to_float]))
    return vision.datasets.wrap_dataset_for_transforms_v2(data)


@pytest.mark.works("loader", "torchvision VOCSegmentation", "as it is, without a transform: `evaluate(model, data)`")
def test_voc(voc: Path) -> None:
    plain = vision.datasets.VOCSegmentation(voc, image_set="val")
    found = check(plain, 21, 3)
    assert check(transformed(voc), 21, 3).rows == found.rows
    folder = check(eroseg_ext.data.NamedDataset("voc", voc / "VOCdevkit" / "VOC2012"), 21, 3)
    assert folder.rows == found.rows


@pytest.mark.works("loader", "torchvision Cityscapes", 'label ids: `evaluate(model, data, dataset="cityscapes")`')
def test_cityscapes(tmp_path: Path) -> None:
    stem = "val/bonn/bonn_0"
    save(
        tmp_path,
        *pictures(1, [0, 7, 8, 33]),
        f"leftImg8bit/{stem}_leftImg8bit.png",
        f"gtFine/{stem}_gtFine_labelIds.png",
    )
    data = vision.datasets.Cityscapes(tmp_path, split="val", mode="fine", target_type="semantic")
    found = check(data, 19, 3, dataset="cityscapes")
    folder = eroseg_ext.data.NamedDataset("cityscapes", tmp_path)
    assert check(folder, 19, 3).rows == found.rows


@pytest.mark.works("loader", "torchvision OxfordIIITPet", "trimaps: `evaluate(model, data, reduce_zero_label=True)`")
def test_pets(tmp_path: Path) -> None:
    root, lines = tmp_path / "oxford-iiit-pet", []
    for number, pair in enumerate(pictures(2, [1, 2, 3])):
        save(root, pair, f"images/cat_{number}.jpg", f"annotations/trimaps/cat_{number}.png")
        lines.append(f"cat_{number} 1 1 1")
    (root / "annotations" / "test.txt").write_text("\n".join(lines))
    data = vision.datasets.OxfordIIITPet(tmp_path, split="test", target_types="segmentation")
    check(data, 3, 3, reduce_zero_label=True)


@pytest.fixture
def scenes() -> Any:
    """With ADE20K's columns and label maps, as ``scene_parse_150`` has them."""
    pairs = [*pictures(2, [0, 1, 2, 150])]
    columns = {"image": [image for image, _ in pairs], "annotation": [labels for _, labels in pairs]}
    features = hugging.Features(
        {"image": hugging.Image(), "annotation": hugging.Image(), "scene_category": hugging.Value("int64")}
    )
    return hugging.Dataset.from_dict(columns | {"scene_category": [3, 4]}, features=features)


@pytest.mark.works(
    "loader",
    "Hugging Face datasets",
    'columns of images, also in torch or NumPy format: `evaluate(model, data, dataset="ade20k")`',
)
def test_hugging_face(scenes: Any) -> None:
    found = check(scenes, 150, 3, dataset="ade20k")
    for form in ("torch", "numpy"):
        assert check(scenes.with_format(form), 150, 3, dataset="ade20k").rows == found.rows
    split = hugging.DatasetDict(validation=scenes)
    with pytest.raises(TypeError, match="data is a DatasetDict with 'validation', wanted one split of it"):
        check(split, 150, 3)


@pytest.mark.works("loader", "torch DataLoader", "its data set and its sampler's images: `evaluate(model, loader)`")
def test_data_loader(voc: Path) -> None:
    data = transformed(voc)
    loader = DataLoader(data, batch_size=2, shuffle=True)
    assert len(next(iter(loader))) == 2
    torch.manual_seed(0)
    model = nn.Conv2d(3, 21, 1)
    found = [eroseg_ext.evaluate(model, x, attacks=["pgd"], steps=1, sanity=0).rows for x in (loader, data)]
    assert found[0] == found[1]


@pytest.mark.works("training", "torchvision or Hugging Face data", '`train(model, data=data, val=data, out="runs/x")`')
@pytest.mark.parametrize("source", ["torchvision", "hugging face"])
def test_training(voc: Path, scenes: Any, source: str, tmp_path: Path) -> None:
    data, settings = scenes, {"dataset": "ade20k"}
    if source == "torchvision":
        data, settings = vision.datasets.VOCSegmentation(voc, image_set="train"), {"dataset": "voc"}
    more: dict[str, Any] = {"epochs": 1, "batch_size": 2, "attack_steps": 1, "val_attack_steps": 1, "size": (16, 16)}
    summary = eroseg_ext.train(
        "tiny", data=data, val=data, out=tmp_path / "out", say=lambda _: None, **settings, **more
    )
    assert summary["classes"] == {"torchvision": 21, "hugging face": 150}[source]
    assert 0 <= summary["validation"]["miou"] <= 100


@pytest.mark.works(
    "training",
    "torchvision models with auxiliary heads",
    '`train(model, auxiliary_weight=0.4, lr_mult={"backbone": 0.1})`',
)
def test_training_of_auxiliary_heads(voc: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 21, "aux_loss": True}
    model = vision.models.segmentation.deeplabv3_mobilenet_v3_large(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _train(model, voc, tmp_path, auxiliary_weight=0.4, lr_mult={"backbone": 0.0})
    after = model.state_dict()
    for name in ("aux_classifier.4.weight", "classifier.4.weight"):
        assert not torch.equal(after[name], before[name])
    assert torch.equal(after["backbone.0.0.weight"], before["backbone.0.0.weight"])


@pytest.mark.works(
    "training",
    "losses of segmentation_models_pytorch",
    '`train(model, loss="segmentation_models_pytorch.losses:DiceLoss", loss_args=...)`, see [Training](train.md)',
)
@pytest.mark.parametrize("loss", ["DiceLoss", "LovaszLoss", "FocalLoss"])
def test_training_with_a_loss(voc: Path, tmp_path: Path, loss: str) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    args = {"mode": "multiclass", "ignore_index": -1}
    _train("tiny", voc, tmp_path, loss=f"segmentation_models_pytorch.losses:{loss}", loss_args=args)


def _train(model: Any, voc: Path, out: Path, **settings: Any) -> None:
    """Trains for two updates whose losses are finite."""
    data = vision.datasets.VOCSegmentation(voc, image_set="train")
    shared: dict[str, Any] = {"dataset": "voc", "epochs": 1, "batch_size": 2, "attack_steps": 1, "size": (48, 64)}
    eroseg_ext.train(model, data=data, out=out, say=lambda _: None, log_every=1, **shared, **settings)
    losses = [line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())]
    assert len(losses) >= 1
    assert all(map(math.isfinite, losses))
