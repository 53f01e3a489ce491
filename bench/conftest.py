"""Options of ``pytest bench/``, and the record of what it measures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import cases, results
from bench.measure import Timing
from bench.results import Figure

Record = Callable[[Figure, Timing], None]

RECORDED = pytest.StashKey[list[Figure]]()
SKIPPED = pytest.StashKey[dict[str, str]]()
LOAD = pytest.StashKey[float]()


class Replay:
    """A timer that tells pytest-benchmark what was measured already, so that its tables hold event times too."""

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: Iterator[float] = iter(())
        self._running = False

    def load(self, timing: Timing) -> None:
        self._durations = iter(timing.seconds)
        self._running = False

    def __call__(self) -> float:
        self._now += next(self._durations, 0.0) if self._running else 0.0
        self._running = not self._running
        return self._now


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("eroseg benchmarks")
    size = group.addoption
    size("--quick", action="store_true", help="small shapes, minutes on 2 cores")
    size("--full", action="store_true", help="the largest shapes on the CPU too, and more samples")
    size("--device", choices=["cpu", "cuda"], help="default: the CPU, and CUDA where there is one")
    size("--save", metavar="NAME", help="write bench/results/NAME.json")


def _target(config: pytest.Config) -> Path | None:
    name = config.getoption("--save")
    return None if name is None else results.FOLDER / f"{name}.json"


def _devices(config: pytest.Config) -> list[torch.device]:
    chosen = config.getoption("--device")
    kinds = [chosen] if chosen else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [torch.device(kind) for kind in kinds]


def _profile(config: pytest.Config) -> str:
    return "quick" if config.getoption("--quick") else "full" if config.getoption("--full") else "default"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not any("--benchmark-columns" in str(argument) for argument in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "min", "iqr", "rounds"]
    config.stash[RECORDED], config.stash[SKIPPED], config.stash[LOAD] = [], {}, results.load()
    if config.getoption("--quick") and config.getoption("--full"):
        raise pytest.UsageError("--quick and --full are both given, wanted one of them")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device is 'cuda', but torch finds no GPU")
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("-n is given, wanted one process: several disturb each other's times")
    target = _target(config)
    if target is not None and (target.exists() or not target.parent.is_dir()):
        why = "exists" if target.exists() else "is not in a folder that exists"
        raise pytest.UsageError(f"--save is {config.getoption('--save')!r}, but {target} {why}; wanted a new name")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "record" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    devices, profile = _devices(metafunc.config), _profile(metafunc.config)
    if "case" in metafunc.fixturenames:
        rows = [
            pytest.param(device, case, name, id=f"{device.type}-{case.name}-{name}")
            for device in devices
            for case in cases.operation_cases(profile, device)
            for name in cases.implementations(case)
        ]
        metafunc.parametrize(("device", "case", "implementation"), rows)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices, ids=[device.type for device in devices])


@pytest.fixture(scope="session")
def profile(request: pytest.FixtureRequest) -> str:
    """``quick``, ``default`` or ``full``."""
    return _profile(request.config)


@pytest.fixture(scope="session")
def seconds(profile: str) -> float:
    """Time for the samples of one figure."""
    return cases.SECONDS[profile]


@pytest.fixture
def record(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Record:
    """Puts a measured figure into pytest-benchmark's tables and into the result file."""

    def store(figure: Figure, timing: Timing) -> None:
        benchmark.name = figure["implementation"]
        benchmark.group = f"{figure['suite']}: {figure['case']} {figure.get('shape', '')}, {figure['device']}"
        benchmark.extra_info.update(figure["extra"])
        REPLAY.load(timing)
        benchmark.pedantic(lambda: None, rounds=len(timing.seconds))
        pytestconfig.stash[RECORDED].append(figure)

    return store


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        item.config.stash[SKIPPED][item.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        item.config.stash[SKIPPED][item.nodeid] = f"failed: {str(report.longrepr).splitlines()[-1]}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    target, figures = _target(config), config.stash[RECORDED]
    if target is not None and figures:
        skipped, load = config.stash[SKIPPED], config.stash[LOAD]
        results.write(target, _profile(config), _devices(config), figures, skipped, load)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    target = _target(config)
    if target is not None and target.exists():
        terminalreporter.write_line(f"{target}: written; python -m bench.report {target.stem} tells what it says")
