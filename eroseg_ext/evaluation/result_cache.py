"""Results on disk that a killed process leaves whole: one line per finished piece of work, found again by its key."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from eroseg_ext.utils.atomic_files import digest


def key_of(description: Any) -> str:
    """Key of a piece of work: a hash of everything that its result depends on, given as plain values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


class ResultCache(dict[str, Any]):
    """A file of lines ``{"key": ..., "what": ..., "value": ..., "digest": ...}``, one per finished piece of work.

    A line is on the disk when :meth:`put` returns. What a killed process was writing is cut off the next time. Damaged
    lines are left out with a warning, so that what they held is made anew, and lines of other settings are left in
    place, under their own keys. Use it as a context manager, in a folder that is ``locked``.

    Args:
        path: the file, made if missing; None keeps everything in memory.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._file: int | None = None
        if path is None:
            return
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._read(path, self._file)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> ResultCache:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def put(self, key: str, what: str, value: Any) -> None:
        """Records a result; ``what`` says in words what it is of."""
        entry = json.loads(json.dumps({"key": key, "what": what, "value": value}))
        line = json.dumps({**entry, "digest": _digest(entry)}) + "\n"
        if self._file is not None:
            end = os.fstat(self._file).st_size
            rest = memoryview(line.encode())
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                os.fsync(self._file)
            except BaseException:
                os.ftruncate(self._file, end)
                raise
        self[key] = entry["value"]

    def _read(self, path: Path, file: int) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        damaged = []
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                if entry.pop("digest") != _digest(entry):
                    raise ValueError("the digest is of another line")
                self[entry["key"]] = entry["value"]
            # What a damaged line holds may be of any type, and nested deeper than Python goes.
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                damaged.append(number)
        if damaged:
            warnings.warn(
                f"{path} is damaged at line {', '.join(map(str, damaged[:5]))}{', ...' if damaged[5:] else ''}: what "
                "was there is made anew where it is needed",
                stacklevel=3,
            )
        os.ftruncate(file, whole)


def _digest(entry: dict[str, Any]) -> str:
    return digest(json.dumps(entry, sort_keys=True).encode())
