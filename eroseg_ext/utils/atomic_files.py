"""Files that are whole or not there, through a kill, an interrupt and a full disk; and folders with one writer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import secrets
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

_PARTS = f"*.{'[0-9a-f]' * 8}.part"
"""Pattern of the names of files that are being written."""
_MARK = b"eroseg blake2b "
"""What the comment of a file of tensors begins with; the digest of everything up to here follows."""
_locks: set[int] = set()
"""Descriptors of the lock files that this process holds."""


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BytesIO]:
    """A buffer whose content takes the place of the file ``path`` at the end, once it is safely on the disk.

    The content is made in memory, so that an interrupt never reaches torch's writer in C++, which it would abort.
    Of a link, the target is replaced; the file keeps its mode and owner. Devices, pipes and this process's own output
    are written to, not replaced. ``keep`` names the file, in the same folder, as which what was there before is kept.

    Raises OSError, which names the file, if it could not be written; what was there before is then kept.
    """
    content = BytesIO()
    yield content
    try:
        try:
            before = path.stat()
        except FileNotFoundError:
            before = None
        output = None if before is None else _own_output(before)
        if output is None and (before is None or stat.S_ISREG(before.st_mode)):
            _replace(Path(os.path.realpath(path)), content, before, keep)
        else:
            with open(path if output is None else output, "ab", closefd=output is None) as file:
                file.write(content.getbuffer())
    except OSError as error:
        kept = "; the one before it is kept" if path.is_file() else ""
        raise OSError(f"{path} could not be written: {error.strerror or error}{kept}") from error


def digest(content: bytes | memoryview) -> str:
    """Tells content from the same with any damage; 32 characters."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_tensors(path: Path, value: Any, keep: Path | None = None) -> None:
    """``torch.save`` through :func:`replacing`, with a digest of the file as the comment at its end.

    A comment is part of the zip format, which torch.load reads; it ends with the file, its length stands before it.
    """
    with replacing(path, keep) as file:
        torch.save(value, file)
        file.seek(-2, os.SEEK_END)
        file.write((len(_MARK) + 32).to_bytes(2, "little") + _MARK)
        file.write(digest(file.getbuffer()).encode())


def write_json(path: Path, value: Any) -> None:
    """A value as JSON through :func:`replacing`."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def plain(value: Any) -> Any:
    """A value as JSON gives it back: lists for tuples, and names for paths, dtypes and callables."""

    def named(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if callable(value):
            return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        return str(value)

    return json.loads(json.dumps(value, default=named))


class Foreign:
    """In the place of an object that is neither a tensor nor a plain value: its class or function is not imported."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_tensors(path: Path, foreign: bool = False) -> Any:
    """What :func:`write_tensors` or torch.save wrote, on the CPU; plain values and tensors only.

    Args:
        path: the file; with the suffix ``.safetensors``, one of that kind.
        foreign: read a file with other objects too, each as a :class:`Foreign`; else it is refused.

    Raises ValueError, which names the file, if it is not of that kind or does not have its digest.
    """
    content = path.read_bytes()
    if content[:-32].endswith(_MARK) and digest(content[:-32]).encode() != content[-32:]:
        raise ValueError(f"{path} is damaged: it does not have its digest")
    try:
        if path.suffix == ".safetensors":
            return _safetensors(content)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(BytesIO(content)) if foreign else []
        stand_ins: list[Any] = [(type(name, (Foreign,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # of which torch says a page about its own options
            reason = "torch.save did not write it, or it holds more than tensors and plain values"
        raise ValueError(f"{path} is no file of weights or checkpoint: {reason}") from error


def _safetensors(content: bytes) -> Any:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ValueError("its format needs the package safetensors, which is not installed") from error
    return load(content)


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Makes this process the only one that writes into a folder; what a killed one left half written is removed.

    With ``shared``, it is one of those that are ``shared`` too.

    The system lets go of the lock when the process ends, however it ends. Where the file system has no locks, a warning
    says so. Raises ValueError, which names the other process, if one has it.
    """
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(lock)
    try:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 1000).decode(errors="replace").strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}: wait for its end, or take another folder") from error
        except OSError as error:
            warnings.warn(
                f"{folder} is on a file system without locks ({error.strerror}): make sure that no other process "
                "writes there",
                stacklevel=3,
            )
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        for part in folder.glob(_PARTS):
            part.unlink()
        yield
    finally:
        if lock in _locks:
            _locks.remove(lock)
            os.close(lock)


def _leave_locks() -> None:
    """A forked process, such as one that reads images, may outlive the one that holds the lock."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks)


def _replace(path: Path, content: BytesIO, before: os.stat_result | None, keep: Path | None) -> None:
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    mode = 0o666 if before is None else stat.S_IMODE(before.st_mode)
    try:
        with open(part, "xb", opener=partial(os.open, mode=mode)) as file:
            if before is not None:
                with suppress(PermissionError):  # as far as the system allows
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                    os.fchmod(file.fileno(), mode)
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and before is not None:
            # Under a second name, so that the file is at no time without its first.
            keep.unlink(missing_ok=True)
            try:
                os.link(path, keep)
            except OSError:  # not every file system has links
                shutil.copyfile(path, keep)
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the renaming itself durable
        finally:
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def _own_output(status: os.stat_result) -> int | None:
    """The descriptor of standard output or error if it is that file, as /dev/stdout is."""
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None
