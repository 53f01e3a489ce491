"""What every operation of the package computes, in plain PyTorch.

This module is the definition: the fused C++ and CUDA kernels are held against it and are wrong where they differ. It
runs on any device, with float32, float16 and bfloat16 logits in any memory layout, and on empty inputs. All arithmetic
per pixel is done in float32.

Conventions shared by all operations
    B images, C classes, H x W pixels. ``logits[B, C, H, W]``; ``labels[B, H, W]`` int64, int32 or uint8.
    Logits of another resolution than the labels, ``[B, C, h, w]`` (confidence, erosion_grad, pixel_grad, confusion),
    stand for ``F.interpolate(logits.float(), (H, W), mode="bilinear", align_corners=align_corners)``: maps and counts
    are at the labels' resolution, and the gradient is that of the logits given.
    A pixel is *valid* if its label is in [0, classes) and is not ``ignore_index``; every other pixel is *void*: it
    has zero gradient, enters no count, and its confidence is +inf, so that it is never among the smallest.
    ``C == 1`` is binary segmentation with one logit: labels 0 and 1, the class-0 logit is the constant 0.
    A logit of -inf, as models give classes that they rule out, is a class of probability 0. Any other logit that is not
    finite, an infinite one of the label, and -inf in all other classes make a valid pixel *broken*: it gets zero
    gradient and a NaN confidence, and makes the fourth of the image's ``stats`` NaN, where the caller finds it without
    any synchronisation in between.
    ``correct``: the arg max over the classes (the lowest index on ties) is the label, and the pixel not broken.

``stats[B, 4]`` (float64): valid pixels, correct pixels, front pixels, summed movement of the front.

Source: Song et al., "Erosion Attack for Adversarial Training to Enhance Semantic Segmentation Robustness", ICASSP 2026,
arXiv 2601.14950; the choices that its abstract leaves open are described in docs/method.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from eroseg_ext.ops.pixel_terms import (
    INF,
    lowest_neighbour,
    pixel_terms,
    predicted_classes,
    signed_confidence,
    summed_stats,
    upsampled,
    weighted_by_label,
    weighted_direction,
)
from eroseg_ext.utils.precision import wide

TAU_FLOOR = 1e-6
"""No threshold is below this confidence: the front's weight divides by it."""


def confidence(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    confidence: str = "label",
    align_corners: bool = False,
) -> Tensor:
    """How sure the model is of each pixel, right or wrong: 0 at even odds.

    Args:
        logits: ``[B, C, H, W]`` float32, float16 or bfloat16.
        labels: ``[B, H, W]`` int64, int32 or uint8.
        ignore_index: the label of void pixels.
        confidence: ``log_odds``: the absolute log-odds of the label, |log p_y/(1-p_y)|; ``label``: the same, but 0
            where the label is predicted with a probability below 1/2; ``top``: the log-odds of the predicted class plus
            log(C-1), which is >= 0 and ordered like the maximum softmax probability.
        align_corners: of the interpolation of logits of another resolution.

    Returns:
        ``[B, H, W]`` float32; +inf on void pixels, NaN on broken ones.
    """
    return signed_confidence(pixel_terms(logits, labels, ignore_index, align_corners), confidence).abs()


