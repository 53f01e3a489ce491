"""Whole attacks on whole models: images per second, where a step's time goes, and what each habit is worth."""

import pytest
import torch

from bench.cases import Unavailable
from bench.conftest import Record
from bench.models import MODELS
from bench.whole import ATTACK, GRAPH, VARIANTS, Task, measure_attack, measure_loop

SHAPES = {"quick": (1, 3, 96, 96), "default": (1, 3, 192, 192), "full": (2, 3, 512, 512), "cuda": (8, 3, 512, 512)}
STEPS = {"quick": 3, "default": 5, "full": 10}
ROUNDS = {"quick": 2, "default": 2, "full": 3}


@pytest.fixture(params=MODELS)
def task(request: pytest.FixtureRequest, device: torch.device, profile: str) -> Task:
    shape = SHAPES["cuda" if device.type == "cuda" and profile != "quick" else profile]
    return Task(request.param, shape, STEPS[profile], ROUNDS[profile], device)


@pytest.mark.parametrize("way", [ATTACK, GRAPH])
def test_attack(record: Record, task: Task, way: str) -> None:
    try:
        record(*measure_attack(task, way))
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loop(record: Record, task: Task, variant: str) -> None:
    try:
        record(*measure_loop(task, variant))
    except Unavailable as reason:
        pytest.skip(str(reason))
