"""Sliding windows: the logits and gradients of mmsegmentation's mode "slide", with one window's graph at a time."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_common import Batch, Counted, MakeNet, run, seeded
from conftest import CLASSES, VOID
from evaluation_common import QUICK, Pairs
from folders import write_evaluated
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eroseg_ext import TrainSettings, evaluate, strong_attack
from eroseg_ext.cli import main
from eroseg_ext.evaluation import sanity
from eroseg_ext.models.adapter import Logits

pytestmark = pytest.mark.usefixtures("one_thread")


def slid(
    model: Callable[[Tensor], Tensor], images: Tensor, window: Any, stride: Any, align_corners: bool = False
) -> Tensor:
    """Mode "slide" by its definition, with all windows in one graph."""
    (height, width), (high, wide) = images.shape[-2:], window
    total, count = torch.zeros(()), torch.zeros(())
    for down in range(-(-max(height - high, 0) // stride[0]) + 1):
        for right in range(-(-max(width - wide, 0) // stride[1]) + 1):
            bottom, side = min(down * stride[0] + high, height), min(right * stride[1] + wide, width)
            top, left = max(bottom - high, 0), max(side - wide, 0)
            part = images[:, :, top:bottom, left:side]
            logits = F.interpolate(model(part), part.shape[-2:], mode="bilinear", align_corners=align_corners)
            border = (left, width - side, top, height - bottom)
            total = total + F.pad(logits, border)
            count = count + F.pad(torch.ones_like(logits), border)
    return total / count


def both(found: Callable[[Tensor], Tensor], images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a weighted sum of them with respect to the images."""
    leaf = images.clone().requires_grad_()
    torch.manual_seed(seed)
    logits = found(leaf)
    weight = torch.randn(logits.shape, generator=seeded(), dtype=torch.float64).to(logits)
    return logits.detach(), torch.autograd.grad(logits, leaf, weight)[0]


def of_size(images: Tensor, **settings: Any) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    size = (images.shape[-2], images.shape[-1])
    return lambda model: lambda given: Logits(model, **settings)(given, size).at(size)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((20, 24), (8, 12), (8, 12)),
        ((20, 24), (8, 12), (4, 6)),
        ((21, 23), (9, 11), (5, 8)),
        ((17, 40), (32, 16), (32, 9)),
        ((9, 33), (9, 11), (1, 11)),
        ((12, 13), (16, 16), (16, 16)),
        ((7, 5), (3, 2), (1, 1)),
    ],
)
def test_logits_and_gradients_are_those_of_mode_slide(
    make_net: MakeNet, device: torch.device, size: Any, window: Any, stride: Any, align_corners: bool
) -> None:
    model = make_net(stride=2).double().eval()
    images = torch.rand(2, 3, *size, dtype=torch.float64, generator=seeded()).to(device)
    ours = of_size(images, window=window, stride=stride, align_corners=align_corners)(model)
    logits, gradient = both(ours, images)
    wanted, wanted_gradient = both(lambda given: slid(model, given, window, stride, align_corners), images)
    # Logits of up to 20, and their gradient, are float32.
    torch.testing.assert_close((logits.double(), gradient), (wanted, wanted_gradient), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(8, (6, 6)), ((8, 12), (6, 9)), ((1, 2), (1, 1))])
def test_default_stride_is_3_quarters_of_the_window(make_net: MakeNet, batch: Batch, window: Any, stride: Any) -> None:
    model, images = make_net().eval(), batch[0]
    default = of_size(images, window=window)(model)(images)
    assert torch.equal(default, of_size(images, window=window, stride=stride)(model)(images))


