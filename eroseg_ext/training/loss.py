"""What an update descends: cross-entropy, in which the pixels that the attack has brought into play may count more."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.data.palettes import VOID
from eroseg_ext.models.loading import imported, told
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops import reference
from eroseg_ext.ops.protocol import Operations
from eroseg_ext.training.settings import TrainSettings
from eroseg_ext.utils.precision import widest

_ALL_PIXELS = 1e30
"""The width of a front that all pixels are in."""
_FRONT = AttackSettings()
"""Whose front the loss has."""


class Loss:
    """The loss that the settings of a training name."""

    def __init__(self, settings: TrainSettings, class_weights: Tensor | None, device: torch.device) -> None:
        self._settings = settings
        self._class_weights = None if class_weights is None else class_weights.to(device)
        self._own = None if settings.loss is None else _own_loss(settings, device)

    def __call__(self, heads: list[LogitMap], labels: Tensor, total: Tensor, ops: Operations) -> Tensor:
        """The share of some images in the loss of a batch, a scalar.

        Args:
            heads: their logits, and those of auxiliary heads.
            labels: ``[B, H, W]`` int64 with ``VOID`` on void pixels.
            total: what the valid pixels of the whole batch weigh, see :meth:`weight`.
            ops: see :func:`summed_loss`.
        """
        first, *auxiliary = (self._share(logits, labels, total, ops) for logits in heads)
        return first + self._settings.auxiliary_weight * sum(auxiliary) if auxiliary else first

    def weight(self, labels: Tensor) -> Tensor:
        """What the valid pixels weigh, a scalar."""
        valid = labels != VOID
        if self._class_weights is None:
            return valid.sum().float()
        return self._class_weights[labels.where(valid, 0)].where(valid, 0).sum()

    def try_on(self, logits: LogitMap, size: tuple[int, int]) -> None:
        """Raises ValueError for a loss that fails on these logits, of one image of that size, and is no scalar."""
        if self._own is None:
            return
        labels = torch.zeros(1, *size, dtype=torch.int64, device=logits.values.device)
        labels[:, 0, 0] = VOID
        try:
            loss = self._own(logits.at(size).float(), labels)
        except Exception as error:
            raise ValueError(f"loss fails on logits [B, C, H, W] and labels [B, H, W]: {told(error)}") from error
        if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
            came = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss gives {came}, wanted a scalar tensor that depends on the logits by autograd")

    def _share(self, logits: LogitMap, labels: Tensor, total: Tensor, ops: Operations) -> Tensor:
        settings = self._settings
        if self._own is None:
            front_loss, balance = settings.front_loss_in_force, settings.loss_balance
            return summed_loss(logits, labels, self._class_weights, front_loss, ops, balance) / total
        mean: Tensor = self._own(logits.at((labels.shape[-2], labels.shape[-1])).float(), labels)
        return mean * (len(labels) / settings.batch_size)


def _own_loss(settings: TrainSettings, device: torch.device) -> Any:
    """The callable that ``settings.loss`` is, names, or names the class of."""
    loss: Any = imported("loss", settings.loss) if isinstance(settings.loss, str) else settings.loss
    if isinstance(loss, type):
        try:
            loss = loss(**settings.loss_args)
        except Exception as error:
            raise ValueError(f"loss cannot be made with {settings.loss_args}: {told(error)}") from error
    elif settings.loss_args:
        loss = functools.partial(loss, **settings.loss_args)
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def summed_loss(
    logits: LogitMap,
    labels: Tensor,
    class_weights: Tensor | None,
    front_loss: float,
    ops: Operations,
    balance: float = 0.0,
) -> Tensor:
    """The cross-entropy summed over the valid pixels, a scalar; pixels count as :func:`pixel_factor` says.

    The fused operations give it and its gradient without logits at the labels' size: the cross-entropy's gradient is
    that of ``erosion_grad`` with ``direction="ce"`` and all pixels in the front, and the factor's part that with the
    soft front, added to it.

    Args:
        logits: ``[B, C, h, w]``, also of another size than the labels; one class is binary segmentation.
        labels: ``[B, H, W]`` int64 with ``VOID`` on void pixels.
        class_weights: ``[max(C, 2)]`` float32, or None.
        front_loss: see :func:`pixel_factor`; 0 for all pixels alike.
        ops: the reference's give the definition, by autograd.
        balance: exponent of :func:`eroseg_ext.ops.reference.class_balance`, which is the rarity; 0 for classes alike.
    """
    rarity = None
    if balance > 0:
        rarity = ops.class_balance(labels, max(logits.values.shape[1], 2), ignore_index=VOID) ** balance
    if ops is not reference:
        loss: Tensor = _Fused.apply(logits.values, labels, class_weights, front_loss, rarity, logits.align_corners, ops)
        return loss
    z = logits.at((labels.shape[-2], labels.shape[-1])).float()
    both = torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z
    losses = F.cross_entropy(both, labels, class_weights, ignore_index=VOID, reduction="none")
    if front_loss > 0 or rarity is not None:
        scores = ops.confidence(z.detach(), labels, ignore_index=VOID, confidence="log_odds")
        losses = losses * pixel_factor(scores, labels, front_loss, rarity, ops)[0]
    return losses.sum()


def pixel_factor(
    scores: Tensor, labels: Tensor, front_loss: float, rarity: Tensor | None, ops: Operations
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(1 + front_loss * w) * rarity``, divided by its mean over the image's valid pixels.

    w is the weight of a pixel in a front of the attack's width, by its log-odds: 1 where the network is undecided,
    nearly 0 where it is sure, right or wrong. An image counts as much as without it, on any number of
    processes and in pieces of any size.

    Args:
        scores: ``[B, H, W]`` float32, the confidence ``log_odds`` of :func:`eroseg_ext.ops.reference.confidence`.
        labels: ``[B, H, W]`` int64 with ``VOID`` on void pixels.
        rarity: ``[B, C]`` float32, of the pixel's class, or None for 1.

    Returns:
        The factor ``[B, H, W]`` float32, 0 on void pixels; the front's width tau ``[B]``, or None without a front; and
        what the product was multiplied by, ``[B]``.
    """
    valid = labels != VOID
    count = valid.sum((1, 2))
    factor, tau = torch.ones_like(scores), None
    if front_loss > 0:
        stats = torch.zeros(len(scores), 4, dtype=widest(scores.device), device=scores.device)
        stats[:, 0] = count
        tau = ops.next_tau(scores, stats, 1, front_min=_FRONT.front_first, front_max=_FRONT.front_first)
        eroded = ops.erode(scores, valid, _FRONT.radius, _FRONT.slope * tau)
        factor += front_loss * reference.front_weight(eroded, tau)
    if rarity is not None:
        factor *= rarity.gather(1, labels.where(valid, 0).flatten(1)).view_as(factor)
    factor = factor.where(valid, 0.0)
    scale = count / factor.sum((1, 2)).clamp(min=1e-12)
    return factor * scale.view(-1, 1, 1), tau, scale


