"""Models whose last operation upsamples their logits: the attack takes the logits before it, and is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import eroseg_ext
from ecosystem.common import batch, settled
from eroseg_ext.models.adapter import Logits

pytestmark = pytest.mark.usefixtures("one_thread")


def taken(model: Any, images: Tensor, **settings: Any) -> Tensor:
    with torch.no_grad():
        return Logits(model, **settings)(images, (images.shape[-2], images.shape[-1])).values


def check(model: Any, images: Tensor, labels: Tensor) -> None:
    """Of both ways: the logits before the last upsampling and those after it, and the same attack."""
    model.eval()
    low, full = taken(model, images), taken(model, images, see_through=False)
    assert low.shape[-1] < images.shape[-1]
    assert full.shape[-2:] == images.shape[-2:]
    found = []
    for see_through in (True, False):
        settings: dict[str, Any] = {"eps": 0.03, "steps": 1, "random_start": False, "see_through": see_through}
        found.append(eroseg_ext.attack(model, images, labels, return_info=True, **settings))
    (ours, info), (expected, full_info) = found
    # A gradient that is 0 but for rounding may have either sign; several steps would amplify that in a random network.
    assert ((ours - expected).abs() > 1e-6).float().mean() < 0.01
    assert torch.equal(info.stats[0, 0, :, :2], full_info.stats[0, 0, :, :2])
    accuracies = [one.correct.sum() / one.valid.sum() for one in (info, full_info)]
    assert abs(float(accuracies[0] - accuracies[1])) <= 1e-3


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_torchvision(name: str) -> None:
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    images, labels = batch()
    check(settled(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5)), images, labels)


def test_upernet_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        depths=[1] * 4,
        hidden_sizes=[16, 16, 32, 32],
        embedding_size=16,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=5
    )
    check(settled(transformers.UperNetForSemanticSegmentation(config)), *batch())


@pytest.mark.parametrize("name", ["DeepLabV3Plus", "FPN", "PAN", "PSPNet", "Segformer", "UPerNet"])
def test_segmentation_models_pytorch(name: str) -> None:
    """With align_corners=True, where a model has it."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    images, labels = batch((128, 128))
    check(settled(getattr(smp, name)("resnet18", encoder_weights=None, classes=5), images), images, labels)
