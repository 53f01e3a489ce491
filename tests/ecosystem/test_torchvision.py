"""torchvision's segmentation models."""

from __future__ import annotations

from typing import Any

import pytest

from ecosystem.common import check_attacks, settled

segmentation = pytest.importorskip("torchvision.models.segmentation")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.works("model", "torchvision DeepLabV3, FCN, LR-ASPP", "as it is: `attack(model, images, labels)`")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deeplabv3_mobilenet_v3_large", {"aux_loss": True}),
        ("fcn_resnet50", {"aux_loss": True}),
        ("lraspp_mobilenet_v3_large", {}),
    ],
)
def test_models_as_they_are(name: str, settings: dict[str, Any]) -> None:
    make = getattr(segmentation, name)
    check_attacks(settled(make(weights=None, weights_backbone=None, num_classes=5, **settings)))
