"""What an evaluation keeps on disk, and that a killed one ends like any other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_common import Batch
from conftest import CLASSES
from evaluation_common import QUICK, Pairs
from folders import write_folder
from PIL import Image
from torch import Tensor, nn

from eroseg_ext import evaluate
from eroseg_ext.data.sources import NamedDataset, SegmentationFolder
from eroseg_ext.utils.atomic_files import locked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pairs(batch: Batch) -> Pairs:
    return Pairs(batch[0].cpu(), batch[1].cpu())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_second_call_computes_nothing(net: nn.Module, pairs: Pairs, tmp_path: Path) -> None:
    first = evaluate(net, pairs, out=tmp_path, batch_size=2, **{**QUICK, "sanity": 2})
    before = (tmp_path / "results.jsonl").read_bytes()
    # The model, clean and three attacks on three images, and the sanity checks.
    assert len(lines(tmp_path)) == 14
    written = (tmp_path / "evaluation.json").read_bytes()
    again = evaluate(net, pairs, out=tmp_path, batch_size=2, **{**QUICK, "sanity": 2})
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert (tmp_path / "evaluation.json").read_bytes() == written
    assert again == first


def test_files_read_in_another_way_are_computed_anew(pixelwise: nn.Module, tmp_path: Path) -> None:
    """At another size, or with another class map: ADE20K's values are one more than its classes."""
    rng = np.random.default_rng(0)
    for part, values in (("images", rng.integers(0, 256, (20, 24, 3))), ("labels", rng.integers(1, 4, (20, 24)))):
        (tmp_path / part).mkdir()
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / part / "a.png")
    settings = {**QUICK, "attacks": ["pgd"], "ignore_index": -1}
    for data in (
        SegmentationFolder(tmp_path),
        SegmentationFolder(tmp_path, (10, 12)),
        NamedDataset("ade20k", tmp_path),
        NamedDataset("ade20k", tmp_path, size=(10, 12)),
    ):
        found, expected = (evaluate(pixelwise, data, out=out, **settings) for out in (tmp_path / "out", None))
        assert (found.clean, found.rows, found.worst) == (expected.clean, expected.rows, expected.worst)


def test_a_further_attack_computes_only_that(net: nn.Module, pairs: Pairs, tmp_path: Path) -> None:
    evaluate(net, pairs, attacks=["eroseg"], out=tmp_path, **QUICK)
    result = evaluate(net, pairs, attacks=["js", "eroseg"], out=tmp_path, **QUICK)
    # The model, and three images clean and under each attack.
    assert len(lines(tmp_path)) == 10
    assert result.as_json() == evaluate(net, pairs, attacks=["js", "eroseg"], **QUICK).as_json()


def change(settings: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {**settings, **changed}


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 5},
        {"eps": 4 / 255},
        {"restarts": 2},
        {"seed": 1},
        {"norm": "l2"},
        {"ignore_index": 1},
        {"model_description": {"name": "another"}},
        {"clip": (-1.0, 1.0)},
        {"mean": (0.5,), "std": (0.5,)},
        {"autocast": torch.bfloat16},
        {"backend": "reference"},
        {"attacks": {"pgd": {"method": "pgd", "random_start": False}}},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_a_changed_setting_never_mixes(
    pixelwise: nn.Module, batch: Batch, tmp_path: Path, changed: dict[str, Any]
) -> None:
    # Every label is a class, also with ignore_index 1.
    pairs = Pairs(batch[0].cpu(), batch[1].cpu() % CLASSES)
    plain = {**QUICK, "attacks": ["pgd"]}
    evaluate(pixelwise, pairs, out=tmp_path, **plain)
    mixed = evaluate(pixelwise, pairs, out=tmp_path, **change(plain, **changed))
    alone = evaluate(pixelwise, pairs, **change(plain, **changed))
    assert mixed.as_json() == alone.as_json()
    assert sum(line["what"].startswith("pgd") for line in lines(tmp_path)) == 6


