"""The state of a run on disk: the last checkpoint and the one before it, and what one must hold to be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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

    Raises:
        ValueError: it is damaged or no checkpoint; one sentence, which names the one before it if that is good.
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
    """Raises ValueError unless a checkpoint that was read fits a run.

    Args:
        folder: of the run.
        state: what :func:`read` returned.
        own: ``model`` and ``ema``, the run's state dicts.
        optimizer: the run's.
        updates: how many the run has.
    """
    try:
        check_integer("done", state["done"], 1, updates)
        for entry in ("model", "ema"):
            if (state[entry] is None) != (own[entry] is None):
                raise ValueError(f"{entry} is {_form(state[entry])}, wanted {_form(own[entry])}")
            _check_alike(entry, state[entry] or {}, own[entry] or {})
        _check_moments(state["optimizer"].get("state"), optimizer)
    except ValueError as error:
        raise ValueError(f"{folder / NAME} does not fit this run: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    state = atomic_files.read_tensors(path)
    try:
        if not isinstance(state, dict):
            raise ValueError(f"it is {_form(state)}, wanted a dict")
        for name, kind in _ENTRIES.items():
            if name not in state:
                raise ValueError(f"it has no {name!r}")
            if not isinstance(state[name], kind):
                raise ValueError(f"{name} is {_form(state[name])}, wanted {getattr(kind, '__name__', kind)}")
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


def _check_alike(name: str, found: Mapping[Any, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError unless both have the same entries, tensors of the same shapes and types."""
    if odd := found.keys() ^ own.keys():
        key = min(odd, key=str)
        raise ValueError(f"{name} has {'an unknown' if key in found else 'no'} {key!r}")
    for key, value in own.items():
        if _form(found[key]) != _form(value):
            raise ValueError(f"{key!r} of {name} is {_form(found[key])}, wanted {_form(value)}")


def _check_moments(found: Any, optimizer: torch.optim.Optimizer) -> None:
    """Of the parameters that have had a gradient: there may be fewer than all."""
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    if not isinstance(found, dict) or not found or not found.keys() <= parameters.keys():
        raise ValueError(f"the optimizer's state is not of {len(parameters)} parameters")
    for number, moments in found.items():
        own = torch.zeros_like(parameters[number], device="cpu")
        wanted = {name: torch.zeros(()) if name == "step" else own for name in _MOMENTS[type(optimizer)]}
        if not isinstance(moments, dict):
            raise ValueError(f"the optimizer's state of parameter {number} is {_form(moments)}, wanted a dict")
        _check_alike(f"the optimizer's state of parameter {number}", moments, wanted)


def _form(value: Any) -> str:
    """What kind of thing it is, in words."""
    if value is None:
        return "None"
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    usual = value.layout == torch.strided and not value.is_meta
    kind = str(value.dtype).removeprefix("torch.")
    return f"a tensor {kind} {list(value.shape)}{'' if usual else f' {value.layout} {value.device}'}"
