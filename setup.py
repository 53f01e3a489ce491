"""What is compiled and how; everything else about the package is in pyproject.toml."""

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch that the package supports
PY_LIMITED_API, PY_TAG = "0x030a0000", "cp310"
WARNINGS_ARE_ERRORS = os.environ.get("EROSEG_WERROR") == "1"
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # a free-threaded Python has none
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0"  # of these, where TORCH_CUDA_ARCH_LIST is not set, those that nvcc knows
OLDEST_CAPABILITY = (8, 0)


def load(path: str) -> ModuleType:
    """A module by its path: neither csrc nor the package, which imports torch, can be imported from here."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_architectures = load("eroseg_ext/utils/cuda_architectures.py")
cuda_toolkit = load("csrc/cuda_toolkit.py")


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
        py_limited_api=LIMITED_API,
    )


def say(sentence: str) -> None:
    print(f"eroseg_ext: {sentence}", file=sys.stderr, flush=True)


def chosen_cuda() -> tuple[Any, list[Any]] | None:
    """The toolkit and the architectures of the CUDA kernels; None, after a line that says why, where there are none."""
    if os.environ.get("EROSEG_NO_CUDA") == "1":
        return None
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    try:
        named = cuda_architectures.parse(listed)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    wanted = [architecture for architecture in named if architecture[:2] >= OLDEST_CAPABILITY]
    if named and not wanted:
        say(f"the CUDA kernels are not built: they need 8.0 or newer, TORCH_CUDA_ARCH_LIST is {listed!r}")
        return None
    if left_out := [str(architecture) for architecture in named if architecture not in wanted]:
        say(f"the CUDA kernels need 8.0 or newer: {', '.join(left_out)} of TORCH_CUDA_ARCH_LIST is left out")
    try:
        toolkit = cuda_toolkit.find()
    except cuda_toolkit.UnusableToolkitError as error:
        # Where nobody asked for CUDA, what happens to lie around must not stop the installation.
        if named or os.environ.get("CUDA_HOME"):
            raise SystemExit(
                f"{error}: name a toolkit of CUDA 12.0 or newer in CUDA_HOME, or set EROSEG_NO_CUDA=1"
            ) from None
        say(f"the CUDA kernels are not built: {error}")
        return None
    if not named:
        wanted = [each for each in cuda_architectures.parse(ARCHITECTURES) if toolkit.knows(each.nvcc_options())]
        return toolkit, [*wanted[:-1], wanted[-1]._replace(ptx=True)]  # PTX of the newest, for what is newer still
    if unknown := [str(each) for each in wanted if not toolkit.knows(each.nvcc_options())]:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST has {', '.join(unknown)}, which {toolkit.nvcc} does not know: "
            f"leave it out, name a newer toolkit in CUDA_HOME, or set EROSEG_NO_CUDA=1"
        )
    return toolkit, wanted


def cuda_extension(toolkit: Any, architectures: list[Any]) -> Extension:
    """The module of the CUDA operators; ``compile_kernels`` adds the kernels to it."""
    extension = stable_extension("eroseg_ext._cuda", ["csrc/cuda"])
    extension.extra_compile_args += toolkit.include_flags
    extension.define_macros.append(("EROSEG_CUDA_ARCHITECTURES", f'"{";".join(map(str, architectures))}"'))
    # The runtime is linked in: the module then runs beside any CUDA torch, whatever runtime that brings.
    extension.extra_objects = [toolkit.runtime]
    extension.libraries += ["rt", "dl", "pthread"]
    return extension


def is_current(built: Path, command: str) -> bool:
    """Whether an object file is what the command would make again: of the same files, none of which has changed."""
    made_by, made_from = built.with_suffix(".command"), built.with_suffix(".d")
    try:
        files = shlex.split(made_from.read_text().partition(":")[2].replace("\\\n", " "))
        return made_by.read_text() == command and max(map(os.path.getmtime, files)) < os.path.getmtime(built)
    except (OSError, ValueError):  # there is none, or a header is gone
        return False


def compile_kernels(toolkit: Any, architectures: list[Any], target: Path) -> list[str]:
    """Compiles what is new of csrc/cuda/*.cu, several at a time; returns the object files."""
    flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "--compiler-options=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    if WARNINGS_ARE_ERRORS:
        # Registers that spill, and arrays in local memory, are what makes such kernels slow: no kernel may have them.
        flags += ["-Werror=all-warnings", "--ptxas-options=--warn-on-spills,--warn-on-local-memory-usage,-Werror"]
    flags += toolkit.include_flags
    flags += dict.fromkeys(option for architecture in architectures for option in architecture.nvcc_options())
    flags.append("--threads=2")  # architectures at a time: the largest file alone would take as long as all the others
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    target.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str:
        built = target / f"{source.stem}.o"
        made_by, made_from = built.with_suffix(".command"), built.with_suffix(".d")
        command = [toolkit.nvcc, *flags, "-MD", "-MF", str(made_from), "-c", str(source), "-o", str(built)]
        if not is_current(built, shlex.join(command)):
            made_by.unlink(missing_ok=True)
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
            made_by.write_text(shlex.join(command))
        return str(built)

    # The largest first, so that none is left over at the end.
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: "grad" not in path.stem)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(compiled, sources))


def compiled() -> dict[str, Any]:
    import torch
    from torch.utils import cpp_extension

    cuda = chosen_cuda()

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            self.force = True  # without ninja, setuptools would not see that a kernel or one of its headers has changed
            say(f"compiling against torch {torch.__version__} in {Path(torch.__file__).parent}")
            for extension in self.extensions:
                if cuda is not None and extension.name == "eroseg_ext._cuda":
                    extension.extra_objects = compile_kernels(*cuda, Path(self.build_temp)) + extension.extra_objects
            super().build_extensions()

    # BuildExtension defines Py_LIMITED_API as this, by default the oldest Python of its own torch, not of our wheel.
    cpp_extension.min_supported_cpython = PY_LIMITED_API
    extensions = [stable_extension("eroseg_ext._C", ["csrc", "csrc/cpu"])]
    if cuda is not None:
        extensions.append(cuda_extension(*cuda))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PY_TAG}} if LIMITED_API else {},
    }


if __name__ == "__main__":
    setup(**({} if os.environ.get("EROSEG_NO_EXT") == "1" else compiled()))