def kth_value(scores: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """The exact k-th smallest score of each row.

    Args:
        scores: ``[B, N]`` float32, no score negative.
        k: ``[B, K]`` int64, counted from 1; values outside [1, N] are clamped.
        valid: ``[B, N]`` bool or None; scores that are not valid count as +inf.

    Returns:
        ``[B, K]`` float32; +inf where a row has fewer than k valid scores (so also for N = 0).
    """
    if scores.shape[1] == 0:
        return scores.new_full(k.shape, INF)
    if valid is not None:
        scores = scores.masked_fill(~valid, INF)
    return scores.sort(1).values.gather(1, k.clamp(1, scores.shape[1]) - 1)


def next_tau(
    log_odds: Tensor,
    stats: Tensor,
    steps_left: int,
    *,
    reach: float = 1.0,
    front_min: float = 0.03,
    front_max: float = 0.4,
) -> Tensor:
    """The width of the next step's front, from what this step measured.

    ``clamp(reach * v * sqrt(steps_left), kth(front_min), kth(front_max))``, where v is the mean movement of the front,
    not below 0, and kth(rho) the exact k-th smallest confidence of the image, k = clamp(round(rho * n), 1, n) over its
    n valid pixels (half rounds to even), never below ``TAU_FLOOR``. ``front_min == front_max`` gives kth itself.
    How fast it may fall from step to step is the attack's own, ``NARROWING`` of ``attacks/gradients.py``.

    Args:
        log_odds: ``[B, H, W]`` float32, as :func:`erosion_grad` returns it: signed confidence, +inf on void pixels.
        stats: ``[B, 4]`` float64, of the same call.
        steps_left: steps that remain after this one, T - 1 - t.
        reach: how many times the expected movement the front is wide.
        front_min, front_max: bounds as fractions of the valid pixels.

    Returns:
        tau ``[B]`` float32, in units of log-odds; ``TAU_FLOOR`` for an image without valid pixels, NaN for an image
        with broken ones.
    """
    scores = log_odds.abs().flatten(1)
    valid, _, front, movement = stats.unbind(1)
    k = torch.stack([(rho * valid).round() for rho in (front_min, front_max)], 1)
    k = torch.minimum(k, valid.unsqueeze(1)).clamp(min=1).long()
    low, high = kth_value(scores, k).clamp(min=TAU_FLOOR).unbind(1)
    velocity = (movement / front.clamp(min=1)).clamp(min=0)
    tau = (reach * velocity * math.sqrt(steps_left)).float()
    tau = torch.minimum(torch.maximum(tau, low), high)
    return torch.where(movement.isnan(), math.nan, torch.where(valid == 0, TAU_FLOOR, tau))


def erode(
    scores: Tensor,
    valid: Tensor | None,
    radius: int,
    cone: Tensor,
    predicted: Tensor | None = None,
    depth: int = 1,
) -> Tensor:
    """Greyscale erosion with a cone: ``q_i = min over valid j, d(i,j) <= radius, of scores_j + cone * d``.

    d is the chessboard distance. It is computed as ``radius`` erosions by a 3x3 element whose eight outer values are
    ``cone``, which is the same cone because chessboard distance is the number of king's moves.

    Args:
        scores: ``[B, H, W]`` float32.
        valid: ``[B, H, W]`` bool or None; a void pixel lends nothing (but receives). NaN scores lend nothing either.
        radius: >= 0; 0 returns the scores, +inf where they are void or NaN.
        cone: ``[B]`` float32, rise per pixel of distance (slope * tau).
        predicted: ``[B, H, W]`` integer or None; if given, the erosion is geodesic: every king's move must join two
            pixels of equal value (``within="class"``).
        depth: above 1, the rows are those of so many slices of a volume, one slice below the other, and the element is
            3x3x3.

    Returns:
        ``[B, H, W]`` float32.
    """
    q = scores.masked_fill(scores.isnan(), INF)
    if valid is not None:
        q = q.masked_fill(~valid, INF)
    if 0 in q.shape:
        return q
    rise = cone.view(-1, 1, 1)
    for _ in range(radius):
        lowest = lowest_neighbour(q, predicted, depth)
        q = torch.minimum(q, lowest + rise)
    return q


def front_weight(q: Tensor, tau: Tensor, front: str = "soft") -> Tensor:
    """How much a pixel counts in a step: ``soft`` sech^2(q / (2 tau)), ``hard`` 1[q <= tau].

    Args:
        q: ``[B, H, W]`` float32, eroded confidence; +inf weighs 0.
        tau: ``[B]`` float32, the width of the front, > 0.
        front: ``soft`` or ``hard``.

    Returns:
        ``[B, H, W]`` float32 in [0, 1].
    """
    width = tau.view(-1, 1, 1)
    return 1 / torch.cosh(q / (2 * width)).square() if front == "soft" else (q <= width).float()


def erosion_grad(
    logits: Tensor,
    labels: Tensor,
    tau: Tensor,
    previous: Tensor | None = None,
    *,
    ignore_index: int = 255,
    confidence: str = "label",
    front: str = "soft",
    direction: str = "log_odds",
    radius: int = 1,
    slope: float = 2.0,
    within: str = "any",
    targeted: bool = False,
    class_weight: Tensor | None = None,
    align_corners: bool = False,
    depth: int = 1,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the EroSeg loss with respect to the logits.

    Per pixel: the confidence s, eroded to q by a cone of ``radius`` pixels rising ``slope * tau`` per pixel; the weight
    w = sech^2(q / (2 tau)) (``soft``) or 1[q <= tau] (``hard``); and ``G = w * dl/dz`` with l the negative log-odds of
    the label (``log_odds``: exp(z_c - a) for c != y, -1 for y) or the cross-entropy (``ce``: p - onehot, computed as
    the former times 1 - p_y, which does not cancel). No division by a pixel count: every entry is in [-1, 1].

    Args:
        logits: ``[B, C, H, W]`` float32, float16 or bfloat16.
        labels: ``[B, H, W]`` int64, int32 or uint8; the wanted class if ``targeted``.
        tau: ``[B]`` float32, the width of the front, > 0.
        previous: ``[B, H, W]`` float32, the log-odds this op returned for the step before, or None.
        ignore_index: the label of void pixels.
        confidence: ``label``, ``top`` or ``log_odds``, see :func:`confidence`.
        front: ``soft`` or ``hard``.
        direction: ``log_odds`` or ``ce``.
        radius: 0 to 8 pixels; 0 switches the erosion off.
        slope: rise of the cone per pixel, in units of tau.
        within: ``any``, or ``class``: the erosion crosses only between neighbours of one predicted class.
        targeted: flips the sign of G and of the movement.
        class_weight: ``[B, max(C, 2)]`` float32 factor of w by label, in [0, 1], or None; see :func:`class_balance`.
        align_corners: of the interpolation of logits of another resolution.
        depth: slices of a volume, see :func:`erode`; the fused operation has none.
        out: the gradient is written here, if given: shape, dtype of the logits.

    Returns:
        G ``[B, C, H, W]`` in the logits' dtype; log_odds ``[B, H, W]`` float32, the signed confidence (L for
        ``log_odds``; +s where correct and -s where wrong for the others), +inf on void pixels; stats ``[B, 4]``
        float64. The front that stats count are the sensitive pixels, s <= tau, and their movement is the log-odds they
        have lost since ``previous`` (gained, if targeted); 0 without it.

    Source: after arXiv 2601.14950; docs/method.md.
    """
    terms = pixel_terms(logits, labels, ignore_index, align_corners)
    signed = signed_confidence(terms, confidence)

    predicted = terms.z.argmax(1) if within == "class" else None
    q = erode(signed.abs(), terms.valid, radius, slope * tau, predicted, depth)
    weight = front_weight(q, tau, front)
    if direction == "ce":
        weight = weight * torch.sigmoid(-terms.log_odds)
    weight = weighted_by_label(weight, class_weight, terms, labels)
    grad = weighted_direction(terms, -weight if targeted else weight, logits, out, align_corners)

    in_front = terms.valid & (signed.abs() <= tau.view(-1, 1, 1))
    before = signed if previous is None else previous
    moved = (signed - before if targeted else before - signed).where(in_front, 0.0)
    broken = terms.valid & ~terms.finite
    return grad, signed, summed_stats(terms.valid, terms.correct, in_front, moved.where(~broken, math.nan))


PIXEL_METHODS = ("pgd", "segpgd", "cospgd", "cospgd_sigmoid", "mce", "js", "tsallis")
"""Methods of :func:`pixel_grad`. ``mce_bal`` is ``mce`` with a class weight."""


def pixel_grad(
    logits: Tensor,
    labels: Tensor,
    method: str,
    progress: float = 0.0,
    *,
    ignore_index: int = 255,
    targeted: bool = False,
    q: float = 2.0,
    class_weight: Tensor | None = None,
    align_corners: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of the other methods' losses: cross-entropy, weighted per pixel.

    The weight of a pixel, with p the softmax, y its label and lam = progress / 2:
        ``pgd`` 1 (Madry et al., ICLR 2018);
        ``segpgd`` correct: 1 - lam, wrong: lam (Gu et al., ECCV 2022, eq. 4);
        ``cospgd`` p_y / ||p||_2, ``cospgd_sigmoid`` the same with p = sigmoid(z) (Agnihotri et al., ICML 2024);
        ``mce`` 1 where correct, else 0 (Croce et al., ECCV 2024);
        ``js`` (p_y / 2) log((1 + p_y) / p_y), the Jensen-Shannon divergence in closed form (Croce et al.);
        ``tsallis`` p_y^(q-1), the Tsallis cross-entropy.
    Targeted, the pixels still to be moved are the ones that are not yet the wanted class: segpgd and mce swap correct
    and wrong, cospgd takes 1 - p_y / ||p||_2, and the sign of G flips for all.

    Args:
        logits: ``[B, C, H, W]`` float32, float16 or bfloat16.
        labels: ``[B, H, W]`` int64, int32 or uint8.
        method: one of :data:`PIXEL_METHODS`.
        progress: t / T with t counted from 0.
        ignore_index: the label of void pixels.
        targeted: labels are the wanted classes.
        q: exponent of ``tsallis``.
        class_weight: ``[B, max(C, 2)]`` float32 factor by label, or None; see :func:`class_balance`.
        align_corners: of the interpolation of logits of another resolution.
        out: the gradient is written here, if given.

    Returns:
        G ``[B, C, H, W]`` in the logits' dtype, entries in [-1, 1]; stats ``[B, 4]`` float64, where every valid pixel
        counts as front and the movement is 0.
    """
    terms = pixel_terms(logits, labels, ignore_index, align_corners)
    p_label, p_rest = torch.sigmoid(terms.log_odds), torch.sigmoid(-terms.log_odds)
    if method == "pgd":
        weight = torch.ones_like(p_label)
    elif method == "segpgd":
        lam = progress / 2
        weight = torch.where(terms.correct != targeted, 1 - lam, torch.full_like(p_label, lam))
    elif method in ("cospgd", "cospgd_sigmoid"):
        if method == "cospgd":
            cosine = p_label / (p_label.square() + (p_rest.unsqueeze(1) * terms.others).square().sum(1)).sqrt()
        else:
            # sigma(z)/sigma(z_y) keeps the cosine defined where every sigmoid underflows.
            log_sigmoid = F.logsigmoid(terms.z)
            gap = log_sigmoid - log_sigmoid.where(terms.onehot, 0.0).sum(1, keepdim=True)
            cosine = (gap * 2).exp().sum(1).rsqrt()
        weight = 1 - cosine if targeted else cosine
    elif method == "mce":
        weight = (terms.correct != targeted).float()
    elif method == "js":
        weight = p_label / 2 * (torch.log1p(p_label) - F.logsigmoid(terms.log_odds))
    elif method == "tsallis":
        weight = ((q - 1) * F.logsigmoid(terms.log_odds)).exp()
    else:
        raise ValueError(f"method is {method!r}, wanted one of {', '.join(PIXEL_METHODS)}")
    weight = weighted_by_label(weight * p_rest, class_weight, terms, labels)
    grad = weighted_direction(terms, -weight if targeted else weight, logits, out, align_corners)

    broken = terms.valid & ~terms.finite
    return grad, summed_stats(
        terms.valid, terms.correct, terms.valid, torch.zeros_like(p_label).where(~broken, math.nan)
    )


def class_balance(labels: Tensor, classes: int, *, ignore_index: int = 255) -> Tensor:
    """Class weights inversely proportional to the class's pixels in the image: ``mce_bal``, and by a power eroseg.

    Divided by the largest of them, so that the rarest class present has weight 1 and a half-precision gradient does
    not underflow; a factor per image changes neither a sign step nor a normalised one.

    Args:
        labels: ``[B, H, W]`` int64, int32 or uint8.
        classes: number of classes (2 for one-logit binary segmentation).
        ignore_index: the label of void pixels.

    Returns:
        ``[B, classes]`` float32; 0 for classes that the image does not have.

    Source: Croce et al., ECCV 2024, "MCE-Bal".
    """
    labels = labels.long().flatten(1)
    valid = (labels != ignore_index) & (labels >= 0) & (labels < classes)
    count = torch.zeros(labels.shape[0], classes, dtype=torch.float32, device=labels.device)
    count.scatter_add_(1, labels.where(valid, 0), valid.float())
    rarest = count.where(count > 0, INF).amin(1, keepdim=True)
    return torch.where(count > 0, rarest / count, 0.0)


def linf_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    alpha: float,
    low: float = 0.0,
    high: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """One signed step inside the l_inf ball: ``clamp(clamp(x_adv + alpha * sign(grad), x - eps, x + eps), low, high)``.

    A NaN gradient makes a NaN pixel, so that it cannot pass for a pixel that needed no change.

    Args:
        x_adv: ``[B, K, H, W]`` float32, changed in place.
        x: the clean images, like x_adv.
        grad: like x_adv.
        eps, alpha, low, high: radius, step size and range, in pixel values.
        mask: ``[B, 1, H, W]`` bool or None; pixels outside it keep their value.

    Returns:
        x_adv.

    Source: Madry et al., ICLR 2018.
    """
    direction = grad.sign().where(~grad.isnan(), math.nan)
    stepped = (x_adv + alpha * direction).clamp(x - eps, x + eps).clamp(low, high)
    return x_adv.copy_(stepped if mask is None else stepped.where(mask, x_adv))


def l2_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    alpha: float,
    low: float = 0.0,
    high: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """One normalised step inside the l_2 ball, per image.

    x_adv moves by ``alpha * grad / ||grad||``, is projected on the ball of radius eps around x, then clamped to the
    range, which only brings it nearer to x. An image whose gradient is 0 is only projected. Norms are taken in float64,
    over the pixels inside the mask.

    Args and returns: as :func:`linf_step_`; eps and alpha are l_2 norms over a whole image's pixel values.
    """
    if x_adv.numel() == 0:
        return x_adv
    if mask is not None:
        grad = grad.where(mask, 0.0)
    norm = wide(grad).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    scale = torch.where(norm == 0, 0.0, alpha / norm).float()
    delta = x_adv + scale * grad - x
    length = wide(delta).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    shrink = torch.where(length > eps, eps / length, 1.0).float()
    stepped = (x + shrink * delta).clamp(low, high)
    return x_adv.copy_(stepped if mask is None else stepped.where(mask, x_adv))


def confusion(
    prediction: Tensor, labels: Tensor, classes: int, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    """Confusion matrix over the valid pixels.

    Args:
        prediction: logits ``[B, C, H, W]`` (float), or predicted classes ``[B, H, W]`` (int64).
        labels: ``[B, H, W]`` int64, int32 or uint8.
        classes: number of classes (2 for one-logit binary segmentation).
        ignore_index: the label of void pixels.
        align_corners: of the interpolation of logits of another resolution.

    Returns:
        int64 ``[classes, classes]``: rows are labels, columns predictions. Void pixels, and those whose label or
        predicted class lies outside ``[0, classes)``, are counted nowhere.
    """
    if prediction.dim() == 4:
        prediction = predicted_classes(upsampled(prediction, labels, align_corners))
    labels = labels.long()
    valid = (labels != ignore_index) & (labels >= 0) & (labels < classes)
    valid &= (prediction >= 0) & (prediction < classes)
    cell = torch.where(valid, labels * classes + prediction, classes * classes)
    counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(0, cell.flatten(), torch.ones_like(cell).flatten())
    return counts[:-1].view(classes, classes)
