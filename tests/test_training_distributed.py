"""Several processes share a batch, and end with the weights of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_folder
from training_common import SMALL, furthest_apart, training_process, weights

from eroseg_ext.utils.validate import usable_device


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), 13)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def run(world: int, **settings: Any) -> dict[str, Any]:
    """Trains in ``world`` processes; the summary."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    processes = [training_process(settings, environment={**rendezvous, "RANK": str(rank)}) for rank in range(world)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * world
    summary: dict[str, Any] = json.loads((settings["out"] / "summary.json").read_text())
    return summary


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "learning_rate": 1e-3, "adv_fraction": 0.5, "accumulate": 2, "batch_size": 8},
        {"optimizer": "sgd", "adv_fraction": 1.0, "class_weights": "median-frequency", "ema": 0.9},
        {"model": "training_common:AuxiliaryNet", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)},
        {"optimizer": "sgd", "replays": 2, "loss_balance": 0.5, "adv_fraction": 0.75, "epochs": 3},
    ],
    ids=["adamw, half attacked, accumulated", "sgd, all attacked, weighted", "auxiliary head, normalised", "replays"],
)
def test_two_processes_train_as_one(data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    common = {**SMALL, "data": data, "val": data, "model": "training_common:plain_net", "epochs": 6, **settings}
    one = run(1, **common, out=tmp_path / "one")
    two = run(2, **common, out=tmp_path / "two")
    apart = furthest_apart(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert apart < 1e-5
    assert one["updates"] == two["updates"] == common["epochs"] * (13 // common["batch_size"])
    assert one["validation"]["accuracy"] == pytest.approx(two["validation"]["accuracy"], abs=0.05)
    assert two["environment"]["processes"] == 2


def test_each_process_takes_its_own_gpu_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.tensor(0))  # there may be no such GPU
    found = [str(usable_device(name, gpu=1)) for name in ("cuda", "cuda:0", "cpu")]
    assert found == ["cuda:1", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(usable_device(None, gpu=1)) == "cuda:1"
    assert str(usable_device(None)) == "cuda"


def torchrun(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node 2 -m eroseg_ext train`` for far too many epochs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "eroseg_ext", "train", "--data", str(data), "--out", str(out), "--model", "tiny"]
    command += ["--size", "24x32", "--batch-size", "4", "--epochs", "100000", "--log-every", "1", "--device", "cpu"]
    return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_job(data: Path, tmp_path: Path) -> None:
    job = torchrun(data, tmp_path / "out")
    log = tmp_path / "out" / "log.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    victim = max(children(job.pid))
    os.kill(victim, signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert f"pid: {victim}" in output or f"pid {victim}" in output, output
    assert "SIGKILL" in output


def test_bad_file_in_one_process_ends_the_job(data: Path, tmp_path: Path) -> None:
    bad = write_folder(tmp_path / "bad", 8)
    (bad / "images" / "05.png").write_bytes(b"not an image")
    output, _ = (job := torchrun(bad, tmp_path / "out", "--classes", "8")).communicate(timeout=60)
    assert job.returncode != 0
    assert f"eroseg: {bad / 'images' / '05.png'} cannot be read as an image" in output
