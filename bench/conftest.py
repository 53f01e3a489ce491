"""Options of ``pytest bench/``, and the record of what it measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import cases, report
from bench.measure import Samples, percentiles
from bench.results import Run

Record = Callable[..., None]
RUN = pytest.StashKey[Run]()
DEADLINE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("eroseg_ext's benchmarks").addoption
    add("--quick", action="store_true", help="small shapes, minutes on 2 cores")
    add("--device", choices=["cpu", "cuda"], help="default: the CPU, and CUDA where there is one")
    add("--csv", type=Path, metavar="FILE", help="append every figure to this file as soon as it is measured")
    add("--limit", type=float, default=float("inf"), metavar="SECONDS", help="begin no measurement later than this")
    add("--commit", help="what to call the code outside a git checkout")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--csv")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device is 'cuda', but torch finds no GPU")
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("-n is given, wanted one process: several disturb each other's times")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise pytest.UsageError(f"--csv is {path}, wanted a file in a folder that exists")
    config.stash[RUN] = Run(path, config.getoption("--commit"))
    config.stash[DEADLINE] = time.monotonic() + config.getoption("--limit")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.getoption("--device")
    kinds = [chosen] if chosen else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    devices, quick = [torch.device(kind) for kind in kinds], metafunc.config.getoption("--quick")
    if "case" in metafunc.fixturenames:
        rows = [
            pytest.param(device, case, name, id=f"{device.type}-{case.name}-{name}")
            for device in devices
            for case in cases.operation_cases(cases.SHAPES["quick" if quick else device.type])
            for name in cases.IMPLEMENTATIONS
        ]
        metafunc.parametrize(("device", "case", "implementation"), rows)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices, ids=kinds)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # torch.compile takes long: last, so that a limit of time leaves everything else measured.
    items.sort(key=lambda item: item.nodeid.endswith("-compiled]"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip("no time was left")


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture
def seconds(quick: bool, device: torch.device) -> float:
    """Time for the samples of one figure; a GPU takes hundreds of them in a fifth of a second."""
    return 0.2 if quick or device.type == "cuda" else 1.0


@pytest.fixture
def compile_seconds(pytestconfig: pytest.Config) -> float:
    """How long torch.compile may take: no longer than there is time."""
    return min(cases.COMPILE_SECONDS, max(pytestconfig.stash[DEADLINE] - time.monotonic(), 1))


@pytest.fixture
def record(pytestconfig: pytest.Config, device: torch.device) -> Record:
    """Keeps what was measured: group, case, name, the times, and further quantities by keyword."""

    def store(group: str, case: str, name: str, samples: Samples | None = None, **more: float) -> None:
        figures = {} if samples is None else percentiles(samples)
        more = {quantity.replace("_", " "): value for quantity, value in more.items()}
        pytestconfig.stash[RUN].add(group, case, name, device, figures | more)

    return store


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[RUN].rows
    for kind in dict.fromkeys(row.device.partition(":")[0] for row in rows):
        for line in report.tables(rows, kind):
            terminalreporter.write_line(line)
