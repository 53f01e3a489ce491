"""The terms of a pixel that the operations of ``reference.py``, which has the conventions, are made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eroseg_ext.utils.precision import wide

INF = float("inf")


class PixelTerms(NamedTuple):
    """What the per-pixel reductions over the classes leave; maps are ``[B, H, W]``, float32."""

    z: Tensor
    """``[B, C', H, W]`` logits at the labels' resolution, C' = max(C, 2)"""
    onehot: Tensor
    """``[B, C', H, W]`` bool, all False on void pixels"""
    valid: Tensor
    finite: Tensor
    """whether the log-odds are: the label's logit and the largest of the others"""
    correct: Tensor
    log_odds: Tensor
    """L = z_y - logsumexp(z_c, c != y) = log(p_y / (1 - p_y)); label 0 stands in on void pixels"""
    others: Tensor
    """``[B, C', H, W]`` softmax over the classes other than the label, 0 at the label"""


def upsampled(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
    """The logits in float32 and at the labels' resolution, bilinearly interpolated if they have another."""
    z = logits.float()
    size = labels.shape[-2:]
    if z.shape[-2:] == size:
        return z
    return F.interpolate(z, size, mode="bilinear", align_corners=align_corners)


def predicted_classes(logits: Tensor) -> Tensor:
    """``[B, H, W]`` int64: the arg max of ``logits[B, C, H, W]``, the lowest class on ties; of one logit, its sign."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def pixel_terms(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool = False) -> PixelTerms:
    """The terms that every weight and direction is made of; see :class:`PixelTerms`."""
    z = upsampled(logits, labels, align_corners)
    if z.shape[1] == 1:
        z = torch.cat([torch.zeros_like(z), z], 1)
    classes = z.shape[1]
    labels = labels.long()
    valid = (labels != ignore_index) & (labels >= 0) & (labels < classes)
    index = labels.where(valid, 0).unsqueeze(1)
    is_label = index == torch.arange(classes, device=z.device).view(1, -1, 1, 1)
    # Relative to the largest of the others: differences of large logits keep their precision.
    z_others = z.masked_fill(is_label, -INF)
    largest = z_others.amax(1, keepdim=True)
    z_others = z_others - largest
    lse_others = z_others.logsumexp(1, keepdim=True)
    of_label = z.gather(1, index)
    finite = (of_label.isfinite() & largest.isfinite()).squeeze(1)
    return PixelTerms(
        z=z,
        onehot=is_label & valid.unsqueeze(1),
        valid=valid,
        finite=finite,
        correct=valid & finite & (z.argmax(1) == index.squeeze(1)),
        log_odds=(of_label - largest - lse_others).squeeze(1),
        others=(z_others - lse_others).exp(),
    )


def weighted_direction(
    terms: PixelTerms, weight: Tensor, logits: Tensor, out: Tensor | None, align_corners: bool = False
) -> Tensor:
    """``weight[B, H, W]`` times the gradient of the negative log-odds, in the logits' shape and dtype.

    dl/dz_c is the softmax over the other classes for c != y, and -1 for c = y. Logits of another resolution get it
    through the transpose of the interpolation, before it is rounded to their dtype.
    """
    weight = weight.where(terms.valid & terms.finite, 0.0).unsqueeze(1)
    grad = torch.where(weight == 0, 0.0, weight * (terms.others - terms.onehot.float()))
    grad = grad[:, -logits.shape[1] :]
    if grad.shape != logits.shape:
        size = grad.shape[-2:]
        grad = torch.ops.aten.upsample_bilinear2d_backward(grad.contiguous(), size, logits.shape, align_corners)
    grad = grad.to(logits.dtype)
    return grad if out is None else out.copy_(grad)


def weighted_by_label(weight: Tensor, class_weight: Tensor | None, terms: PixelTerms, labels: Tensor) -> Tensor:
    if class_weight is None:
        return weight
    index = labels.long().where(terms.valid, 0).flatten(1)
    return weight * class_weight.gather(1, index).view_as(weight)


def signed_confidence(terms: PixelTerms, confidence: str) -> Tensor:
    """L for ``log_odds``; L but not below 0 where the label is predicted for ``label``; for ``top`` the confidence in
    the predicted class, negative where that class is wrong."""
    signed = terms.log_odds
    if confidence == "label":
        signed = torch.where(terms.correct, signed.clamp(min=0), signed)
    elif confidence == "top":
        z = terms.z
        is_top = z.argmax(1, keepdim=True) == torch.arange(z.shape[1], device=z.device).view(1, -1, 1, 1)
        rest = z.masked_fill(is_top, -INF)
        second = rest.amax(1, keepdim=True)
        log_odds = z.amax(1) - second.squeeze(1) - (rest - second).logsumexp(1)
        top = (log_odds + math.log(z.shape[1] - 1)).clamp(min=0)
        signed = torch.where(terms.correct, top, -top)
    signed = signed.where(terms.finite, math.nan)
    return signed.where(terms.valid, INF)


def lowest_neighbour(q: Tensor, predicted: Tensor | None, depth: int) -> Tensor:
    """The least of ``q[B, H, W]`` within a king's move, see :func:`eroseg_ext.ops.reference.erode`."""
    if depth > 1:
        return -F.max_pool3d(-q.unflatten(1, (depth, -1)).unsqueeze(1), 3, 1, 1).view_as(q)
    if predicted is None:
        return -F.max_pool2d(-q.unsqueeze(1), 3, 1, 1).squeeze(1)
    return _lowest_neighbour_of_class(q, predicted)


def _lowest_neighbour_of_class(q: Tensor, predicted: Tensor) -> Tensor:
    height, width = q.shape[1:]
    padded_q = F.pad(q, (1, 1, 1, 1), value=INF)
    padded_class = F.pad(predicted, (1, 1, 1, 1), value=-1)
    lowest = torch.full_like(q, INF)
    for dy in range(3):
        for dx in range(3):
            window = (slice(None), slice(dy, dy + height), slice(dx, dx + width))
            same = padded_class[window] == predicted
            lowest = torch.minimum(lowest, padded_q[window].where(same, INF))
    return lowest


def summed_stats(valid: Tensor, correct: Tensor, front: Tensor, movement: Tensor) -> Tensor:
    maps = (valid, correct, front, movement)
    return torch.stack([wide(m).sum((1, 2)) for m in maps], 1)
