"""The models of other libraries of attacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import eroseg_ext
from ecosystem.common import batch, check_attacks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def segmenter() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1))


@pytest.mark.works("model", "foolbox `PyTorchModel`", "as it is, with its preprocessing")
def test_a_model_of_foolbox(segmenter: nn.Module) -> None:
    foolbox = pytest.importorskip("foolbox")
    preprocessing = {"mean": [0.5] * 3, "std": [0.2] * 3, "axis": -3}
    model = foolbox.PyTorchModel(segmenter.eval(), bounds=(0, 1), preprocessing=preprocessing)
    check_attacks(model)
    images, labels = batch()
    given = {"steps": 2, "random_start": False}
    wanted = eroseg_ext.attack(segmenter, images, labels, mean=[0.5] * 3, std=[0.2] * 3, **given)
    assert (eroseg_ext.attack(model, images, labels, **given) == wanted).float().mean() > 0.99


@pytest.mark.works("model", "ART's estimators", "`attack(estimator.model, ..., mean=..., std=...)`")
def test_an_estimator_of_art(segmenter: nn.Module) -> None:
    classification = pytest.importorskip("art.estimators.classification")
    estimator = classification.PyTorchClassifier(segmenter, nn.CrossEntropyLoss(), (3, 64, 64), 5, clip_values=(0, 1))
    check_attacks(estimator.model)
    with pytest.raises(
        TypeError, match=r"model is a PyTorchClassifier, wanted .* callable, as its \.model is, with mean"
    ):
        eroseg_ext.attack(estimator, *batch())
