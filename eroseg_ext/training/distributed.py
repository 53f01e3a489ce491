"""The processes of a run: what torchrun tells them, and the few sums they exchange."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from eroseg_ext.utils.processes import started
from eroseg_ext.utils.validate import usable_device


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes files and talks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: str | None, timeout: float) -> Iterator[Processes]:
    """Joins the processes that torchrun started, if it did; leaves them at the end.

    The device is a name, or None for this process's GPU if there is one, else the CPU; ValueError if it cannot be used.
    """
    rank, world = started()
    place = usable_device(device, gpu=int(os.environ.get("LOCAL_RANK", 0)))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world == 1 or dist.is_initialized():
        yield Processes(rank, world, place)
        return
    wait = timedelta(seconds=timeout)
    gpu = place.type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo", timeout=wait, device_id=place if gpu else None)
    yield Processes(rank, world, place)
    # Not after an exception: leaving in order would wait for processes that wait for this one.
    dist.destroy_process_group()
