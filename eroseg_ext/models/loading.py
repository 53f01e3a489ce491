"""Networks by name, for training and evaluation."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from eroseg_ext.models.small_deeplab import DEMO_WIDTH, FULL_WIDTH, SmallDeepLab
from eroseg_ext.models.weights import fit, load_states, read_weights

BUILT_IN = {"small": FULL_WIDTH, "tiny": DEMO_WIDTH}
"""Widths of :class:`eroseg_ext.models.SmallDeepLab` by name."""
_CLASSES = ("classes", "num_classes", "num_labels")
"""What callables call the number of classes."""


def build(name: str, classes: int | None, model_args: Mapping[str, Any] | None = None) -> nn.Module:
    """A fresh network, on the CPU.

    Args:
        name: ``small`` or ``tiny``, the built-in :class:`eroseg_ext.models.SmallDeepLab`; what returns an nn.Module, as
            ``package.module:callable`` or ``file.py:callable``, where the callable may have dots and modules of the
            current folder are found; a folder that transformers or segmentation_models_pytorch saved a model to; or
            the name that one of torchvision's segmentation models or of segmentation_models_pytorch's has there.
        classes: number of classes, passed as ``classes``, ``num_classes`` or ``num_labels`` if the callable has such a
            parameter; None leaves it to ``model_args`` and the callable's default. A folder's model keeps its own.
        model_args: keywords for the callable; they win. Without them torchvision and segmentation_models_pytorch load
            no pretrained weights.

    Raises:
        ValueError: the callable cannot be imported or called so, or gives no nn.Module; one sentence, which names the
            type and text of what it raised.
    """
    given = dict(model_args or {})
    if name in BUILT_IN:
        return _called(name, SmallDeepLab, {**_known(SmallDeepLab, classes), "width": BUILT_IN[name], **given})
    if ":" in name:
        make = imported("model", name)
        return _called(name, make, {**_known(make, classes), **given})
    if (Path(name) / "config.json").is_file():
        return _called(name, _of_folder(Path(name)), given)
    for library in (_of_torchvision, _of_smp):
        if found := library(name):
            make, defaults = found
            return _called(name, make, {**defaults, **_known(make, classes), **given})
    raise ValueError(
        f"model is {name!r}, wanted {', '.join(BUILT_IN)}, package.module:callable, file.py:callable, a folder with "
        "config.json, or the name of a model of torchvision or segmentation_models_pytorch, where they are installed"
    )


def imported(what: str, name: str) -> Any:
    """What ``package.module:attribute`` or ``file.py:attribute`` names; ValueError, which calls it ``what``."""
    path, _, attribute = name.rpartition(":")
    try:
        if path.startswith("."):
            raise ImportError("the path of its module is relative")
        if path.endswith(".py"):
            module = _module_of_file(Path(path))
        else:
            _find_in(os.getcwd())
            module = importlib.import_module(path)
        return functools.reduce(getattr, attribute.split("."), module)
    except (Exception, SystemExit) as error:  # a module can raise anything when it is imported
        raise ValueError(f"{what} is {name!r}, which cannot be imported: {told(error)}") from error


def _find_in(folder: str) -> None:
    """Lets imports find what is in a folder, as ``python file.py`` does; for good, as a model may import later."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _module_of_file(path: Path) -> Any:
    path = path.resolve(strict=True)
    _find_in(str(path.parent))
    # Under a name that no module has: a file may be called as one of the standard library.
    spec = importlib.util.spec_from_file_location(f"{path.stem} of {path.parent}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_folder(folder: Path) -> Callable[..., Any]:
    """What loads the model that a library saved to a folder; its config.json tells which one did."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "_model_class" in config:
            library, name = "segmentation_models_pytorch", "from_pretrained"
        else:
            library, name = "transformers", f"{config['architectures'][0]}.from_pretrained"
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"model is {str(folder)!r}, whose config.json names no architecture") from error
    return functools.partial(imported("model", f"{library}:{name}"), str(folder))


def _of_torchvision(name: str) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    models = imported("model", "torchvision:models")
    if name not in models.list_models(module=models.segmentation):
        return None
    return functools.partial(models.get_model, name), {"weights": None, "weights_backbone": None}


def _of_smp(name: str) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        return None
    models = imported("model", "segmentation_models_pytorch:MODEL_ARCHITECTURES_MAPPING")
    if name.lower() not in models:
        return None
    return models[name.lower()], {"encoder_weights": None}


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Loads a model's weights from a file, in place.

    Args:
        model: the model; the file's names may have a prefix, and more weights than the model's.
        path: file with a state dict, or a checkpoint: a dict that holds one, or several, of which an average over the
            training is taken; also in safetensors' format.
        name: of the model, for errors.

    Raises:
        ValueError: the file holds no weights, or those of another model; one sentence.
        OSError: the file cannot be read.
    """
    load_states(model, read_weights(path), path, name)


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
    states = read_weights(weights)
    if name is None or name in BUILT_IN:
        state = fit(states, SmallDeepLab(1, width=4).state_dict()).state
        first, last = state.get("stem.0.weight"), state.get("classifier.weight")
        if first is None or last is None or first.dim() != 4 or last.dim() != 4:
            raise ValueError(
                f"{weights} holds the weights of another network than the built-in one, model must name it"
            )
        classes = len(last)
        if name is None:
            given = {"width": len(first), **given}
    model = build(name or "small", classes, given)
    load_states(model, states, weights, name or type(model).__name__)
    return model.eval()


def _known(make: Any, classes: int | None) -> dict[str, int]:
    """The number of classes under the name that a callable has for it."""
    if classes is None:
        return {}
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some built-in callables tell none
        return {}
    known = {key: classes for key in _CLASSES if key in parameters}
    if not known and any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values()):
        of_transformers = str(getattr(make, "__module__", "")).startswith("transformers.")
        known = {"num_labels" if of_transformers else "num_classes": classes}
    return known


def told(error: BaseException) -> str:
    """An exception's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _called(name: str, make: Any, keywords: dict[str, Any]) -> nn.Module:
    if isinstance(make, nn.Module):
        raise ValueError(f"model {name!r} is an nn.Module itself, wanted what makes one, such as a function")
    try:
        model = make(**keywords)
    except (Exception, SystemExit) as error:
        raise ValueError(f"model {name!r} cannot be made with {keywords}: {told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} gives a {type(model).__name__}, wanted an nn.Module")
    return model
