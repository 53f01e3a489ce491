"""The keywords of the attacks as editors, type checkers and ``help()`` see them.

A test holds the names and types here against the fields of :class:`AttackSettings`, which has defaults and meanings.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable as Function
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from eroseg_ext.attacks.result import Callback
from eroseg_ext.attacks.settings import AttackSettings

F = TypeVar("F", bound=Function[..., Any])


class Options(TypedDict, total=False):
    """Settings of every attack besides ``method``."""

    eps: float
    steps: int
    norm: str
    ignore_index: int
    random_start: bool
    restarts: int
    clip: tuple[float, float]
    quantize: bool
    mean: Sequence[float] | Any | None
    std: Sequence[float] | None
    images_are_normalized: bool
    autocast: torch.dtype | None
    output: str
    output_key: int | str | None
    logits: Function[[Any], Tensor] | None
    align_corners: bool
    see_through: bool
    window: int | tuple[int, int] | None
    stride: int | tuple[int, int] | None
    own_label_size: bool
    backend: str
    model_mode: str
    progress: bool
    confidence: str
    front: str
    direction: str
    radius: int
    slope: float
    within: str
    threshold: str
    schedule: str
    reach: float
    front_first: float
    front_min: float
    front_max: float
    balance: float
    rho_range: tuple[float, float] | None
    variant: str
    q: float


class ObjectOptions(Options, total=False):
    """Those of the object forms, whose class is the method."""

    preset: str | None
    step_size: float | None
    targeted: bool
    keep: str
    early_stop: bool
    micro_batch: int | None
    graph: bool


class AttackOptions(ObjectOptions, total=False):
    """Those of ``attack``."""

    method: str


class StrongOptions(Options, total=False):
    """Those of ``strong_attack``."""

    method: str


class Call(TypedDict, total=False):
    """Arguments of a call that are no settings, besides ``return_info``, which the type of the result depends on."""

    mask: Tensor | None
    generator: torch.Generator | None
    callback: Callback | None


class AttackCall(AttackOptions, Call):
    """All that ``attack`` takes by keyword, but for ``return_info``."""


def with_settings(options: Any, **defaults: object) -> Function[[F], F]:
    """Puts ``options`` in the place of a function's ``**settings``, in its signature and its docstring.

    Args:
        options: a TypedDict of these; their defaults and explanations are those of ``AttackSettings``.
        **defaults: which are others.
    """
    known = dict(inspect.signature(AttackSettings).parameters)
    known["preset"] = inspect.signature(AttackSettings.create).parameters["preset"]
    listed = (AttackSettings.__doc__ or "").partition("Attributes:\n")[2].rstrip()
    explained = {entry.split(":")[0].strip(): entry for entry in re.split(r"\n(?= {8}\w)", listed)}

    def shown(function: F) -> F:
        signature = inspect.signature(function)
        own = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        names = [name for name in known if name in options.__optional_keys__ and name not in own]
        keywords = [
            known[name].replace(kind=inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, known[name].default))
            for name in names
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own.values(), *keywords])
        entries = inspect.cleandoc("\n".join(explained[name] for name in names if name in explained))
        own_doc = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = f"{own_doc}\n\nSettings:\n{textwrap.indent(entries, '    ')}"
        return function

    return shown