@pytest.mark.parametrize("reading", [{"output_key": "fine"}, {"output_key": "p", "output": "probabilities"}], ids=str)
def test_what_a_model_does_to_its_output_and_input(make_net: MakeNet, batch: Batch, reading: dict[str, str]) -> None:
    """Upsampling by itself, one output of several, probabilities, normalised input, and writing to the input."""
    net, images = make_net(stride=2).eval().requires_grad_(False), batch[0]
    settings: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "window": (8, 11), "stride": (5, 7)}
    mean, std = (images.new_tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))

    def model(given: Tensor) -> dict[str, Tensor]:
        logits = net(given.mul_(1.0))
        return {"fine": F.interpolate(logits, given.shape[-2:], mode="bilinear"), "p": logits.softmax(1)}

    def in_units(given: Tensor) -> Tensor:
        logits = net((given - mean) / std)
        return logits.log_softmax(1) if "output" in reading else logits

    found = both(of_size(images, **settings, **reading)(model), images)  # type: ignore[arg-type]
    wanted = both(lambda given: slid(in_units, given, (8, 11), (5, 7)), images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def test_a_backward_pass_draws_the_random_numbers_of_the_forward_pass(net: nn.Module, batch: Batch) -> None:
    net.train()
    net[1].eval()
    ours = of_size(batch[0], window=(8, 10), stride=(6, 7))(net)
    found = both(ours, batch[0])
    after = torch.rand(1)
    wanted = both(lambda given: slid(net, given, (8, 10), (6, 7)), batch[0])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.rand(1), after)
    other = both(ours, batch[0], seed=1)
    assert not torch.allclose(other[1], found[1])


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(net: nn.Module, batch: Batch, inside: bool) -> None:
    net.eval()
    kind, low = batch[0].device.type, torch.bfloat16

    def wanted(images: Tensor) -> Tensor:
        with torch.autocast(kind, low):
            logits = slid(net, images, (8, 12), (6, 9))
        return logits.float()

    ours = of_size(batch[0], window=(8, 12), autocast=low if inside else None)(net)

    def found(images: Tensor) -> Tensor:
        with contextlib.nullcontext() if inside else torch.autocast(kind, low):
            logits = ours(images)
        assert logits.dtype == torch.float32
        return logits

    torch.testing.assert_close(both(found, batch[0]), both(wanted, batch[0]), rtol=0.03, atol=0.03)
    exact = both(lambda images: slid(net, images, (8, 12), (6, 9)), batch[0])
    assert not torch.allclose(both(found, batch[0])[1], exact[1], rtol=1e-4, atol=1e-4)


