"""Files that are whole or not there: checkpoints and weights survive a kill, a crash and a full disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(value: Any, path: Path) -> None:
    """``torch.save`` that leaves either the old file or the whole new one, also after a power cut.

    Raises:
        OSError: it could not be written, say for want of space; names the file. The old file is as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    # torch's writer turns the system's error into one of its own.
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        kept = "; the one before it is kept" if path.exists() else ""
        raise OSError(f"{path} could not be written: {_first_line(error)}{kept}") from error


def load(path: Path) -> Any:
    """What :func:`save` wrote, on the CPU; plain values and tensors only.

    Raises:
        ValueError: the file is not of that kind; names it.
        OSError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no file of weights or checkpoint: {_first_line(error)}") from error


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    cause = error.__context__ if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) else error
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__
