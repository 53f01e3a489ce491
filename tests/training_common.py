"""What the tests of training share: small networks, and runs in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eroseg_ext.data import datasets
from eroseg_ext.data.sources import SegmentationFolder
from eroseg_ext.training.samples import Reader

Model = TypeVar("Model", bound=nn.Module)
CLASSES = 8
SMALL = {"size": (24, 32), "classes": CLASSES, "batch_size": 4, "eps": 2 / 255, "val_attack_steps": 2}
SMALL |= {"threads": 1, "device": "cpu"}
"""Settings of a run of a second; on the CPU, where a run is the same each time, to the last bit."""


def plain_net(classes: int = CLASSES) -> nn.Module:
    """Three convolutions without BatchNorm: an image's logits do not depend on its neighbours in the batch."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1)
    )


def dropout_net(classes: int = CLASSES) -> nn.Module:
    """With BatchNorm and dropout: everything that has state or chance."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(8, classes, 3, padding=1),
    )


class AuxiliaryNet(nn.Module):
    """Half-size logits in a dict, beside an auxiliary head that the loss does not see, as torchvision's models."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, num_classes, 1)
        self.auxiliary = nn.Conv2d(8, num_classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {"out": self.head(features), "aux": self.auxiliary(features)}


def records(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def seeded(make: Callable[[], Model]) -> Model:
    """A model with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def reader(data: Path) -> Reader:
    """Reads the validation images of a folder."""
    to_class = datasets.class_map("folder", CLASSES, 255)
    return Reader(SegmentationFolder(data, SMALL["size"]), to_class, False)


def weights(folder: Path) -> dict[str, Tensor]:
    """The final weights of a run."""
    state: dict[str, Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return state


def furthest_apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two models' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def training_process(
    settings: dict[str, Any],
    kill_at: tuple[str, int, str] | None = None,
    environment: dict[str, str] | None = None,
) -> multiprocessing.context.ForkServerProcess:
    """Starts a training in a process of its own, forked from one that has torch loaded.

    Args:
        settings: of :func:`eroseg_ext.train`.
        kill_at: a function of ``os``, the number of its call, ``before`` or ``after``: there the process kills itself.
        environment: variables to set.
    """
    return _process(_train, settings, kill_at, environment or {})


def command_process(arguments: list[str]) -> multiprocessing.context.ForkServerProcess:
    """Starts the command ``eroseg`` in such a process."""
    return _process(_command, arguments)


def _process(target: Callable[..., None], *arguments: Any) -> multiprocessing.context.ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    # What optimisers import when they are made; a second in every process otherwise.
    context.set_forkserver_preload(["eroseg_ext.training", "torch._dynamo"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def _command(arguments: list[str]) -> None:
    from eroseg_ext.cli import main

    # At once: an interrupt that comes after the end is none of the command's.
    os._exit(main.main(arguments))


def _train(settings: dict[str, Any], kill_at: tuple[str, int, str] | None, environment: dict[str, str]) -> None:
    from eroseg_ext import training

    os.environ.update(environment)
    if kill_at is not None:
        _kill_self_at(*kill_at)
    training.train(say=lambda _: None, **settings)


def _kill_self_at(name: str, number: int, when: str) -> None:
    original: Callable[..., Any] = getattr(os, name)
    calls = 0

    def deadly(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, deadly)
