"""segmentation_models_pytorch's models."""

from __future__ import annotations

from typing import Any

import pytest

from ecosystem.common import batch, check_attacks, settled
from eroseg_ext.models import semantic

smp = pytest.importorskip("segmentation_models_pytorch")

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3Plus", "Linknet", "MAnet", "PAN", "UPerNet", "Segformer")


def made(name: str, **settings: Any) -> Any:
    return getattr(smp, name)("resnet18", encoder_weights=None, **{"classes": 5, **settings})


@pytest.mark.works(
    "model", f"segmentation_models_pytorch {', '.join(MODELS)}", "as it is: `attack(model, images, labels)`"
)
@pytest.mark.parametrize("name", MODELS)
def test_models_as_they_are(name: str) -> None:
    images, labels = batch((128, 128) if name == "PAN" else (64, 64))
    check_attacks(settled(made(name), images), images, labels)


@pytest.mark.works(
    "model", "segmentation_models_pytorch, images of any size", "`attack(semantic(model, multiple_of=32), ...)`"
)
def test_images_of_any_size() -> None:
    images, labels = batch((50, 70))
    check_attacks(settled(semantic(made("Unet"), multiple_of=32), images), images, labels)


@pytest.mark.works(
    "model", "segmentation_models_pytorch with `aux_params`", "as it is; the mask comes first in its output"
)
def test_a_head_for_classification_beside_the_mask() -> None:
    check_attacks(settled(made("Unet", aux_params={"classes": 3})))


@pytest.mark.works(
    "model",
    "segmentation_models_pytorch with `activation`",
    '`attack(..., output="sigmoid")` where it is a sigmoid, also of one class; `"probabilities"` for a softmax',
)
@pytest.mark.parametrize(
    ("classes", "activation", "output"), [(1, "sigmoid", "sigmoid"), (2, "softmax2d", "probabilities")]
)
def test_an_activation(classes: int, activation: str, output: str) -> None:
    images, labels = batch(classes=2)
    check_attacks(settled(made("Unet", classes=classes, activation=activation)), images, labels, output=output)
