"""What a run finds in its folder: damaged and foreign checkpoints, another run, what an interrupt left."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_folder
from training_common import CLASSES, SMALL, command_process, dropout_net, furthest_apart, training_process, weights

from eroseg_ext import train
from eroseg_ext.cli import main
from eroseg_ext.models import loading
from eroseg_ext.utils import atomic_files

State = dict[str, Any]


def silent(_: str) -> None:
    pass


def settings(data: Path, out: Path) -> dict[str, Any]:
    common = {**SMALL, "model": "training_common:dropout_net", "epochs": 2, "ema": 0.5, "checkpoint_every": 1}
    return {**common, "data": data, "out": out, "resume": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), 8)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four updates."""
    out = tmp_path_factory.mktemp("finished")
    train(say=silent, **settings(data, out))
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


# The last checkpoint and the one before it


def test_two_checkpoints_are_kept(out: Path) -> None:
    names = ("checkpoint.pt", "checkpoint.previous.pt")
    assert [atomic_files.read_tensors(out / name)["done"] for name in names] == [4, 3]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["done"] == 4


def damage(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_names_the_one_before_it_which_can_be_resumed(data: Path, out: Path, how: str) -> None:
    path = out / "checkpoint.pt"
    expected = weights(out)
    content = path.read_bytes()
    if how == "flipped":
        damage(path)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2 if how == "cut" else 0])
    good = re.escape(str(out / "checkpoint.previous.pt"))
    words = rf"checkpoint\.pt.*; {good}, of update 3, is good: rename it to checkpoint\.pt and resume$"
    with pytest.raises(ValueError, match=words):
        train(say=silent, **settings(data, out))
    (out / "checkpoint.previous.pt").rename(path)
    train(say=silent, **settings(data, out))
    assert furthest_apart(expected, weights(out)) == 0


def test_with_both_damaged_no_good_one_is_named(data: Path, out: Path) -> None:
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        damage(out / name)
    words = (
        r"checkpoint\.pt is damaged: it does not have its digest; there is no other checkpoint, start again in another"
    )
    with pytest.raises(ValueError, match=words):
        train(say=silent, **settings(data, out))


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.previous.pt"])
def test_a_folder_with_either_is_not_overwritten(data: Path, out: Path, name: str) -> None:
    (out / name).unlink()
    with pytest.raises(ValueError, match=r"out .* holds a run already"):
        train(say=silent, **{**settings(data, out), "resume": False})


def test_without_hard_links_two_are_kept_all_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    train(say=silent, **settings(data, tmp_path))
    names = ("checkpoint.pt", "checkpoint.previous.pt")
    assert [atomic_files.read_tensors(tmp_path / name)["done"] for name in names] == [4, 3]


# Foreign and old files


def without(*path: str | int) -> Callable[[State], Any]:
    """The state without an entry."""

    def change(state: State) -> State:
        inner: Any = state
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return state

    return change


def having(*path: Any) -> Callable[[State], Any]:
    """The state with another value, the last of the arguments, at a place."""

    def change(state: State) -> State:
        inner: Any = state
        for name in path[:-2]:
            inner = inner[name]
        inner[path[-2]] = path[-1]
        return state

    return change


