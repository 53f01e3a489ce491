"""The check on a GPU machine, rehearsed without one: stand-ins for NVIDIA's tools, small shapes, all else as there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

# Last, so that the installed package is the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import eroseg_ext
from bench import gpu_check, results
from bench.gpu_check import Check, Part
from eroseg_ext.ops import backend

if why_not := backend.why_not_fused(torch.device("cpu")):
    pytest.skip(str(why_not), allow_module_level=True)

# Each runs the program that it is given, behind its own options.
SANITIZER = """#!/usr/bin/env bash
tool=$2
while [[ $1 != */python* ]]; do shift; done
if [[ $tool == memcheck ]]; then "$@" || exit; else printf '\\xff\\n'; fi
echo "========= ${tool^^} SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
"""
NCU = """#!/usr/bin/env bash
echo "==ERROR== ERR_NVGPUCTRPERM"
exit 1
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script with changed environment variables."""
    for name, text in {"compute-sanitizer": SANITIZER, "ncu": NCU}.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text)
        tool.chmod(0o755)

    def start(*arguments: Path, **changed: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "TESTS": "test_training_loss.py",
            "LIMITS": "bench=100 margin=85",
        }
        command = [gpu_check.ROOT / "bench" / "gpu_check.sh", *arguments]
        return subprocess.Popen(command, env=environment | changed, stdout=subprocess.PIPE, text=True)

    return start


def wheel(folder: Path) -> Path:
    """The package that is tested, as a wheel."""
    path, info = folder / "eroseg_ext-0-py3-none-any.whl", "eroseg_ext-0.dist-info"
    package = Path(eroseg_ext.__file__).parent
    with zipfile.ZipFile(path, "w") as archive:
        for file in package.rglob("*.*"):
            archive.write(file, file.relative_to(package.parent))
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: eroseg_ext\nVersion: 0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def outcomes(out: Path) -> dict[str, str]:
    return {name: part["outcome"] for name, part in json.loads(out.read_text())["checks"].items()}


def test_everything_is_in_the_file(script: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    process = script(out, wheel(tmp_path))
    printed, _ = process.communicate()
    passed = dict.fromkeys(gpu_check.PARTS, "passed")
    assert outcomes(out) == passed | {"profile": "failed: exit status 1"}  # which is not held against the package
    assert process.returncode == 0
    result = json.loads(out.read_text())
    assert result["checks"]["tests"]["counts"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert result["checks"]["memcheck"]["summary"] == [
        "========= MEMCHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    ]
    assert "every kernel has run on cpu" in result["checks"]["memcheck"]["output"]
    assert result["checks"]["profile"]["output"] == ["==ERROR== ERR_NVGPUCTRPERM"]
    assert "no time was left" in "\n".join(result["checks"]["bench"]["output"])
    assert {row.group for row in results.read(out.with_suffix(".csv"))} == {"operations"}
    assert "| `erosion_grad` | PASCAL VOC |" in printed
    assert set(tmp_path.iterdir()) == {
        out,
        out.with_suffix(".csv"),
        tmp_path / "bin",
        tmp_path / "eroseg_ext-0-py3-none-any.whl",
    }


def test_a_build_that_fails_says_why(script: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    process = script(out, CXX="no-such-compiler")
    process.communicate()
    assert process.returncode == 1
    found = outcomes(out)
    assert found.pop("device") == "passed"
    assert found.pop("build") == "failed: exit status 1"
    assert all(outcome.startswith("skipped: ") for outcome in found.values())
    assert set(found) == set(gpu_check.PARTS) - {"device", "build"}
    result = json.loads(out.read_text())
    assert "found no compiler 'no-such-compiler'" in "\n".join(result["checks"]["build"]["output"])
    assert int(result["environment"]["setuptools"].split(".")[0]) > 0


def test_a_check_that_is_ended_leaves_what_it_has(script: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    process = script(out)
    assert process.stdout is not None
    assert process.stdout.readline() == "== device\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 1
    found = outcomes(out)
    assert found.pop("device") == "killed: the check was ended by SIGTERM"
    assert all(outcome.startswith("skipped: ") for outcome in found.values())


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """A check in this process, whose handlers of signals are left alone."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return Check(tmp_path / "out.json", tmp_path, 60)


def python(name: str, code: str, limit: float = 30, **more: Any) -> Part:
    return Part(name, [sys.executable, "-c", code], limit, **more)


def test_what_a_part_may_do(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 3)
    deaf = "import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    child = tmp_path / "child"
    check.run(
        python("garbage", r"import os; os.write(1, b'\xff\x00\n' * 2**20)"),
        python("dies", "import os; print('so far', flush=True); os.kill(os.getpid(), 9)"),
        python("waits", "import time; time.sleep(60)", 5),
        python("deaf", f"{deaf} c = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(c.pid)); "
               "time.sleep(60)", 5),
        Part("missing", ["no-such-program"], 5),
        python("nothing left", "", summary=lambda lines: json.loads((tmp_path / "missing.json").read_text())),
        python("unclean", "print('========= ERROR SUMMARY: 2 errors')", summary=gpu_check.sanitizer_summary),
    )  # fmt: skip
    assert outcomes(tmp_path / "out.json") == {
        "missing": "failed: [Errno 2] No such file or directory: 'no-such-program'",
        "garbage": "passed",
        "dies": "failed: killed by SIGKILL",
        "waits": "killed at its limit of 5 s",
        "deaf": "killed at its limit of 5 s",
        "nothing left": "failed: its results cannot be read: FileNotFoundError: [Errno 2] No such file or directory: "
        f"'{tmp_path / 'missing.json'}'",
        "unclean": "failed: compute-sanitizer does not say that all is well",
    }
    assert check.result["checks"]["dies"]["output"] == ["so far"]
    assert "KeyboardInterrupt" in check.result["checks"]["waits"]["output"]
    state = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(100):  # a kill takes effect in its own time
        if not state.exists() or ") Z " in state.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the part had started lives on")


def test_a_part_that_no_time_is_left_for_is_not_begun(tmp_path: Path, check: Check) -> None:
    check.run(python("late", f"open({str(tmp_path / 'begun')!r}, 'w')", limit=0))
    assert outcomes(tmp_path / "out.json") == {"late": "skipped: no time was left"}
    assert not (tmp_path / "begun").exists()


def test_tests_that_fail_are_named_also_where_they_are_interrupted(check: Check, tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text(
        "import os, pytest, signal, time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'first\\nsecond'\n"
        "@pytest.fixture\n"
        "def broken(): raise RuntimeError('no such kernel')\n"
        "def test_error(broken): pass\n"
        "def test_skipped(): pytest.skip('no need')\n"
        "def test_interrupted(): os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "test_planted.py"]
    summary = partial(lambda path, lines: gpu_check.tests_summary(path), report)
    check.run(Part("tests", command, 50, summary, tmp_path))
    part = check.result["checks"]["tests"]
    assert part["outcome"] == "failed: exit status 2"
    assert part["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert [(failure["test"], failure["message"][:2]) for failure in part["failures"]] == [
        ("test_planted::test_wrong", ["AssertionError: first", "  second"]),
        ("test_planted::test_error", ['failed on setup with "RuntimeError: no such kernel"']),
    ]
