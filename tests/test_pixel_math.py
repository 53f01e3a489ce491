"""The per-pixel maths that CPU and CUDA kernels share, against NumPy in float64.

It is compiled here as scalar code, without torch and without the package's build: the kernels run the same text.
"""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pybind11 = pytest.importorskip("pybind11")

TESTS = Path(__file__).parent
COMPILER = shutil.which("c++")


@pytest.fixture(scope="module")
def maths(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    target = tmp_path_factory.mktemp("build") / f"pixel_math_module{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [TESTS.parent / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    command = [COMPILER, "-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += [f"-isystem{path}" for path in includes[1:]] + [f"-I{includes[0]}"]
    subprocess.run([*command, str(TESTS / "pixel_math_module.cpp"), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location("pixel_math_module", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.max(np.abs(got - wanted) / np.maximum(np.abs(wanted), 1e-300)))


def test_exponential(maths: ModuleType) -> None:
    x = np.concatenate([np.linspace(-87, 80, 200_001), -np.logspace(-30, 0, 1000), [0.0, -0.0]]).astype(np.float32)
    # Worst seen 1.6e-7, a unit and a half in the last place.
    assert relative_error(maths.exponential(x), np.exp(x.astype(np.float64))) < 3e-7
    assert np.all(maths.exponential(np.float32([-87.5, -1e4, -3e38, -np.inf, np.nan])) == 0)
    assert maths.exponential(0.0) == 1


def test_log_positive(maths: ModuleType) -> None:
    x = np.concatenate([np.logspace(-37, 38, 100_001), np.linspace(0.5, 256, 100_001)]).astype(np.float32)
    x = x[np.abs(x - 1) > 1e-6]
    assert relative_error(maths.log_positive(x), np.log(x.astype(np.float64))) < 3e-7
    near_one = (1 + np.linspace(-1e-3, 1e-3, 2001)).astype(np.float32)
    assert np.max(np.abs(maths.log_positive(near_one) - np.log(near_one.astype(np.float64)))) < 1e-9
    assert maths.log_positive(1.0) == 0


def test_sigmoid_and_its_logarithm(maths: ModuleType) -> None:
    x = np.linspace(-87, 87, 100_001).astype(np.float32)
    wide = x.astype(np.float64)
    assert relative_error(maths.sigmoid(x), 1 / (1 + np.exp(-wide))) < 6e-7
    expected = -np.logaddexp(0, -wide)
    got = maths.log_sigmoid(x)
    # Near 0 it is log(1 + e), whose argument was rounded: absolute there, relative elsewhere.
    assert np.max(np.abs(got - expected) / np.maximum(np.abs(expected), 1)) < 3e-7
    extreme = np.float32([-1e4, 1e4, np.inf])
    assert maths.log_sigmoid(extreme).tolist() == [-1e4, 0.0, 0.0]
    assert maths.sigmoid(extreme).tolist() == [0.0, 1.0, 1.0]


def test_front_weight(maths: ModuleType) -> None:
    q = np.concatenate([[0.0], np.logspace(-6, 2, 10_000)]).astype(np.float32)
    for tau in (0.01, 1.0, 30.0):
        wide = np.minimum(q.astype(np.float64) / (2 * np.float32(tau)), 300)
        inside = wide < 40  # beyond, the weight is 0 for all purposes
        soft = maths.front_weight(0, q, tau)
        assert relative_error(soft[inside], (1 / np.cosh(wide) ** 2)[inside]) < 1e-5
        assert np.all(soft[~inside] < 1e-30)
        assert np.array_equal(maths.front_weight(1, q, tau), (q <= np.float32(tau)).astype(np.float32))
    assert maths.front_weight(0, np.inf, 1.0) == 0


@pytest.mark.parametrize("targeted", [False, True])
def test_method_weights(maths: ModuleType, targeted: bool) -> None:
    log_odds = np.linspace(-60, 60, 4001).astype(np.float32)
    wide = log_odds.astype(np.float64)
    p, rest = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
    norm, lam, q_minus_one = np.float64(np.float32(0.4)), 0.3, 1.5
    cosine = p / np.sqrt(p**2 + rest**2 * norm)
    for correct in (False, True):
        expected = {
            0: np.ones_like(p),
            1: np.full_like(p, 1 - lam if correct else lam),
            2: 1 - cosine if targeted else cosine,
            3: np.full_like(p, float(correct)),
            4: p / 2 * (np.log1p(p) + np.logaddexp(0, -wide)),
            5: p**q_minus_one,
        }
        for method, weight in expected.items():
            got = maths.method_weight(method, log_odds, correct, 0.4, targeted, lam, q_minus_one)
            # 1 - cosine cancels; everything else is relative.
            slack = 1e-6 * rest if method == 2 else 0
            assert np.all(np.abs(got - weight * rest) <= 1e-5 * weight * rest + slack + 1e-30), method