class Rearranged(nn.Module):
    """Four classes in the order, scaled and shifted as attributes say, which are no weights and show in no repr."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2, 3), factor: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.order, self.factor, self.bias = order, factor, bias

    def forward(self, images: Tensor) -> Tensor:
        logits = self.factor * torch.cat([4 * images, images[:, :1] + 1], 1)
        logits[:, 2] += self.bias
        return logits[:, self.order]


@pytest.mark.parametrize(
    "changed",
    [{"factor": 1.001}, {"factor": -1.0}, {"order": (1, 0, 2, 3)}, {"order": (0, 1, 3, 2)}, {"bias": 0.005}],
    ids=str,
)
def test_a_changed_attribute_never_mixes(pairs: Pairs, tmp_path: Path, changed: dict[str, Any]) -> None:
    quick = {**QUICK, "attacks": ["mce"]}
    evaluate(Rearranged(), pairs, out=tmp_path, **quick)
    before = len(lines(tmp_path))
    mixed = evaluate(Rearranged(**changed), pairs, out=tmp_path, **quick)
    assert mixed.as_json() == evaluate(Rearranged(**changed), pairs, **quick).as_json()
    assert len(lines(tmp_path)) == 2 * before
    # Neither of the two is computed again.
    for settings in ({}, changed):
        evaluate(Rearranged(**settings), pairs, out=tmp_path, **quick)
    assert len(lines(tmp_path)) == 2 * before


def test_a_changed_image_never_mixes(pairs: Pairs, tmp_path: Path) -> None:
    evaluate(Rearranged(), pairs, attacks=["mce"], out=tmp_path, **QUICK)
    before = len(lines(tmp_path))
    pairs.labels[1, 10, 10] = (pairs.labels[1, 10, 10] + 1) % CLASSES
    evaluate(Rearranged(), pairs, attacks=["mce"], out=tmp_path, **QUICK)
    # That image, clean and attacked.
    assert len(lines(tmp_path)) == before + 2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_threads_batches_and_rounding_do_not_matter(
    net: nn.Module, pairs: Pairs, tmp_path: Path, autocast: torch.dtype | None
) -> None:
    class Rounded(nn.Module):
        """Last bits that are others in every run, as another load of the machine may leave them."""

        def __init__(self, error: float) -> None:
            super().__init__()
            self.net = net
            self.error = error

        def forward(self, images: Tensor) -> Tensor:
            logits = self.net(images)
            return logits + self.error * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)

    first = evaluate(Rounded(0.0), pairs, out=tmp_path, autocast=autocast, batch_size=3, **QUICK)
    kept = (tmp_path / "results.jsonl").read_bytes()
    threads = torch.get_num_threads()
    try:
        for count, batch_size, error in ((2, 3, 0.0), (1, 2, 0.0), (3, 1, 1e-6)):
            torch.set_num_threads(count)
            settings = {**QUICK, "autocast": autocast, "batch_size": batch_size}
            again = evaluate(Rounded(error), pairs, out=tmp_path, **settings)
            assert torch.get_num_threads() == count
            assert (again.rows, again.environment) == (first.rows, first.environment)
            assert (tmp_path / "results.jsonl").read_bytes() == kept
    finally:
        torch.set_num_threads(threads)


def test_changed_weights_never_mix(net: nn.Module, pairs: Pairs, tmp_path: Path) -> None:
    evaluate(net, pairs, attacks=["mce"], out=tmp_path, **QUICK)
    with torch.no_grad():
        net[0].bias[0] += 1e-6
    evaluate(net, pairs, attacks=["mce"], out=tmp_path, **QUICK)
    assert len({line["key"] for line in lines(tmp_path)}) == len(lines(tmp_path)) == 14


PROGRAM = """
import sys, torch
from pathlib import Path
from eroseg_ext import evaluate
from eroseg_ext.models import SmallDeepLab
torch.set_num_threads(1)
torch.manual_seed(0)
evaluate(SmallDeepLab(8, width=8), Path(sys.argv[1]), out=sys.argv[2], attacks=["eroseg", "mce", "js"],
         eps=[2 / 255, 8 / 255], steps=6, batch_size=2, sanity=2)
"""


def start(data: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(data), str(out)])


def test_killed_at_any_time_it_ends_like_any_other(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 5)
    assert start(data, tmp_path / "whole").wait() == 0
    killed = tmp_path / "killed"
    path = killed / "results.jsonl"
    kills = 0
    for target in (1, 12):
        process = start(data, killed)
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < target):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (killed / "evaluation.json").exists()
    assert kills == 2
    done = path.read_bytes()
    # As if the last kill had come in the midst of a line.
    path.write_bytes(done + b'{"key": "0123", "what": "mce, eps 2/2')
    assert start(data, killed).wait() == 0
    assert (killed / "evaluation.json").read_bytes() == (tmp_path / "whole" / "evaluation.json").read_bytes()
    # Nothing that was finished has been done again, and each piece is there once.
    assert path.read_bytes().startswith(done[: done.rfind(b"\n") + 1])
    keys = [line["key"] for line in lines(killed)]
    assert len(keys) == len(set(keys)) == 1 + 7 * 5 + 1
    assert set(keys) == {line["key"] for line in lines(tmp_path / "whole")}


def test_a_damaged_result_is_told_and_made_anew(net: nn.Module, pairs: Pairs, tmp_path: Path) -> None:
    first = evaluate(net, pairs, out=tmp_path, **QUICK)
    whole = (tmp_path / "results.jsonl").read_text()
    key = lines(tmp_path)[1]["key"]
    damaged = re.sub(rf'("key": "{key}".*?"counts": \[\[\d+, )(\d+)', lambda found: f"{found[1]}1{found[2]}", whole)
    assert len(damaged) == len(whole) + 1
    (tmp_path / "results.jsonl").write_text(damaged)
    with pytest.warns(UserWarning, match=r"results\.jsonl is damaged at line 2: what was there is made anew"):
        assert evaluate(net, pairs, out=tmp_path, **QUICK).as_json() == first.as_json()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(whole.splitlines()) + 1


def test_one_evaluation_at_a_time_in_a_folder(net: nn.Module, pairs: Pairs, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on .* since "):
        evaluate(net, pairs, out=tmp_path, **QUICK)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_stochastic_model_is_reproducible(pairs: Pairs, tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([images, images[:, :1]], 1) + 0.1 * torch.randn(len(images), 4, *images.shape[-2:])

    found = [evaluate(Noisy(), pairs, batch_size=1, out=tmp_path / name, **QUICK) for name in ("a", "b")]
    assert found[0].as_json() == found[1].as_json()
    # Half of the work is missing: the rest must not depend on what was drawn for it.
    kept = (tmp_path / "b" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "results.jsonl").write_text("".join(kept[::2]))
    assert evaluate(Noisy(), pairs, batch_size=1, out=tmp_path / "b", **QUICK).as_json() == found[0].as_json()
