"""The model as training calls it: its output read, its time on the clock, its logits at their own size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folders import write_folder
from torch import Tensor, nn
from training_common import CLASSES, SMALL, plain_net, reader, records, seeded

from eroseg_ext import attack, train
from eroseg_ext.training import TrainSettings
from eroseg_ext.training import clock as phases
from eroseg_ext.training.clock import Clock
from eroseg_ext.training.distributed import Processes
from eroseg_ext.training.network import Network
from eroseg_ext.training.validate import validate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), 8)


class _Slow(nn.Module):
    """A model whose forward takes 3 seconds and whose backward 5 of a clock that does not go by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, CLASSES, 1)
        self.now = 0.0

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def forward(self, images: Tensor) -> Tensor:
        self.wait(3)
        images = images * 1
        images.register_hook(lambda _: self.wait(5))
        logits: Tensor = self.convolution(images)
        return logits


def test_the_clock_tells_the_models_time_from_the_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Slow()
    monkeypatch.setattr(time, "perf_counter", lambda: model.now)
    clock = Clock(torch.device("cpu"))
    network = Network(model, clock)
    clock.switch(phases.ATTACK_KERNELS)
    model.wait(1)
    attack(network, torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64), steps=4, backend="reference")
    model.wait(2)
    clock.switch(phases.OTHER)
    booked = {name: seconds for name, seconds in clock.seconds().items() if seconds}
    assert booked == {phases.ATTACK_MODEL: 4 * (3 + 5), phases.ATTACK_KERNELS: 1 + 2}


class Probabilities(nn.Module):
    """[auxiliary, probabilities at a quarter of the size], or the logits at that size."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.net, self.bare = plain_net(), bare

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)[:, :, ::4, ::4]
        return logits if self.bare else [0 * logits, logits.softmax(1)]


def test_training_reads_the_output_as_the_settings_say(data: Path, tmp_path: Path) -> None:
    def losses(name: str, **settings: Any) -> list[float]:
        model = seeded(lambda: Probabilities(bare=name == "bare"))
        train(model, data=data, out=tmp_path / name, say=lambda _: None, **{**SMALL, "epochs": 1, **settings})
        return [record["loss"] for record in records(tmp_path / name) if "loss" in record]

    read = losses("read", output_key=1, output="probabilities", align_corners=True)
    assert read == pytest.approx(losses("bare", align_corners=True), rel=1e-3)


class Upsampling(nn.Module):
    """Logits at a quarter of the size, or these upsampled."""

    def __init__(self, upsamples: bool) -> None:
        super().__init__()
        self.net, self.upsamples = plain_net(), upsamples

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(F.avg_pool2d(images, 4))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear") if self.upsamples else logits


def test_no_update_and_no_validation_makes_logits_of_full_size(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: str
) -> None:
    def losses(upsamples: bool, **settings: Any) -> list[float]:
        name = "-".join(map(str, (upsamples, *settings.values())))
        model = seeded(lambda: Upsampling(upsamples))
        train(model, data=data, out=tmp_path / name, say=lambda _: None, **{**SMALL, "epochs": 1, **settings})
        config = TrainSettings(data=data, out=tmp_path, **SMALL, **settings)
        validate(config, model, CLASSES, reader(data), Processes(rank=0, world=1, device=torch.device("cpu")), 0)
        return [record["loss"] for record in records(tmp_path / name) if "loss" in record]

    whole = losses(True, backend="reference", see_through=False)
    for upsampled in ("LogitMap.at", "Deferred.values_now"):
        monkeypatch.setattr(f"eroseg_ext.models.see_through.{upsampled}", lambda *_: pytest.fail("full size"))
    for upsamples in (True, False):
        assert losses(upsamples, backend=fused) == pytest.approx(whole, rel=1e-2)
