"""Training: what it leaves, what it promises about attack and backends, and how it fails."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import write_folder, write_labels
from PIL import Image
from torch import Tensor, nn
from training_common import CLASSES, SMALL, dropout_net, furthest_apart, plain_net, reader, records, seeded, weights

from eroseg_ext import AttackSettings, evaluate, train
from eroseg_ext.attacks import pgd
from eroseg_ext.cli import main
from eroseg_ext.models.loading import load_weights
from eroseg_ext.ops import backend as backends
from eroseg_ext.training import TrainingStopped, TrainSettings
from eroseg_ext.training.distributed import Processes
from eroseg_ext.training.samples import Reader, batches
from eroseg_ext.training.validate import examples, validate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), 13)


def run(data: Path, out: Path, **settings: Any) -> dict[str, Any]:
    common = {**SMALL, "model": "training_common:plain_net", "epochs": 2, "say": lambda _: None}
    return train(data=data, out=out, **{**common, **settings})


# What a run leaves


def test_a_run_from_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--data", str(data), "--val", str(data), "--out", str(tmp_path), "--model", "tiny"]
    arguments += ["--size", "24x32", "--epochs", "16", "--batch-size", "4", "--eps", "2/255", "--attack-steps", "2"]
    arguments += ["--val-every", "8", "--val-attack-steps", "3", "--log-every", "2", "--device", "cpu", "--ema", "0.8"]
    built = backends.why_not_fused(torch.device("cpu")) is None
    code = main.main([*arguments, "--compare-reference", "2"] if built else arguments)
    output = capsys.readouterr().out
    assert code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "8 classes" in output
    assert summary["settings"]["eps"] == pytest.approx(2 / 255)
    assert summary["updates"] == 48
    assert sum(summary["time"].values()) == pytest.approx(1)
    assert re.search(r"of the time: model \d+%, attack kernels \d+%, data \d+%, other \d+%", output)
    assert set(summary["validation"]) == {"miou", "accuracy", "adversarial_miou", "adversarial_accuracy"}
    assert summary["validation"]["adversarial_accuracy"] < summary["validation"]["accuracy"]
    trained = [record for record in records(tmp_path) if "loss" in record]
    assert [record["update"] for record in trained] == [n for n in range(1, 49) if n % 2 == 0 or n % 3 == 0]
    assert trained[-1]["loss"] < 0.9 * trained[0]["loss"]
    assert [record["epoch"] for record in records(tmp_path) if "miou" in record] == [8.0, 16.0]
    for name in ("curves.png", "examples.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    assert not list(tmp_path.glob("*.part"))
    if built:
        assert re.search(r"whole attack: [\d.]+ ms instead of [\d.]+ ms, [\d.]+x", output)
        assert re.search(r"whole update: [\d.]+ ms instead of [\d.]+ ms, [\d.]+x", output)


def test_the_weights_are_those_that_were_validated(data: Path, tmp_path: Path) -> None:
    model = dropout_net()
    settings = {**SMALL, "data": data, "val": data, "out": tmp_path, "epochs": 3, "ema": 0.5}
    summary = train(model, say=lambda _: None, **settings)
    averaged = dropout_net()
    averaged.load_state_dict(weights(tmp_path))
    assert furthest_apart(model.state_dict(), averaged.state_dict()) > 0
    alone = Processes(rank=0, world=1, device=torch.device("cpu"))
    assert validate(TrainSettings(**settings), averaged, CLASSES, reader(data), alone, 0) == summary["validation"]


def test_validation_takes_the_images_that_an_evaluation_takes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainSettings(**SMALL, data=data, out=tmp_path, val_images=4)
    alone, read = Processes(rank=0, world=1, device=torch.device("cpu")), reader(data)
    taken: list[str] = []

    def watched(self: Reader, index: int) -> Any:
        taken.append(self._source.name(index))
        return right(self, index)

    right = Reader.__call__
    monkeypatch.setattr(Reader, "__call__", watched)
    validate(settings, seeded(plain_net), CLASSES, read, alone, 0)
    evaluated = evaluate(seeded(plain_net), data, images=4, steps=1, attacks=["pgd"], sanity=0).images
    assert tuple(taken) == evaluated == ("00.png", "03.png", "06.png", "09.png")


def test_validation_attacks_in_the_norm_of_the_training(data: Path, tmp_path: Path) -> None:
    settings = TrainSettings(**SMALL | {"eps": 0.5}, data=data, out=tmp_path, attack_options={"norm": "l2"})
    for example in examples(settings, seeded(plain_net), reader(data), torch.device("cpu")):
        assert example.adversarial is not None
        assert 0.1 < (example.adversarial - example.image).norm() <= 0.5 + 1e-5


def test_a_module_is_trained_in_place_and_another_folder_starts_from_its_weights(data: Path, tmp_path: Path) -> None:
    model = plain_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(data, tmp_path / "one", model=model)
    assert furthest_apart(before, model.state_dict()) > 1e-3
    assert furthest_apart(weights(tmp_path / "one"), model.state_dict()) == 0
    run(data, tmp_path / "two", init=tmp_path / "one" / "weights.pt", learning_rate=0.0, weight_decay=0.0)
    assert furthest_apart(weights(tmp_path / "one"), weights(tmp_path / "two")) == 0


def test_a_checkpoint_gives_the_weights_that_its_run_saved(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "one", model="training_common:dropout_net", ema=0.5)
    start = tmp_path / "one" / "checkpoint.pt"
    model = dropout_net()
    load_weights(model, start, "dropout_net")
    assert furthest_apart(weights(tmp_path / "one"), model.state_dict()) == 0
    frozen = {"learning_rate": 0.0, "weight_decay": 0.0, "epochs": 1}
    run(data, tmp_path / "two", model="training_common:dropout_net", init=start, **frozen)
    begun = weights(tmp_path / "two")
    learned = [name for name, _ in model.named_parameters()]
    assert all(torch.equal(begun[name], model.state_dict()[name]) for name in learned)


def test_the_front_loss_reaches_the_update(data: Path, tmp_path: Path) -> None:
    for name, settings in {"default": {}, "four": {"front_loss": 4.0}, "off": {"front_loss": 0.0}}.items():
        run(data, tmp_path / name, epochs=1, model=seeded(plain_net), **settings)
    assert furthest_apart(weights(tmp_path / "default"), weights(tmp_path / "four")) == 0
    assert furthest_apart(weights(tmp_path / "default"), weights(tmp_path / "off")) > 1e-4


@pytest.mark.parametrize("front_loss", [0.0, 4.0])
def test_classes_that_weigh_nothing_teach_nothing(data: Path, tmp_path: Path, front_loss: float) -> None:
    """All weight is on a class that no pixel has."""
    model = plain_net(CLASSES + 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    class_weights = (0.0,) * CLASSES + (1.0,)
    settings = {"classes": CLASSES + 1, "class_weights": class_weights, "front_loss": front_loss, "weight_decay": 0.0}
    run(data, tmp_path, epochs=1, model=model, **settings)
    assert furthest_apart(before, model.state_dict()) == 0


def test_the_callers_random_numbers_and_threads_stay(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    run(data, tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads


# What it promises


def test_an_attack_without_budget_is_no_attack(data: Path, tmp_path: Path) -> None:
    """Nothing of the attack reaches the update but its images."""
    run(data, tmp_path / "eroseg", eps=0.0, front_loss=0.0, model=seeded(dropout_net))
    run(data, tmp_path / "none", attack="none", model=seeded(dropout_net))
    assert furthest_apart(weights(tmp_path / "eroseg"), weights(tmp_path / "none")) == 0


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_the_fraction_is_what_is_attacked(
    data: Path, tmp_path: Path, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[tuple[Tensor, Tensor, AttackSettings]] = []
    attack = pgd.Loop.run

    def watched(loop: pgd.Loop) -> tuple[Tensor, None]:
        adversarial, _ = attack(loop)
        attacked.append((loop.images, adversarial, loop.config))
        return adversarial, None

    monkeypatch.setattr(pgd.Loop, "run", watched)
    run(
        data,
        tmp_path,
        adv_fraction=fraction,
        epochs=1,
        eps=3 / 255,
        attack="cospgd",
        attack_options={"variant": "sigmoid"},
    )
    assert [len(images) for images, _, _ in attacked] == [int(4 * fraction)] * 3
    for images, adversarial, settings in attacked:
        assert 2 / 255 < (adversarial - images).abs().max() <= 3 / 255 + 1e-6
        assert (settings.method, settings.variant, settings.steps) == ("cospgd", "sigmoid", 3)


def test_accumulated_gradients_are_those_of_the_whole_batch(data: Path, tmp_path: Path) -> None:
    for pieces in (1, 2):
        run(data, tmp_path / str(pieces), accumulate=pieces, class_weights="median-frequency", optimizer="sgd")
    assert furthest_apart(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-6


@pytest.mark.parametrize("method", ["eroseg", "pgd", "cospgd"])
def test_fused_training_equals_reference_training(data: Path, tmp_path: Path, method: str, fused: str) -> None:
    """Losses of 51 updates in float32, each backend on its own. Worst seen: 5.7e-6, of eroseg.

    It holds while no sign is left to rounding: once one pixel steps the other way, the runs part as any two do whose
    weights differ in a last bit. The larger the images, the sooner that is; the next test is not subject to it.
    """
    losses = {}
    for name in (fused, "reference"):
        run(data, tmp_path / name, attack=method, epochs=17, backend=name, log_every=1, model=seeded(plain_net))
        losses[name] = [record["loss"] for record in records(tmp_path / name)]
    assert len(losses[fused]) == 51
    assert losses[fused] == pytest.approx(losses["reference"], abs=1e-4)
    assert losses[fused][-1] < losses[fused][0] - 0.1


def test_an_update_is_the_same_with_both_backends(data: Path, tmp_path: Path, fused: str, device: torch.device) -> None:
    """Each from the same state, on larger images and with BatchNorm. Worst seen over four seeds: 1.1e-5."""
    summary = run(data, tmp_path, compare_reference=12, model="tiny", size=(96, 128), device=device.type)
    losses = summary["comparison"]["losses"]
    assert len(losses[fused]) == 6
    assert losses[fused] == pytest.approx(losses["reference"], abs=1e-4)


def test_a_comparison_leaves_no_trace(data: Path, tmp_path: Path, fused: str) -> None:
    for number in (0, 2):
        run(data, tmp_path / str(number), compare_reference=number, model=seeded(dropout_net), ema=0.9)
    assert furthest_apart(weights(tmp_path / "0"), weights(tmp_path / "2")) == 0


def test_schedule(data: Path, tmp_path: Path) -> None:
    run(
        data,
        tmp_path,
        epochs=4,
        warmup_epochs=1,
        learning_rate=1.0,
        attack="none",
        optimizer="sgd",
        log_every=1,
        class_weights=(0.0,) * 7 + (1.0,),
    )
    rates = [record["learning_rate"] for record in records(tmp_path)]
    expected = [min(1, (update + 1) / 3) * (1 - update / 12) ** 0.9 for update in range(12)]
    assert rates == pytest.approx(expected)


# How it fails


def last_image(data: Path) -> Path:
    """The image that the first epoch reads last."""
    keys = list(batches(13, 4, 0, 0, 3))[-1]
    return data / "images" / f"{keys[-1].image:02}.png"


@pytest.mark.parametrize("fault", ["unreadable image", "label of another size"])
def test_a_bad_file_is_named_and_costs_no_more_than_the_last_update(tmp_path: Path, fault: str) -> None:
    data = write_folder(tmp_path / "data", 13)
    run(data, tmp_path / "good")
    image = last_image(data)
    label = data / "labels" / image.name
    victim = image if fault == "unreadable image" else label
    original = victim.read_bytes()
    if fault == "unreadable image":
        victim.write_bytes(original[: len(original) // 2])
        words = f"{re.escape(str(image))} cannot be read as an image"
    else:
        Image.fromarray(np.full((30, 56), 1, np.uint8)).save(victim)
        words = f"{re.escape(str(label))} is 56x30 pixels but its image"
    settings: dict[str, Any] = {"checkpoint_every": 1, "resume": True}
    with pytest.raises(ValueError, match=words):
        run(data, tmp_path / "out", **settings)
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["done"] == 2
    victim.write_bytes(original)
    run(data, tmp_path / "out", **settings)
    assert furthest_apart(weights(tmp_path / "good"), weights(tmp_path / "out")) == 0


def test_a_label_out_of_range_is_named_before_any_work(tmp_path: Path) -> None:
    good, bad = write_folder(tmp_path / "good", 4), write_folder(tmp_path / "bad", 4)
    label = bad / "labels" / "02.png"
    Image.fromarray(np.full((40, 56), 8, np.uint8)).save(label)
    words = f"{re.escape(str(label))} has the label 8 at row 0, column 0, wanted classes 0 to 7, or 255 for void"
    for folders in ({"data": bad}, {"data": good, "val": bad}):
        with pytest.raises(ValueError, match=words):
            run(**folders, out=tmp_path / "out")
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ([[0, 1], [1, 60000]], r"labels/1\.png has the label 60000, wanted class indices below 1000"),
        ([[0, 1], [1, 65535]], r"labels/1\.png has the label 65535, wanted class indices below 1000"),
        ([[0, 255], [255]], r"data: the labels are 0 and 255 alone, and 255 counts as void: a single class"),
        ([[3], [3]], r"data: the labels are 3 alone: a single class"),
        ([[255], [255]], r"data has no pixel with a label other than ignore_index 255"),
    ],
)
def test_labels_that_give_no_number_of_classes(tmp_path: Path, maps: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(write_labels(tmp_path / "data", *maps), tmp_path / "out", classes=None, batch_size=2)
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("maps", "val", "classes", "line"),
    [
        ([[0, 1, 250]], None, None, "data has the labels 0, 1, 250: 248 of 251 classes have no pixel to learn from"),
        ([[0, 1]], [2, 3], None, "val alone has the labels 2, 3"),
        ([[0, 255]], None, 2, "in data the labels are 0 and 255 alone, and 255 counts as void: a single class"),
        ([[0, 1]], [1, 255], 2, "in val the labels are 1 and 255 alone, and 255 counts as void: a single class"),
        ([[0, 1, 255]], [0, 1], None, None),
    ],
)
def test_suspicious_labels_are_told_before_training(
    tmp_path: Path, maps: list[list[int]], val: list[int] | None, classes: int | None, line: str | None
) -> None:
    lines: list[str] = []
    settings = {"classes": classes, "batch_size": 1, "epochs": 1, "attack": "none", "val_attack_steps": 0}
    if val is not None:
        settings["val"] = write_labels(tmp_path / "val", val)
    summary = run(write_labels(tmp_path / "data", *maps), tmp_path / "out", say=lines.append, **settings)
    assert summary["classes"] == max(max(value for value in [*maps[0], *(val or [])] if value != 255) + 1, 2)
    told = [entry for entry in lines[:4] if entry.startswith("warning: ")]
    if line is None:
        assert not told
    else:
        assert f"warning: {line}" in told


def test_a_bad_file_in_a_worker_is_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "data", 4)
    (data / "images" / "02.png").write_bytes(b"nothing")
    arguments = ["train", "--data", str(data), "--out", str(tmp_path / "out"), "--model", "tiny", "--size", "24x32"]
    assert main.main([*arguments, "--batch-size", "4", "--workers", "1", "--classes", "8", "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"eroseg: {data / 'images' / '02.png'} cannot be read as an image")
    assert "\n" not in error


def test_a_full_disk_keeps_the_last_checkpoint(data: Path, tmp_path: Path) -> None:
    """The limit of a file's size stands in for the disk: the write fails half way."""
    run(data, tmp_path / "good", val=data, val_images=1, val_every=1, epochs=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = b""

    def fill_the_disk(line: str) -> None:
        nonlocal kept
        if line.startswith("epoch 1:"):
            kept = (tmp_path / "out" / "checkpoint.pt").read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, hard))

    settings: dict[str, Any] = {"val": data, "val_images": 1, "val_every": 1, "epochs": 3, "resume": True}
    try:
        with pytest.raises(OSError, match=r"out/checkpoint\.pt could not be written: .*; the one before it is kept"):
            run(data, tmp_path / "out", say=fill_the_disk, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == kept
    assert not list((tmp_path / "out").glob("*.part"))
    run(data, tmp_path / "out", **settings)
    assert furthest_apart(weights(tmp_path / "good"), weights(tmp_path / "out")) == 0


class _Breaks(nn.Module):
    """A model whose logits become infinite from one training forward on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, CLASSES, 1)
        self.at = at
        self.forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += self.training
        logits: Tensor = self.convolution(images)
        return logits * float("inf") if self.forwards >= self.at else logits


@pytest.mark.parametrize("method", ["none", "eroseg"])
def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path, method: str) -> None:
    what = r"the loss is nan; .*checkpoint\.pt holds the last good state"
    with pytest.raises(TrainingStopped, match=rf"^training stopped at update 5 of 6: {what}"):
        run(data, tmp_path, model=_Breaks(at=5), checkpoint_every=2, attack=method)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["done"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attack-options", '{"radios": 1}'], "radios is not a setting of attack"),
        (["--attack-options", "radius"], "argument --attack-options: got 'radius', wanted a JSON object"),
        (["--eps", "8:255"], "argument --eps: got '8:255', wanted a number such as 0.03 or 8/255"),
        (["--eps", "8"], "--eps is 8.0, wanted a number below 1, the range of clip"),
        (["--step-size", "2"], "--step-size is 2.0, wanted a number below 1, the range of clip"),
        (["--size", "big"], "argument --size: got 'big', wanted HEIGHTxWIDTH"),
        (["--class-weights", "balanced"], "--class-weights is 'balanced', wanted one of none, median-frequency"),
        (["--attack", "fgsm"], "--attack is 'fgsm', wanted one of eroseg, "),
    ],
)
def test_wrong_options_are_told_in_one_sentence(
    data: Path, tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["train", "--data", str(data), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("eroseg: ")
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_an_l2_budget_may_be_larger_than_1(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--data", str(data), "--out", str(tmp_path), "--eps", "8", "--batch-size", "99"]
    assert main.main([*arguments, "--attack-options", '{"norm": "l2"}']) == 2
    # It is the batch that is wrong.
    assert "wanted at least batch_size = 99" in capsys.readouterr().err


def test_weights_that_explode_stop_the_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--data", str(data), "--out", str(tmp_path), "--model", "tiny", "--size", "24x32"]
    arguments += ["--learning-rate", "1e30", "--optimizer", "sgd", "--warmup-epochs", "0", "--batch-size", "4"]
    assert main.main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert re.match(
        r"eroseg: training stopped at update \d of \d+: .*(NaN|nan|not finite).*no checkpoint was written yet$", error
    )


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", epochs=1)
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"out .* holds a run already: continue it with resume, or take another folder"
    ):
        run(data, tmp_path / "out", epochs=1)
    with pytest.raises(ValueError, match=r"eps is 0\.1, but the run in .* has 0\.0078"):
        run(data, tmp_path / "out", epochs=1, eps=0.1, resume=True)
    other = write_folder(tmp_path / "other", 12)
    with pytest.raises(ValueError, match=r"data .*other holds other images than when"):
        run(other, tmp_path / "out", epochs=1, resume=True)
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    (tmp_path / "out" / "checkpoint.pt").write_bytes(before[:500])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no file of weights or checkpoint"):
        run(data, tmp_path / "out", epochs=1, resume=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attack": "fgsm"}, "attack is 'fgsm', wanted one of eroseg"),
        ({"adv_fraction": 1.5}, "adv_fraction is 1.5, wanted a number from 0 to 1"),
        ({"batch_size": 3, "accumulate": 2}, "batch_size is 3, wanted a multiple of 2"),
        ({"batch_size": 32}, "holds 13 images, wanted at least batch_size = 32"),
        ({"scale": (2, 1)}, r"scale is \(2, 1\), wanted a pair"),
        ({"class_weights": (1.0, 2.0)}, "class_weights has 2 numbers, wanted 8, one per class"),
        ({"model": "small:net"}, "model is 'small:net', which cannot be imported"),
        ({"model": "big"}, "model is 'big', wanted small, tiny, package.module:callable, file.py:callable, a folder"),
        ({"model": "training_common:plain_net", "model_args": {"classes": 5}}, "logits have 5 classes, wanted 8"),
        ({"model": "builtins:dict"}, "model 'builtins:dict' gives a dict, wanted an nn.Module"),
        ({"attack_options": {"radios": 1}}, "radios is not a setting of attack"),
        (
            {"attack_options": {"output_key": 1}},
            "attack_options is 'output_key', wanted it as a setting of the training",
        ),
        (
            {"attack_options": {"images_are_normalized": True}},
            "attack_options is 'images_are_normalized', wanted none of what training fixes",
        ),
        ({"attack_options": {"logits": 1}}, "attack_options is 'logits', wanted none of what training fixes"),
        ({"output": "softmax"}, "output is 'softmax', wanted one of logits, probabilities, sigmoid"),
        ({"eps": 8}, "eps is 8, wanted a number below 1"),
        ({"attack_options": {"eps": 1}}, "attack_options is 'eps', wanted it as a setting of the training"),
        ({"attack": "none", "compare_reference": 3}, "compare_reference is 3, wanted 0"),
        ({"init": "nowhere.pt"}, "nowhere.pt"),
        ({"data": Path("nowhere")}, "nowhere must hold the folders images/ and labels/"),
        ({"epoch": 3}, r"train\(\) got an unexpected keyword argument 'epoch'"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_wrong_settings_are_told_before_any_work(
    data: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises((ValueError, TypeError, OSError), match=words):
        run(settings.pop("data", data), tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "log.jsonl").exists()