class Saving(nn.Module):
    """Counts the bytes that passes through a model hold for their backward passes, and the most of them at a time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.held = self.most = 0

    def forward(self, images: Tensor) -> Tensor:
        class Held:
            def __init__(self, value: Tensor) -> None:
                self.value = value

        def pack(value: Tensor) -> Held:
            held, size = Held(value), value.numel() * value.element_size()
            self.add(size)
            weakref.finalize(held, self.add, -size)
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.value):
            return self.model(images)

    def add(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)


def test_one_window_is_in_memory_at_a_time(net: nn.Module) -> None:
    images, window = torch.rand(1, 3, 50, 61, device=next(net.parameters()).device), (10, 12)
    net.requires_grad_(False)
    most = {}
    for name, settings, given in (
        ("windows", {"window": window}, images),
        ("one window", {}, images[:, :, :10, :12]),
        ("whole", {}, images),
    ):
        model = Saving(net.eval())
        both(of_size(given, **settings)(model), given)
        assert model.held == 0
        most[name] = model.most
    assert most["windows"] == most["one window"]
    assert most["whole"] > 20 * most["windows"]


def test_a_model_is_run_twice_a_window(net: nn.Module, batch: Batch) -> None:
    model = Counted(net.eval())
    images = batch[0]
    logits = of_size(images, window=(10, 24), stride=(5, 24))(model)
    with torch.no_grad():
        logits(images)
    assert model.calls == 3
    both(logits, images)
    assert model.calls == 3 + 6
    # An image that fits into a window is one pass, whose logits are not upsampled.
    small = Logits(make_low().to(images.device), window=24)(images, (20, 24)).values
    assert small.shape[-2:] == (10, 12)


def make_low() -> nn.Module:
    return nn.Conv2d(3, CLASSES, 2, stride=2)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_in_a_model(make_net: MakeNet, batch: Batch, reentrant: bool) -> None:
    net = make_net().eval()

    class Checkpointed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return checkpoint(net, images, use_reentrant=reentrant)

    found = run(Checkpointed(), batch, window=(9, 10))
    assert torch.equal(found, run(net, batch, window=(9, 10)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "cospgd"},
        {"micro_batch": 1},
        {"keep": "best", "restarts": 2},
        {"early_stop": True},
        {"norm": "l2", "eps": 0.5},
    ],
    ids=str,
)
def test_attacks(make_net: MakeNet, batch: Batch, settings: dict[str, Any]) -> None:
    """They are those of a model that slides by itself."""
    net = make_net(stride=2).eval()

    class Slides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            return slid(self.net, images, (8, 11), (6, 8))

    model = Slides()
    found = run(net, batch, window=(8, 11), **settings)
    wanted = run(model, batch, **settings)
    assert ((found - wanted).abs() > 1e-5).float().mean() < 0.01  # signs of gradients that rounding makes 0
    assert (found - run(net, batch, **settings)).abs().max() > 1e-3


def test_strong_attack_and_predicted_labels(net: nn.Module, batch: Batch) -> None:
    found = strong_attack(net, batch[0], steps=4, window=[8, 12])  # type: ignore[arg-type]
    assert (found - batch[0]).abs().max() > 0
    size = tuple(batch[0].shape[-2:])
    with torch.no_grad():
        labels = Logits(net.eval(), window=(8, 12))(batch[0], size).at(size).argmax(1)
    assert torch.equal(found, strong_attack(net, batch[0], labels, steps=4, window=(8, 12)))


def test_a_model_without_a_gradient_is_told_of(batch: Batch) -> None:
    def model(images: Tensor) -> Tensor:
        return 4 * images.detach()[:, :1].repeat(1, CLASSES, 1, 1)

    with pytest.raises(ValueError, match="the model's logits do not depend on images by autograd"):
        run(model, batch, window=8)


def test_a_function_of_a_module_is_warned_of_as_without_windows(batch: Batch) -> None:
    weight = nn.Parameter(torch.randn(CLASSES, 3, 1, 1, device=batch[0].device))

    class Hidden:
        __slots__ = ("weight",)

    hidden = Hidden()
    hidden.weight = weight  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="the nn.Module of its parameters was not found"):
        run(lambda images: F.conv2d(images, hidden.weight), batch, window=8)  # type: ignore[attr-defined]
    assert weight.grad is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"window": 0}, r"^window is 0, wanted an integer >= 1$"),
    ({"window": True}, r"^window is True, wanted an integer >= 1$"),
    ({"window": (8, 0)}, r"^window is \(8, 0\), wanted \(height, width\), both at least 1$"),
    ({"window": (8, 8, 8)}, r"^window is \(8, 8, 8\), wanted \(height, width\), both at least 1$"),
    ({"window": 8, "stride": 2.5}, r"^stride is 2.5, wanted an integer >= 1$"),
    ({"window": 8, "stride": 9}, r"^stride is 9, wanted at most window = 8, as pixels between windows would have no"),
    ({"window": (8, 16), "stride": 9}, r"^stride is 9, wanted at most window = \(8, 16\)"),
    ({"stride": 8}, r"^stride is 8, wanted None without window$"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_wrong_windows(net: nn.Module, batch: Batch, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(net, batch, **settings)
    with pytest.raises(ValueError, match=message):
        evaluate(net, Pairs(*batch), **settings)


def test_what_does_not_go_with_windows(net: nn.Module, batch: Batch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^graph is True, wanted False beside window$"):
        run(net, batch, graph=True, window=8)
    volumes, labels = torch.rand(1, 2, 3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^window is 8, wanted None for volumes, images of shape \[1, 2, 3, 8, 8\]$"):
        run(nn.Conv3d(2, CLASSES, 1), (volumes, labels), window=8)
    for name in ("window", "stride"):
        message = f"^attack_options is '{name}', wanted none of what training fixes$"
        with pytest.raises(ValueError, match=message):
            TrainSettings(
                data=tmp_path,
                out=tmp_path,
                attack_options={"window": 8, "stride": 4} if name == "window" else {name: 8},
            )


@pytest.fixture
def several_sizes(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    images, labels = batch[0].cpu(), batch[1].cpu()
    return [
        (images[0], labels[0]),
        (images[1], labels[1]),
        (images[0, :, :7], labels[0, :7]),
        (images[1, :, 3:18, 2:13], labels[1, 3:18, 2:13]),
    ]


def test_evaluation_of_images_of_several_sizes(
    make_net: MakeNet, several_sizes: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    net = make_net(stride=2).eval()
    device = next(net.parameters()).device
    settings = {"window": (8, 12), "stride": (6, 12), "attacks": ["pgd"]}
    result = evaluate(net, several_sizes, out=tmp_path, **QUICK, **settings)
    hits = dict.fromkeys(("clean", "pgd"), 0)
    valid = sum(int((labels != VOID).sum()) for _, labels in several_sizes)
    for number, (image, labels) in enumerate(several_sizes):
        pixels, wanted = image[None].to(device), labels[None].to(device)
        for name in hits:
            if name == "pgd":
                given = {"method": "pgd", "eps": QUICK["eps"], "steps": QUICK["steps"], "indices": [number]}
                pixels = strong_attack(net, pixels, wanted, window=(8, 12), stride=(6, 12), **given)
            with torch.no_grad():
                logits = slid(net, pixels, (8, 12), (6, 12))
            hits[name] += int(((logits.argmax(1) == wanted) & (wanted != VOID)).sum())
    assert result.clean.aacc == pytest.approx(100 * hits["clean"] / valid)
    assert result.rows[0].scores.aacc == pytest.approx(100 * hits["pgd"] / valid, abs=100 / valid)
    assert result.as_json()["settings"]["window"] == [8, 12]


def test_labels_of_another_size_than_the_images(make_net: MakeNet, batch: Batch) -> None:
    net, images = make_net(stride=2).eval(), batch[0]
    labels = torch.randint(CLASSES, (len(images), 31, 33), generator=seeded())
    settings = {"window": (8, 12), "align_corners": True, "attacks": ["pgd"]}
    found = evaluate(net, Pairs(images.cpu(), labels), own_label_size=True, **QUICK, **settings)
    with torch.no_grad():
        logits = slid(net, images, (8, 12), (6, 9), align_corners=True)
        predicted = F.interpolate(logits, (31, 33), mode="bilinear", align_corners=True).argmax(1).cpu()
    assert found.clean.aacc == pytest.approx(100 * float((predicted == labels).double().mean()), abs=0.1)
    assert found.rows[0].scores.aacc < found.clean.aacc


def test_kept_results_are_of_the_same_windows(net: nn.Module, batch: Batch, tmp_path: Path) -> None:
    """Also those of images that fit into either window, whose logits are the same."""
    model = Counted(net)
    pairs = Pairs(batch[0].cpu(), batch[1].cpu())
    settings = {**QUICK, "attacks": ["pgd"], "out": tmp_path}

    def passes(**windows: Any) -> int:
        model.calls = 0
        evaluate(model, pairs, **settings, **windows)
        return model.calls

    first = [passes(), passes(window=32), passes(window=16), passes(window=16, stride=16)]
    again = [passes(), passes(window=32), passes(window=16), passes(window=16, stride=16)]
    fingerprints = [3, 3, 3 * 4, 3 * 4]
    assert again == fingerprints
    assert all(before > after for before, after in zip(first, again, strict=True))


def test_sanity_checks_with_windows(net: nn.Module, batch: Batch) -> None:
    checks = sanity.check(net, *batch, eps=8 / 255, window=(8, 12), ignore_index=VOID)
    assert {check.name: check.passed for check in checks if check.name in ("deterministic", "logits", "gradients")} == {
        "deterministic": True,
        "logits": True,
        "gradients": True,
    }
    assert "could not be checked" not in " ".join(check.verdict for check in checks)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluated(tmp_path_factory.mktemp("windows"), 2, void=9)


def command(name: str, files: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", str(files / "data"), "--weights", str(files / "weights.pt"), "--out", str(out)]
    return [name, *given, "--ignore-index", "9", "--steps", "2", "--size", "32x48", "--device", "cpu", *more]


def test_commands(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attacked = tmp_path / "attacked"
    more = ["--window", "16x24", "--stride", "12", "--eps", "8/255"]
    assert main.main(command("attack", files, attacked, *more, "--seed", "3")) == 0
    about = json.loads((attacked / "attack.json").read_text())
    assert (about["window"], about["stride"]) == ([16, 24], 12)
    others = tmp_path / "others"
    assert main.main(command("attack", files, others, "--eps", "8/255", "--seed", "3")) == 0
    name = next(attacked.glob("*.png")).name
    assert not np.array_equal(*(np.array(Image.open(folder / name)) for folder in (attacked, others)))

    quick = ["--sanity", "0", "--attacks", "pgd"]
    assert main.main(command("evaluate", files, tmp_path / "windows", *more, *quick)) == 0
    assert main.main(command("evaluate", files, tmp_path / "whole", *quick)) == 0
    results = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("windows", "whole")]
    assert [result["settings"]["window"] for result in results] == [[16, 24], None]
    assert results[0]["environment"]["model"] != results[1]["environment"]["model"]  # which is of its logits

    capsys.readouterr()
    for window, sentence in (("0", "--window is 0, wanted an integer >= 1"), ("16x", "got '16x', wanted a number of")):
        assert main.main(command("evaluate", files, tmp_path / "wrong", "--window", window)) == 2
        assert sentence in capsys.readouterr().err
