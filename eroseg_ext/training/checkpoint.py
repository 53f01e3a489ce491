"""The state of a run on disk: the last checkpoint and the one before it, and what one must hold to be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eroseg_ext.training import clock as phases
from eroseg_ext.utils import atomic_files
from eroseg_ext.utils.validate import check_integer, check_number

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
_ENTRIES = {
    "model": dict,
    "optimizer": dict,
    "ema": dict | None,
    "done": int,
    "seconds": dict,
    "settings": dict,
    "data": str,
}
_MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}
"""What an optimiser keeps of a parameter."""


def exists(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / NAME).exists() or (folder / PREVIOUS).exists()


def write(folder: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint; the last one becomes the one before it."""
    atomic_files.write_tensors(folder / NAME, state, keep=folder / PREVIOUS)


def read(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a run, its entries of the right types.

    Raises ValueError if it is damaged or no checkpoint; one sentence, which names the one before it if that is good.
    """
    try:
        return _read(folder / NAME)
    except (ValueError, OSError) as error:
        try:
            done = _read(folder / PREVIOUS)["done"]
        except (ValueError, OSError):
            raise ValueError(f"{error}; there is no other checkpoint, start again in another folder") from error
        raise ValueError(
            f"{error}; {folder / PREVIOUS}, of update {done}, is good: rename it to {NAME} and resume"
        ) from error


def check(
    folder: Path, state: dict[str, Any], own: dict[str, Any], optimizer: torch.optim.Optimizer, updates: int
) -> None:
    """Raises ValueError unless a checkpoint that was read fits a run of so many updates with this state."""
    moments, known = state["optimizer"].get("state"), {}
    for number, parameter in enumerate(value for group in optimizer.param_groups for value in group["params"]):
        if isinstance(moments, dict) and number in moments:  # only parameters that have had a gradient are
            like = torch.zeros_like(parameter, device="cpu")
            known[number] = {name: torch.zeros(()) if name == "step" else like for name in _MOMENTS[type(optimizer)]}
    found, wanted = (
        {place: form for name, value in parts.items() for place, form in _forms(value, name)}
        for parts in (
            {"model": state["model"], "ema": state["ema"], "the optimizer's state": moments},
            {"model": own["model"], "ema": own["ema"], "the optimizer's state": known or {0: {}}},
        )
    )
    try:
        check_integer("done", state["done"], 1, updates)
        for place in sorted(found.keys() | wanted.keys()):
            came, fits = found.get(place, "missing"), wanted.get(place, "unknown")
            if came != fits:
                raise ValueError(f"{place} is {came}, wanted {fits}" if fits != "unknown" else f"{place} is unknown")
    except ValueError as error:
        raise ValueError(f"{folder / NAME} does not fit this run: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    state = atomic_files.read_tensors(path)
    try:
        for name, kind in _ENTRIES.items():
            if not (isinstance(state, dict) and isinstance(state.get(name, ()), kind)):
                raise ValueError(f"it has no {name!r}, wanted {getattr(kind, '__name__', kind)}")
        check_integer("done", state["done"], 1)
        for phase in phases.PHASES:
            check_number(f"seconds of {phase!r}", state["seconds"].get(phase), 0, math.inf)
        try:
            json.dumps(state["settings"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings are not plain values: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of a training: {error}") from error
    return dict(state)


def _forms(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """What kind of thing is at each place of nested dicts, in words."""
    form = f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        form = f"{'' if value.layout == torch.strided else value.layout} {'meta ' if value.is_meta else ''}tensor"
        form = f"a {form.strip()} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    yield place, form.replace("OrderedDict", "dict")
    for key, entry in value.items() if isinstance(value, dict) else ():
        yield from _forms(entry, f"{place}[{key!r}]")
