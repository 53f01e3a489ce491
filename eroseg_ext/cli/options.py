"""Options made from the fields of a settings dataclass, and what turns an option's text into its value."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from eroseg_ext.utils.atomic_files import write_json
from eroseg_ext.utils.validate import require

MAX_PIXELS = 2**24
"""Of an image that is asked for: 4096x4096. Far more would be told of by the system's memory, not by us."""
LEFT_OUT = ("autocast", "clip", "logits", "model_description", "progress")
"""Fields that a command sets itself, or that no text can give."""

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage above it."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30), **keywords)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a command's result goes, beside what it prints."""

    json: Path | None = None
    """also write the results to this file"""

    def __post_init__(self) -> None:
        # Found out before the work, not after it.
        possible = self.json is None or (self.json.parent.is_dir() and not self.json.is_dir())
        require(possible, "json", str(self.json), "a file in a folder that exists")

    def write(self, result: dict[str, Any]) -> None:
        """Writes the result if that is asked for."""
        if self.json is not None:
            write_json(self.json, result)


def settings_of(command: Callable[..., None]) -> list[type]:
    """The dataclasses that a command takes, one a parameter."""
    return [kind for name, kind in get_type_hints(command).items() if name != "return"]


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds an option for each field of a dataclass, but for ``LEFT_OUT``.

    Name, type and default are the field's, the help is the text below it, and ``metadata={"aliases": ["--x"]}`` gives
    more names. Fields that no blank line separates are a group in the help.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    group: argparse._ActionsContainer = parser
    for before, node, after in zip(definition.body, definition.body[1:], [*definition.body[2:], None], strict=False):
        if isinstance(node, ast.AnnAssign):
            if node.lineno > (before.end_lineno or 0) + 1:
                group = parser.add_argument_group()
            field = fields[ast.unparse(node.target)]
            if field.name not in LEFT_OUT:
                _add_option(group, field, ast.literal_eval(after.value) if isinstance(after, ast.Expr) else "")


def _add_option(group: argparse._ActionsContainer, field: dataclasses.Field[Any], text: str) -> None:
    given: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    if isinstance(field.default, bool):
        given["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
    else:
        convert, given["metavar"], wanted = CONVERTERS[str(field.type).removesuffix(" | None")]
        given["type"] = _checked(convert, wanted)
        given["required"] = field.default is field.default_factory is dataclasses.MISSING
        if given["required"]:
            text += " (required)"
        elif field.default not in (None, dataclasses.MISSING):
            text += f" (default: {_shown(field.default)})"
    names = [f"--{field.name.replace('_', '-')}", *field.metadata.get("aliases", ())]
    group.add_argument(*names, **given, help=plain(text).replace("%", "%%"))


def plain(text: str) -> str:
    """A docstring's text without its markup."""
    return re.sub(r":\w+:`~?(.*?)`", r"\1", " ".join(text.split())).replace("``", "")


def _shown(value: Any) -> str:
    """A default as it would be given."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else f"{255 * value:g}/255"
    return str(value)


def settings(kind: type[Settings], args: argparse.Namespace) -> Settings:
    """The dataclass that the options of :func:`add_options` give; ValueError, naming the option, for a wrong value."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    try:
        return kind(**{name: value for name, value in vars(args).items() if name in names})
    except (TypeError, ValueError) as error:
        first, space, rest = str(error).partition(" ")
        name = f"--{first.replace('_', '-')}" if first in names else first
        raise ValueError(f"{name}{space}{rest}") from error


def _checked(convert: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """The converter, as argparse takes it: for a text that it raises for, the error tells what is wanted."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, ArithmeticError, RecursionError):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}") from None

    return converted


def _number(text: str) -> float:
    above, _, below = text.partition("/")
    value = float(above) / float(below or 1)
    if not math.isfinite(value):
        raise ValueError
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(_number, text.split(",")))


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    json.dumps(value, allow_nan=False)
    if not isinstance(value, dict):
        raise ValueError
    return value


def _path(text: str) -> Path:
    if not text:  # Path("") is the current folder
        raise ValueError
    return Path(text)


def _size(text: str) -> tuple[int, int]:
    height, width = map(int, text.lower().split("x"))
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError
    return height, width


_NUMBERS = (_numbers, "X,...", "numbers such as 2/255,0.5")
_NAMES = (lambda text: tuple(map(str.strip, text.split(","))), "NAME,...", "names with commas between them")
CONVERTERS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "int": (int, "N", "a whole number"),
    "float": (_number, "X", "a number such as 0.03 or 8/255"),
    **dict.fromkeys(("str", "str | Callable[[Tensor, Tensor], Tensor]"), (str, "NAME", "a name")),
    **dict.fromkeys(("Path", "Path | SegmentationData"), (_path, "PATH", "a path")),
    "int | str": (lambda text: int(text) if text.lstrip("-").isdigit() else text, "N|NAME", "a number or a name"),
    "str | tuple[float, ...]": (
        lambda text: text if text[:1].isalpha() else _numbers(text),
        "NAME|X,...",
        "a name or numbers",
    ),
    "int | tuple[int, int]": (
        lambda text: int(text) if text.isdigit() else _size(text),
        "N|HxW",
        f"a number of pixels, or HEIGHTxWIDTH of at most {MAX_PIXELS} pixels",
    ),
    "float | Sequence[float]": _NUMBERS,
    "Sequence[float] | Any": _NUMBERS,
    "Sequence[float]": _NUMBERS,
    "tuple[float, ...] | Any": _NUMBERS,
    "tuple[float, ...]": _NUMBERS,
    "tuple[float, float]": _NUMBERS,
    "tuple[int, int]": (_size, "HxW", f"HEIGHTxWIDTH of at most {MAX_PIXELS} pixels"),
    "tuple[str, ...]": _NAMES,
    "Sequence[str] | Mapping[str, Mapping[str, Any]]": _NAMES,
    **dict.fromkeys(
        ("Mapping[str, Any]", "Mapping[str, float]"),
        (_json_object, "JSON", 'a JSON object such as {"name": 1}, without NaN'),
    ),
}
"""By a field's type: what makes a value of the option's text, how the help calls that, and what is told if it fails."""
