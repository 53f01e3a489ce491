"""The keywords that editors, type checkers and ``help()`` see are those that the attacks take; so are the methods."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import eroseg_ext
from eroseg_ext import AttackSettings
from eroseg_ext.attacks import options
from eroseg_ext.attacks.apgd import DEFAULTS, NOT_OF_APGD
from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.attacks.settings import CALL_ARGUMENTS
from eroseg_ext.ops import reference

FIELDS = get_type_hints(AttackSettings)
FRONT_DOORS: list[tuple[Any, Any, dict[str, Any]]] = [
    (eroseg_ext.attack, options.AttackOptions, {}),
    (eroseg_ext.strong_attack, options.StrongOptions, DEFAULTS),
    (eroseg_ext.EroSeg, options.ObjectOptions, {}),
    (eroseg_ext.MaskedCE, options.ObjectOptions, {}),
]


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        (options.AttackOptions, {*FIELDS, "preset"}),
        (options.ObjectOptions, {*FIELDS, "preset"} - {"method"}),
        (options.StrongOptions, {*FIELDS} - {*NOT_OF_APGD}),
    ],
)
def test_the_options_are_the_settings(listed: Any, wanted: set[str]) -> None:
    types = get_type_hints(listed)
    assert set(types) == wanted
    assert {name: types[name] for name in types if name != "preset"} == {
        name: FIELDS[name] for name in types if name != "preset"
    }


def test_the_arguments_of_a_call_are_those_of_attack() -> None:
    listed = get_type_hints(options.Call)
    shown = inspect.signature(eroseg_ext.attack).parameters
    assert {*listed, "return_info"} == set(CALL_ARGUMENTS)
    assert all(name in shown for name in CALL_ARGUMENTS)
    assert set(get_type_hints(options.AttackCall)) == {*listed, *get_type_hints(options.AttackOptions)}


@pytest.mark.parametrize(("door", "listed", "others"), FRONT_DOORS)
def test_the_signature_has_every_setting_with_its_type_and_default(
    door: Any, listed: Any, others: dict[str, Any]
) -> None:
    parameters = inspect.signature(door).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in get_type_hints(listed):
        parameter = parameters[name]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == {"preset": None, **vars(AttackSettings()), **others}[name]
        assert name == "preset" or parameter.annotation == AttackSettings.__annotations__[name]
    assert set(FIELDS) & set(parameters) == set(FIELDS) & set(get_type_hints(listed))


@pytest.mark.parametrize(("door", "listed", "others"), FRONT_DOORS)
def test_help_explains_every_setting_once(door: Any, listed: Any, others: dict[str, Any]) -> None:
    text = inspect.getdoc(door.__init__ if isinstance(door, type) else door) or ""
    lines = text.partition("Settings:\n")[2].splitlines()
    explained = [line.split(":")[0].strip() for line in lines if line[:4].isspace() and not line[4].isspace()]
    assert sorted(explained) == sorted(set(get_type_hints(listed)) - {"preset"})


def test_every_method_has_an_object_settings_and_a_gradient() -> None:
    for name, method in METHODS.items():
        kind = getattr(eroseg_ext, method.class_name)
        assert method.name == name
        made = kind(lambda images: images, **({"balanced": True} if method.balanced else {}))
        assert made.settings.method == name
        assert method.source in kind.__doc__
        assert set(method.settings) <= set(FIELDS)
        assert f"``{name}``" in str(AttackSettings.__doc__)
    ops = {method.op for method in METHODS.values()}
    assert ops == {"erosion_grad", *reference.PIXEL_METHODS} - {"cospgd_sigmoid"}


def test_settings_say_which_method_reads_them() -> None:
    lines = str(AttackSettings.__doc__).splitlines()
    for field in dataclasses.fields(AttackSettings):
        (line,) = (line.strip() for line in lines if line.startswith(f"        {field.name}: "))
        readers = {method.name for method in METHODS.values() if field.name in method.settings}
        said = line.split(": ")[1].split(",")[0].strip()
        assert readers == ({said} & set(METHODS))


def test_the_table_of_methods_is_in_the_documentation() -> None:
    defaults = AttackSettings()
    lines = ["| `method` | object | what weighs a pixel | source | settings of its own |", "|---|---|---|---|---|"]
    for method in METHODS.values():
        settings = ", ".join(f"`{name}={getattr(defaults, name)!r}`" for name in method.settings)
        lines.append(f"| `{method.name}` | `{method.class_name}` | {method.summary} | {method.source} | {settings} |")
    table = "\n".join(lines)
    assert table in (Path(__file__).parents[1] / "docs" / "attack.md").read_text(encoding="utf-8"), table
