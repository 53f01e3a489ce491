"""PEP 517 build backend: setuptools, compiling against the torch that is already installed.

A frontend builds in an isolated process that does not see the packages of the environment it installs into. A plain
build requirement on torch would therefore fetch a second torch, several gigabytes of it, for every build. Under pip
the isolated process still runs the target environment's interpreter, so `site` names the directories it hides; they
go to the end of sys.path, where they provide torch and shadow nothing that the frontend installed for the build.
torch is required only where there is none. uv and build isolate with an interpreter of their own, which names no such
directories: docs/install.md says how to build without isolation there.
"""

import os
import re
import shlex
import shutil
import site
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import setuptools
from setuptools import build_meta

OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = 77
OR_WITHOUT = "or set EROSEG_NO_EXT=1 to install the pure-PyTorch path alone."

sys.path += [path for path in site.getsitepackages() if path not in sys.path]
if sys.prefix == sys.base_prefix:  # outside a virtual environment, packages may also be the user's own
    sys.path.append(site.getusersitepackages())


def _wants_extension() -> bool:
    return os.environ.get("EROSEG_NO_EXT") != "1"


def _installed_torch() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def _require_setuptools() -> None:
    """pip installs what pyproject.toml requires, but not under --no-build-isolation."""
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"eroseg_ext builds with setuptools {OLDEST_SETUPTOOLS} or newer and found {setuptools.__version__}: "
            f"install 'setuptools>={OLDEST_SETUPTOOLS}', or build without --no-build-isolation."
        )


def _require_torch() -> None:
    installed = _installed_torch()
    release = re.match(r"(\d+)\.(\d+)", installed or "")
    if release is None or tuple(map(int, release.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(
            f"eroseg_ext compiles against torch {oldest} or newer and found {installed or 'none'}: "
            f"install 'torch>={oldest}' first, {OR_WITHOUT}"
        )


def _require_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]  # the choice of torch.utils.cpp_extension
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"eroseg_ext compiles C++20 and found no compiler {compiler!r}: "
            f"install g++ 10 or newer or name a compiler in CXX, {OR_WITHOUT}"
        )


def _requires(config_settings: Any = None) -> list[str]:
    if not _wants_extension():
        return []
    _require_compiler()  # before a frontend fetches torch in vain
    ninja = ["ninja"]  # torch compiles with it where it is there: several files at a time, and only what has changed
    if _installed_torch() is None:
        return [*ninja, "torch>=" + ".".join(map(str, OLDEST_TORCH))]
    _require_torch()
    return ninja


def _checked(hook: Callable[..., str]) -> Callable[..., str]:
    """The hook, which a missing tool stops with one sentence instead of a traceback out of torch or setuptools."""

    def run(*args: Any, **kwargs: Any) -> str:
        _require_setuptools()
        if _wants_extension():
            _require_compiler()
            _require_torch()
        return hook(*args, **kwargs)

    return run


get_requires_for_build_wheel = _requires
get_requires_for_build_editable = _requires
prepare_metadata_for_build_wheel = _checked(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _checked(build_meta.prepare_metadata_for_build_editable)
build_wheel = _checked(build_meta.build_wheel)
build_editable = _checked(build_meta.build_editable)


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    os.environ["EROSEG_NO_EXT"] = "1"  # nothing is compiled, so setup.py need not import torch
    return build_meta.build_sdist(sdist_directory, config_settings)
