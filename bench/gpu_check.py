"""Everything that only a machine with a CUDA GPU can tell, in at most 10 minutes:

    bench/gpu_check.sh OUT.json [WHEEL]

Builds the package for the GPU at hand (or takes a built wheel) and runs the CUDA tests with compute-sanitizer's four
tools beside them, the benchmarks, and Nsight Compute over the large kernels. Needs torch with CUDA, pytest and
hypothesis, and nvcc unless a wheel is given. Installs nothing outside a folder that it removes.

OUT.json tells of the parts and is written anew after each, whatever became of it; the figures of the benchmarks are
in OUT.csv, one a row. A part that takes too long is interrupted, then killed. The tables are printed last. The exit
status is 1 if a part did not pass; the profile is not held against the package, since who may count is a matter of the
machine.

Environment variables:
    PYTHON: the interpreter that has torch; default python3.
    COMMIT: names the code outside a git checkout.
    DEVICE: default cuda; with cpu, a rehearsal with small shapes.
    TESTS: test files in tests/; default all.
    LIMITS: seconds for parts, such as ``tests=60 bench=100``; see ``LIMITS`` below.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = ("device", "build", "tests", *SANITIZERS, "bench", "profile")
LIMITS = {"total": 545, "device": 60, "build": 70, "tests": 150, "sanitizers": 120}
LIMITS |= {"bench": 230, "margin": 50, "profile": 60}
"""Seconds. No part begins after the total, or goes on for longer than ``GRACE`` after it. The margin is of the time of
the benchmarks, which begin no measurement in it and end what they have begun."""
GRACE = 10
"""Seconds from the interrupt, upon which pytest and Nsight Compute tell what they have, to the kill."""
MOST_BYTES = 2**22
"""Of the end of a log that is read."""
PROBE = """
import sys, torch
device = torch.ones(1, device=sys.argv[1]).device
if device.type == "cuda":
    print(torch.cuda.get_device_name(device))
    print("%d.%d" % torch.cuda.get_device_capability(device))
"""

Summary = Callable[[list[str]], dict[str, Any]]


@dataclass
class Part:
    """A command with its limit in seconds."""

    name: str
    command: Sequence[str]
    limit: float
    summary: Summary = field(default=lambda lines: {})
    """what is told of it besides the end of its output, from all of its output; with ``problem``, it has not passed"""
    folder: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Running:
    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    interrupted: bool = False

    def signal(self, number: int) -> None:
        """To the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Check:
    """Runs parts and keeps the record of them."""

    def __init__(self, out: Path, work: Path, seconds: float) -> None:
        self.result: dict[str, Any] = {"environment": environment(), "checks": {}}
        self.out = out
        self._work = work
        self._deadline = time.monotonic() + seconds
        self._running: list[Running] = []
        self._ended_by: str | None = None
        # Also when the caller ignores them: nohup and `&` do, and the parts would inherit that.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)

    def _end(self, number: int, frame: object) -> None:
        self._ended_by = signal.Signals(number).name  # no exception: a part would be lost that is just being started

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n")
        os.replace(part, self.out)

    def within(self, limit: float) -> float:
        """The seconds that are left of a limit."""
        return min(limit, self._deadline - time.monotonic())

    def passed(self, name: str) -> bool:
        return self.result["checks"].get(name, {}).get("outcome") == "passed"

    def run(self, *parts: Part) -> None:
        """Runs parts at once, and returns when all have ended."""
        try:
            for part in parts:
                self._start(part)
            while self._running:
                time.sleep(0.1)
                if self._ended_by is not None:
                    raise SystemExit(f"gpu_check was ended by {self._ended_by}")
                for running in tuple(self._running):
                    late = time.monotonic() - running.started - running.part.limit
                    if running.process.poll() is not None or late > GRACE:
                        self._finish(running)
                    elif late > 0 and not running.interrupted:
                        running.interrupted = True
                        running.signal(signal.SIGINT)
        finally:
            for running in tuple(self._running):
                self._finish(running)

    def _start(self, part: Part) -> None:
        part.limit = self.within(part.limit)
        if part.limit <= 0:
            self._record(part.name, "skipped: no time was left")
            return
        print(f"== {part.name}", flush=True)
        log = self._work / f"{part.name}.log"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    part.command,
                    cwd=part.folder,
                    env={**os.environ, **part.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    preexec_fn=os.setpgrp,  # process_group=0 wants Python 3.11
                )
            except OSError as error:
                self._record(part.name, f"failed: {error}")
                return
        self._running.append(Running(part, process, log, time.monotonic()))

    def _finish(self, running: Running) -> None:
        """Kills what is left of a part and records it."""
        self._running.remove(running)
        seconds = time.monotonic() - running.started
        running.signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that waits for a broken GPU may never end
            running.process.wait(2)
        status = running.process.returncode
        outcome = "passed" if status == 0 else f"failed: exit status {status}"
        if status is not None and status < 0:
            outcome = f"failed: killed by {signal.Signals(-status).name}"
        if self._ended_by is not None:
            outcome = f"killed: the check was ended by {self._ended_by}"
        elif running.interrupted:
            outcome = f"killed at its limit of {running.part.limit:.0f} s"
        lines = output_of(running.log)
        more: dict[str, Any] = {"output": lines[-5 if outcome == "passed" else -100 :]}
        try:
            more |= running.part.summary(lines)
        except Exception as error:  # whatever a part has left in its files
            more["problem"] = f"its results cannot be read: {type(error).__name__}: {error}"
        if outcome == "passed" and "problem" in more:
            outcome = f"failed: {more['problem']}"
        self._record(running.part.name, outcome, seconds=round(seconds), **more)

    def _record(self, name: str, outcome: str, **more: Any) -> None:
        print(f"{name}: {outcome}", flush=True)
        self.result["checks"][name] = {"outcome": outcome, **more}
        self.save()

    def close(self) -> None:
        """Says of the parts that were not begun that they were not."""
        for name in PARTS:
            self.result["checks"].setdefault(
                name, {"outcome": "skipped: not begun, since a part before it did not pass or the check was ended"}
            )
        self.save()


