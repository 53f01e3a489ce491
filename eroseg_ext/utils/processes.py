"""The processes that torchrun started."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import count

import torch.distributed as dist

PATIENCE = timedelta(minutes=10)
"""How long the first process waits for the last to come."""
_numbers = count()


def started() -> tuple[int, int]:
    """This process's rank and how many there are; 0 and 1 without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Meeting:
    """Where the processes wait for each other. It needs no process group: their program may have one or none.

    Raises ValueError if not all of them come.
    """

    def __init__(self) -> None:
        self._rank, self._world = started()
        store, *_ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"eroseg_ext {next(_numbers)}", store)  # type: ignore[attr-defined]
        try:
            self._wait("begin", PATIENCE)
        except dist.DistStoreError as error:
            raise ValueError(
                f"of {self._world} processes that torchrun started some did not call evaluate, wanted all with the "
                "same out, or shard=(0, 1) where one evaluates alone"
            ) from error

    def end(self) -> None:
        """Waits until every process is here; for 30 days at most, as torchrun ends them all if one fails."""
        self._wait("end", timedelta(days=30))

    def _wait(self, what: str, timeout: timedelta) -> None:
        self._store.set(f"{what} {self._rank}", "")
        self._store.wait([f"{what} {rank}" for rank in range(self._world)], timeout)
