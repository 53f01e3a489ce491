"""Checks of what a user sets: each raises one sentence that names the argument, what came, and what was wanted."""

from __future__ import annotations

import difflib
import math
import numbers
import sys
import warnings
from collections.abc import Sequence

import torch


def require(condition: bool, name: str, came: object, wanted: str) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {came!r}, wanted {wanted}")


def warn(message: str) -> None:
    """Warns at the line outside this package that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("eroseg_ext", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def near_misses(value: object, choices: Sequence[str]) -> str:
    """Which choices may have been meant, as the end of a sentence; empty if none is near."""
    near = difflib.get_close_matches(str(value).lower(), choices, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def check_choice(name: str, came: object, choices: Sequence[str]) -> None:
    """Raises ValueError unless it is one of the choices; lists them."""
    if came not in choices:
        raise ValueError(f"{name} is {came!r}, wanted one of {', '.join(choices)}{near_misses(came, choices)}")


def check_number(name: str, came: object, low: float, high: float) -> None:
    """Raises ValueError unless it is a finite number from low to high, both included; ``high`` may be infinite."""
    wanted = f"a number >= {low}" if high == math.inf else f"a number from {low} to {high}"
    require(_is_number(came) and low <= came <= high, name, came, wanted)  # type: ignore[operator]


def check_integer(name: str, came: object, low: int, high: int | None = None) -> None:
    """Raises ValueError unless it is an integer from low to high, both included; None: no upper bound."""
    wanted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    require(_is_integer(came) and low <= came and (high is None or came <= high), name, came, wanted)  # type: ignore[operator]


def check_pair(name: str, came: object) -> None:
    """Raises ValueError unless it is a tuple or list of two finite numbers."""
    ok = isinstance(came, (tuple, list)) and len(came) == 2 and all(_is_number(value) for value in came)
    require(ok, name, came, "a pair of numbers")


def check_size(name: str, came: tuple[int, int]) -> None:
    """Raises ValueError unless it is two positive integers."""
    ok = len(came) == 2 and all(_is_integer(side) and side >= 1 for side in came)
    require(ok, name, came, "(height, width), both at least 1")


def check_sequence(name: str, came: object, one_per: str = "image channel") -> None:
    """Raises ValueError unless it is a sequence of finite numbers, at least one."""
    ok = isinstance(came, Sequence) and len(came) > 0 and all(_is_number(value) for value in came)
    require(ok, name, came, f"a list of numbers, one per {one_per}")


def usable_device(name: str | None, gpu: int | None = None) -> torch.device:
    """The device of that name.

    Args:
        name: None takes cuda if there is one, else cpu.
        gpu: which GPU ``cuda`` means; None leaves it to torch.

    Raises:
        ValueError: there is no such device, or it cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if gpu is not None and device == torch.device("cuda"):
            device = torch.device("cuda", gpu)
        torch.zeros(1, device=device).item()  # meta tensors can be made and hold nothing
    except Exception as error:  # each kind of device has its own for what is missing
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)
