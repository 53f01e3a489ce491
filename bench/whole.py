"""Whole attacks on whole models: what is measured of each, for ``pytest bench/`` and ``python -m bench.kernels``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench import loop
from bench.cases import VOID, Unavailable, operations
from bench.loop import Habits
from bench.measure import Call, Timing, peak_memory, time_calls
from bench.models import build
from bench.peers import Budget, textbook
from bench.results import Figure
from eroseg_ext import PGD, AttackSettings, EroSeg
from eroseg_ext.attacks.classes import Attack
from eroseg_ext.models.adapter import Logits

CLASSES = 21
ATTACK, GRAPH, TEXTBOOK = "attack()", "EroSeg(model, graph=True)", "textbook PGD loop"
LOOP, PGD_LOOP, REFERENCE_LOOP = "the loop of attack()", "pgd instead of eroseg", "reference operations"


@dataclass(frozen=True)
class Way:
    """An attack object that is called again and again, as for batch after batch; None is the textbook's loop."""

    attack: type[Attack] | None
    settings: dict[str, Any] = field(default_factory=dict)
    loop: str | None = None
    """the one of ``VARIANTS`` that splits its steps"""


ATTACKS = {
    ATTACK: Way(EroSeg, {}, LOOP),
    GRAPH: Way(EroSeg, {"graph": True}, LOOP),
    "attack(backend='reference')": Way(EroSeg, {"backend": "reference"}, REFERENCE_LOOP),
    "attack(method='pgd')": Way(PGD, {}, PGD_LOOP),
    "PGD(model, graph=True)": Way(PGD, {"graph": True}, PGD_LOOP),
    TEXTBOOK: Way(None),
}


@dataclass(frozen=True)
class Variant:
    """What is changed in the loop."""

    habits: Habits = loop.BEST
    implementation: str = "fused"
    method: str = "eroseg"
    bf16: bool = False


VARIANTS = {
    LOOP: Variant(),
    "weight gradients too (`.backward()`)": Variant(Habits(input_gradient_only=False)),
    "a fresh gradient buffer in each step": Variant(Habits(kept_buffer=False)),
    REFERENCE_LOOP: Variant(implementation="reference"),
    "these three together": Variant(Habits(False, False), "reference"),
    "bf16 autocast": Variant(bf16=True),
    PGD_LOOP: Variant(method="pgd"),
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


class _OnlyLogits(nn.Module):
    """The model as the textbook's loop wants it: its output the logits at the images' size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return Logits(self.model)(images, (images.shape[-2], images.shape[-1]))


def _caller(way: Way, model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Call:
    if way.attack is not None:
        bound = way.attack(model, steps=steps, **way.settings)
        return lambda: bound(images, labels)
    whole = _OnlyLogits(model)

    def run() -> None:
        textbook(whole, images, labels, Budget(steps=steps, classes=CLASSES))
        whole.zero_grad()  # or the weights' gradients would be there before the next run

    return run


def measure_attack(task: Task, name: str) -> tuple[Figure, Timing]:
    """Time per step of whole calls, images/s, and memory: torch's in all, and beyond the model's own passes.

    Raises Unavailable with the reason.
    """
    way = ATTACKS[name]
    if "graph" in way.settings and task.device.type != "cuda":
        raise Unavailable("a CUDA graph needs CUDA")
    images, labels = task.inputs()
    model, description = build(task.model, CLASSES, task.device)
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    whole = time_calls([_caller(way, model, images, labels, task.steps)], task.device, seconds=0, least=task.rounds)
    reserved = torch.cuda.max_memory_reserved() if task.device.type == "cuda" else None
    timing = Timing(tuple(value / task.steps for value in whole.seconds))
    kept = torch.zeros(len(images), CLASSES, *images.shape[2:], device=task.device)
    # More steps hold no more at once.
    short = _caller(way, model, images, labels, steps=2)
    extra = {
        "model": description,
        "steps": task.steps,
        "images/s": round(len(images) / whole.median, 4),
        "reserved_bytes": reserved,
        "peak_bytes": peak_memory(short, task.device),
        "model_peak_bytes": peak_memory(
            lambda: loop.model_only(model, images, kept, AttackSettings(steps=2)), task.device
        ),
        "logits_bytes": kept.nbytes,
    }
    return task.figure(name, timing, extra), timing


def measure_loop(task: Task, name: str) -> tuple[Figure, Timing]:
    """Time per step of the loop in one of its variants, with the split; raises Unavailable with the reason."""
    chosen = VARIANTS[name]
    ops = operations(chosen.implementation, task.device)
    model, description = build(task.model, CLASSES, task.device)
    config = AttackSettings(method=chosen.method, steps=task.steps)
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
