"""What is compiled and how; everything else about the package is in pyproject.toml."""

import os
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch that the package supports
PY_LIMITED_API, PY_TAG = "0x030a0000", "cp310"


def stable_extension(name: str, directories: list[str]) -> Extension:
    """A module of the LibTorch stable ABI and the Python limited API, from the C++ files of the directories."""
    from torch.utils import cpp_extension

    def files(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for folder in directories for path in (ROOT / folder).glob(pattern))

    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags.append("-g0")  # Python's own flags may ask for debug information, nine tenths of the file
    flags.append(f"-ffile-prefix-map={ROOT}/=")  # error messages name csrc/ops.cpp, not the builder's directories
    if os.environ.get("EROSEG_WERROR") == "1":
        flags.append("-Werror")
    for path in cpp_extension.include_paths():
        flags += ["-isystem", path]
    return Extension(
        name,
        files("*.cpp"),
        depends=files("*.h"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args=flags,
        language="c++",
        py_limited_api=True,
    )


def compiled() -> dict[str, Any]:
    from torch.utils import cpp_extension

    # BuildExtension defines Py_LIMITED_API as this, by default the oldest Python of its own torch, not of our wheel.
    cpp_extension.min_supported_cpython = PY_LIMITED_API
    return {
        "ext_modules": [stable_extension("eroseg_ext._C", ["csrc", "csrc/cpu"])],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PY_TAG}},
    }


setup(**({} if os.environ.get("EROSEG_NO_EXT") == "1" else compiled()))
