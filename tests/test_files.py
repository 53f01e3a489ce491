"""Files on disk: whole or not there, with digests, and one writer in a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eroseg_ext.utils import atomic_files

STATE = {"model": {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(3)}, "done": 7, "settings": {"eps": [0.5]}}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# What is replaced, and what is written to


@pytest.mark.parametrize("links", [1, 2])
def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, links: int) -> None:
    target, link = tmp_path / "elsewhere" / "target.json", tmp_path / "link.json"
    target.parent.mkdir()
    target.write_text("before")
    link.symlink_to("elsewhere/target.json")
    if links == 2:
        link.rename(tmp_path / "second.json")
        link.symlink_to("second.json")
    atomic_files.write_json(link, 1)
    assert link.is_symlink()
    assert target.read_text() == "1\n"
    assert [path.name for path in target.parent.iterdir()] == ["target.json"]


def test_a_link_to_nothing_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    atomic_files.write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "1\n"


def test_a_link_to_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OSError, match="link could not be written: Too many levels of symbolic links"):
        atomic_files.write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    atomic_files.write_json(pipe, [1])
    reader.join(10)
    assert pipe.is_fifo()
    assert [json.loads(text) for text in received] == [[1]]


@pytest.mark.parametrize(("name", "full"), [("null", False), ("full", True)])
def test_a_device_stays_one(tmp_path: Path, name: str, full: bool) -> None:
    """A device of our own where that is allowed: one that is replaced is lost to the whole machine."""
    device = tmp_path / name
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 7 if full else 3))
        device.open("wb").close()
    except OSError:
        if os.access("/dev", os.W_OK):
            pytest.skip("devices cannot be made here, and those of the system could be lost")
        device = Path("/dev", name)
    if full:
        with pytest.raises(OSError, match=r"full could not be written: No space left on device$"):
            atomic_files.write_json(device, 1)
    else:
        atomic_files.write_json(device, 1)
    assert device.is_char_device()


@pytest.mark.parametrize("into", ["file", "pipe"])
def test_standard_output_is_written_to(tmp_path: Path, into: str) -> None:
    code = "import sys; from pathlib import Path; from eroseg_ext.utils import atomic_files as files\n"
    code += "print('before', flush=True); files.write_json(Path('/dev/stdout'), [1]); print('after')"
    command = [sys.executable, "-c", code]
    if into == "pipe":
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    else:
        with (tmp_path / "out").open("w") as file:
            subprocess.run(command, stdout=file, check=True)
        output = (tmp_path / "out").read_text()
    assert output.split() == ["before", "[", "1", "]", "after"]


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664, 0o666])
def test_the_mode_stays(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    path.chmod(kept)
    atomic_files.write_json(path, 1)
    assert (path.read_text(), mode(path)) == ("1\n", kept)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_a_new_file_obeys_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic_files.write_json(tmp_path / "file", 1)
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o666 & ~mask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    os.chown(path, 1234, 4321)
    atomic_files.write_json(path, 1)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_files.replacing(path) as one, atomic_files.replacing(path) as other:
        one.write(b"one" * 100_000)
        other.write(b"other")
    assert path.read_bytes() == b"one" * 100_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# Interrupts


def interrupting(original: Callable[..., Any], when: str) -> Callable[..., Any]:
    def function(*arguments: Any, **keywords: Any) -> Any:
        if when == "before":
            raise KeyboardInterrupt
        original(*arguments, **keywords)
        raise KeyboardInterrupt

    return function


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "replace", "link", "fstat"])
def test_an_interrupt_stays_one_and_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    path, keep = tmp_path / "state.pt", tmp_path / "state.previous.pt"
    for number in (1, 2):
        atomic_files.write_tensors(path, {**STATE, "done": number}, keep)
    monkeypatch.setattr(os, name, interrupting(getattr(os, name), when))
    with pytest.raises(KeyboardInterrupt):
        atomic_files.write_tensors(path, {**STATE, "done": 3}, keep)
    monkeypatch.undo()
    assert atomic_files.read_tensors(path)["done"] in (2, 3)
    assert not keep.exists() or atomic_files.read_tensors(keep)["done"] in (1, 2)
    assert not list(tmp_path.glob("*.part"))


WRITES = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from eroseg_ext.utils import atomic_files as files
torch.set_num_threads(1)
path = Path(sys.argv[1])
state = {str(number): torch.zeros(3000) for number in range(60)}
files.write_tensors(path, state)  # what torch imports for it is there then
moments = random.Random(0)
for trial in range(60):
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        code = 130
        try:
            os.write(begins, b".")
            for number in range(10**6):
                for value in state.values():
                    value.fill_(number)
                files.write_tensors(path, state, path.with_name("previous.pt"))
        except Exception:
            code = 1
        finally:
            os._exit(code)
    os.read(begun, 1)
    os.close(begun)
    os.close(begins)
    time.sleep(moments.uniform(0, 0.03))
    # Python itself swallows an interrupt that comes in a callback of its importing or after a fork.
    ended = 0
    while not ended:
        os.kill(child, signal.SIGINT)
        for _ in range(100):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)
    print(os.waitstatus_to_exitcode(status))
    for found in (path, path.with_name("previous.pt")):
        if found.exists():
            print(len({float(value) for tensor in files.read_tensors(found).values() for value in tensor[::300]}))
"""
"""Interrupts 60 processes that write one file again and again, and prints how they ended and what is left."""


def test_a_real_interrupt_at_any_time_leaves_a_whole_file(tmp_path: Path) -> None:
    """Signals come while torch's writer is at work: with a file of Python's under it, many became a RuntimeError."""
    done = subprocess.run([sys.executable, "-c", WRITES, str(tmp_path / "state.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split()
    assert printed.count("130") == 60, printed
    assert set(printed) == {"130", "1"}
    assert not list(tmp_path.glob("*.part"))


# Digests


def test_torch_and_zipfile_read_what_has_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    atomic_files.write_tensors(path, STATE)
    for mmap in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap)["model"]["a"], STATE["model"]["a"])
    assert zipfile.ZipFile(path).testzip() is None


def test_any_flipped_bit_is_told(tmp_path: Path) -> None:
    """Except in the 15 bytes that say that there is a digest: without them the file is read as any of torch's."""
    path = tmp_path / "state.pt"
    atomic_files.write_tensors(path, STATE)
    whole = path.read_bytes()
    for place in [*range(0, len(whole) - 47, 7), *range(len(whole) - 32, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.pt is damaged: it does not have its digest"):
            atomic_files.read_tensors(path)


def test_a_file_of_torch_needs_no_digest(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "state.pt")
    assert atomic_files.read_tensors(tmp_path / "state.pt")["done"] == 7


# One writer in a folder

HOLDER = """
import os, sys, time
from pathlib import Path
from eroseg_ext.utils import atomic_files as files
with files.locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as a process that reads images
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_names_its_holder_and_ends_with_its_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        who = rf"process {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        in_use = f"is in use by {who}: wait for its end, or take another folder$"
        with pytest.raises(ValueError, match=in_use), atomic_files.locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        mine = pytest.raises(ValueError, match=f"by process {os.getpid()} ")
        with atomic_files.locked(tmp_path), mine, atomic_files.locked(tmp_path):
            pass
        with atomic_files.locked(tmp_path):
            pass


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("state.pt.0123abcd.part", "film.part", "state.pt"):
        (tmp_path / name).touch()
    with atomic_files.locked(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "film.part", "state.pt"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    sentence = "is on a file system without locks .*: make sure that no other process"
    with pytest.warns(UserWarning, match=sentence), atomic_files.locked(tmp_path):
        pass
