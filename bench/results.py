"""Figures as rows of one CSV file; ``bench/results/results.csv`` holds those that the documentation shows."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from bench import ROOT

RESULTS = ROOT / "bench" / "results" / "results.csv"
UNITS = {"p20": "ms", "p50": "ms", "p80": "ms", "bytes": "bytes", "peak": "bytes", "logits": "bytes"}
"""Of quantities, by their last word; all others are in percent."""


class Row(NamedTuple):
    """One figure."""

    group: str
    """``operations``, ``attacks``, ``parts``, ``strength``, ``pareto``, ``evaluation``, ``demo``, ``resolution``,
    ``resolution steps`` or ``resolution loss``"""
    case: str
    """what is measured, on what"""
    name: str
    """which implementation, attack or model of those that stand side by side"""
    quantity: str
    """``p20``, ``p50`` and ``p80`` of the time; ``peak`` memory; ``miou``, ..."""
    value: float
    unit: str
    device: str
    commit: str
    date: str
    """when the run began; the rows of a run have the same"""


class Run:
    """Makes rows of figures, and appends each to a file at once if there is a path; ``commit`` names the code."""

    def __init__(self, path: Path | None = None, commit: str | None = None) -> None:
        self.rows: list[Row] = []
        self._path = path
        self._commit = commit or checkout()
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def add(self, group: str, case: str, name: str, device: torch.device, figures: Mapping[str, float]) -> None:
        """Adds a row for each quantity."""
        where = describe(device), self._commit, self._date
        new = [
            Row(group, case, name, quantity, value, UNITS.get(quantity.split()[-1], "%"), *where)
            for quantity, value in figures.items()
        ]
        self.rows += new
        if self._path is not None:
            write(self._path, new)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Appends rows, and the head where the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([Row._fields] * new)
        table.writerows([*row[:4], f"{row.value:.10g}", *row[5:]] for row in rows)


def read(path: Path = RESULTS) -> list[Row]:
    """The rows of a file; ValueError with a sentence if it is none of ours."""
    try:
        with path.open(newline="") as file:
            head, *lines = csv.reader(file)
        if tuple(head) != Row._fields:
            raise ValueError(f"its head is {','.join(head)}")
        return [Row(*line[:4], float(line[4]), *line[5:]) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as results of pytest bench/: {error}") from error


def latest(rows: Sequence[Row], group: str, kind: str = "cpu") -> list[Row]:
    """The rows of a group's last run on a kind of device: what is compared comes from one run."""
    found = [row for row in rows if row.group == group and row.device.startswith(kind)]
    last = max((row.date for row in found), default="")
    return [row for row in found if row.date == last]


def checkout() -> str:
    """The commit, with a + if the checkout has changes besides results; empty outside a git repository."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    changed = git("status", "--porcelain", "--", ".", ":!bench/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def describe(device: torch.device) -> str:
    """What a figure depends on besides the code."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine)
    level = torch.backends.cpu.get_cpu_capability()
    return f"cpu: {name}, {torch.get_num_threads()} threads, {level}, torch {torch.__version__}"