ENTRIES = ("model", "optimizer", "ema", "done", "seconds", "settings", "data")
OTHER_NET = torch.nn.Linear(3, 2).state_dict()
STRUCTURES: dict[str, Callable[[State], Any]] = {
    "a list": lambda state: [state],
    "a tensor": lambda state: state["model"]["0.weight"],
    "a number": lambda _: 3,
    "None": lambda _: None,
    "an empty dict": lambda _: {},
    "a state dict without its wrapper": lambda state: state["model"],
    "tensors under numbers": lambda _: {3: torch.zeros(2)},
    "weights without dimensions": lambda _: {"stem.0.weight": torch.zeros(()), "classifier.weight": torch.zeros(())},
    "weights alone": lambda state: {"model": state["model"]},
    "of another trainer": lambda state: {"epoch": 3, "state_dict": state["model"], "optimizer": state["optimizer"]},
    **{f"without {name}": without(name) for name in ENTRIES},
    **{f"{name} a list": having(name, []) for name in ENTRIES},
    **{f"{name} a tensor": having(name, torch.zeros(2)) for name in ENTRIES},
    **{f"{name} a number": having(name, 2.5) for name in ENTRIES},
    **{f"{name} a text": having(name, "7") for name in ENTRIES if name != "data"},
    **{f"{name} None": having(name, None) for name in ENTRIES},
    **{f"{name} empty": having(name, {}) for name in ENTRIES},
    "images of another run": having("data", "0123"),
    "done negative": having("done", -1),
    "done 0": having("done", 0),
    "done beyond the end": having("done", 5),
    "done huge": having("done", 10**30),
    "done True": having("done", True),
    "seconds negative": having("seconds", "data", -1.0),
    "seconds NaN": having("seconds", "data", float("nan")),
    "seconds a text": having("seconds", "data", "1"),
    "a phase is missing": without("seconds", "data"),
    "settings hold a tensor": having("settings", "eps", torch.zeros(2)),
    "settings lack one": without("settings", "eps"),
    "a setting of another type": having("settings", "eps", "2/255"),
    "weights of another network": having("model", OTHER_NET),
    "weights of another shape": having("model", "0.weight", torch.zeros(8, 3, 5, 5)),
    "weights of another type": having("model", "0.weight", torch.zeros(8, 3, 3, 3, dtype=torch.int64)),
    "weights as a list": having("model", "0.weight", [1.0]),
    "weights on no device": having("model", "0.weight", torch.zeros(8, 3, 3, 3, device="meta")),
    "sparse weights": having("model", "0.weight", torch.zeros(8, 3, 3, 3).to_sparse()),
    "a weight is missing": without("model", "0.weight"),
    "a weight too many": having("model", "more", torch.zeros(2)),
    "a weight under a number": having("model", 3, torch.zeros(2)),
    "average of another network": having("ema", OTHER_NET),
    "average of another shape": having("ema", "module.0.bias", torch.zeros(3)),
    "average lacks its count": without("ema", "n_averaged"),
    "optimizer without state": without("optimizer", "state"),
    "optimizer's state a list": having("optimizer", "state", []),
    "optimizer's state empty": having("optimizer", "state", {}),
    "optimizer's state of a parameter too many": having("optimizer", "state", 17, {}),
    "optimizer's state under a text": having("optimizer", "state", "0", {}),
    "optimizer's state of a parameter a list": having("optimizer", "state", 0, []),
    "a moment is missing": without("optimizer", "state", 0, "exp_avg"),
    "a moment too many": having("optimizer", "state", 0, "momentum_buffer", torch.zeros(8, 3, 3, 3)),
    "a moment of another shape": having("optimizer", "state", 0, "exp_avg", torch.zeros(8)),
    "a moment of another type": having("optimizer", "state", 0, "exp_avg", torch.zeros(8, 3, 3, 3).long()),
    "a moment a text": having("optimizer", "state", 0, "exp_avg", "zeros"),
    "a step a number": having("optimizer", "state", 0, "step", 3),
    "a step of several": having("optimizer", "state", 0, "step", torch.zeros(2)),
}
CONTENTS: dict[str, bytes] = {
    "an empty file": b"",
    "a text": b"epoch 3\n",
    "JSON": b'{"done": 3}\n',
    "a plain pickle": pickle.dumps({"done": 3, "model": {}}),
    "a pickle that runs code": b"cos\nsystem\n(S'true'\ntR.",
    "half a zip file": b"PK\x03\x04" + bytes(100),
    "zeros": bytes(5000),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


def refused(data: Path, out: Path) -> str:
    """The sentence with which a run does not start; nothing of its folder has changed."""
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != ".lock"}
    with pytest.raises((ValueError, OSError)) as told:
        train(say=silent, **settings(data, out))
    assert {name: (out / name).read_bytes() for name in before} == before
    sentence = str(told.value)
    assert "\n" not in sentence
    assert len(sentence) < 700
    assert str(out) in sentence or str(data) in sentence
    return sentence


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_checkpoint_of_another_structure_is_told(data: Path, out: Path, name: str) -> None:
    path = out / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"] = copy.deepcopy(state["optimizer"])
    torch.save(STRUCTURES[name](state), path)
    sentence = refused(data, out)
    what = r"checkpoint\.pt (is no checkpoint of a training|does not fit this run): .*"
    assert re.search(rf"{what}|but the run in .* has|holds other images than", sentence), sentence


@pytest.mark.parametrize("name", CONTENTS)
def test_a_checkpoint_that_is_no_file_of_tensors_is_told(data: Path, out: Path, name: str) -> None:
    (out / "checkpoint.pt").write_bytes(CONTENTS[name])
    assert re.search(r"checkpoint\.pt is no file of weights or checkpoint: .", refused(data, out))


