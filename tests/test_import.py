"""What importing the package does: torch's first calls are those of one thread, and little else is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECK = """
import torch

first = {}

def noted(name, function):
    def call(*arguments, **keywords):
        value = arguments[0]
        first.setdefault((name, value.dtype), (value.numel(), value.device.type))
        return function(*arguments, **keywords)
    return call

for name in ("exp", "log", "sqrt"):
    setattr(torch, name, noted(name, getattr(torch, name)))
import eroseg_ext

for name in ("exp", "log", "sqrt"):
    for dtype in (torch.float32, torch.float64):
        assert first.get((name, dtype)) == (1, "cpu"), (name, dtype, first)
"""


def test_importing_the_package_makes_the_first_calls_with_one_element(tmp_path: Path) -> None:
    # From another folder: python -c would find the sources in this one before the package that is installed.
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_neither_pillow_nor_matplotlib(tmp_path: Path) -> None:
    code = "import sys, torch, eroseg_ext; print(sorted({'PIL', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


FIRST_ATTACK = """
import sys, torch, eroseg_ext
assert "torch._dynamo" not in sys.modules, "by importing"
images, labels = torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
eroseg_ext.attack(torch.nn.Conv2d(3, 2, 1), images, labels, steps=1)
assert "torch._dynamo" not in sys.modules, "by an attack"
"""


def test_neither_importing_the_package_nor_an_attack_loads_torchs_compiler(tmp_path: Path) -> None:
    """That takes seconds, many times the package itself."""
    done = subprocess.run([sys.executable, "-c", FIRST_ATTACK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
