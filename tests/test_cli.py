"""The command ``eroseg``: what it prints and writes, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import write_folder
from PIL import Image

from eroseg_ext import EvaluationSettings, TrainSettings
from eroseg_ext.cli import demo, main, options
from eroseg_ext.ops import backend
from eroseg_ext.utils import atomic_files

TINY = ["--quick", "--train-steps", "3", "--steps", "3", "--size", "32x48"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """One run of the demo in a pipe: its folder, its JSON, its output."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "eroseg_ext",
            "demo",
            *TINY,
            "--out",
            str(folder),
            "--json",
            str(folder / "result.json"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # No bars in a pipe. Other warnings of the interpreter are not ours to judge.
    assert "%|" not in done.stderr
    return folder, json.loads((folder / "result.json").read_text()), done.stdout


def test_demo_prints_a_row_per_method(ran: tuple[Path, dict, str]) -> None:
    _, result, output = ran
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line}
    for method in demo.ORDER:
        assert float(rows[method][1]) == pytest.approx(result["methods"][method]["miou"], abs=0.051)
        assert float(rows[method][2]) == pytest.approx(result["methods"][method]["accuracy"], abs=0.051)
    assert float(rows["none"][2]) == pytest.approx(result["unattacked"]["accuracy"], abs=0.051)


def test_demo_json(ran: tuple[Path, dict, str]) -> None:
    folder, result, _ = ran
    assert set(result["methods"]) == set(demo.ORDER)
    for row in result["methods"].values():
        assert 0 <= row["miou"] <= 100
        assert 0 <= row["accuracy"] <= 100
        assert row["seconds_per_step"] > 0
        assert row["reference_ms"] > 0
        assert row["fused_ms"] is None or row["fused_ms"] > 0
    assert result["settings"]["steps"] == 3
    assert result["settings"]["eps"] == pytest.approx(2 / 255)
    assert result["training"]["steps"] == 3
    assert result["environment"]["torch"] == torch.__version__
    assert not list(folder.glob("*.part"))


def test_demo_pictures(ran: tuple[Path, dict, str]) -> None:
    folder, result, _ = ran
    assert [Path(name).name for name in result["pictures"]] == ["accuracy.png", "example-1.png"]
    assert all(Path(name).parent == folder for name in result["pictures"])
    for name in result["pictures"]:
        with Image.open(name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 10


def test_demo_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "data", 6, void=9, suffix=".jpg")
    names = ",".join(f"thing {index}" for index in range(8))
    arguments = ["demo", *TINY, "--data", str(data), "--out", str(tmp_path / "new" / "out"), "--ignore-index", "9"]
    code = main.main([*arguments, "--class-names", names, "--eps", "0.01", "--json", str(tmp_path / "r.json")])
    assert code == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["task"] == {"train": 5, "test": 1, "classes": names.split(",")}
    assert result["settings"]["ignore_index"] == 9
    assert (tmp_path / "new" / "out" / "example-1.png").is_file()


def test_same_seed_same_scores(ran: tuple[Path, dict, str], tmp_path: Path) -> None:
    seed = str(ran[1]["settings"]["seed"])
    assert main.main(["demo", *TINY, "--out", str(tmp_path), "--json", str(tmp_path / "r"), "--seed", seed]) == 0
    rows = [result["methods"]["eroseg"] for result in (ran[1], json.loads((tmp_path / "r").read_text()))]
    assert (rows[0]["miou"], rows[0]["accuracy"]) == (rows[1]["miou"], rows[1]["accuracy"])