class _Fused(torch.autograd.Function):
    """:func:`summed_loss` by the fused operations, which give the gradient together with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        class_weights: Tensor | None,
        front_loss: float,
        rarity: Tensor | None,
        align_corners: bool,
        ops: Operations,
    ) -> Tensor:
        shared: dict[str, Any] = {"confidence": "log_odds", "direction": "ce"}
        shared |= {"ignore_index": VOID, "align_corners": align_corners}
        largest = None
        if class_weights is not None:
            largest = class_weights.amax()  # the operation's factors are at most 1
            shared["class_weight"] = (class_weights / largest).expand(len(logits), -1)
        elif rarity is not None:
            shared["class_weight"] = rarity
        wide = logits.new_full((len(logits),), _ALL_PIXELS, dtype=torch.float32)
        grad, log_odds, _ = ops.erosion_grad(logits, labels, wide, front="hard", radius=0, **shared)
        losses = F.softplus(-log_odds)  # -log p of the label; 0 on void pixels, whose log-odds are infinite
        if class_weights is not None:
            losses = losses * class_weights[labels.where(labels != VOID, 0)]
        if front_loss > 0 or rarity is not None:
            factor, tau, scale = pixel_factor(log_odds.abs(), labels, front_loss, rarity, ops)
            losses = losses * factor
            if tau is not None:
                of_front, *_ = ops.erosion_grad(logits, labels, tau, radius=_FRONT.radius, slope=_FRONT.slope, **shared)
                grad.add_(of_front, alpha=front_loss)
            grad.mul_(scale.view(-1, 1, 1, 1))
        if largest is not None:
            grad.mul_(largest)
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None, None, None
