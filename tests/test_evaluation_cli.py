"""The command ``eroseg evaluate``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_evaluated, write_folder, write_labels
from torch import Tensor

from eroseg_ext import evaluate
from eroseg_ext.cli import main
from eroseg_ext.models.small_deeplab import SmallDeepLab

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data/`` of three scenes and ``weights.pt`` of an untrained network of their 8 classes."""
    return write_evaluated(tmp_path_factory.mktemp("evaluate"), 3, void=9)


def command(files: Path, out: Path, *more: str) -> list[str]:
    return [
        "evaluate",
        *("--data", str(files / "data"), "--weights", str(files / "weights.pt"), "--out", str(out)),
        *("--ignore-index", "9", "--steps", "3", "--size", "32x48", "--device", "cpu", *more),
    ]


def test_table_and_json(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(command(files, tmp_path, "--attacks", "eroseg,js", "--eps", "2/255,0.03", "--sanity", "2")) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(row["attack"], round(row["eps"] * 255, 2)) for row in result["rows"]] == [
        ("eroseg", 2.0),
        ("js", 2.0),
        ("eroseg", 7.65),
        ("js", 7.65),
    ]
    rows = {
        cells[1].split(" (")[0].strip(): cells
        for cells in (line.split("|") for line in printed.splitlines())
        if len(cells) > 3
    }
    for column in (0, 1):
        found = result["rows"][2 * column]
        assert (
            rows["`eroseg`"][2 + column].strip() == f"{found['miou']:.2f} / {found['macc']:.2f} / {found['aacc']:.2f}"
        )
        worst = result["worst"][column]
        assert rows["lower bound of its mIoU"][2 + column].strip() == f"{worst['miou_bound']:.2f}"
    assert "attack, at 32x48" in rows
    assert result["settings"]["size"] == [32, 48]
    assert len(result["sanity"]) == 8
    for check in result["sanity"]:
        assert f"{'ok  ' if check['passed'] else 'FAIL'}  {check['name']}: {check['verdict']}" in printed.splitlines()
    assert not list(tmp_path.glob("*.part"))


