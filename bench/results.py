"""What a run leaves: figures with their device, versions and commit, as one JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch

import eroseg_ext
from bench import ROOT
from bench.measure import Timing, copy_timing
from eroseg_ext.ops import backend
from eroseg_ext.utils.atomic_files import write_json

FOLDER = ROOT / "bench" / "results"
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
"""Traffic of the copy that stands for a device's bandwidth: well beyond a GPU's L2."""


class Figure(TypedDict, total=False):
    """One measured thing; the first four fields together name it."""

    suite: str
    """``ops``, ``peers``, ``end_to_end`` or ``scaling``"""
    case: str
    implementation: str
    device: str
    """``cpu`` or ``cuda``"""
    shape: list[int]
    ms: dict[str, float]
    """``p20``, ``p50``, ``p80``, ``rounds``, ``drift`` (see :class:`bench.measure.Timing`)"""
    again_ms: dict[str, float]
    """the same version measured once more, later in the same run"""
    extra: dict[str, Any]


def key(figure: Figure) -> tuple[str, str, str, str]:
    return figure["suite"], figure["case"], figure["implementation"], figure["device"]


def traffic(figure: Figure, nbytes: int, copy: Timing) -> None:
    """Adds the least traffic, GB/s (10^9 bytes read plus written) and the share of a copy that moves as much."""
    seconds = figure["ms"]["p50"] / 1000
    figure["extra"] |= {
        "bytes": nbytes,
        "GB/s": round(nbytes / seconds / 1e9, 2),
        "copy_ms": round(1000 * copy.median, 6),
        "share_of_copy": round(copy.median / seconds, 4),
    }


def _output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def commit() -> dict[str, Any]:
    """The commit of the checkout and whether it has changes besides results; None outside a git repository."""
    changes = _output_of("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "commit": _output_of("git", "rev-parse", "--short", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def clocks() -> dict[str, str] | None:
    """Driver, clocks, temperature and power of the current GPU, read from nvidia-smi; None without one."""
    if not torch.cuda.is_available():
        return None
    names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    line = _output_of("nvidia-smi", "-i", uuid, f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return None if line is None else dict(zip(names, (value.strip() for value in line.split(",")), strict=False))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    copy = COPY_BYTES[device.type] / copy_timing(device, COPY_BYTES[device.type]).median / 1e9
    facts: dict[str, Any] = {"copy GB/s": round(copy, 1), "fused": backend.why_not_fused(device) or "yes"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "L2 MiB": properties.L2_cache_size / 2**20, "cuda": torch.version.cuda}
        return gpu | facts | {"clocks": clocks()}
    cpu = {"name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return cpu | {"capability": torch.backends.cpu.get_cpu_capability()} | facts


def versions() -> dict[str, str | None]:
    """Of everything that is measured, None where it is not installed."""

    def of(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    peers = {name: of(name) for name in ("cospgd", "torchattacks", "torchvision", "transformers")}
    ours = {"python": platform.python_version(), "torch": torch.__version__, "eroseg_ext": eroseg_ext.__version__}
    return ours | peers


def load() -> float:
    """How many processes wanted to run in the last minute; asked before a run, whether the machine was idle."""
    return round(os.getloadavg()[0], 2)


def write(
    path: Path,
    profile: str,
    devices: list[torch.device],
    figures: list[Figure],
    skipped: dict[str, str],
    load: float,
    **more: Any,
) -> None:
    """Writes a result file, whole or not at all.

    Args:
        path: the file.
        profile: ``quick``, ``default`` or ``full``.
        devices: that were measured.
        figures: in the order in which they were taken.
        skipped: reason by name of what was left out.
        load: see :func:`load`, from before the run.
        more: further entries.
    """
    value = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "profile": profile,
        "load": load,
        **commit(),
        "versions": versions(),
        "devices": {device.type: device_facts(device) for device in devices},
        **more,
        "figures": figures,
        "skipped": skipped,
    }
    write_json(path, value)


def read(name: str) -> dict[str, Any]:
    """A result file, by its path or by its name under ``bench/results``; ValueError if it is not one."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a result: {error}") from error
    if not isinstance(value, dict) or "figures" not in value:
        raise ValueError(f"{path} is not a result of pytest bench/ --save or python -m bench.kernels")
    return {"name": path.stem, **value}
