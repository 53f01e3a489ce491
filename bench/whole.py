"""Whole attacks on whole models: what is measured of each, for ``pytest bench/`` and ``python -m bench.kernels``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bench import loop
from bench.cases import VOID, Unavailable, operations
from bench.loop import Habits
from bench.measure import Timing, peak_memory, time_calls
from bench.models import build
from bench.results import Figure
from eroseg_ext import AttackSettings, attack

CLASSES = 21
ATTACKS = ("attack()", "attack(graph=True)")
LOOP = "the loop of attack()"


@dataclass(frozen=True)
class Variant:
    """What is changed in the loop."""

    habits: Habits = loop.BEST
    implementation: str = "fused"
    bf16: bool = False


VARIANTS = {
    LOOP: Variant(),
    "weight gradients too (`.backward()`)": Variant(Habits(input_gradient_only=False)),
    "a fresh gradient buffer in each step": Variant(Habits(kept_buffer=False)),
    "reference operations": Variant(implementation="reference"),
    "these three together": Variant(Habits(False, False), "reference"),
    "bf16 autocast": Variant(bf16=True),
}


@dataclass(frozen=True)
class Task:
    """What is attacked, and for how long."""

    model: str
    """a name of ``bench.models.MODELS``"""
    shape: tuple[int, int, int, int]
    """``[B, 3, H, W]`` of the images"""
    steps: int
    rounds: int
    device: torch.device

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Noise, and random labels with 5 % void pixels: no speed depends on what the images show."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(self.shape, generator=generator)
        labels = torch.randint(CLASSES, (self.shape[0], *self.shape[2:]), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.05] = VOID
        return images.to(self.device), labels.to(self.device)

    def figure(self, name: str, timing: Timing, extra: dict[str, Any]) -> Figure:
        return Figure(
            suite="end_to_end",
            case=self.model,
            implementation=name,
            device=self.device.type,
            shape=list(self.shape),
            ms=timing.to_json(),
            extra=extra,
        )


def measure_attack(task: Task, way: str) -> tuple[Figure, Timing]:
    """Time per step of whole calls, images/s, and the memory beyond the model's own forward and backward pass.

    Raises Unavailable with the reason.
    """
    settings: dict[str, Any] = {"steps": task.steps}
    if way == ATTACKS[1]:
        if "graph" not in {field.name for field in fields(AttackSettings)}:
            raise Unavailable("this version of attack() has no setting graph")
        if task.device.type != "cuda":
            raise Unavailable("a CUDA graph needs CUDA")
        settings["graph"] = True
    images, labels = task.inputs()
    model, description = build(task.model, CLASSES, task.device)

    def run() -> Tensor:
        return attack(model, images, labels, **settings)

    whole = time_calls([run], task.device, seconds=0, least=task.rounds)
    timing = Timing(tuple(value / task.steps for value in whole.seconds))
    kept = torch.zeros(len(images), CLASSES, *images.shape[2:], device=task.device)
    config = AttackSettings(steps=2)
    settings["steps"] = 2  # more of them hold no more at once
    extra = {
        "model": description,
        "steps": task.steps,
        "images/s": round(len(images) / whole.median, 4),
        "peak_bytes": peak_memory(run, task.device),
        "model_peak_bytes": peak_memory(lambda: loop.model_only(model, images, kept, config), task.device),
        "logits_bytes": kept.nbytes,
    }
    return task.figure(way, timing, extra), timing


def measure_loop(task: Task, name: str) -> tuple[Figure, Timing]:
    """Time per step of the loop in one of its variants, with the split; raises Unavailable with the reason."""
    chosen = VARIANTS[name]
    ops = operations(chosen.implementation, task.device)
    model, description = build(task.model, CLASSES, task.device)
    config = AttackSettings(steps=task.steps)
    if chosen.bf16:
        config = replace(config, autocast=torch.bfloat16)
    split = loop.split(model, *task.inputs(), config, ops, chosen.habits, task.rounds)
    timing = Timing(tuple(split.steps()))
    extra = {
        "model": description,
        "parts": {part: Timing(tuple(times)).to_json() for part, times in split.parts.items()},
        "ours": Timing(tuple(split.ours())).to_json(),
    }
    return task.figure(name, timing, extra), timing
