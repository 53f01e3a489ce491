"""Results on disk that a killed process leaves whole: one line per finished piece of work, found again by its key."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eroseg_ext.utils.atomic_files import digest
from eroseg_ext.utils.validate import warn


def key_of(description: Any) -> str:
    """Key of a piece of work: a hash of everything that its result depends on, given as plain values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


class ResultCache(dict[str, Any]):
    """A file of lines ``{"key": ..., "what": ..., "value": ..., "digest": ...}``, one per finished piece of work.

    A line is on the disk when :meth:`put` returns. What a killed process was writing is cut off the next time. Damaged
    lines are left out with a warning, so that what they held is made anew, and lines of other settings are left in
    place, under their own keys. Several processes may write at once, on a file system with locks. Use it as a context
    manager.

    Args:
        path: the file, made if missing; None keeps everything in memory.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path
        self._file: int | None = None
        self._end = self._lines = 0
        if path is None:
            return
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self.read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> ResultCache:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def put(self, key: str, what: str, value: Any) -> None:
        """Records a result, unless another process has by now; ``what`` says in words what it is of."""
        entry = json.loads(json.dumps({"key": key, "what": what, "value": value}))
        line = (json.dumps({**entry, "digest": _digest(entry)}) + "\n").encode()
        with self._alone():
            if key in self:
                return
            if self._file is not None:
                rest = memoryview(line)
                try:
                    while rest:
                        rest = rest[os.write(self._file, rest) :]
                    os.fsync(self._file)
                except BaseException:
                    os.ftruncate(self._file, self._end)
                    raise
                self._end, self._lines = self._end + len(line), self._lines + 1
            self[key] = entry["value"]

    def read(self) -> None:
        """Takes in what other processes have written by now."""
        with self._alone():
            pass

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Meanwhile no other process writes, and what others have written is known."""
        if self._file is None:
            yield
            return
        with suppress(OSError):  # without locks on this file system, as ``locked`` has warned
            fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._read_on(self._file)
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read_on(self, file: int) -> None:
        content = os.pread(file, max(os.fstat(file).st_size - self._end, 0), self._end)
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].split(b"\n")[:-1]
        damaged = []
        for number, line in enumerate(lines, start=self._lines + 1):
            try:
                entry = json.loads(line)
                if entry.pop("digest") != _digest(entry):
                    raise ValueError("the digest is of another line")
                self[entry["key"]] = entry["value"]
            # What a damaged line holds may be of any type, and nested deeper than Python goes.
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                damaged.append(number)
        if damaged:
            warn(
                f"{self._path} is damaged at line {', '.join(map(str, damaged[:5]))}{', ...' if damaged[5:] else ''}: "
                "what was there is made anew where it is needed"
            )
        self._end, self._lines = self._end + whole, self._lines + len(lines)
        if whole < len(content):
            os.ftruncate(file, self._end)


def _digest(entry: dict[str, Any]) -> str:
    return digest(json.dumps(entry, sort_keys=True).encode())
