"""A run that is killed and resumed ends with the weights of one that was not."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_folder
from training_common import SMALL, training_process, weights

EPOCHS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), 10)


def settings(data: Path, out: Path) -> dict[str, Any]:
    """20 updates, a checkpoint after every one, with everything that carries state."""
    return {
        **SMALL,
        "data": data,
        "val": data,
        "val_images": 1,
        "out": out,
        "model": "training_common:dropout_net",
        "epochs": EPOCHS,
        "ema": 0.9,
        "checkpoint_every": 1,
        "log_every": 1,
        "resume": True,
    }


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(data, out)
    return out


def finish(data: Path, out: Path) -> None:
    process = training_process(settings(data, out))
    process.join()
    assert process.exitcode == 0


def assert_same(one: Path, other: Path) -> None:
    """Bit-equal weights, averages and optimiser, and the same log but for its times."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (one, other)]
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])
    moments = [state["optimizer"]["state"] for state in states]
    for number, moment in moments[0].items():
        assert all(torch.equal(value, moments[1][number][name]) for name, value in moment.items())
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (one, other)]
    assert len(logs[0]) == len(logs[1])
    assert [line.partition('"seconds"')[0] for line in logs[0]] == [line.partition('"seconds"')[0] for line in logs[1]]


def test_killed_around_writes(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Between the write and the rename of a file (log, checkpoint, curves), and on either side of them."""
    moments = [
        (name, number, when) for name in ("fsync", "replace") for number in (3, 4) for when in ("before", "after")
    ]
    for moment in moments:
        process = training_process(settings(data, tmp_path), kill_at=moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(data, tmp_path)
    assert_same(uninterrupted, tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_killed_at_any_time(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    log = tmp_path / "log.jsonl"
    for reached in (2, 5, 8, 11):
        process = training_process({**settings(data, tmp_path), "checkpoint_every": 3})
        while process.is_alive() and (not log.exists() or len(log.read_text().splitlines()) < reached):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(data, tmp_path)
    assert_same(uninterrupted, tmp_path)


def test_resumed_within_an_epoch_with_workers(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    process = training_process({**settings(data, tmp_path), "workers": 1}, kill_at=("replace", 5, "after"))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(data, tmp_path)
    assert_same(uninterrupted, tmp_path)
