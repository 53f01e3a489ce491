"""Results on disk: whole after a kill and an interrupt, told and left out when damaged."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from eroseg_ext.evaluation.result_cache import ResultCache, key_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_what_was_put_is_found_again(path: Path) -> None:
    with ResultCache(path) as cache:
        cache.put("a", "first", {"counts": [1, 2]})
        cache.put("b", "second", [3.5, None])
        assert "a" in cache
        assert "c" not in cache
    with ResultCache(path) as cache:
        assert cache["a"] == {"counts": [1, 2]}
        assert cache["b"] == [3.5, None]


def test_each_line_is_on_disk_at_once(path: Path) -> None:
    with ResultCache(path) as cache:
        cache.put("a", "first", 1)
        line = json.loads(path.read_text())
        assert len(line.pop("digest")) == 32
        assert line == {"key": "a", "what": "first", "value": 1}


@pytest.mark.parametrize("left", range(0, 60, 7))
def test_half_a_line_is_cut_off(path: Path, left: int) -> None:
    with ResultCache(path) as cache:
        cache.put("a", "first", 1)
    whole = path.read_bytes()
    line = json.dumps({"key": "b", "what": "second", "value": list(range(20))}).encode()
    path.write_bytes(whole + line[:left])
    with ResultCache(path) as cache:
        assert "b" not in cache
        cache.put("b", "second", 2)
    with ResultCache(path) as cache:
        assert (cache["a"], cache["b"]) == (1, 2)


def three(path: Path) -> list[bytes]:
    """The lines of a file of three results."""
    with ResultCache(path) as cache:
        for number, key in enumerate("abc"):
            cache.put(key, f"number {number}", {"counts": [[number, 2.5]], 1: None, 10: True, 2: float("nan")})
    return path.read_bytes().splitlines(keepends=True)


def found(path: Path) -> set[str]:
    with ResultCache(path) as cache:
        return {key for key in "abc" if key in cache and cache[key]["counts"] == [["abc".index(key), 2.5]]}


def test_any_flipped_bit_costs_its_line_alone_and_is_told(path: Path) -> None:
    first, second, third = three(path)
    for place in range(len(second) - 1):
        damaged = bytearray(second)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(first + damaged + third)
        with pytest.warns(UserWarning, match=r"results\.jsonl is damaged at line 2"):
            assert found(path) == {"a", "c"}


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "null", "3", '"text"', "{}", '{"key": "b"}', '{"key": "b", "what": "", "value": 1}', "[" * 100_000],
    ids=lambda line: line[:12],
)
def test_lines_of_another_kind_are_left_out_and_told(path: Path, line: str) -> None:
    first, _, third = three(path)
    path.write_bytes(first + line.encode() + b"\n" + third)
    with pytest.warns(UserWarning, match=r"results\.jsonl is damaged at line 2: what was there is made anew"):
        assert found(path) == {"a", "c"}


def test_of_a_line_that_is_there_twice_the_last_counts(path: Path, recwarn: pytest.WarningsRecorder) -> None:
    first, second, third = three(path)
    path.write_bytes(second + first + second + third + first)
    assert found(path) == {"a", "b", "c"}
    assert not recwarn


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_an_interrupt_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = getattr(os, name)

    def interrupted(file: int, *data: bytes) -> int:
        original(file, *(part[:10] for part in data))
        raise KeyboardInterrupt

    with ResultCache(path) as cache:
        cache.put("a", "first", 1)
        monkeypatch.setattr(os, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.put("b", "second", 2)
        monkeypatch.undo()
        cache.put("c", "third", 3)
    with ResultCache(path) as cache:
        assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)


def test_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 10:
            return real(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResultCache(path) as cache:
        cache.put("a", "first", 1)
        whole = path.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            cache.put("b", "second", 2)
        monkeypatch.undo()
        assert path.read_bytes() == whole
        assert "b" not in cache
        cache.put("b", "second", 2)
    with ResultCache(path) as cache:
        assert cache["b"] == 2


def test_nothing_is_written_without_a_path() -> None:
    with ResultCache(None) as cache:
        cache.put("a", "first", 1)
        assert cache["a"] == 1


def test_keys() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 1.5})
