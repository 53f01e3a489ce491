"""Everything that only a machine with a CUDA GPU can tell, in at most 10 minutes:

    bench/gpu_check.sh OUT.json [WHEEL]

Builds the package for the GPU at hand (or takes a built wheel) and runs the CUDA tests with compute-sanitizer's four
tools beside them, then the benchmarks. Needs torch with CUDA, pytest and hypothesis, and nvcc unless a wheel is given.
Installs nothing outside a folder that it removes.

OUT.json has each part's outcome, time and output, and is written anew after each; the figures of the benchmarks are in
OUT.csv, one a row. A part that takes too long is interrupted, then killed. The exit status is 1 if a part did not pass.

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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = ("device", "build", "tests", *SANITIZERS, "bench")
LIMITS: dict[str, float] = {"total": 545, "device": 60, "build": 70, "tests": 150, "bench": 290}
LIMITS |= dict.fromkeys(SANITIZERS, 120) | {"margin": 50}
"""Seconds. No part begins after the total, or goes on for longer than ``GRACE`` after it. The margin is of the time of
the benchmarks, which begin no measurement in it and end what they have begun."""
GRACE = 10
"""Seconds from the interrupt, upon which pytest tells what it has, to the kill."""
MOST_BYTES = 2**22
"""Of the end of an output that is kept."""
EXPECTED = dict.fromkeys(SANITIZERS, r"SUMMARY: 0 ") | {"tests": r"\b[1-9]\d* passed"}
"""What a part that has passed has printed."""
PROBE = """
import sys, torch
from importlib import metadata
device = torch.ones(1, device=sys.argv[1]).device
print("python", sys.version)
print(*sorted({f"{package.name} {package.version}" for package in metadata.distributions()}), sep="\\n")
if device.type == "cuda":
    print(torch.cuda.get_device_name(device))
    print("capability %d.%d" % torch.cuda.get_device_capability(device))