def test_a_checkpoint_that_is_a_folder_is_told(data: Path, out: Path) -> None:
    (out / "checkpoint.pt").unlink()
    (out / "checkpoint.pt").mkdir()
    assert "Is a directory" in refused(data, out)


@pytest.mark.parametrize("name", [*STRUCTURES, *CONTENTS])
def test_weights_from_any_file_load_or_are_told(finished: Path, tmp_path: Path, name: str) -> None:
    """As ``--init`` and ``--weights`` read them."""
    path = tmp_path / "weights.pt"
    if name in CONTENTS:
        path.write_bytes(CONTENTS[name])
    else:
        torch.save(STRUCTURES[name](torch.load(finished / "checkpoint.pt", weights_only=True)), path)
    for load in (
        lambda: loading.load_weights(dropout_net(CLASSES), path, "dropout_net"),
        lambda: loading.load_network(weights=path),
    ):
        with suppress(ValueError):
            load()
            continue
        with pytest.raises(ValueError, match=re.escape(str(path))) as told:
            load()
        assert "\n" not in str(told.value)


def test_lines_of_the_log_that_are_no_records_are_left_out(data: Path, out: Path) -> None:
    path = out / "log.jsonl"
    before = path.read_text().splitlines()
    odd = ["", "[]", "3", "{}", '{"update": "3", "epoch": 1}', '{"update": 1}', '{"update": 1, "epoch": 1, "loss": []}']
    path.write_bytes("\n".join([*odd, *before, "\udcff", '{"upd']).encode("utf-8", "surrogateescape"))
    train(say=silent, **settings(data, out))
    assert path.read_text().splitlines() == before


# Another run in the folder


def test_one_run_at_a_time_in_a_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = training_process({**settings(data, tmp_path), "epochs": 10**6, "workers": 1, "log_every": 1})
    log = tmp_path / "log.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    before = log.read_text().splitlines()
    arguments = ["train", "--data", str(data), "--out", str(tmp_path), "--classes", "8", "--resume"]
    assert main.main([*arguments, "--model", "tiny", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert re.match(rf"eroseg: {tmp_path} is in use by process {process.pid} on \S+ since [\d: -]+: wait .*\n$", error)
    process.kill()
    process.join()
    after = log.read_text().splitlines()
    assert after[: len(before)] == before
    assert [json.loads(line)["update"] for line in after[:-1]] == list(range(1, len(after)))[: len(after) - 1]
    # Its worker may live on for some seconds, and does not hold the lock.
    with atomic_files.locked(tmp_path):
        pass


# Ctrl-C


def command(data: Path, out: Path, *more: str) -> list[str]:
    arguments = ["train", "--data", str(data), "--out", str(out), "--classes", "8", "--size", "24x32", "--eps", "2/255"]
    arguments += ["--model", "training_common:dropout_net", "--epochs", "2", "--batch-size", "4", "--ema", "0.5"]
    return [*arguments, "--checkpoint-every", "1", "--device", "cpu", "--threads", "1", "--resume", *more]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", ["fsync", "replace", "link", "ftruncate"])
def test_an_interrupt_around_writes_ends_with_130_and_the_run_goes_on(
    data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = getattr(os, name)
    calls = 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        original(*arguments)
        if calls == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, name, interrupted)
    code = main.main(command(data, tmp_path))
    monkeypatch.undo()
    assert code == (130 if calls == number else 0)
    assert capsys.readouterr().err == ("eroseg: interrupted\n" if code else "")
    assert main.main(command(data, tmp_path)) == 0
    assert furthest_apart(weights(finished), weights(tmp_path)) == 0
    assert not list(tmp_path.glob("*.part"))


def test_a_real_interrupt_at_any_time_ends_with_130_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    interrupted = 0
    for trial in range(12):
        out = tmp_path / str(trial % 4)
        (out / ".lock").unlink(missing_ok=True)
        process = command_process(command(data, out))
        # Nothing is ours to answer before the command has begun.
        while process.is_alive() and not (out / ".lock").exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.5))
        assert process.pid is not None
        with suppress(ProcessLookupError):  # it has ended already
            os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode in (0, 130)
        interrupted += process.exitcode == 130
    assert interrupted > 3
    # Bits can be compared between processes of one kind; this one has run other tests before.
    for name in ("undisturbed", *map(str, range(4))):
        out = tmp_path / name
        process = command_process(command(data, out))
        process.join()
        assert process.exitcode == 0
        assert furthest_apart(weights(tmp_path / "undisturbed"), weights(out)) == 0, name
        assert not list(out.glob("*.part"))