def test_options_reach_the_evaluation(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--norm", "l2", "--eps", "2.5", "--images", "2", "--batch-size", "1", "--restarts", "2", "--seed", "3"]
    more += ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--amp", "bf16", "--sanity", "0", "--attacks", "pgd"]
    more += ["--miou-classes", "labelled_or_predicted"]
    assert main.main(command(files, tmp_path, *more)) == 0
    assert capsys.readouterr().out.startswith("mIoU (labelled or predicted classes) / mAcc / aAcc in %, 2 images")
    settings = json.loads((tmp_path / "evaluation.json").read_text())["settings"]
    wanted = {"norm": "l2", "eps": [2.5], "batch_size": 1, "restarts": 2, "seed": 3, "autocast": "bfloat16", "steps": 3}
    wanted |= {"mean": [0.5] * 3, "std": [0.25] * 3, "attacks": {"pgd": {"method": "pgd"}}, "ignore_index": 9}
    wanted["miou_classes"] = "labelled_or_predicted"
    assert {name: settings[name] for name in wanted} == wanted


@pytest.mark.parametrize(("options", "ignore_index"), [([], 255), (["--ignore-index", "0"], 0)])
def test_the_void_label_of_a_folder(tmp_path: Path, options: list[str], ignore_index: int) -> None:
    write_folder(tmp_path / "data", 1, void=ignore_index)
    arguments = [
        "evaluate",
        "--data",
        str(tmp_path / "data"),
        "--model",
        "tiny",
        "--classes",
        "8",
        "--out",
        str(tmp_path),
    ]
    quick = ["--steps", "1", "--attacks", "pgd", "--sanity", "0", "--size", "32x48", "--device", "cpu"]
    assert main.main([*arguments, *quick, *options]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["settings"]["ignore_index"] == ignore_index


def test_a_network_by_import_path(files: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--data", str(files / "data"), "--ignore-index", "9", "--out", str(tmp_path)]
    arguments += ["--model", "eroseg_ext.models:SmallDeepLab", "--model-args", '{"classes": 8, "width": 8}']
    assert main.main([*arguments, "--steps", "1", "--attacks", "pgd", "--sanity", "0", "--images", "1"]) == 0


def test_a_named_data_set_needs_no_void_label(tmp_path: Path) -> None:
    """CamVid's void is 11: the figures are those of a folder of which that is said."""
    write_folder(tmp_path / "data", 3, void=11)
    found = []
    for more in (["--dataset", "camvid"], ["--ignore-index", "11", "--classes", "11"]):
        out = tmp_path / more[1]
        arguments = ["evaluate", "--data", str(tmp_path / "data"), "--out", str(out), *more, "--device", "cpu"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            code = main.main([*arguments, *("--model", "tiny", "--steps", "2", "--size", "32x48", "--sanity", "0")])
        assert code == 0
        result = json.loads((out / "evaluation.json").read_text())
        found.append({name: result[name] for name in ("clean", "rows", "worst", "images")})
    assert len(found[0]["clean"]["iou"]) == 11
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "number"), [("write", 2), ("fsync", 3), ("fsync", 5), ("replace", 1)])
def test_an_interrupted_evaluation_goes_on(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Around the writes of results.jsonl, and at the end those of evaluation.json."""
    arguments = ("--attacks", "pgd", "--batch-size", "2", "--sanity", "0")
    assert main.main(command(files, tmp_path / "whole", *arguments)) == 0
    original = getattr(os, name)
    calls = 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(os, name, interrupted)
    assert main.main(command(files, tmp_path / "cut", *arguments)) == 130
    monkeypatch.undo()
    assert capsys.readouterr().err == "eroseg: interrupted\n"
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    assert main.main(command(files, tmp_path / "cut", *arguments)) == 0
    results = [(tmp_path / out / "evaluation.json").read_bytes() for out in ("whole", "cut")]
    assert results[0] == results[1]
    assert not list((tmp_path / "cut").glob("*.part"))


class Turned(SmallDeepLab):
    """Its classes in another order, if asked."""

    def __init__(self, turn: int, width: int = 8) -> None:
        super().__init__(8, width)
        self.turn = turn

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).roll(self.turn, 1)


def test_other_arguments_make_another_model(files: Path, tmp_path: Path) -> None:
    """The same weights, class and repr: only --model-args differ."""
    found = []
    for turn, out in ((0, "together"), (1, "together"), (1, "alone"), (1, "alone")):
        arguments = ["--model", f"{__name__}:Turned", "--model-args", json.dumps({"turn": turn}), "--sanity", "0"]
        assert main.main(command(files, tmp_path / out, *arguments, "--attacks", "pgd")) == 0
        found.append(json.loads((tmp_path / out / "evaluation.json").read_text()))
    assert found[0]["clean"] != found[1]["clean"]
    assert found[1] == found[2] == found[3]
    assert found[1]["settings"]["model_description"] == {"name": f"{__name__}:Turned", "args": {"turn": 1}}
    # The model, and three images clean and attacked, of each.
    count = [len((tmp_path / out / "results.jsonl").read_text().splitlines()) for out in ("together", "alone")]
    assert count == [14, 7]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--eps", "8"],
            "--eps is 8.0, wanted a number below 1, the range of clip=(0.0, 1.0): lengths are in pixel values",
        ),
        (["--eps", "2/255,x"], "argument --eps: got '2/255,x', wanted numbers such as 2/255,0.5"),
        (["--attacks", "erosg"], "--attacks is 'erosg', wanted one of eroseg"),
        (["--steps", "0"], "--steps is 0, wanted an integer >= 1"),
        (["--mean", "a"], "argument --mean: got 'a', wanted numbers such as"),
        (["--output", "softmax"], "--output is 'softmax', wanted one of logits, probabilities, sigmoid"),
        (["--mean", "123.675,116.28,103.53", "--std", "58,57,57"], "mean is (123.675, 116.28, 103.53), wanted numbers"),
        (["--mean", "0.5"], "std is None, wanted both mean and std"),
        (["--model-args", "[]"], "argument --model-args: got '[]', wanted a JSON object"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--model", "nowhere"], "model is 'nowhere'"),
        (["--data", "nowhere"], "nowhere must hold the folders images/ and labels/"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--ignore-index", "255"], "has the label 9 at row"),
        (["--dataset", "ade20k", "--data", "nowhere"], "nowhere must hold the folders images/ and labels/"),
        (["--dataset", "kitti"], "--dataset is 'kitti', wanted one of folder, "),
        (["--sanity", "-1"], "--sanity is -1, wanted an integer >= 0"),
    ],
)
def test_errors_are_one_sentence(
    files: Path, tmp_path: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(command(files, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("eroseg: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "evaluation.json").exists()


def test_labels_of_a_single_class_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [
        "--model",
        "tiny",
        "--classes",
        "2",
        "--steps",
        "1",
        "--attacks",
        "pgd",
        "--sanity",
        "0",
        "--device",
        "cpu",
    ]
    for name, values in (("mask", [0, 255]), ("zeros", [0]), ("both", [0, 1, 255])):
        data = write_labels(tmp_path / name, values)
        assert main.main(["evaluate", "--data", str(data), "--out", str(tmp_path / "out"), *quick]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eroseg: warning: in data")]
        assert len(told) == (name != "both")
        assert all(("0 and 255 alone" in line) == (name == "mask") for line in told)
    with pytest.warns(UserWarning, match="in data the labels are 0 and 255 alone, and 255 counts as void"):
        evaluate(torch.nn.Conv2d(3, 2, 1), tmp_path / "mask", steps=1, attacks=["pgd"], sanity=0)


class Rounded(SmallDeepLab):
    """Its input is quantised: no gradient reaches an attack."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward((images * 32).round() / 32)


class Probabilities(SmallDeepLab):
    """[auxiliary, probabilities], as a list."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        logits = super().forward(images)
        return [0 * logits, logits.softmax(1)]


def test_how_to_read_the_output(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", f"{__name__}:Probabilities", "--model-args", '{"classes": 8, "width": 8}', "--attacks", "pgd"]
    common = [*model, "--images", "1", "--sanity", "1"]
    assert main.main(command(files, tmp_path / "a", *common)) == 2
    assert "several entries that could be the logits" in capsys.readouterr().err
    assert main.main(command(files, tmp_path / "a", *common, "--output-key", "1", "--output", "probabilities")) == 0
    found = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    wanted = {"output": "probabilities", "output_key": 1, "logits": None, "align_corners": False}
    assert {name: found["settings"][name] for name in wanted} == wanted
    assert "ok    logits: the outputs are made logits" in capsys.readouterr().out
    assert main.main(command(files, tmp_path / "b", "--attacks", "pgd", "--images", "1", "--sanity", "0")) == 0
    bare = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert found["clean"]["aacc"] == bare["clean"]["aacc"]
    assert found["rows"][0]["aacc"] == pytest.approx(bare["rows"][0]["aacc"], abs=1)


def test_strict(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounded = ["--model", f"{__name__}:Rounded", "--model-args", '{"classes": 8, "width": 8}', "--attacks", "pgd"]
    arguments = command(files, tmp_path, *rounded, "--sanity", "1", "--images", "1")
    assert main.main(arguments) == 0
    assert "| `pgd` (checks failed) (no gradient on 1 of 1 images) |" in capsys.readouterr().out
    assert main.main([*arguments, "--strict"]) == main.EXIT_CHECKS_FAILED == 3
    error = capsys.readouterr().err
    assert error.startswith("eroseg: --strict: failed are gradients, ")
    assert error.endswith("pgd without gradients\n")
    assert main.main(command(files, tmp_path, "--sanity", "0", "--strict")) == 2
    assert capsys.readouterr().err == "eroseg: --strict needs the sanity checks, which --sanity 0 leaves out\n"


def test_broken_model_is_told(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(files / "weights.pt")["model"]
    state["classifier.bias"][0] = torch.nan
    torch.save(state, tmp_path / "broken.pt")
    arguments = command(files, tmp_path, "--sanity", "0", "--weights", str(tmp_path / "broken.pt"))
    assert main.main(arguments) == 2
    assert capsys.readouterr().err.startswith("eroseg: the model's logits of 00.png are NaN or infinite")
