"""README.md and docs/: their Python runs, and the commands that they show have the options that they use."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import SIZE, write_folder

import eroseg_ext
from eroseg_ext.cli.main import main
from eroseg_ext.models import SmallDeepLab

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OPTION = r"--[a-z][a-z-]*"

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def having(language: str) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


def without_libraries() -> list[Any]:
    """Pages of Python that needs this package alone; ``tests/ecosystem`` runs the recipes for training loops."""
    return [page for page in having("python") if page.id != "docs/recipes.md"]


def cheaper(call: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """The call with settings that cost little in the place of those that the page gives or leaves out."""

    @functools.wraps(call)
    def run(*args: Any, **given: Any) -> Any:
        return call(*args, **{**given, **settings})

    return run


@pytest.mark.parametrize("page", without_libraries())
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks in their order, with a small model and a small data set in the place of the reader's own."""
    for folder in ("train", "val"):
        write_folder(tmp_path / "camvid" / folder, count=2, void=11)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eroseg_ext, "evaluate", cheaper(eroseg_ext.evaluate, steps=2, sanity=0))
    monkeypatch.setattr(
        eroseg_ext, "train", cheaper(eroseg_ext.train, epochs=1, size=SIZE, val_attack_steps=1, batch_size=2)
    )
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, 24, 32), torch.randint(11, (2, 24, 32))
    labels[:, :3] = 255
    names: dict[str, Any] = {"model": SmallDeepLab(11, width=4), "images": images, "labels": labels}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


def options_in(help_text: str) -> set[str]:
    return set(re.findall(OPTION, help_text))


@functools.cache
def options_of_eroseg(command: str) -> set[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        assert main([command, "--help"]) == 0
    return options_in(printed.getvalue())


def options_of_module(module: str) -> set[str]:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(ROOT))
        patch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as done:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not done.value.code
    return options_in(printed.getvalue())


def commands(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks, continued ones joined, comments and what stands before ``&&`` split off."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in re.split(r"&&|\s#", line)[: None if "&&" in line else 1])


@pytest.mark.parametrize("page", having("bash"))
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    for command in commands(page):
        given = set(re.findall(rf"\s({OPTION})", command))
        if found := re.search(r"(?:^|-m )eroseg(?:_ext)? (\w+)(.*)", command):
            given = set(re.findall(rf"\s({OPTION})", found[2]))
            known = options_of_eroseg(found[1])
        elif found := re.match(r"python -m (bench\.\w+)", command):
            known = options_of_module(found[1])
        elif command.startswith("pytest bench/"):
            known = options_in((ROOT / "bench" / "conftest.py").read_text(encoding="utf-8"))
        else:
            continue
        assert given <= known, f"{page.name} shows {command!r}, which has no {given - known}"


def test_options_named_in_sentences_exist() -> None:
    """Of the pages that describe the commands."""
    for name in ("attack", "data", "evaluate", "models", "train"):
        text = FENCE.sub("", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
        named = set(re.findall(rf"`({OPTION})", text))
        assert named <= options_of_eroseg("train") | options_of_eroseg("evaluate"), name


def test_links_lead_somewhere() -> None:
    """README.md's and CONTRIBUTING.md's; those of docs/ are checked by ``mkdocs build --strict``."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
