"""Files that are whole or not there: they survive a kill, a crash and a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` at the end, and not before it is safely on the disk.

    Raises:
        OSError: it could not be written, say for want of space; names the file. What was there before is kept.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    # torch's writer turns the system's error into one of its own.
    except (OSError, RuntimeError) as error:
        kept = "; the one before it is kept" if path.exists() else ""
        raise OSError(f"{path} could not be written: {_first_line(error)}{kept}") from error
    finally:
        part.unlink(missing_ok=True)


def write_tensors(path: Path, value: Any) -> None:
    """``torch.save`` through :func:`replacing`."""
    with replacing(path) as file:
        torch.save(value, file)


def write_json(path: Path, value: Any) -> None:
    """A value as JSON through :func:`replacing`."""
    text = json.dumps(value, indent=1) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def read_tensors(path: Path) -> Any:
    """What :func:`write_tensors` wrote, on the CPU; plain values and tensors only.

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


def _first_line(error: BaseException) -> str:
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
