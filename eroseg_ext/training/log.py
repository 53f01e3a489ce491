"""What a run leaves to read: a JSONL log, curves as PNG, TensorBoard events where that is installed."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eroseg_ext.utils import atomic_files

Record = dict[str, Any]


class Log:
    """The log of the run in a folder, ``log.jsonl``, one record per line, each with its ``update``.

    What it says of updates after the one to continue after, and of a validation after that one, is dropped: that is
    done again.
    """

    def __init__(self, folder: Path, update: int) -> None:
        self._path = folder / "log.jsonl"
        self._curves = folder / "curves.png"
        self.records = [
            record
            for record in _read(self._path)
            if record["update"] < update or (record["update"] == update and "loss" in record)
        ]
        with atomic_files.replacing(self._path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in self.records).encode())
        self._board: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1)

    def write(self, record: Record) -> None:
        """Appends a record."""
        self.records.append(record)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(f"{self._path} could not be written: {error}") from error
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, record["update"])

    def draw(self) -> None:
        """Draws the curves so far."""
        figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
        loss, score = figure.subplots(1, 2)
        trained = [record for record in self.records if "loss" in record]
        validated = [record for record in self.records if "miou" in record]
        loss.plot([r["epoch"] for r in trained], [r["loss"] for r in trained], color="tab:blue", linewidth=0.8)
        loss.set(xlabel="epoch", ylabel="training loss")
        names = {"miou": "mIoU", "accuracy": "pixel accuracy"}
        for name, label in names.items():
            colour = "tab:blue" if name == "miou" else "tab:orange"
            for prefix, style, kind in (("", "-", "clean"), ("adversarial_", "--", "attacked")):
                points = [(r["epoch"], r[prefix + name]) for r in validated if prefix + name in r]
                if points:
                    score.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=f"{label}, {kind}")
        score.set(xlabel="epoch", ylabel="validation, %")
        for axes in (loss, score):
            axes.grid(alpha=0.3)
        if validated:
            score.legend(fontsize=9)
        with atomic_files.replacing(self._curves) as file:
            figure.savefig(file, format="png")

    def close(self) -> None:
        """Flushes what TensorBoard's writer still holds."""
        if self._board is not None:
            self._board.close()


def _read(path: Path) -> list[Record]:
    """The records of a log; what is no record is left out, such as a last line that is half written."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError, AttributeError):
            record = json.loads(line)
            plain = {name: value for name, value in record.items() if name != "seconds"}
            if {"update", "epoch"} <= plain.keys() and all(isinstance(value, (int, float)) for value in plain.values()):
                found.append(record)
    return found