"""


class Check:
    """Runs commands within their limits, and keeps what became of them in a file."""

    def __init__(self, out: Path, work: Path, limits: dict[str, float]) -> None:
        self.checks: dict[str, dict[str, Any]] = {}
        self.limits = limits
        self._out = out
        self._work = work
        self._end = time.monotonic() + limits["total"]

    def seconds_for(self, name: str) -> float:
        """How long a part may take."""
        return min(self.limits[name], self._end - time.monotonic())

    def run(self, commands: dict[str, Sequence[str]], folder: Path = ROOT, **environment: str) -> bool:
        """Runs parts at once; returns, when all have ended, whether they passed."""
        running: dict[str, subprocess.Popen[bytes]] = {}
        started, limits = time.monotonic(), {name: self.seconds_for(name) for name in commands}
        try:
            for name, command in commands.items():
                if limits[name] <= 0:
                    self._record(name, "skipped: no time was left")
                    continue
                with (self._work / name).open("wb") as log:
                    running[name] = subprocess.Popen(
                        ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(limits[name]), *command],
                        cwd=folder,
                        env={**os.environ, **environment},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                print(f"== {name}", flush=True)
            while waiting := [name for name in running if name not in self.checks]:
                time.sleep(0.1)
                for name in waiting:
                    status, taken = running[name].poll(), time.monotonic() - started
                    # A process that waits for a broken GPU may never end.
                    if status is not None or taken > limits[name] + GRACE + 2:
                        late = status in (None, 124, -signal.SIGKILL) and taken >= limits[name]
                        outcome = "passed" if status == 0 else f"failed: exit status {status}"
                        self._record(name, f"killed at its limit of {limits[name]:.0f} s" if late else outcome, started)
        finally:
            for name, process in running.items():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and all that it has left behind
                if name not in self.checks:
                    self._record(name, "killed: the check was ended", started)
        return all(self.checks[name]["outcome"] == "passed" for name in commands)

    def _record(self, name: str, outcome: str, started: float | None = None) -> None:
        log, lines = self._work / name, []
        if log.exists():
            lines = log.read_bytes()[-MOST_BYTES:].decode("utf-8", "replace").splitlines()
        if outcome == "passed" and not re.search(EXPECTED.get(name, ""), "\n".join(lines)):
            outcome = f"failed: its output has no {EXPECTED[name]!r}"
        print(f"{name}: {outcome}", flush=True)
        seconds = 0 if started is None else round(time.monotonic() - started)
        self.checks[name] = {"outcome": outcome, "seconds": seconds, "output": lines}
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        part = self._out.with_suffix(".part")
        part.write_text(json.dumps({"checks": self.checks}, indent=1) + "\n")
        part.replace(self._out)


def run_all(check: Check, wheel: str | None, work: Path, csv: Path) -> None:
    """All parts, the ones that others need first."""
    python, device = sys.executable, os.environ.get("DEVICE", "cuda")
    if not check.run({"device": [python, "-c", PROBE, device]}):
        return
    capability = re.findall(r"^capability (.*)", "\n".join(check.checks["device"]["output"]), re.MULTILINE)
    install = [python, "-m", "pip", "install", "--verbose", "--no-index", "--disable-pip-version-check", "--no-deps"]
    install += ["--no-build-isolation", "--target", str(work / "site"), wheel or str(ROOT)]
    if not check.run({"build": install}, **({"TORCH_CUDA_ARCH_LIST": capability[0]} if capability else {})):
        return

    # What runs on the host has run without a GPU already.
    tests = [python, "-m", "pytest", "-k", f"{device} and not host and not test_cuda_kernels", "-rfE"]
    tests += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "faulthandler_timeout=60"]
    spread = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]
    tests += spread if importlib.util.find_spec("xdist") else []
    tests += os.environ.get("TESTS", "").split()
    parts = {"tests": tests}
    for tool in SANITIZERS:
        parts[tool] = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        # Torch asks for things that it can do without.
        parts[tool] += ["--report-api-errors", "no"] if tool == "memcheck" else []
        # initcheck must see torch's kernels write, or what they wrote counts as not written.
        parts[tool] += ["--kernel-name", "kernel_substring=eroseg"] if tool != "initcheck" else []
        parts[tool] = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *parts[tool], python]
        parts[tool] += [str(ROOT / "bench" / "every_kernel.py"), device]
    # The tests in their own folder, so that they import the package that was installed. A dozen processes share the
    # cores. Without torch's pooling of memory, bounds are those of tensors.
    check.run(parts, ROOT / "tests", OMP_NUM_THREADS="1")

    bench = [python, "-m", "pytest", "bench/", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider", "--device", device]
    bench += ["-k", "not test_demo and not test_attack", "--csv", str(csv), *(["--quick"] if device == "cpu" else [])]
    bench += ["--limit", str(max(check.seconds_for("bench") - check.limits["margin"], 1))]
    bench += ["--commit", os.environ["COMMIT"]] if "COMMIT" in os.environ else []
    check.run({"bench": bench})


def main(arguments: Sequence[str]) -> int:
    if not 1 <= len(arguments) <= 2 or not arguments[0].endswith(".json"):
        raise SystemExit(f"usage: bench/gpu_check.sh OUT.json [WHEEL], and the arguments are {list(arguments)}")
    out = Path(arguments[0]).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".csv").unlink(missing_ok=True)
    wheel = str(Path(arguments[1]).resolve()) if len(arguments) == 2 else None
    changed = dict(entry.split("=") for entry in os.environ.get("LIMITS", "").split())
    # Also when the caller ignores them: nohup and `&` do, and the parts would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(f"gpu_check was ended by {signal.Signals(number).name}"))
    work = Path(tempfile.mkdtemp(prefix="gpu_check-"))
    site = os.pathsep.join([str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"PYTHONPATH": site, "PYTHONUNBUFFERED": "1", "TMPDIR": str(work)}
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(work / "hypothesis")
    os.environ["PATH"] += ":/usr/local/cuda/bin"  # where CUDA's tools are, if the PATH does not tell
    check = Check(out, work, LIMITS | {name: float(seconds) for name, seconds in changed.items()})
    try:
        run_all(check, wheel, work, out.with_suffix(".csv"))
    finally:
        for name in PARTS:
            skipped = "skipped: not begun, since a part before it did not pass or the check was ended"
            check.checks.setdefault(name, {"outcome": skipped, "seconds": 0, "output": []})
        check.save()
        shutil.rmtree(work, ignore_errors=True)
    print("\n".join(check.checks["tests"]["output"][-30:] + check.checks["bench"]["output"]))
    for name, part in check.checks.items():
        print(f"{name:<10} {part['seconds']:4} s  {part['outcome']}")
    return int(any(part["outcome"] != "passed" for part in check.checks.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