def environment() -> dict[str, Any]:
    """What the build and the tests find."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("torch", "setuptools", "pip", "numpy", "pytest", "pytest-xdist", "hypothesis", "torchvision")
    tools = ("nvcc", "c++", "compute-sanitizer", "ncu", "git")
    return {
        "python": sys.version,
        "cores": os.cpu_count(),
        **{name: version(name) for name in packages},
        **{name: shutil.which(name) for name in tools},
    }


def output_of(log: Path) -> list[str]:
    """The lines at the end of a log, whatever bytes are in it."""
    with log.open("rb") as stream:
        stream.seek(max(log.stat().st_size - MOST_BYTES, 0))
        return [line[:400] for line in stream.read().decode("utf-8", "replace").splitlines()]


def tests_summary(report: Path) -> dict[str, Any]:
    """Counts, and the tests that failed with the first lines of why, from JUnit XML."""
    suite = ElementTree.parse(report).find("testsuite")
    assert suite is not None
    ran, *others = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    counts = {"passed": ran - sum(others), "failed": others[0] + others[1], "skipped": others[2]}
    failures = []
    for case in suite.iter("testcase"):
        for found in (child for child in case if child.tag in ("failure", "error")):
            message = (found.get("message") or found.text or "").splitlines()
            test = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": test, "message": [line[:400] for line in message[:5]]})
    return {"counts": counts, "failures": failures} | ({} if counts["passed"] else {"problem": "no test has passed"})


def sanitizer_summary(lines: list[str]) -> dict[str, Any]:
    """The summaries of compute-sanitizer, and its first errors."""
    own = [line for line in lines if line.startswith("=========")]
    summary = [line for line in own if "SUMMARY" in line]
    if any("SUMMARY: 0 " in line for line in summary):
        return {"summary": summary}
    return {"summary": summary, "first errors": own[:60], "problem": "compute-sanitizer does not say that all is well"}


def run_all(check: Check, wheel: str | None, work: Path, limits: dict[str, float]) -> None:
    """All parts, the ones that others need first."""
    python, device = sys.executable, os.environ.get("DEVICE", "cuda")
    check.run(Part("device", [python, "-c", PROBE, device], limits["device"], lambda lines: {"found": lines}))
    if not check.passed("device"):
        return
    capability = [line for line in check.result["checks"]["device"]["found"] if re.fullmatch(r"\d+\.\d", line)]
    install = [python, "-m", "pip", "install", "--verbose", "--no-index", "--disable-pip-version-check", "--no-deps"]
    install += ["--no-build-isolation", "--target", str(work / "site"), wheel or str(ROOT)]
    architecture = {"TORCH_CUDA_ARCH_LIST": capability[0]} if capability else {}
    check.run(Part("build", install, limits["build"], environment=architecture))
    if not check.passed("build"):
        return

    files = os.environ.get("TESTS", "").split() or sorted(
        (path.name for path in (ROOT / "tests").glob("test_*.py")),
        key=lambda name: (name != "test_ops.py", "graph" not in name, name),
    )
    report = work / "tests.xml"
    # What runs on the host has run without a GPU already.
    tests = [python, "-m", "pytest", *files, "-k", f"{device} and not host and not test_cuda_kernels", "-rfE"]
    tests += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "faulthandler_timeout=60", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", str(min(os.cpu_count() or 1, 8))]
    one_thread = {"OMP_NUM_THREADS": "1"}  # a dozen processes share the cores
    # In their own folder, so that they import the package that was installed.
    parts = [Part("tests", tests, limits["tests"], lambda lines: tests_summary(report), ROOT / "tests", one_thread)]
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch asks for things that it can do without
        if tool != "initcheck":  # which must see torch's kernels write, or what they wrote counts as not written
            command += ["--kernel-name", "kernel_substring=eroseg"]
        command += [python, str(ROOT / "bench" / "every_kernel.py"), device]
        # Without torch's own pooling of memory, so that bounds are those of tensors.
        own_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | one_thread
        parts.append(Part(tool, command, limits["sanitizers"], sanitizer_summary, environment=own_memory))
    check.run(*parts)

    seconds = check.within(limits["bench"])
    bench = [python, "-m", "pytest", "bench/", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider", "--device", device]
    bench += ["-k", "not test_demo and not test_attack", "--csv", str(check.out.with_suffix(".csv"))]
    bench += ["--limit", str(max(seconds - limits["margin"], 1)), *(["--quick"] if device == "cpu" else [])]
    bench += ["--commit", os.environ["COMMIT"]] if "COMMIT" in os.environ else []
    check.run(Part("bench", bench, seconds, lambda lines: {"output": lines}))

    profile = ["ncu", "--clock-control", "none", "--print-details", "all"]
    profile += ["--kernel-name", "regex:erosion_grad|pixel_grad|select|linf_step"]
    for section in ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "LaunchStats"):
        profile += ["--section", section]
    profile += ["--section", "Occupancy", python, str(ROOT / "bench" / "every_kernel.py"), "large", device]
    check.run(Part("profile", profile, limits["profile"], lambda lines: {"output": lines}))


def tell(checks: dict[str, dict[str, Any]]) -> None:
    """The tables of the benchmarks and a line for each part."""
    for failure in checks["tests"].get("failures", [])[:20]:
        print(f"{failure['test']}: {' '.join(failure['message'])[:200]}")
    print("\n".join(checks["bench"].get("output", [])))
    for name, part in checks.items():
        print(f"{name:<10} {part.get('seconds', 0):4} s  {part['outcome']}")


def main(arguments: Sequence[str]) -> int:
    if not 1 <= len(arguments) <= 2 or not arguments[0].endswith(".json"):
        raise SystemExit(f"usage: bench/gpu_check.sh OUT.json [WHEEL], and the arguments are {list(arguments)}")
    out = Path(arguments[0]).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".csv").unlink(missing_ok=True)
    wheel = str(Path(arguments[1]).resolve()) if len(arguments) == 2 else None
    changed = dict(entry.split("=") for entry in os.environ.get("LIMITS", "").split())
    limits = LIMITS | {name: float(seconds) for name, seconds in changed.items()}
    work = Path(tempfile.mkdtemp(prefix="gpu_check-"))
    site = os.pathsep.join([str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"PYTHONPATH": site, "PYTHONUNBUFFERED": "1", "TMPDIR": str(work)}
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(work / "hypothesis")
    os.environ["PATH"] += ":/usr/local/cuda/bin"  # where CUDA's tools are, if the PATH does not tell
    check = Check(out, work, limits["total"])
    try:
        check.save()
        run_all(check, wheel, work, limits)
    finally:
        check.close()
        shutil.rmtree(work, ignore_errors=True)
    checks = check.result["checks"]
    tell(checks)
    return int(any(part["outcome"] != "passed" for name, part in checks.items() if name != "profile"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
