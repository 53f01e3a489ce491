"""What an update descends: cross-entropy, in which the pixels that the attack has brought into play may count more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.data.palettes import VOID
from eroseg_ext.ops import reference
from eroseg_ext.ops.protocol import Operations
from eroseg_ext.utils.precision import widest


def summed_loss(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None, front_loss: float, ops: Operations
) -> Tensor:
    """The cross-entropy summed over the valid pixels, a scalar; pixels count as :func:`front_factor` says.

    Logits ``[B, C, H, W]``, labels ``[B, H, W]`` int64 with ``VOID`` on void pixels, class weights ``[C]`` float32.
    """
    logits = logits.float()
    if front_loss == 0:
        return F.cross_entropy(logits, labels, class_weights, ignore_index=VOID, reduction="sum")
    losses = F.cross_entropy(logits, labels, class_weights, ignore_index=VOID, reduction="none")
    return (losses * front_factor(logits.detach(), labels, front_loss, ops)).sum()


def front_factor(logits: Tensor, labels: Tensor, front_loss: float, ops: Operations) -> Tensor:
    """``1 + front_loss * w``, divided by its mean over the image's valid pixels.

    w is the weight that EroSeg's attack would give a pixel in its next step from here: 1 where the network is
    undecided, nearly 0 where it is sure, right or wrong. An image counts as much as without it, on any number of
    processes and in pieces of any size. ``[B, H, W]`` float32, 0 on void pixels.
    """
    settings = AttackSettings()
    scores = ops.confidence(logits, labels, ignore_index=VOID)
    valid = labels != VOID
    count = valid.sum((1, 2))
    stats = torch.zeros(len(logits), 4, dtype=widest(logits.device), device=logits.device)
    stats[:, 0] = count
    tau = ops.next_tau(scores, stats, 1, front_min=settings.front_first, front_max=settings.front_first)
    eroded = ops.erode(scores, valid, settings.radius, settings.slope * tau)
    factor = (1 + front_loss * reference.front_weight(eroded, tau)).where(valid, 0.0)
    return factor * (count / factor.sum((1, 2)).clamp(min=1e-12)).view(-1, 1, 1)
