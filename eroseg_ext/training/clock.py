"""Where the time goes: seconds per phase, on the device, without a synchronisation per step."""

from __future__ import annotations

import time

import torch

DATA = "data"
"""waiting for samples, and their transfer"""
ATTACK_MODEL = "attack: model"
"""the model's forward and backward in the attack"""
ATTACK_KERNELS = "attack: kernels"
"""the rest of the attack: kernels, the loop around them, the noise"""
UPDATE = "update"
"""forward, loss, backward and optimiser of the update"""
OTHER = "other"
"""validation, checkpoints, logging"""
PHASES = (DATA, ATTACK_MODEL, ATTACK_KERNELS, UPDATE, OTHER)


class Clock:
    """Books all time to the phase that was switched to last.

    On the CPU with the wall clock. On a GPU with events on its stream, read in :meth:`seconds` only: there a phase
    lasts from when the GPU reaches its beginning to when it reaches its end, idle time included.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = OTHER
        self._since = time.perf_counter()
        self._events: list[tuple[str, torch.cuda.Event]] = []
        if self._cuda:
            self._events.append((OTHER, _event()))

    @property
    def phase(self) -> str:
        """What the time is booked to now."""
        return self._events[-1][0] if self._cuda else self._phase

    def switch(self, phase: str) -> None:
        """What follows is of this phase."""
        if self._cuda:
            self._events.append((phase, _event()))
            return
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase so far; waits for the GPU."""
        self.switch(self.phase)
        if self._cuda:
            self._events[-1][1].synchronize()
            for (phase, start), (_, end) in zip(self._events, self._events[1:], strict=False):
                self._seconds[phase] += start.elapsed_time(end) / 1000
            del self._events[:-1]
        return dict(self._seconds)

    def reset(self) -> None:
        """Forgets what was booked so far."""
        self.seconds()
        self._seconds = dict.fromkeys(PHASES, 0.0)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
