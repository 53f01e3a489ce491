"""Networks by name, and weights from files, for training and evaluation."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eroseg_ext.models.small_deeplab import DEMO_WIDTH, FULL_WIDTH, SmallDeepLab
from eroseg_ext.utils import atomic_files

BUILT_IN = {"small": FULL_WIDTH, "tiny": DEMO_WIDTH}
"""Widths of :class:`eroseg_ext.models.SmallDeepLab` by name."""
_WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and a module that holds the network put before its weights' names."""
_ENTRIES = ("ema", "model", "state_dict")
"""Where checkpoints keep the weights; an average over the training is what its end would have saved."""

State = dict[str, Tensor]


def build(name: str, classes: int | None, model_args: Mapping[str, Any] | None = None) -> nn.Module:
    """A fresh network, on the CPU.

    Args:
        name: ``small`` or ``tiny``, the built-in :class:`eroseg_ext.models.SmallDeepLab`, or the import path
            ``package.module:callable`` of what returns an nn.Module.
        classes: number of classes, passed as ``classes`` or ``num_classes`` if the callable has such a parameter; None
            leaves it to ``model_args`` and the callable's default.
        model_args: keywords for the callable; they win.

    Raises:
        ValueError: the callable cannot be imported or called so, or gives no nn.Module; one sentence, which names the
            type and text of what it raised.
    """
    given = dict(model_args or {})
    if name in BUILT_IN:
        return _called(name, SmallDeepLab, {**_known(SmallDeepLab, classes), "width": BUILT_IN[name], **given})
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"model is {name!r}, wanted {', '.join(BUILT_IN)} or an import path package.module:callable")
    try:
        if module.startswith("."):
            raise ImportError("the path of its module is relative")
        make = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module can raise anything when it is imported
        raise ValueError(f"model is {name!r}, which cannot be imported: {_told(error)}") from error
    return _called(name, make, {**_known(make, classes), **given})


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Loads a model's weights from a file, in place.

    Args:
        model: the model; its state dict may be the file's but for the names' common prefix.
        path: file with a state dict, or a checkpoint: a dict that holds one as ``ema``, ``model`` or ``state_dict``.
        name: of the model, for errors.

    Raises:
        ValueError: the file holds no weights, or those of another model; one sentence.
        OSError: the file cannot be read.
    """
    _load_state(model, read_weights(path), path, name)


def load_network(
    name: str | None = None,
    weights: Path | None = None,
    *,
    classes: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network to evaluate: in eval mode, on the CPU.

    Args:
        name: as :func:`build` takes it. None: built-in, its width and classes as the weights tell.
        weights: as the path of :func:`load_weights`. None: as made.
        classes: as :func:`build` takes it. A built-in network with weights has as many as they have.
        model_args: keywords for the callable; they win.

    Raises:
        ValueError: the callable or the file is not as described, or they do not go together; one sentence.
        OSError: the file cannot be read.
    """
    given = dict(model_args or {})
    if weights is None:
        if name is None or (name in BUILT_IN and classes is None and "classes" not in given):
            raise ValueError("model has no weights, wanted a file of them, or the name of a network and its classes")
        return build(name, classes, given).eval()
    state = read_weights(weights)
    if name is None or name in BUILT_IN:
        stripped = _stripped(state, ())
        first, last = stripped.get("stem.0.weight"), stripped.get("classifier.weight")
        if first is None or last is None or first.dim() != 4 or last.dim() != 4:
            raise ValueError(
                f"{weights} holds the weights of another network than the built-in one, model must name it"
            )
        classes = len(last)
        if name is None:
            given = {"width": len(first), **given}
    model = build(name or "small", classes, given)
    _load_state(model, state, weights, name or type(model).__name__)
    return model.eval()


def read_weights(path: Path) -> State:
    """The state dict that a file is or holds, see :func:`load_weights`."""
    state = _state_in(atomic_files.read_tensors(path))
    if state is None:
        raise ValueError(f"{path} holds no weights, wanted a state dict, or a dict whose entry 'model' is one")
    return state


def _state_in(content: Any) -> State | None:
    """The state dict that ``content`` is or holds."""
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        # torch.optim.swa_utils.AveragedModel counts its averages there.
        return {name: value for name, value in content.items() if name != "n_averaged"}
    for entry in _ENTRIES:
        found = _state_in(content.get(entry))
        if found is not None:
            return found
    return None


def _stripped(state: State, wanted: Iterable[str]) -> State:
    """The weights without the prefix of a wrapper around the network, unless names in ``wanted`` have it too."""
    own = tuple(wanted)
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _load_state(model: nn.Module, state: State, path: Path, name: str) -> None:
    try:
        model.load_state_dict(_stripped(state, model.state_dict()))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit model {name}: {' '.join(str(error).split())[:300]}") from error


def _known(make: Any, classes: int | None) -> dict[str, int]:
    """The number of classes under the name that a callable has for it."""
    if classes is None:
        return {}
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some built-in callables tell none
        return {}
    known = {key: classes for key in ("classes", "num_classes") if key in parameters}
    if not known and any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values()):
        known = {"num_classes": classes}
    return known


def _told(error: BaseException) -> str:
    """An exception's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _called(name: str, make: Any, keywords: dict[str, Any]) -> nn.Module:
    try:
        model = make(**keywords)
    except (Exception, SystemExit) as error:
        raise ValueError(f"model {name!r} cannot be made with {keywords}: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} gives a {type(model).__name__}, wanted an nn.Module")
    return model