def test_zero_budget_changes_nothing(tmp_path: Path) -> None:
    assert main.main(["demo", *TINY, "--out", str(tmp_path), "--json", str(tmp_path / "r"), "--eps", "0"]) == 0
    result = json.loads((tmp_path / "r").read_text())
    assert all(row["accuracy"] == result["unattacked"]["accuracy"] for row in result["methods"].values())


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["info", "--json", str(tmp_path / "info.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "info.json").read_text())
    assert report["torch"] in printed
    assert report["backends"]["reference"] == "active"
    for text in [*report["backends"].values(), *report["reference_only"]]:
        assert text in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--eps", "8/0"], "argument --eps: got '8/0', wanted a number such as 0.03 or 8/255"),
        (
            ["demo", "--eps", "1"],
            "--eps is 1.0, wanted a number below 1, the range of clip=(0.0, 1.0): lengths are in pixel values",
        ),
        (["demo", "--steps", "0"], "--steps is 0, wanted an integer from 1 to 10000"),
        (["demo", "--size", "100"], "argument --size: got '100', wanted HEIGHTxWIDTH"),
        (
            ["demo", "--class-names", "a,b"],
            "--class-names is ('a', 'b'), wanted None without data, whose classes they name",
        ),
        (["demo", "--device", "toaster"], "device 'toaster' cannot be used"),
        (
            ["demo", "--json", "no/such/folder/x.json"],
            "--json is 'no/such/folder/x.json', wanted a file in a folder that exists",
        ),
        (["info", "--json", "."], "--json is '.', wanted a file in a folder that exists"),
        (["demo", "--data", "no/such/folder"], "no/such/folder must hold the folders images/ and labels/"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("eroseg: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_bad_data_is_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "data", 3, suffix=".jpg")
    run = ["demo", *TINY, "--data", str(data), "--out", str(tmp_path / "out")]
    assert main.main([*run, "--class-names", "a,b"]) == 2
    assert "class_names has 2 names, wanted 8" in capsys.readouterr().err
    Image.fromarray(np.full((40, 56), 60000, np.uint16)).save(data / "labels" / "01.png")
    assert main.main(run) == 2
    assert "go up to 60000, wanted class indices below 256" in capsys.readouterr().err
    for path in (data / "labels").iterdir():
        Image.fromarray(np.full((40, 56), 1, np.uint8)).save(path)
    assert main.main(run) == 2
    assert "the labels are 1 alone: a single class beside ignore_index 255" in capsys.readouterr().err
    (data / "images" / "01.jpg").write_text("no image")
    assert main.main(run) == 2
    assert "images/01.jpg cannot be read as an image" in capsys.readouterr().err


def test_folder_of_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["demo", "--data", str(write_folder(tmp_path, 1)), "--out", str(tmp_path / "out")]) == 2
    assert "holds 1 image, wanted at least 2" in capsys.readouterr().err


def test_folder_of_void(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path, 2)
    for path in (data / "labels").iterdir():
        Image.fromarray(np.full((40, 56), 255, np.uint8)).save(path)
    assert main.main(["demo", *TINY, "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "no pixel with a label other than ignore_index 255" in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic_files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_interrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert main.main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "eroseg: interrupted\n"


def test_interrupt_while_modules_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(command: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_parser", interrupted)
    assert main.main(["info"]) == 130
    assert capsys.readouterr().err == "eroseg: interrupted\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    assert main.main(["demo", "--help"]) == 0
    assert main.main(["--version"]) == 0
    assert "eroseg_ext" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "settings", "left_out"),
    [
        ("train", TrainSettings, {"progress"}),
        ("evaluate", EvaluationSettings, {"clip", "autocast", "logits", "model_description", "progress"}),
        ("demo", demo.DemoSettings, {"progress"}),
    ],
)
def test_help_lists_every_field_once_with_its_text(
    command: str, settings: type, left_out: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    listed = [name.replace("-", "_") for name in re.findall(r"^  --([a-z-]+)", shown, re.MULTILINE)]
    fields = {field.name for field in dataclasses.fields(settings)}
    assert [listed.count(name) for name in fields - left_out] == [1] * len(fields - left_out)
    assert not left_out & set(listed)
    # After a name and what it takes comes a text: neither the default at once nor the next option.
    assert not re.findall(r"^  --[a-z-]+(?: \S*[^\s,])?\s+(?:\(default|--)", shown, re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """Fields of each kind."""

    data: Path
    """of ``images``, see :func:`eroseg_ext.attack`: 100 % of
    them"""
    eps: float = 4 / 255
    flip: bool = True
    """mirror"""

    weights: Path | None = dataclasses.field(default=None, metadata={"aliases": ["--checkpoint"]})
    progress: bool = False
    """never told"""

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError("eps is below 0")


def test_options_are_the_fields_of_a_dataclass() -> None:
    parser = options.Parser(prog="draw")
    options.add_options(parser, Drawn)
    shown = parser.format_help()
    assert "of images, see eroseg_ext.attack: 100 % of them (required)" in " ".join(shown.split())
    assert re.search(r"--eps X +\(default: 4/255\)", shown)
    assert re.search(r"--flip, --no-flip +mirror\n\n", shown)
    assert "never told" not in shown
    given = parser.parse_args(["--data", "a", "--eps", "8/255", "--no-flip", "--checkpoint", "b"])
    made = options.settings(Drawn, given)
    assert made == Drawn(data=Path("a"), eps=8 / 255, flip=False, weights=Path("b"))
    assert options.settings(Drawn, parser.parse_args(["--data", "a"])) == Drawn(data=Path("a"))
    with pytest.raises(ValueError, match=r"^--eps is below 0$"):
        options.settings(Drawn, parser.parse_args(["--data", "a", "--eps", "-1"]))


def test_an_error_that_a_library_makes_of_ctrl_c_is_told_as_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("a drawing half done") from None

    monkeypatch.setattr(backend, "report", report)
    handler = signal.getsignal(signal.SIGINT)
    assert main.main(["info"]) == 130
    assert capsys.readouterr().err == "eroseg: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is handler
