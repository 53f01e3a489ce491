"""The CUDA toolkit that setup.py compiles the kernels with.

NVIDIA, conda-forge and Debian lay a toolkit out differently; where the parts of each are, its own nvcc tells.
"""

import os
import re
import shlex
import shutil
import subprocess
from typing import NamedTuple

NVIDIAS_NVCC = "/usr/local/cuda/bin/nvcc"  # where NVIDIA's installers put it, without adding it to the PATH
SYSTEM_INCLUDE = "/usr/include"


class UnusableToolkitError(Exception):
    """There is no toolkit, or none that can compile the kernels; says why in one sentence."""


class Toolkit(NamedTuple):
    nvcc: str
    include_flags: list[str]
    runtime: str  # the path of libcudart_static.a

    def knows(self, architecture_options: list[str]) -> bool:
        return _run(self.nvcc, "--dryrun", *architecture_options).returncode == 0


def find() -> Toolkit:
    """The toolkit in CUDA_HOME, else that of the nvcc on the PATH, else that in /usr/local/cuda.

    Raises:
        UnusableToolkitError: there is none, a part is missing, or its nvcc does not compile C++20 here.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or NVIDIAS_NVCC
    if not os.path.isfile(nvcc):
        raise UnusableToolkitError(f"there is no {nvcc}" if home else f"no nvcc is on the PATH, nor is {nvcc} there")

    told = dict(re.findall(r"^#\$ (\w+)=(.*)$", _messages(nvcc, "--dryrun"), re.MULTILINE))
    # nvcc's own folders, and those that conda's build environments add.
    names = ("INCLUDES", "LIBRARIES", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    flags = [flag for name in names for flag in shlex.split(told.get(name, ""))]
    roots = [root for root in (told.get("TOP", "").strip(), home) if root]
    headers = [flag[2:] for flag in flags if flag.startswith("-I")] + [f"{root}/include" for root in roots]
    libraries = [flag[2:] for flag in flags if flag.startswith("-L")]
    libraries += [f"{root}/{name}" for root in roots for name in ("lib64", "lib")]

    include = _folder_with("cuda_runtime_api.h", [*headers, SYSTEM_INCLUDE], nvcc)
    runtime = os.path.join(_folder_with("libcudart_static.a", libraries, nvcc), "libcudart_static.a")
    # Named as an option, the system's own folder would come before the C++ library, which wants to be the first.
    include_flags = [] if include == SYSTEM_INCLUDE else ["-isystem", include]
    # CUDA's headers judge the host's compiler, and those of bfloat16 need libcu++, which is a package of its own.
    _messages(nvcc, *include_flags, "-include", "cuda_bf16.h", "-E", "-o", os.devnull)
    return Toolkit(nvcc, include_flags, runtime)


def _run(nvcc: str, *options: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [nvcc, "-std=c++20", *options, "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UnusableToolkitError(f"{nvcc} cannot be run ({error.strerror})") from error


def _messages(nvcc: str, *options: str) -> str:
    run = _run(nvcc, *options)
    if run.returncode != 0:
        lines = [line for line in run.stderr.splitlines() if re.search("error|fatal", line)]
        why = lines[0].strip() if lines else f"exit status {run.returncode}"
        raise UnusableToolkitError(f"{nvcc} fails ({why})")
    return run.stderr


def _folder_with(file: str, folders: list[str], nvcc: str) -> str:
    for folder in map(os.path.realpath, folders):
        if os.path.isfile(os.path.join(folder, file)):
            return folder
    raise UnusableToolkitError(f"the toolkit of {nvcc} has no {file} in {', '.join(folders)}")
