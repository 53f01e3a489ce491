"""Several processes share an evaluation, and end with the figures of one."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attack_common import Batch
from evaluation_common import QUICK, Pairs
from folders import write_evaluated, write_folder
from torch import Tensor, nn

from eroseg_ext import evaluate
from eroseg_ext.cli import main
from eroseg_ext.evaluation.result_cache import ResultCache
from eroseg_ext.utils import progress
from eroseg_ext.utils.atomic_files import locked
from eroseg_ext.utils.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ["--attacks", "eroseg,mce", "--steps", "3", "--batch-size", "2", "--sanity", "2"]


def arguments(folder: Path, out: Path) -> list[str]:
    """Of ``eroseg evaluate``."""
    files = ["--data", str(folder / "data"), "--weights", str(folder / "weights.pt"), "--out", str(out)]
    return ["evaluate", *files, "--device", "cpu", *OPTIONS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``data/`` of five scenes and ``weights.pt`` of an untrained network of their 8 classes."""
    return write_evaluated(tmp_path, 5)


def command(folder: Path, out: Path, processes: int) -> subprocess.CompletedProcess[str]:
    """``eroseg evaluate`` in so many processes of torchrun, each of one thread."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *run, "-m", "eroseg_ext", *arguments(folder, out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_processes_of_torchrun_end_as_one_and_go_on_as_any_number(folder: Path, tmp_path: Path) -> None:
    one, two = (command(folder, tmp_path / name, count) for name, count in (("one", 1), ("two", 2)))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    # The table is printed once, and but for the seconds it is the same.
    assert re.sub(r"[\d.]+ \|\n", "", two.stdout) == re.sub(r"[\d.]+ \|\n", "", one.stdout)
    expected = (tmp_path / "one" / "evaluation.json").read_bytes()
    assert (tmp_path / "two" / "evaluation.json").read_bytes() == expected
    path = tmp_path / "two" / "results.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    keys = [json.loads(line)["key"] for line in kept]
    # The model, the checks, and five images clean and under two attacks: nothing was made twice.
    assert len(keys) == len(set(keys)) == 1 + 1 + 5 * 3
    path.write_text("".join(kept[:8]))
    assert command(folder, tmp_path / "two", 3).returncode == 0
    assert (tmp_path / "two" / "evaluation.json").read_bytes() == expected
    assert path.read_text().startswith("".join(kept[:8]))
    assert sorted(json.loads(line)["key"] for line in path.read_text().splitlines()) == sorted(keys)


PROGRAM = """
import os, sys, time

import torch
import torch.distributed as dist

from eroseg_ext import evaluate
from eroseg_ext.evaluation.evaluate import _Evaluator
from eroseg_ext.models import SmallDeepLab

made = []
make = _Evaluator._attacked_and_counted

def counted(self, batch, attack):
    made.extend(batch)
    time.sleep(0.3 * int(os.environ["RANK"]))
    return make(self, batch, attack)

_Evaluator._attacked_and_counted = counted
data, *folders = sys.argv[1:]
torch.manual_seed(0)
model = SmallDeepLab(8, width=8)
for folder in folders[:2]:
    evaluate(model, data, out=folder, steps=3, attacks=["mce"], batch_size=1, sanity=0)
dist.init_process_group("gloo")
result = evaluate(model, data, out=folders[2], steps=3, attacks=["mce"], batch_size=1, sanity=0)
assert dist.is_initialized() and len(result.images) == 3
# Three images, clean and attacked, in three evaluations: half of them, also where the other process is slow.
assert len(made) == 9, made
"""


def test_evaluate_in_a_script_of_torchrun_again_and_again(tmp_path: Path) -> None:
    """Before and after the script joins its processes itself; the models are of one seed."""
    data = write_folder(tmp_path / "data", 3)
    (tmp_path / "script.py").write_text(PROGRAM)
    folders = [tmp_path / name for name in "abc"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*run, tmp_path / "script.py", data, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len({(folder / "evaluation.json").read_bytes() for folder in folders}) == 1


LONELY = """
import os, sys, time
from datetime import timedelta
import torch
from eroseg_ext import evaluate
from eroseg_ext.utils import processes

processes.PATIENCE = timedelta(seconds=1)
data, out = (torch.rand(2, 3, 8, 8), torch.ones(2, 8, 8).long()), sys.argv[1]
settings = {"steps": 1, "attacks": ["mce"], "sanity": 0}
if os.environ["RANK"] == "0":
    evaluate(torch.nn.Conv2d(3, 4, 1), data, out=out, shard=(0, 1), **settings)
    evaluate(torch.nn.Conv2d(3, 4, 1), data, **settings)
    evaluate(torch.nn.Conv2d(3, 4, 1), data, out=out, **settings)
