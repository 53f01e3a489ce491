"""The check on a GPU machine, rehearsed without one: stand-ins for NVIDIA's tools, small shapes, all else as there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Last, so that the installed package is the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import eroseg_ext
from bench import gpu_check, results
from bench.gpu_check import Check
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


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script with changed environment variables."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
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
    assert outcomes(out) == dict.fromkeys(gpu_check.PARTS, "passed")
    assert process.returncode == 0
    result = json.loads(out.read_text())
    assert re.search(r"\b\d+ passed", result["checks"]["tests"]["output"][-1])
    summary = "========= MEMCHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert summary in result["checks"]["memcheck"]["output"]
    assert "every kernel has run on cpu" in result["checks"]["memcheck"]["output"]
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
    assert any(re.match(r"setuptools \d+", line) for line in result["checks"]["device"]["output"])


def test_a_check_that_is_ended_leaves_what_it_has(script: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    process = script(out)
    assert process.stdout is not None
    assert process.stdout.readline() == "== device\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 1
    found = outcomes(out)
    assert found.pop("device") == "killed: the check was ended"
    assert all(outcome.startswith("skipped: ") for outcome in found.values())


def run(folder: Path, **programs: str) -> dict[str, str]:
    """What becomes of parts that are Python programs, run at once with 8 seconds each."""
    check = Check(folder / "out.json", folder, {"total": 60} | dict.fromkeys(programs, 8))
    commands = {name: [sys.executable, "-c", code] for name, code in programs.items()}
    check.limits["missing"] = 8
    check.run({**commands, "missing": ["no-such-program"]}, folder)
    return outcomes(folder / "out.json")


def test_what_a_part_may_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 3)
    child = tmp_path / "child"
    deaf = "import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    deaf += f"c = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(c.pid)); time.sleep(60)"
    assert run(
        tmp_path,
        garbage=r"import os; os.write(1, b'\xff\x00\n' * 2**20)",
        dies="import os; print('so far', flush=True); os.kill(os.getpid(), 9)",
        waits="import time; time.sleep(60)",
        deaf=deaf,
        memcheck="print('========= ERROR SUMMARY: 2 errors')",
        tests="print('3 skipped in 2 s')",
    ) == {
        "missing": "failed: exit status 127",
        "garbage": "passed",
        "dies": "failed: exit status -9",
        "waits": "killed at its limit of 8 s",
        "deaf": "killed at its limit of 8 s",
        "memcheck": "failed: its output has no 'SUMMARY: 0 '",
        "tests": r"failed: its output has no '\\b[1-9]\\d* passed'",
    }
    checks = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert checks["dies"]["output"] == ["so far"]
    assert re.search("no-such-program.*: No such file", checks["missing"]["output"][0])
    assert "KeyboardInterrupt" in checks["waits"]["output"]
    state = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(100):  # a kill takes effect in its own time
        if not state.exists() or ") Z " in state.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the part had started lives on")


def test_a_part_that_no_time_is_left_for_is_not_begun(tmp_path: Path) -> None:
    check = Check(tmp_path / "out.json", tmp_path, {"total": 60, "late": 0})
    assert not check.run({"late": [sys.executable, "-c", f"open({str(tmp_path / 'begun')!r}, 'w')"]})
    assert outcomes(tmp_path / "out.json") == {"late": "skipped: no time was left"}
    assert not (tmp_path / "begun").exists()


def test_tests_that_fail_are_named_also_where_they_are_interrupted(tmp_path: Path) -> None:
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
    check = Check(tmp_path / "out.json", tmp_path, {"total": 60, "tests": 50})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "test_planted.py"]
    assert not check.run({"tests": command}, tmp_path)
    part = check.checks["tests"]
    assert part["outcome"] == "failed: exit status 2"
    assert re.search(r"1 failed, 1 passed, 1 skipped, 1 error", part["output"][-1])
    assert [line.partition(" - ")[::2] for line in part["output"] if line.startswith(("FAILED", "ERROR "))] == [
        ("FAILED test_planted.py::test_wrong", "AssertionError: first"),
        ("ERROR test_planted.py::test_error", "RuntimeError: no such kernel"),
    ]
