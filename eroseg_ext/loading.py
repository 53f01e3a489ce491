"""A network to evaluate: made by name, with weights from a file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eroseg_ext.nets import DEMO_WIDTH, FULL_WIDTH, SmallDeepLab

BUILT_IN = {"small": FULL_WIDTH, "tiny": DEMO_WIDTH}
_WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and a module that holds the network put before its weights' names."""
_ENTRIES = ("ema", "model", "state_dict", "updater")
"""Where checkpoints keep the weights; an average over the training is what its end would have saved."""


def load_network(
    name: str | None = None,
    weights: Path | None = None,
    *,
    classes: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network in eval mode, on the CPU.

    Args:
        name: ``small`` or ``tiny``, the built-in :class:`eroseg_ext.nets.SmallDeepLab`, or the import path
            ``package.module:callable`` of what returns an nn.Module. None: built-in, its width and classes as the
            weights tell.
        weights: file with a state dict, or a checkpoint: a dict that holds one as ``ema``, ``model`` or
            ``state_dict``. None: as made.
        classes: number of classes of a built-in network without weights.
        model_args: keywords for the callable.

    Raises:
        ValueError: the callable or the file is not as described, or they do not go together; one sentence.
        OSError: the file cannot be read.
    """
    state = None if weights is None else _read(weights)
    model: nn.Module
    if name is None or name in BUILT_IN:
        model = _built_in(name, weights, state, classes)
    else:
        model = _imported(name, model_args or {})
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit model {name}: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no file of weights: {str(error).splitlines()[0]}") from error
    state = _state_in(content)
    if state is None:
        raise ValueError(f"{path} holds no weights, wanted a state dict, or a dict whose entry 'model' is one")
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _state_in(content: Any) -> dict[str, Tensor] | None:
    """The state dict that ``content`` is or holds."""
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(value, Tensor) for value in content.values()):
        # torch.optim.swa_utils.AveragedModel counts its averages there.
        return {name: value for name, value in content.items() if name != "n_averaged"}
    for entry in _ENTRIES:
        found = _state_in(content.get(entry))
        if found is not None:
            return found
    return None


def _built_in(
    name: str | None, weights: Path | None, state: dict[str, Tensor] | None, classes: int | None
) -> SmallDeepLab:
    if state is not None:
        first, last = state.get("stem.0.weight"), state.get("classifier.weight")
        if first is None or last is None:
            raise ValueError(
                f"{weights} holds the weights of another network than the built-in one, model must name it"
            )
        return SmallDeepLab(len(last), width=len(first))
    if name is None or classes is None:
        raise ValueError("model has no weights, wanted a file of them, or the name of a network and its classes")
    return SmallDeepLab(classes, width=BUILT_IN[name])


def _imported(path: str, model_args: Mapping[str, Any]) -> nn.Module:
    module, _, attribute = path.partition(":")
    if not attribute:
        raise ValueError(f"model is {path!r}, wanted small, tiny or an import path package.module:callable")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model is {path!r}, which cannot be imported: {error}") from error
    try:
        model = make(**model_args)
    except TypeError as error:
        raise ValueError(f"model {path!r} cannot be made with {dict(model_args)}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {path!r} gives a {type(model).__name__}, wanted an nn.Module")
    return model
