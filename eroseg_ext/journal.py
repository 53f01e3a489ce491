"""Results on disk that a killed process leaves whole: one line per finished piece of work, found again by its key."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


def key_of(description: Any) -> str:
    """Key of a piece of work: a hash of everything that its result depends on, given as plain values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """A file of lines ``{"key": ..., "what": ..., "value": ...}``, one per finished piece of work.

    A line is on the disk when :meth:`put` returns. What a killed process was writing is cut off the next time; lines
    of other settings are left in place, under their own keys. Use it as a context manager.

    Args:
        path: the file, made if missing; None keeps everything in memory.

    Raises:
        ValueError: another process has the file open, or a line in its midst is damaged.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None) -> None:
        self._values: dict[str, Any] = {}
        self._file: int | None = None
        if path is None:
            return
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"{path} is in use by another evaluation") from error
            self._read(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def put(self, key: str, what: str, value: Any) -> None:
        """Records a result; ``what`` says in words what it is of."""
        line = json.dumps({"key": key, "what": what, "value": value}) + "\n"
        if self._file is not None:
            end = os.fstat(self._file).st_size
            rest = memoryview(line.encode())
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, end)
                raise
        self._values[key] = json.loads(line)["value"]

    def close(self) -> None:
        """Lets another process have the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, path: Path) -> None:
        assert self._file is not None
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is damaged at line {number}: delete that line, it will be made anew"
                ) from error
        os.ftruncate(self._file, whole)
