"""What is compiled and how; everything else about the package is in pyproject.toml."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch that the package supports
PY_LIMITED_API, PY_TAG = "0x030a0000", "cp310"
WARNINGS_ARE_ERRORS = os.environ.get("EROSEG_WERROR") == "1"
CUDA_ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def stable_extension(name: str, directories: list[str]) -> Extension:
    """A module of the LibTorch stable ABI and the Python limited API, from the C++ files of the directories."""
    from torch.utils import cpp_extension

    def files(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for folder in directories for path in (ROOT / folder).glob(pattern))

    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags.append("-g0")  # Python's own flags may ask for debug information, nine tenths of the file
    flags.append(f"-ffile-prefix-map={ROOT}/=")  # error messages name csrc/ops.cpp, not the builder's directories
    if WARNINGS_ARE_ERRORS:
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


def cuda_toolkit() -> Path | None:
    """Where CUDA's compiler and libraries are: CUDA_HOME, else as nvcc itself tells; None where it is not wanted."""
    if os.environ.get("EROSEG_NO_CUDA") == "1":
        return None
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # nvcc on the PATH may be a link or a script elsewhere.
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", told.stderr + told.stdout, re.MULTILINE)
    if top is None:
        raise SystemExit(f"{nvcc} does not tell where its toolkit is: name its folder in CUDA_HOME")
    return Path(top[1].strip()).resolve()


def cuda_extension(toolkit: Path) -> Extension:
    """The module of the CUDA operators; ``compile_kernels`` adds the kernels to it."""
    extension = stable_extension("eroseg_ext._cuda", ["csrc/cuda"])
    extension.extra_compile_args += ["-isystem", str(toolkit / "include")]
    extension.define_macros.append(("EROSEG_CUDA_ARCHITECTURES", f'"{CUDA_ARCHITECTURES}"'))
    # The runtime is linked in: the module then runs beside any CUDA torch, whatever runtime that brings.
    libraries = [path for name in ("lib64", "lib") if (path := toolkit / name / "libcudart_static.a").is_file()]
    if not libraries:
        raise SystemExit(f"the CUDA toolkit in {toolkit} has no libcudart_static.a: install it or set EROSEG_NO_CUDA=1")
    extension.extra_objects = [str(libraries[0])]
    extension.libraries += ["rt", "dl", "pthread"]
    return extension


def code_of(architectures: str) -> list[str]:
    """nvcc's options for a list such as ``8.0;9.0+PTX``."""
    options = []
    for architecture in re.split(r"[;\s]+", architectures.strip()):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {architecture!r}, wanted such as '8.0;9.0;12.0+PTX'")
        number = architecture.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def compile_kernels(toolkit: Path, target: Path) -> list[str]:
    """Compiles csrc/cuda/*.cu, several at a time; returns the object files."""
    flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "--compiler-options=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    if WARNINGS_ARE_ERRORS:
        # Registers that spill, and arrays in local memory, are what makes such kernels slow: no kernel may have them.
        flags += ["-Werror=all-warnings", "--ptxas-options=--warn-on-spills,--warn-on-local-memory-usage,-Werror"]
    flags += code_of(CUDA_ARCHITECTURES)
    flags.append("--threads=2")  # architectures at a time: the largest file alone would take as long as all the others
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    target.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str:
        built = target / f"{source.stem}.o"
        command = [str(toolkit / "bin" / "nvcc"), *flags, "-c", str(source), "-o", str(built)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
        return str(built)

    # The largest first, so that none is left over at the end.
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: "grad" not in path.stem)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(compiled, sources))


def compiled() -> dict[str, Any]:
    from torch.utils import cpp_extension

    toolkit = cuda_toolkit()

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            for extension in self.extensions:
                if toolkit is not None and extension.name == "eroseg_ext._cuda":
                    extension.extra_objects = compile_kernels(toolkit, Path(self.build_temp)) + extension.extra_objects
            super().build_extensions()

    # BuildExtension defines Py_LIMITED_API as this, by default the oldest Python of its own torch, not of our wheel.
    cpp_extension.min_supported_cpython = PY_LIMITED_API
    extensions = [stable_extension("eroseg_ext._C", ["csrc", "csrc/cpu"])]
    if toolkit is not None:
        extensions.append(cuda_extension(toolkit))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PY_TAG}},
    }


setup(**({} if os.environ.get("EROSEG_NO_EXT") == "1" else compiled()))