"""


def test_one_process_of_torchrun_evaluates_alone_if_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LONELY)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*run, tmp_path / "script.py", tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ValueError: of 2 processes that torchrun started some did not call evaluate" in done.stderr
    assert "line 14" in done.stderr, done.stderr
    assert (tmp_path / "out" / "evaluation.json").exists()


class Counted(nn.Module):
    """A network that counts the images it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return self.net(images)


@pytest.fixture
def pairs(batch: Batch) -> Pairs:
    return Pairs(batch[0].cpu(), batch[1].cpu())


def test_after_all_shards_a_whole_run_computes_nothing(net: nn.Module, pairs: Pairs, tmp_path: Path) -> None:
    settings = {**QUICK, "batch_size": 1, "sanity": 2}
    expected = evaluate(net, pairs, **settings)
    made = []
    for shard in ("1/2", (0, 2)):
        model = Counted(net)
        assert evaluate(model, pairs, out=tmp_path, shard=shard, **settings) is None
        made.append((tmp_path / "results.jsonl").read_bytes().count(b"\n"))
    assert not (tmp_path / "evaluation.json").exists()
    # The model and the checks, and half of the images clean and under three attacks; then the other half.
    assert made == [1 + 1 + 6, 1 + 1 + 12]
    model = Counted(net)
    # Also as batches of another size.
    result = evaluate(model, pairs, out=tmp_path, **{**settings, "batch_size": 3})
    assert model.seen == [1, 1, 1]  # those that tell the model from others
    assert (result.clean, result.rows, result.worst) == (expected.clean, expected.rows, expected.worst)
    assert (tmp_path / "evaluation.json").exists()


def test_shards_run_at_once_and_a_whole_evaluation_alone(net: nn.Module, pairs: Pairs, tmp_path: Path) -> None:
    with locked(tmp_path, shared=True):
        assert evaluate(net, pairs, out=tmp_path, shard="0/2", **QUICK) is None
        with pytest.raises(ValueError, match="is in use by"):
            evaluate(net, pairs, out=tmp_path, **QUICK)
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by"):
        evaluate(net, pairs, out=tmp_path, shard="1/2", **QUICK)


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", (0, 0), (1, 2, 3), 5])
def test_wrong_shard(net: nn.Module, pairs: Pairs, tmp_path: Path, shard: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shard is {shard!r}, wanted i/n with i from 0 to n - 1")):
        evaluate(net, pairs, out=tmp_path / "out", shard=shard, **QUICK)  # type: ignore[call-overload]
    assert not (tmp_path / "out").exists()


def test_shard_needs_out(net: nn.Module, pairs: Pairs) -> None:
    with pytest.raises(ValueError, match="out is None, wanted a folder that the shares are kept in"):
        evaluate(net, pairs, shard="0/2", **QUICK)


def test_shard_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*arguments(folder, tmp_path / "out"), "--images", "2"]
    assert main.main([*given, "--shard", "2/2"]) == 2
    assert "eroseg: --shard is '2/2', wanted i/n" in capsys.readouterr().err
    assert main.main([*given, "--shard", "0/2"]) == 0
    assert capsys.readouterr().out == f"share 0/2 is in {tmp_path / 'out'}\n"


def test_whoever_is_first_to_record_a_result_has_it(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultCache(path) as first, ResultCache(path) as second:
        first.put("a", "of the first", 1)
        second.put("a", "of the second", 2)
        second.put("b", "of the second", 3)
        assert dict(second) == {"a": 1, "b": 3}
        first.read()
        assert dict(first) == {"a": 1, "b": 3}
    assert path.read_bytes().count(b"\n") == 2


def test_a_line_that_a_killed_process_left_is_cut_off_by_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultCache(path) as cache:
        cache.put("a", "whole", 1)
        with path.open("ab") as file:
            file.write(b'{"key": "b", "wh')
        cache.put("c", "whole", 3)
    with ResultCache(path) as cache:
        assert dict(cache) == {"a": 1, "c": 3}
    assert path.read_bytes().count(b"\n") == 2


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(stream: io.StringIO) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(total=2, unit="image") as bar:
            bar.set_description("clean", refresh=False)
            bar.update()
            bar.update()
        return stream.getvalue()

    assert "\rclean: 100%|" in shown(Terminal())
    assert not shown(io.StringIO())
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert re.fullmatch(r"0/2 images .*\n(clean: [12]/2 images .*\n)*clean: 2/2 images .*\n\n", shown(io.StringIO()))
