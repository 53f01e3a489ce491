"""What a training may have of one's own: a loss, auxiliary heads, other learning rates, binary models of one logit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folders import write_folder
from PIL import Image
from torch import Tensor, nn
from training_common import CLASSES, SMALL, AuxiliaryNet, furthest_apart, records, seeded, weights

from eroseg_ext import train
from eroseg_ext.cli import main
from eroseg_ext.training import TrainSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), 8)


def auxiliary_net() -> AuxiliaryNet:
    return seeded(lambda: AuxiliaryNet(CLASSES))


def trained(data: Path, out: Path, model: Any = None, **settings: Any) -> tuple[Any, list[float]]:
    """The model, and the loss of each update."""
    model = model or auxiliary_net()
    train(model, data=data, out=out, say=lambda _: None, **{**SMALL, "epochs": 2, "log_every": 1, **settings})
    return model, [record["loss"] for record in records(out) if "loss" in record]


def mean_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    assert logits.shape[-2:] == labels.shape[-2:]
    losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none", label_smoothing=label_smoothing)
    return (losses.sum((1, 2)) / (labels >= 0).sum((1, 2))).mean()


# A loss of one's own


def test_a_loss_is_given_full_logits_and_its_mean_is_descended(data: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"attack": "none", "epochs": 1, "scale": (1, 1)}
    whole, losses = trained(data, tmp_path / "own", loss=mean_cross_entropy, **shared)
    pieces, of_pieces = trained(data, tmp_path / "pieces", loss=mean_cross_entropy, accumulate=2, **shared)
    assert of_pieces == pytest.approx(losses, rel=1e-5)
    assert furthest_apart(whole.state_dict(), pieces.state_dict()) < 1e-4
    # These images have nearly as many valid pixels each.
    assert losses == pytest.approx(trained(data, tmp_path / "usual", **shared)[1], rel=0.02)


def test_a_loss_by_name_with_arguments(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import test_training_choices\nsmooth = test_training_choices.mean_cross_entropy\n"
    )
    monkeypatch.chdir(tmp_path)
    name = "training_common:AuxiliaryNet"
    expected = trained(data, tmp_path / "a", name, loss=lambda z, y: mean_cross_entropy(z, y, 0.3))[1]
    arguments = ["train", "--data", str(data), "--out", "b", "--model", name]
    arguments += ["--size", "24x32", "--batch-size", "4", "--epochs", "2", "--log-every", "1", "--threads", "1"]
    arguments += ["--loss", "mine.py:smooth", "--loss-args", '{"label_smoothing": 0.3}', "--device", "cpu"]
    assert main.main([*arguments, "--eps", "2/255", "--classes", str(CLASSES)]) == 0
    found = [record["loss"] for record in records(Path("b")) if "loss" in record]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[0] != pytest.approx(trained(data, tmp_path / "c", name, loss=mean_cross_entropy)[1][0], rel=1e-2)
    summary = json.loads(Path("b/summary.json").read_text())
    assert summary["settings"]["loss"] == "mine.py:smooth"


def test_a_class_of_losses_is_made_once(data: Path, tmp_path: Path) -> None:
    class Weighted(nn.Module):
        made = 0

        def __init__(self, factor: float) -> None:
            super().__init__()
            Weighted.made += 1
            self.register_buffer("factor", torch.tensor(factor))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = self.factor * mean_cross_entropy(logits, labels)
            return loss

    once = trained(data, tmp_path / "1", loss=Weighted, loss_args={"factor": 1.0}, attack="none")[1]
    thrice = trained(data, tmp_path / "3", loss=Weighted, loss_args={"factor": 3.0}, attack="none")[1]
    assert Weighted.made == 2
    assert thrice[0] == pytest.approx(3 * once[0], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(), r"loss fails on logits \[B, C, H, W\].*-1 is out of bounds"),
        (nn.CrossEntropyLoss(ignore_index=-1, reduction="none"), r"loss gives \[1, 24, 32\], wanted a scalar"),
        (lambda logits, labels: 0.0, "loss gives float, wanted a scalar tensor"),
        ("nowhere:loss", "loss is 'nowhere:loss', which cannot be imported"),
    ],
)
def test_a_loss_that_is_none_is_told_before_training(data: Path, tmp_path: Path, loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(data, tmp_path, loss=loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dice"}, "loss is 'dice', wanted package.module:callable"),
        ({"loss": "a:b", "front_loss": 2}, "front_loss is 2, wanted 0 with a loss"),
        ({"loss": "a:b", "class_weights": (1.0, 2.0)}, "class_weights is .* wanted none with a loss"),
        ({"loss_args": {"a": 1}}, "loss_args is .* wanted none without loss"),
        ({"auxiliary_weight": -1}, "auxiliary_weight is -1"),
        ({"lr_mult": {"backbone": -1}}, "lr_mult.*backbone.* is -1"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(data=Path("data"), out=Path("out"), **settings)


# Auxiliary heads


class ListNet(AuxiliaryNet):
    """The auxiliary logits first, as some networks of several resolutions give them."""

    def forward(self, images: Tensor) -> Any:
        found = super().forward(images)
        return [F.interpolate(found["aux"], images.shape[-2:], mode="bilinear"), found["out"]]


def test_auxiliary_heads_are_trained_with_a_weight(data: Path, tmp_path: Path, fused: str) -> None:
    shared: dict[str, Any] = {"attack": "none", "epochs": 1, "backend": fused}
    start = auxiliary_net().auxiliary.weight
    main_alone, losses = trained(data, tmp_path / "0", **shared)
    both, with_weight = trained(data, tmp_path / "1", auxiliary_weight=0.4, **shared)
    assert torch.equal(main_alone.auxiliary.weight, start)
    assert (both.auxiliary.weight - start).abs().max() > 1e-3
    # Both heads of an untrained network lose about as much.
    assert with_weight[0] == pytest.approx(1.4 * losses[0], rel=0.1)
    listed = ListNet(CLASSES)
    listed.load_state_dict(auxiliary_net().state_dict())
    of_list = trained(data, tmp_path / "2", listed, auxiliary_weight=0.4, output_key=1, **shared)[1]
    assert of_list == pytest.approx(with_weight, rel=1e-3)


def test_a_model_without_auxiliary_heads_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="auxiliary_weight is set, and the model's output has no further logits"):
        trained(data, tmp_path, nn.Conv2d(3, CLASSES, 1), auxiliary_weight=0.4)


# Learning rates


def test_a_part_of_the_model_learns_slower(data: Path, tmp_path: Path) -> None:
    start = auxiliary_net().state_dict()
    shared: dict[str, Any] = {"attack": "none", "epochs": 1, "optimizer": "sgd", "weight_decay": 0.0}
    usual = trained(data, tmp_path / "1", **shared)[0].state_dict()
    frozen = trained(data, tmp_path / "2", lr_mult={"body": 0, "body.0.bias": 0.5}, **shared)[0].state_dict()
    assert torch.equal(frozen["body.0.weight"], start["body.0.weight"])
    assert not torch.equal(frozen["body.0.bias"], start["body.0.bias"])
    assert not torch.equal(frozen["head.weight"], start["head.weight"])
    one = trained(data, tmp_path / "3", lr_mult={"body": 0.1}, **(shared | {"batch_size": 8}))[0].state_dict()
    whole = trained(data, tmp_path / "4", **(shared | {"batch_size": 8}))[0].state_dict()
    moved = [(state["body.0.weight"] - start["body.0.weight"]).norm() for state in (one, whole)]
    assert float(moved[0] / moved[1]) == pytest.approx(0.1, rel=0.01)
    assert furthest_apart(usual, whole) > 0


def test_a_run_with_learning_rates_goes_on(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr_mult": {"body": 0.1}, "epochs": 3}
    trained(data, tmp_path / "whole", **settings)
    model = auxiliary_net()
    calls = 0

    def stop(_: nn.Module, __: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 18:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        trained(data, tmp_path / "parts", model, **settings)
    handle.remove()
    trained(data, tmp_path / "parts", auxiliary_net(), resume=True, **settings)
    assert furthest_apart(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


def test_a_part_that_no_parameter_has_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lr_mult names 'backbone', wanted a part of .* such as 'body\.0\.weight'"):
        trained(data, tmp_path, lr_mult={"backbone": 0.1})


# One logit


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_binary_model_of_one_logit(tmp_path: Path, fused: str, backend: str) -> None:
    data = write_folder(tmp_path / "data", 8)
    for path in (data / "labels").iterdir():
        labels = Image.open(path)
        labels.point([*(int(value > 3) for value in range(255)), 255]).save(path)
    shared: dict[str, Any] = {"classes": 2, "epochs": 6, "backend": fused if backend == "fused" else backend}
    torch.manual_seed(0)
    one, two = (
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, classes, 1)) for classes in (1, 2)
    )
    with torch.no_grad():  # logits of class 0 that are 0: the same model
        two.load_state_dict(
            one.state_dict() | {"2.weight": one[2].weight.repeat(2, 1, 1, 1), "2.bias": one[2].bias.repeat(2)}
        )
        two[2].weight[0] = two[2].bias[0] = 0
    first = [trained(data, tmp_path / f"{i}", net, val=data, **shared)[1][0] for i, net in enumerate((one, two))]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    summary = json.loads((tmp_path / "0" / "summary.json").read_text())
    assert summary["validation"]["accuracy"] > 60
    assert (tmp_path / "0" / "examples.png").exists()
