"""Torch's element-wise functions on the CPU, called once before threads share a call."""

from __future__ import annotations

import torch


def settle_first_calls() -> None:
    """Makes the first calls of exp, log and sqrt with one element, which one thread computes.

    In the oneMKL of torch's CPU builds (2024.2) the first call of such a function chooses its implementation; threads
    that share that call may compute their part of it with 13 bits instead of 24
    (github.com/pytorch/pytorch/issues/188792). The reference uses exp and log, optimizers use sqrt.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for function in (torch.exp, torch.log, torch.sqrt):
            function(one)
