"""Results on disk: whole after a kill, told when damaged, one writer at a time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from eroseg_ext.journal import Journal, key_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_what_was_put_is_found_again(path: Path) -> None:
    with Journal(path) as journal:
        journal.put("a", "first", {"counts": [1, 2]})
        journal.put("b", "second", [3.5, None])
        assert "a" in journal
        assert "c" not in journal
    with Journal(path) as journal:
        assert journal["a"] == {"counts": [1, 2]}
        assert journal["b"] == [3.5, None]


def test_each_line_is_on_disk_at_once(path: Path) -> None:
    with Journal(path) as journal:
        journal.put("a", "first", 1)
        assert json.loads(path.read_text()) == {"key": "a", "what": "first", "value": 1}


@pytest.mark.parametrize("left", range(0, 60, 7))
def test_half_a_line_is_cut_off(path: Path, left: int) -> None:
    with Journal(path) as journal:
        journal.put("a", "first", 1)
    whole = path.read_bytes()
    line = json.dumps({"key": "b", "what": "second", "value": list(range(20))}).encode()
    path.write_bytes(whole + line[:left])
    with Journal(path) as journal:
        assert "b" not in journal
        journal.put("b", "second", 2)
    with Journal(path) as journal:
        assert (journal["a"], journal["b"]) == (1, 2)


def test_damage_in_the_midst_is_told_and_nothing_is_lost(path: Path) -> None:
    path.write_text('{"key": "a", "what": "", "value": 1}\n{"key": "b", "wh\n{"key": "c", "what": "", "value": 3}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"results\.jsonl is damaged at line 2"):
        Journal(path)
    assert path.read_bytes() == before


def test_one_writer_at_a_time(path: Path) -> None:
    with Journal(path), pytest.raises(ValueError, match="is in use by another evaluation"):
        Journal(path)
    with Journal(path):
        pass


def test_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 10:
            return real(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path) as journal:
        journal.put("a", "first", 1)
        whole = path.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.put("b", "second", 2)
        monkeypatch.undo()
        assert path.read_bytes() == whole
        assert "b" not in journal
        journal.put("b", "second", 2)
    with Journal(path) as journal:
        assert journal["b"] == 2


def test_nothing_is_written_without_a_path() -> None:
    with Journal(None) as journal:
        journal.put("a", "first", 1)
        assert journal["a"] == 1


def test_keys() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 1.5})
