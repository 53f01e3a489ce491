"""Whatever the command ``eroseg`` is given: it works, or ends with code 2 and one sentence; never with a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folders import write_folder
from torch import Tensor, nn

from eroseg_ext.cli import main
from eroseg_ext.models.small_deeplab import SmallDeepLab

pytestmark = pytest.mark.usefixtures("one_thread")

HUGE = "9" * 30
NOT_UTF8 = "\udcff"  # as Python has such bytes of a command line
TOO_LONG = "x" * 5000

WHOLE = ("", "x", "nan", "inf", "-1", "1.5", HUGE, "9" * 5000)
COUNT = ("", "x", "nan", "-1", "1.5", "9" * 5000)
"""Of what may be more than there is."""
LABEL = ("", "x", "nan", "1.5", HUGE, "-" + HUGE)
NUMBER = ("", "x", "nan", "inf", "-1", "1e400")
BUDGET = ("", "x", "nan", "inf", "-1", "1/0", "1e300", "8/255/2", "2/255,,")
NUMBERS = ("", "x", "nan", "inf", "1,,2", "0,0")
SIZE = ("", "x", "0x5", "-1x5", "5", "5x", "nanxnan", "100000x100000", f"{HUGE}x1", "1.5x2")
SIDES = ("", "x", "nan", "0", "-1", "1.5", "9" * 5000, "0x5", "5x", "1.5x2", "100000x100000", f"{HUGE}x1")
JSON = ("", "x", "[]", "1", '{"a": NaN}', '{"a": Infinity}', '{"a": 1e400}', "[" * 100_000, '{"no_such_name": 1}')
CHOICE = ("", "x", NOT_UTF8)
OUTPUT_KEY = ("", "nothing", "7", HUGE, "9" * 5000, NOT_UTF8)
FOLDER = ("", "nowhere", "file", "empty", NOT_UTF8, "\0", TOO_LONG)
OUT = ("", "file", "file/below", "\0", TOO_LONG)
FILE = ("", "nowhere.pt", "empty", "file", "other.pt", "odd.pt", NOT_UTF8, "\0", TOO_LONG)
PALETTE = ("", "nowhere.txt", "empty", "file", NOT_UTF8, "\0", TOO_LONG)
TO_WRITE = ("", "empty", "nowhere/file", "file/below", "\0")
DEVICE = ("", "x", "meta", "cuda:99", "cpu:-1", "hpu", "privateuseone", NOT_UTF8, "\0")
MODEL = (
    *("", "x", ":", "x:", ":y", ".x:y", "..:y", "nowhere:x", "math:pi", "math:nothing", "sys:exit", "builtins:print"),
    *("raises_on_import:x", "exits_on_import:x", f"{__name__}:raises", f"{__name__}:raises_nothing_said"),
    *(f"{__name__}:exits", f"{__name__}:FailsInForward", f"{__name__}:ExitsInForward", "torch.nn:Flatten"),
    *("torch.nn:ReLU", f"{NOT_UTF8}:x", "\0:x", "x y:z"),
)

VALUES = {
    "demo": {
        **dict.fromkeys(("--seed", "--steps", "--train-steps"), WHOLE),
        **{"--data": FOLDER, "--out": OUT, "--eps": (*BUDGET, "8"), "--size": (*SIZE, "8x8", "4000x4000")},
        **{"--ignore-index": LABEL, "--class-names": ("", "a", "a,b"), "--device": DEVICE, "--json": TO_WRITE},
    },
    "train": {
        **dict.fromkeys(("--epochs", "--batch-size", "--accumulate", "--attack-steps", "--seed", "--workers"), WHOLE),
        **dict.fromkeys(("--val-attack-steps", "--compare-reference", "--replays", "--classes", "--threads"), WHOLE),
        **dict.fromkeys(("--val-every", "--log-every", "--val-images", "--checkpoint-every"), COUNT),
        **dict.fromkeys(
            ("--learning-rate", "--weight-decay", "--warmup-epochs", "--poly-power", "--front-loss"), NUMBER
        ),
        **{
            "--loss": MODEL,
            "--loss-args": JSON,
            "--lr-mult": (*JSON, '{"stem": "x"}', '{"stem": -1}'),
            "--auxiliary-weight": NUMBER,
        },
        **dict.fromkeys(("--adv-fraction", "--loss-balance", "--ema", "--timeout"), (*NUMBER, "1e300")),
        **{"--data": FOLDER, "--val": FOLDER, "--out": OUT, "--init": FILE, "--device": DEVICE, "--model": MODEL},
        **{"--ignore-index": LABEL, "--eps": (*BUDGET, "8"), "--step-size": BUDGET, "--size": SIZE, "--crop": SIZE},
        **{"--scale": ("", "x", "1", "1,2,3", "0,1", "2,1", "nan,1", "1e-300,1", "1,1e300"), "--mean": NUMBERS},
        **{"--std": (*NUMBERS, "-1"), "--class-weights": ("", "x", "nan", "-1,1", "1,2", "0,0"), "--model-args": JSON},
        **{"--attack-options": (*JSON, '{"radius": -1}', '{"steps": 3}', '{"norm": []}', '{"preset": {}}')},
        **dict.fromkeys(("--dataset", "--attack", "--attack-mode", "--backend", "--optimizer", "--amp"), CHOICE),
        **{"--output": CHOICE, "--output-key": OUTPUT_KEY, "--palette": PALETTE},
    },
    "evaluate": {
        **dict.fromkeys(("--window", "--stride"), SIDES),
        **dict.fromkeys(("--steps", "--restarts", "--seed"), WHOLE),
        **dict.fromkeys(("--images", "--batch-size", "--sanity"), COUNT),
        **{"--data": FOLDER, "--out": OUT, "--weights": FILE, "--device": DEVICE, "--model": MODEL},
        **{"--classes": WHOLE, "--ignore-index": LABEL, "--eps": (*BUDGET, "8", "0.1,0.1"), "--size": SIZE},
        **{"--mean": NUMBERS, "--std": (*NUMBERS, "-1"), "--model-args": JSON},
        **{"--attacks": ("", "x", "js:", "eroseg,", ",", NOT_UTF8)},
        **dict.fromkeys(("--dataset", "--norm", "--amp", "--miou-classes", "--backend"), CHOICE),
        **{"--output": CHOICE, "--output-key": OUTPUT_KEY, "--palette": PALETTE, "--adversarial": FOLDER},
        **{"--shard": ("", "x", "1", "2/2", "-1/2", "0/0", "1.5/2", "0/2/2", f"{HUGE}/2", "nan/2")},
    },
    "attack": {
        **dict.fromkeys(("--window", "--stride"), SIDES),
        **dict.fromkeys(("--steps", "--restarts", "--seed", "--classes"), WHOLE),
        **dict.fromkeys(("--images", "--batch-size"), COUNT),
        **{"--data": FOLDER, "--out": OUT, "--weights": FILE, "--device": DEVICE, "--model": MODEL, "--size": SIZE},
        **{"--ignore-index": LABEL, "--eps": (*BUDGET, "8", "0.1,0.1"), "--palette": PALETTE, "--model-args": JSON},
        **{"--mean": NUMBERS, "--std": (*NUMBERS, "-1"), "--options": (*JSON, '{"radius": -1}', '{"norm": []}')},
        **dict.fromkeys(("--dataset", "--method", "--norm", "--amp", "--output"), CHOICE),
        **{"--output-key": OUTPUT_KEY},
    },
    "info": {"--json": TO_WRITE},
}


def raises(**_: object) -> nn.Module:
    raise KeyError("a name\nthat is missing")


def raises_nothing_said(**_: object) -> nn.Module:
    raise AssertionError


def exits(**_: object) -> nn.Module:
    sys.exit()


class FailsInForward(SmallDeepLab):
    def forward(self, images: Tensor) -> Tensor:
        raise ZeroDivisionError("of the model\nitself")


class ExitsInForward(SmallDeepLab):
    def forward(self, images: Tensor) -> Tensor:
        sys.exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder meanwhile, with ``data/``, weights, and what is not what an option wants."""
    folder = tmp_path_factory.mktemp("hostile")
    write_folder(folder / "data", 2)
    (folder / "empty").mkdir()
    (folder / "file").write_text("no weights, no image")
    (folder / "raises_on_import.py").write_text("1 / 0")
    (folder / "exits_on_import.py").write_text("import sys; sys.exit()")
    torch.save(SmallDeepLab(8, width=8).state_dict(), folder / "weights.pt")
    torch.save({"a": torch.zeros(2)}, folder / "other.pt")
    torch.save(
        {"stem.0.weight": torch.zeros(()), "classifier.weight": torch.zeros(()), 3: torch.ones(1)}, folder / "odd.pt"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder


def base(command: str, out: Path, option: str) -> dict[str, str]:
    """Options with which the command would work, and quickly."""
    shared = {"--data": "data", "--out": str(out), "--device": "cpu"}
    if command in ("attack", "evaluate"):
        model = {"--model": f"{__name__}:FailsInForward"} if option == "--model-args" else {"--weights": "weights.pt"}
        if option in ("--model", "--classes"):
            model = {"--model": "tiny", "--classes": "8"}
        quick = {"--attacks": "pgd", "--sanity": "0"} if command == "evaluate" else {"--method": "pgd"}
        return {**shared, **model, "--steps": "1", **quick}
    if command == "train":
        quick = {"--epochs": "1", "--batch-size": "2", "--attack-steps": "1", "--model": "tiny", "--crop": "32x32"}
        return {**shared, **quick, "--seed": "1"}
    if command == "demo":
        return {**shared, "--steps": "1", "--train-steps": "1", "--size": "32x32"}
    return {}


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that the command ends with."""
    code = main.main(arguments)
    error = capsys.readouterr().err
    shown = [argument[:60] for argument in arguments]
    assert code == 2, (shown, error)
    assert error.startswith("eroseg: "), (shown, error)
    assert error.count("\n") == 1, (shown, error)
    assert "Traceback" not in error, (shown, error)
    assert len(error.strip()) > len("eroseg: "), shown
    return error


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in VALUES.items() for option in options]
)
def test_hostile_values(
    command: str, option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, value in enumerate(VALUES[command][option]):
        options = {**base(command, tmp_path / str(number), option), option: value}
        told([command, *(f"{name}={text}" for name, text in options.items())], capsys)


def test_every_option_is_tried() -> None:
    assert set(main.COMMANDS) == set(VALUES)
    for name in main.COMMANDS:
        parser = main._parser(name)._subparsers._group_actions[0].choices[name]
        takes_a_value = [action for action in parser._actions if action.option_strings and action.nargs != 0]
        assert {action.option_strings[0] for action in takes_a_value} == set(VALUES[name])


@pytest.mark.parametrize(
    ("command", "options", "sentence"),
    [
        ("evaluate", {"--mean": "0,0", "--std": "1,1"}, "mean has 2 numbers, wanted 3"),
        ("train", {"--mean": "0,0", "--std": "1,1"}, "mean is (0.0, 0.0), wanted one number"),
        ("evaluate", {"--norm": "l2", "--eps": "1e300"}, "--eps is 1e+300, wanted a number from 0 to"),
        ("evaluate", {"--model": f"{__name__}:raises"}, "cannot be made with {'num_classes': 8}: KeyError: 'a name"),
        ("evaluate", {"--model": "sys:exit"}, "cannot be made with"),
        ("evaluate", {"--model": "raises_on_import:x"}, "cannot be imported: ZeroDivisionError: division by zero"),
        ("evaluate", {"--model": "exits_on_import:x"}, "cannot be imported: SystemExit"),
        ("evaluate", {"--model": ".x:y"}, "cannot be imported: ImportError: the path of its module is relative"),
        ("evaluate", {"--model": f"{__name__}:FailsInForward"}, "ZeroDivisionError in forward ("),
        ("train", {"--model": f"{__name__}:FailsInForward"}, "): of the model itself"),
        ("evaluate", {"--model-args": '{"width": 1e10}'}, "cannot be made with"),
        (
            "evaluate",
            {"--size": "100000x100000"},
            "got '100000x100000', wanted HEIGHTxWIDTH of at most 16777216 pixels",
        ),
        ("train", {"--threads": "100000"}, "--threads is 100000, wanted an integer from 1 to 1024"),
        ("train", {"--workers": "99999999999"}, "--workers is 99999999999, wanted an integer from 0 to 256"),
        ("evaluate", {"--device": "meta"}, "device 'meta' cannot be used"),
        (
            "evaluate",
            {"--steps": "10000", "--restarts": "1000"},
            "steps x restarts is 10000000, wanted at most 1000000",
        ),
    ],
)
def test_sentences(
    command: str,
    options: dict[str, str],
    sentence: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {**base(command, tmp_path, "--model"), **options}
    assert sentence in told([command, *(f"{name}={text}" for name, text in given.items())], capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("command", ["demo", "train", "evaluate"])
def test_folders_that_may_not_be_used(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "closed" / "images").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    try:
        for option in ("--data", "--out"):
            given = {**base(command, tmp_path, "--weights"), option: str(tmp_path / "closed")}
            told([command, *(f"{name}={text}" for name, text in given.items())], capsys)
    finally:
        (tmp_path / "closed").chmod(0o700)


@pytest.mark.parametrize("name", ["evaluation.json", "results.jsonl"])
def test_a_folder_where_a_result_belongs(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    given = base("evaluate", tmp_path, "--weights")
    assert name in told(["evaluate", *(f"{key}={text}" for key, text in given.items())], capsys)
    # Before any work.
    assert not any((tmp_path / result).is_file() for result in ("evaluation.json", "results.jsonl"))


def test_paths_need_not_be_utf8(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = folder / f"data{NOT_UTF8}", tmp_path / NOT_UTF8
    (folder / "data").rename(data)
    try:
        for command in ("train", "evaluate"):
            given = {**base(command, out / command, "--weights"), "--data": str(data)}
            assert main.main([command, *(f"{name}={text}" for name, text in given.items())]) == 0, (
                capsys.readouterr().err
            )
    finally:
        data.rename(folder / "data")
