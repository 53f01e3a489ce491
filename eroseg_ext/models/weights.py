"""Weights from files into a model, whatever their names begin with there and whatever else the file holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from eroseg_ext.utils import atomic_files
from eroseg_ext.utils.validate import warn

State = dict[str, Tensor]
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile and others put into names, at any depth."""
_AVERAGES = {"ema", "teacher"}
"""An average over the training is what its end would have saved: it is taken where others fit as well."""
_AUXILIARY = re.compile(r"(^|[._])aux")
_COUNTERS = re.compile(r"(^|\.)(n_averaged|num_batches_tracked)$")
"""Numbers that are no weights: a model works without them."""


class Fit(NamedTuple):
    """The weights of a file that fit a model's names best."""

    state: State
    """under the model's names"""
    left_out: list[str]
    """names beside them that the model does not have"""
    names: list[str]
    """all that are there, for errors"""


def read_weights(path: Path) -> dict[str, State]:
    """The state dicts in a file, by the entries that lead to each.

    The file is a state dict, a dict with state dicts anywhere within, a pickled nn.Module, or in safetensors' format.
    Code that a file refers to is never imported nor run: what it would make is left out.

    Raises:
        ValueError: the file holds no weights; one sentence.
        OSError: it cannot be read.
    """
    content = atomic_files.read_tensors(path, foreign=True)
    states = dict(_states(content, ""))
    if not states:
        came = f"a dict with {', '.join(map(str, content))}" if isinstance(content, dict) and content else "none"
        raise ValueError(f"{path} holds no weights, wanted a state dict, or a dict that has one: it is {came}")
    return states


def _states(content: Any, where: str) -> Iterator[tuple[str, State]]:
    if isinstance(content, atomic_files.Foreign):
        content = dict(_of_module(content, ""))
    if isinstance(content, dict):
        of_names = ((name, value) for name, value in content.items() if isinstance(name, str))
        tensors = {name: value for name, value in of_names if isinstance(value, Tensor)}
        if tensors:
            yield where, tensors
        for name, value in content.items():
            yield from _states(value, f"{where}{name}.")


def _of_module(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of a pickled nn.Module, by name."""
    state = module.state if isinstance(module, atomic_files.Foreign) and isinstance(module.state, dict) else {}
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
    for name, child in (state.get("_modules") or {}).items():
        yield from _of_module(child, f"{prefix}{name}.")


def fit(states: dict[str, State], wanted: Iterable[str]) -> Fit:
    """The state dict and the prefix of its names that have the most of the wanted names.

    Names may have a prefix that the model's lack, as in a checkpoint of what holds the network, or lack one that all of
    the model's have, where the model itself only holds the network.
    """
    own = {_WRAPPERS.sub("", name): name for name in wanted}
    best: tuple[tuple[int, bool], State, str, str] | None = None
    for where, found in states.items():
        state = {_WRAPPERS.sub("", name): value for name, value in found.items()}
        more, less = _prefixes(state, own), _prefixes(own, state)
        for prefix, added, count in (*((p, "", n) for p, n in more.items()), *(("", p, n) for p, n in less.items())):
            is_average = not _AVERAGES.isdisjoint(re.split(r"[._]", where + prefix))
            if best is None or (count, is_average) > best[0]:
                best = (count, is_average), state, prefix, added
    if best is None:
        names = [name for state in states.values() for name in state]
        return Fit({}, names, names)
    _, state, prefix, added = best
    renamed = {name: added + name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    kept = {own[new]: state[name] for name, new in renamed.items() if new in own}
    left_out = [name for name in state if renamed.get(name) not in own and not _COUNTERS.search(name)]
    return Fit(kept, left_out, list(state))


def _prefixes(names: Iterable[str], ends: dict[str, Any]) -> Counter[str]:
    """How many of the names are one of ``ends`` after a prefix of whole parts, by prefix."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for begin in range(len(parts)):
            if ".".join(parts[begin:]) in ends:
                found["".join(f"{part}." for part in parts[:begin])] += 1
    return found


def load_states(model: nn.Module, states: dict[str, State], path: Path, name: str) -> None:
    """Loads into a model, in place, what fits it of what :func:`read_weights` found in a file.

    Args:
        model: of which auxiliary heads alone may have no weights in the file.
        states: of the file.
        path, name: of the file and the model, for errors.

    Raises:
        ValueError: weights are missing or of another shape; one sentence.

    Warns:
        UserWarning: weights are left out, or auxiliary heads stay as they are.
    """
    own = model.state_dict()
    found = fit(states, own)
    missing = [key for key in own if key not in found.state and not _COUNTERS.search(key)]
    needed = [key for key in missing if not _AUXILIARY.search(key)]
    if needed or not found.state:
        instead = f", where the file has such as {found.left_out[0]}" if found.left_out else ""
        raise ValueError(
            f"{path} does not fit model {name}: {len(missing)} of its {len(own)} weights are missing, such as "
            f"{(needed or missing)[0]}{instead}; the file's begin with {_beginnings(found.names)}, the model's with "
            f"{_beginnings(own)}"
        )
    for key, value in found.state.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{path} does not fit model {name}: size mismatch for {key}, {list(value.shape)} in the file and "
                f"{list(own[key].shape)} in the model"
            )
    for names, what in ((found.left_out, "are not the model's, and left out"), (missing, "of the model are not there")):
        if names:
            warn(f"{path}: {len(names)} weights {what}, which begin with {_beginnings(names)}")
    model.load_state_dict(found.state, strict=False)


def _beginnings(names: Iterable[str]) -> str:
    """The first parts of names, the most frequent ones first."""
    parts = [part for part, _ in Counter(name.partition(".")[0] for name in names).most_common()]
    return ", ".join(map(repr, parts[:4])) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
