"""Benchmarks: ``pytest bench/`` measures, ``python -m bench.report`` makes tables and plots of the figures."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# ``pytest bench/`` and ``python -m`` put this folder's parent first on the path, where the package's sources lie.
# Unless the kernels were built in place, the package that can be measured is the installed one.
if not any((ROOT / "eroseg_ext").glob("_C*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]
