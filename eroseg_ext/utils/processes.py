"""The processes that torchrun started."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import count

import torch.distributed as dist

_numbers = count()


def started() -> tuple[int, int]:
    """This process's rank and how many there are; 0 and 1 without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Meeting:
    """Where the processes wait for each other. It needs no process group: their program may have one or none."""

    def __init__(self) -> None:
        self._rank, self._world = started()
        store, *_ = next(dist.rendezvous("env://"))
        self._store = dist.PrefixStore(f"eroseg_ext {next(_numbers)}", store)

    def wait(self) -> None:
        """Until every process is here; at most 30 days, as torchrun ends them all if one fails."""
        self._store.set(str(self._rank), "")
        self._store.wait(list(map(str, range(self._world))), timedelta(days=30))
