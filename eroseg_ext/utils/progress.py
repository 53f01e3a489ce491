"""How far a long run is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

INTERVAL = 60.0
"""Seconds between lines in a log, and before the first."""


class Progress(tqdm):
    """tqdm's bar on stderr; where that is no terminal, a line each minute and a last one."""

    def __init__(self, **keywords: Any) -> None:
        self._lines = not sys.stderr.isatty()
        if self._lines:
            counted = "{desc}{n_fmt}/{total_fmt} {unit}s [{elapsed}<{remaining}]"
            keywords |= {"bar_format": counted, "mininterval": INTERVAL, "maxinterval": INTERVAL, "delay": INTERVAL}
        super().__init__(**keywords)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Shows the present state."""
        if self._lines:
            print(self if msg is None else msg, file=sys.stderr, flush=True)
        else:
            super().display(msg, pos)
