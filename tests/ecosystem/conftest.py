"""The tables of docs/works.md, made from the tests in this folder.

    python -m pytest tests/ecosystem                  # fails if the page is not what the tests say
    python -m pytest tests/ecosystem --write-table    # writes it

A test whose pass shows that something works has a mark, ``pytest.mark.works(kind, name, how)``: ``kind`` is the table,
one of ``KINDS``; ``how`` is a few words and the line of code, in Markdown. Several tests may have one mark: all of them
must pass. A table stands between ``<!-- works:KIND -->`` and ``<!-- /works -->``, its rows sorted by name.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

HERE = Path(__file__).resolve().parent
FOLDER = "tests/ecosystem/"
PAGE = HERE.parents[1] / "docs" / "works.md"
KINDS = ("model", "loader", "training")
LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "segmentation_models_pytorch",
    "datasets",
    "lightning",
    "accelerate",
)
MARKED = re.compile(r"(<!-- works:(\w+) -->\n)(.*?)(<!-- /works -->)", re.DOTALL)


@pytest.fixture(autouse=True)
def same_weights_each_time() -> None:
    """What an attack reaches on a network of random weights depends on them, which must not depend on other tests."""
    torch.manual_seed(0)


class Row(NamedTuple):
    kind: str
    name: str
    how: str


def markdown(kind: str, tests: dict[Row, str]) -> str:
    rows = sorted((row for row in tests if row.kind == kind), key=lambda row: row.name.casefold())
    lines = [f"| {kind} | works how | shown by |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.how} | `{tests[row]}` |" for row in rows]
    return "\n".join(lines) + "\n"


def versions() -> str:
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"Written with {', '.join(found)}.\n"


def filled(page: str, tests: dict[Row, str]) -> str:
    """The page with its tables, and as it is between them."""
    return MARKED.sub(lambda found: found[1] + markdown(found[2], tests) + found[4], page)


class Tables:
    """What the tests of a run say; under pytest-xdist, in the process that hands them out."""

    def __init__(self) -> None:
        self.tests: dict[Row, str] = {}
        self.all_passed = True
        self.sentence = ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.all_passed &= report.passed or not report.nodeid.startswith(FOLDER)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.startswith(FOLDER):
            return
        self.all_passed &= report.passed
        for name, value in report.user_properties:
            if name == "works":
                test = report.nodeid.removeprefix(FOLDER).partition("[")[0]
                row = Row(*value)
                self.tests[row] = min(test, self.tests.get(row, test))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not _is_whole(session.config):
            return
        page = PAGE.read_text(encoding="utf-8")
        wanted = filled(page, self.tests)
        if not self.all_passed:
            self.sentence = "docs/works.md is neither checked nor written: not every test of tests/ecosystem passed"
        elif session.config.getoption("--write-table", False):
            PAGE.write_text(re.sub(r"^Written with .*\n", versions(), wanted, flags=re.MULTILINE), encoding="utf-8")
            self.sentence = "docs/works.md is written"
        elif page != wanted:
            self.sentence = "docs/works.md is not what the tests say: python -m pytest tests/ecosystem --write-table"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.sentence:
            terminalreporter.line(self.sentence)


def _is_whole(config: pytest.Config) -> bool:
    """Whether a run has the whole folder."""
    chosen = config.option.keyword or config.option.markexpr or config.getoption("lf", False)
    return not chosen and any(Path(arg).resolve() in (HERE, *HERE.parents) for arg in config.args)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/works.md from the tests of tests/ecosystem")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "works(kind, name, how): a row of docs/works.md")
    if config.getoption("--write-table", False) and not _is_whole(config):
        raise pytest.UsageError("--write-table is given, wanted a run of the whole folder tests/ecosystem")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Tables())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("works"):
            row = Row(*mark.args, **mark.kwargs)
            if row.kind not in KINDS or "|" in row.name + row.how:
                raise pytest.UsageError(f"{item.nodeid}: works has {tuple(row)}, wanted a kind of {KINDS} and no |")
            item.user_properties.append(("works", tuple(row)))
