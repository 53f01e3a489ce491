"""Adversarial images of 8 bits: attacked, written, and evaluated for another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOID, Pixelwise
from folders import write_folder
from PIL import Image
from torch import Tensor, nn

from eroseg_ext import attack, evaluate, save_adversarial, strong_attack
from eroseg_ext.cli import main
from eroseg_ext.models.small_deeplab import SmallDeepLab

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 4 / 255


@pytest.fixture
def eight_bits(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return (batch[0] * 255).round() / 255, batch[1]


@pytest.mark.parametrize("call", [attack, strong_attack])
@pytest.mark.parametrize(
    ("norm", "eps", "clip"),
    [("linf", EPS, (0.0, 1.0)), ("linf", 2.6 / 255, (0.0, 1.0)), ("l2", 1.0, (0.0, 1.0)), ("linf", 4.0, (0.0, 255.0))],
)
def test_quantized_images_are_255ths_in_the_ball(
    pixelwise: nn.Module, eight_bits: tuple[Tensor, Tensor], call: Any, norm: str, eps: float, clip: tuple[float, float]
) -> None:
    images, labels = eight_bits
    images = images * clip[1]
    found = call(pixelwise, images, labels, quantize=True, norm=norm, eps=eps, clip=clip, steps=4)
    levels, clean = ((x * (255 / clip[1])).round().int() for x in (found, images))
    assert torch.equal(found, levels.to(found) * clip[1] / 255)
    assert levels.amin() >= 0
    assert levels.amax() <= 255
    moved = (levels - clean).double() * clip[1] / 255
    farthest = moved.abs().max() if norm == "linf" else moved.flatten(1).norm(dim=1).max()
    assert 0.5 * eps < farthest <= eps + 1e-9


def test_what_is_counted_are_the_quantized_images(pixelwise: nn.Module, eight_bits: tuple[Tensor, Tensor]) -> None:
    images, labels = eight_bits
    found, info = attack(pixelwise, images, labels, quantize=True, eps=EPS, steps=3, keep="best", return_info=True)
    correct = ((pixelwise(found).argmax(1) == labels) & (labels != VOID)).sum((1, 2))
    assert info.correct.tolist() == correct.tolist()


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (lambda x: x * 0.999, {}, r"images has values between the 255ths of .*, wanted 8-bit images"),
        (lambda x: x.half(), {}, r"images is torch.float16, wanted float32 since quantize is True"),
        (lambda x: x, {"eps": 0.5 / 255}, r"eps is 0.00196.*, wanted 0, or at least a 255th .* quantize is True"),
        (lambda x: x, {"quantize": 1}, r"quantize is 1, wanted True or False"),
    ],
)
def test_what_cannot_be_quantized_is_named(
    pixelwise: nn.Module, eight_bits: tuple[Tensor, Tensor], change: Any, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        attack(pixelwise, change(eight_bits[0]), eight_bits[1], **{"quantize": True, **settings})


@pytest.mark.parametrize("quantize", [True, False])
def test_written_images_are_in_the_ball(
    pixelwise: nn.Module, eight_bits: tuple[Tensor, Tensor], tmp_path: Path, quantize: bool
) -> None:
    images, labels = eight_bits
    settings: dict[str, Any] = {"eps": EPS, "steps": 3, "method": "pgd", "quantize": quantize}
    adversarial = attack(pixelwise, images, labels, **settings)
    paths = save_adversarial(tmp_path, adversarial, images, **settings)
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    for path, clean, wanted in zip(paths, images, adversarial, strict=True):
        written = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).int()
        assert (written - (clean.cpu() * 255).round().int()).abs().max() == 4
        assert (written - wanted.cpu() * 255).abs().max() < (1e-3 if quantize else 1)
    about = json.loads((tmp_path / "attack.json").read_text())
    assert (about["method"], about["eps"], about["steps"], about["norm"]) == ("pgd", EPS, 3, "linf")
    assert not list(tmp_path.glob("*.part"))


def test_images_outside_the_ball_are_not_written(eight_bits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, _ = eight_bits
    beyond = images.clone()
    beyond[1] = 1 - beyond[1]
    with pytest.raises(ValueError, match=r"images\[1\] \(b\) is further than eps=0.0156863 \(linf\) from clean"):
        save_adversarial(tmp_path / "x", beyond, images, names=["a", "b", "c"], eps=EPS)
    with pytest.raises(ValueError, match=r"names has 3 names, 2 different, wanted 3"):
        save_adversarial(tmp_path / "x", images, images, names=["a", "b", "a"], eps=EPS)
    assert not (tmp_path / "x").exists()


class Other(Pixelwise):
    """Another model that answers alike."""

    def __init__(self) -> None:
        super().__init__()
        self.gain *= 0.9


def test_transfer_to_another_model(pixelwise: nn.Module, eight_bits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = eight_bits
    other = Other().to(images.device)
    adversarial = attack(pixelwise, images, labels, quantize=True, eps=EPS, steps=5)
    save_adversarial(tmp_path / "saved", adversarial, images, quantize=True, eps=EPS, steps=5)
    data = [*zip(images.cpu(), labels.cpu(), strict=True)]
    found = evaluate(other, data, adversarial=tmp_path / "saved", out=tmp_path / "out")
    valid = labels != VOID
    assert found.rows[0].attack == "saved eroseg"
    assert found.rows[0].eps == pytest.approx(EPS)
    accuracy = 100 * float((other(adversarial).argmax(1) == labels)[valid].double().mean())
    assert found.rows[0].scores.aacc == pytest.approx(accuracy)
    assert found.rows[0].scores.aacc < found.clean.aacc
    # Other images under the same names are evaluated anew.
    save_adversarial(tmp_path / "saved", images, images, eps=EPS)
    again = evaluate(other, data, adversarial=tmp_path / "saved", out=tmp_path / "out")
    assert again.rows[0].scores == found.clean


def test_saved_images_that_are_not_the_datas_are_named(
    pixelwise: nn.Module, eight_bits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    images, labels = eight_bits
    with pytest.raises(OSError, match=r"attack\.json"):
        evaluate(pixelwise, [(images[0].cpu(), labels[0].cpu())], adversarial=tmp_path)
    save_adversarial(tmp_path, images[:2], images[:2], eps=EPS)
    pairs = [*zip(images.cpu(), labels.cpu(), strict=True)]
    with pytest.raises(ValueError, match=r"000002\.png is missing, wanted an adversarial image for each image"):
        evaluate(pixelwise, pairs, adversarial=tmp_path)
    with pytest.raises(
        ValueError, match=r"000000\.png is further than its eps=0.0156863 \(linf\) from its clean image"
    ):
        evaluate(pixelwise, pairs[1::-1], adversarial=tmp_path)
    with pytest.raises(ValueError, match=r"000000\.png is an image \[3, 20, 24\], wanted \[3, 8, 8\].*: size must be"):
        evaluate(pixelwise, pairs[:2], adversarial=tmp_path, size=(8, 8))


def test_the_command_writes_what_evaluate_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "data", 3)
    torch.manual_seed(0)
    torch.save(SmallDeepLab(8, width=4).state_dict(), tmp_path / "weights.pt")
    shared = ["--data", str(tmp_path / "data"), "--weights", str(tmp_path / "weights.pt"), "--size", "24x32"]
    shared += ["--device", "cpu"]
    more = ["--method", "pgd", "--eps", "2/255", "--steps", "2", "--batch-size", "2", "--options", '{"keep": "best"}']
    assert main.main(["attack", *shared, *more, "--out", str(tmp_path / "saved")]) == 0
    assert "3 images and attack.json are in" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "saved").glob("*.png")) == ["00.png", "01.png", "02.png"]
    code = main.main(["evaluate", *shared, "--adversarial", str(tmp_path / "saved"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "saved pgd" in printed.out
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [round(row["eps"] * 255, 3) for row in result["rows"]] == [2.0]
    assert main.main(["attack", *shared, "--eps", "0.1/255", "--out", str(tmp_path / "x")]) == 2
    assert "eps is 0.00039" in capsys.readouterr().err
