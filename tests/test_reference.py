"""The reference against independent definitions: autograd in float64, brute force, NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eroseg_ext.ops import reference

VOID = 255


def case(classes: int = 5, scale: float = 3.0, shape: tuple[int, int, int] = (2, 6, 7)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator) * scale
    labels = torch.randint(0, max(classes, 2), shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = VOID
    return logits, labels


def two_class(logits: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def label_log_probability(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log p_y in float64 (0 on void pixels), and the valid pixels."""
    valid = labels != VOID
    log_p = two_class(logits).log_softmax(1).gather(1, labels.where(valid, 0).unsqueeze(1)).squeeze(1)
    return log_p.where(valid, 0.0), valid


def everywhere(labels: Tensor) -> Tensor:
    """A front so wide that every pixel's weight is 1."""
    return torch.full((len(labels),), 1e9)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_direction_ce_is_the_gradient_of_cross_entropy(classes: int) -> None:
    logits, labels = case(classes)
    z = logits.double().requires_grad_()
    log_p, _ = label_log_probability(z, labels)
    (expected,) = torch.autograd.grad(-log_p.sum(), z)
    grad, _, _ = reference.erosion_grad(logits, labels, everywhere(labels), direction="ce")
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_direction_log_odds_is_the_gradient_of_the_negative_log_odds(classes: int) -> None:
    logits, labels = case(classes)
    z = logits.double().requires_grad_()
    log_p, valid = label_log_probability(z, labels)
    log_odds = (log_p - torch.log1p(-log_p.exp()))[valid]
    (expected,) = torch.autograd.grad(-log_odds.sum(), z)
    grad, signed, _ = reference.erosion_grad(logits, labels, everywhere(labels), confidence="log_odds")
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(signed[valid].double(), log_odds.detach(), rtol=1e-5, atol=1e-6)
    assert signed[~valid].isposinf().all()


def test_a_predicted_label_of_low_probability_has_no_confidence() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8], [0.9, 1.0, 0.8], [3.0, 0.0, 0.0]]).T.view(1, 3, 1, 3)
    labels = torch.zeros(1, 1, 3, dtype=torch.long)
    raw = reference.confidence(logits, labels, confidence="log_odds").flatten()
    found, (_, signed, _) = reference.confidence(logits, labels), reference.erosion_grad(logits, labels, torch.ones(1))
    # Predicted with 36 %, not predicted, predicted with 91 %.
    assert found.flatten().tolist() == [0.0, raw[1].item(), raw[2].item()]
    assert signed.flatten().tolist() == [0.0, -raw[1].item(), raw[2].item()]
    assert (raw > 0.5).all()


def test_targeted_flips_the_gradient_and_the_movement() -> None:
    logits, labels = case()
    previous = torch.zeros(labels.shape)
    tau = torch.ones(len(labels))
    plain = reference.erosion_grad(logits, labels, tau, previous)
    targeted = reference.erosion_grad(logits, labels, tau, previous, targeted=True)
    assert torch.equal(targeted[0], -plain[0])
    torch.testing.assert_close(targeted[2][:, 3], -plain[2][:, 3])


def test_a_saturated_softmax_does_not_stop_the_log_odds() -> None:
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 1] = torch.tensor([200.0, 300.0])
    labels = torch.ones(1, 1, 2, dtype=torch.long)
    confidence = reference.confidence(logits, labels)
    torch.testing.assert_close(confidence, torch.tensor([[[200.0, 300.0]]]) - math.log(2))
    grad, _, _ = reference.erosion_grad(logits, labels, everywhere(labels))
    torch.testing.assert_close(grad[0, :, 0, 0], torch.tensor([0.5, -1.0, 0.5]))


def test_top_confidence_is_ordered_like_the_largest_probability() -> None:
    logits, labels = case(7)
    valid = labels != VOID
    confidence = reference.confidence(logits, labels, confidence="top")[valid]
    probability = logits.softmax(1).amax(1)[valid]
    assert (confidence >= 0).all()
    assert torch.equal(confidence.argsort(), probability.argsort())


def test_top_confidence_is_zero_where_all_classes_are_equal() -> None:
    confidence = reference.confidence(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2).long(), confidence="top")
    torch.testing.assert_close(confidence, torch.zeros(1, 2, 2), atol=1e-6, rtol=0)


def brute_force_erosion(scores: Tensor, valid: Tensor, radius: int, cone: float, predicted: Tensor | None) -> Tensor:
    """min over valid sources of score + cone * distance, by a search over king's moves from every pixel."""
    height, width = scores.shape
    q = torch.full_like(scores, math.inf)
    for y, x in itertools.product(range(height), range(width)):
        reached, ring = {(y, x)}, {(y, x)}
        for distance in range(radius + 1):
            for a, b in ring:
                if valid[a, b]:
                    q[y, x] = min(q[y, x].item(), scores[a, b].item() + cone * distance)
            moves = {(a + i, b + j) for a, b in ring for i in (-1, 0, 1) for j in (-1, 0, 1)}
            ring = {
                (a, b)
                for a, b in moves - reached
                if 0 <= a < height and 0 <= b < width and (predicted is None or predicted[a, b] == predicted[y, x])
            }
            reached |= ring
    return q


@pytest.mark.parametrize("geodesic", [False, True])
@pytest.mark.parametrize("radius", [0, 1, 3])
def test_erosion_is_the_minimum_over_the_cone(radius: int, geodesic: bool) -> None:
    generator = torch.Generator().manual_seed(radius)
    scores = torch.rand(1, 7, 9, generator=generator) * 5
    valid = torch.rand(1, 7, 9, generator=generator) > 0.3
    predicted = torch.randint(0, 2, (1, 7, 9), generator=generator) if geodesic else None
    eroded = reference.erode(scores, valid, radius, torch.tensor([0.7]), predicted)
    expected = brute_force_erosion(scores[0], valid[0], radius, 0.7, None if predicted is None else predicted[0])
    torch.testing.assert_close(eroded[0], expected)


def test_soft_front_weighs_one_on_the_boundary_and_0_79_at_tau() -> None:
    labels = torch.zeros(1, 1, 3).long()
    logits = torch.stack([torch.tensor([[0.0, 2.0, 40.0]]), torch.zeros(1, 3)]).unsqueeze(0)
    grad, _, _ = reference.erosion_grad(logits, labels, torch.tensor([2.0]), radius=0)
    expected = torch.tensor([1.0, 1 / math.cosh(0.5) ** 2, 1 / math.cosh(10) ** 2])
    torch.testing.assert_close(-grad[0, 0, 0], expected)


def test_hard_front_is_the_sensitive_pixels_and_their_surroundings() -> None:
    labels = torch.zeros(1, 1, 5).long()
    logits = torch.stack([torch.tensor([[1.0, 1.8, 9.0, 2.5, 9.0]]), torch.zeros(1, 5)]).unsqueeze(0)
    grad, _, stats = reference.erosion_grad(logits, labels, torch.tensor([2.0]), front="hard", radius=1, slope=0.05)
    # 2.5 is out of reach, 9.0 beside 1.8 is drawn in at 1.8 + 0.1.
    assert (grad[0, 0, 0] != 0).tolist() == [True, True, True, False, False]
    assert stats[0, 2] == 2


def test_stats_count_valid_right_and_front_pixels_and_their_movement() -> None:
    logits, labels = case()
    previous = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1)) * 2
    tau = torch.tensor([0.8, 1.5])
    _, signed, stats = reference.erosion_grad(logits, labels, tau, previous)
    for image in range(2):
        valid = labels[image] != VOID
        front = valid & (signed[image].abs() <= tau[image])
        correct = valid & (logits[image].argmax(0) == labels[image])
        assert stats[image, :3].tolist() == [valid.sum(), correct.sum(), front.sum()]
        moved = (previous[image] - signed[image])[front].double().sum()
        torch.testing.assert_close(stats[image, 3], moved)


def test_kth_value_is_the_sorted_rank() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0], [5.0, 4.0, 0.0, 9.0]])
    valid = torch.tensor([[True, True, True, True], [True, False, True, False]])
    k = torch.tensor([[1, 2, 4], [1, 2, 3]])
    assert reference.kth_value(scores, k, valid).tolist() == [[1.0, 1.0, 3.0], [0.0, 5.0, math.inf]]


def test_next_tau_follows_the_movement_between_its_bounds() -> None:
    log_odds = torch.arange(1.0, 101.0).view(1, 10, 10)

    def tau(movement: float) -> float:
        stats = torch.tensor([[100.0, 0.0, 10.0, movement]], dtype=torch.float64)
        return reference.next_tau(log_odds, stats, 4, front_min=0.03, front_max=0.4).item()

    assert tau(50.0) == 10.0  # 50 / 10 pixels, times sqrt(4)
    assert tau(0.0) == tau(-5.0) == 3.0
    assert tau(1e6) == 40.0
    assert math.isnan(tau(math.nan))


def test_next_tau_without_valid_pixels_is_the_floor() -> None:
    stats = torch.zeros(1, 4, dtype=torch.float64)
    assert reference.next_tau(torch.full((1, 2, 2), math.inf), stats, 1).item() == pytest.approx(reference.TAU_FLOOR)


def textbook_weight(method: str, p: Tensor, p_label: Tensor, correct: Tensor, lam: float, targeted: bool) -> Tensor:
    if method == "pgd":
        return torch.ones_like(p_label)
    if method == "segpgd":
        return torch.where(correct != targeted, 1 - lam, lam).to(p_label)
    if method == "cospgd":
        cosine = p_label / p.norm(dim=1)
        return 1 - cosine if targeted else cosine
    if method == "mce":
        return (correct != targeted).to(p_label)
    assert method == "tsallis"
    return p_label**1.5


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 6])
@pytest.mark.parametrize("method", ["pgd", "segpgd", "cospgd", "mce", "tsallis"])
def test_methods_weigh_the_gradient_of_cross_entropy(method: str, classes: int, targeted: bool) -> None:
    logits, labels = case(classes)
    z = logits.double().requires_grad_()
    log_p, valid = label_log_probability(z, labels)
    p = two_class(z.detach()).softmax(1)
    correct = p.argmax(1) == labels
    weight = textbook_weight(method, p, log_p.detach().exp(), correct, 0.7 / 2, targeted)
    (expected,) = torch.autograd.grad(-(weight * log_p)[valid].sum() * (-1 if targeted else 1), z)
    grad, stats = reference.pixel_grad(logits, labels, method, 0.7, targeted=targeted, q=2.5)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(stats[:, 1], (correct & valid).sum((1, 2)).double())


def test_cospgd_sigmoid_is_the_cosine_of_sigmoids_and_does_not_underflow() -> None:
    logits, labels = case(6)
    valid = labels != VOID
    cosine = F.cosine_similarity(logits.sigmoid(), F.one_hot(labels.where(valid, 0), 6).permute(0, 3, 1, 2), dim=1)
    plain, _ = reference.pixel_grad(logits, labels, "pgd")
    grad, _ = reference.pixel_grad(logits, labels, "cospgd_sigmoid")
    torch.testing.assert_close(grad, plain * cosine.unsqueeze(1), rtol=1e-5, atol=1e-7)
    shifted, _ = reference.pixel_grad(logits - 500, labels, "cospgd_sigmoid")
    assert (shifted.abs().amax(1)[valid] > 0).all()


def test_js_is_the_gradient_of_the_jensen_shannon_divergence() -> None:
    logits, labels = case(5)
    z = logits.double().requires_grad_()
    valid = labels != VOID
    p = z.softmax(1)
    y = F.one_hot(labels.where(valid, 0), 5).permute(0, 3, 1, 2).double()
    middle = (p + y) / 2
    # KL(y || middle) of a one-hot y is -log of middle at the label.
    divergence = ((p * (p / middle).log()).sum(1) - (y * middle).sum(1).log()) / 2
    (expected,) = torch.autograd.grad(divergence[valid].sum(), z)
    grad, _ = reference.pixel_grad(logits, labels, "js")
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_class_balance_is_inverse_to_the_count_and_ignores_void() -> None:
    labels = torch.tensor([[[0, 0, 0, 0], [1, 1, VOID, VOID]]])
    assert reference.class_balance(labels, 3).tolist() == [[0.5, 1.0, 0.0]]


def test_class_weight_is_a_factor_by_label() -> None:
    logits, labels = case(3)
    weight = torch.tensor([[0.5, 1.0, 0.25], [1.0, 0.0, 2.0]])
    plain, _, stats = reference.erosion_grad(logits, labels, torch.ones(2))
    weighted, _, weighted_stats = reference.erosion_grad(logits, labels, torch.ones(2), class_weight=weight)
    factor = torch.stack([weight[image][labels[image].clamp(max=2)] for image in range(2)]).unsqueeze(1)
    torch.testing.assert_close(weighted, plain * factor)
    assert torch.equal(weighted_stats, stats)


def test_linf_step_keeps_ball_range_and_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, 5, generator=generator)
    grad = torch.randn(x.shape, generator=generator)
    grad[0, 0, 0, 0] = 0
    mask = torch.rand(2, 1, 4, 5, generator=generator) > 0.5
    x_adv = reference.linf_step_(x.clone(), x, grad, eps=0.1, alpha=0.3, mask=mask)
    expected = (x + 0.1 * grad.sign()).clamp(0, 1).where(mask, x)
    torch.testing.assert_close(x_adv, expected)


def test_a_nan_gradient_makes_a_nan_pixel() -> None:
    x = torch.full((1, 1, 1, 2), 0.5)
    grad = torch.tensor([math.nan, 1.0]).view(1, 1, 1, 2)
    x_adv = reference.linf_step_(x.clone(), x, grad, eps=0.1, alpha=0.1)
    assert x_adv.isnan().flatten().tolist() == [True, False]


def test_l2_step_has_the_length_asked_for_and_stays_in_the_ball() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 8, 8, generator=generator) * 0.2 + 0.4
    grad = torch.randn(x.shape, generator=generator)
    grad[1] = 0
    x_adv = reference.l2_step_(x.clone(), x, grad, eps=0.5, alpha=0.2)
    assert torch.equal(x_adv[1], x[1])
    delta = x_adv[0] - x[0]
    assert delta.norm() == pytest.approx(0.2, rel=1e-5)
    torch.testing.assert_close(delta / delta.norm(), grad[0] / grad[0].norm(), rtol=1e-4, atol=1e-5)
    for _ in range(4):
        reference.l2_step_(x_adv, x, grad, eps=0.5, alpha=0.2)
    assert (x_adv[0] - x[0]).norm() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("classes", [1, 4])
def test_confusion_counts_valid_pixels(classes: int) -> None:
    logits, labels = case(classes)
    predicted = two_class(logits).argmax(1)
    expected = np.zeros((max(classes, 2),) * 2, dtype=np.int64)
    for label, prediction in zip(labels.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if label != VOID:
            expected[label, prediction] += 1
    assert np.array_equal(reference.confusion(logits, labels, max(classes, 2)).numpy(), expected)
    assert np.array_equal(reference.confusion(predicted, labels, max(classes, 2)).numpy(), expected)


@pytest.mark.parametrize("method", [None, *reference.PIXEL_METHODS])
def test_a_class_that_the_model_rules_out_is_as_if_it_were_not_there(method: str | None) -> None:
    logits, labels = case(5)
    labels[labels == 4] = 0
    masked = logits.clone()
    masked[:, 4] = -math.inf
    tau = torch.full((len(logits),), 1.5)
    for confidence in ("label", "top", "log_odds"):
        if method is None:
            ours = reference.erosion_grad(masked, labels, tau, confidence=confidence)
            fewer = reference.erosion_grad(logits[:, :4], labels, tau, confidence=confidence)
        else:
            ours, fewer = (reference.pixel_grad(z, labels, method) for z in (masked, logits[:, :4]))
        assert (ours[0][:, 4] == 0).all()
        if confidence != "top":  # which has log(C - 1) in it, which moves the front
            for mine, theirs in zip((ours[0][:, :4], *ours[1:]), fewer, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert not ours[-1].isnan().any()


@pytest.mark.parametrize("where", ["label", "all but the label"])
def test_log_odds_that_are_infinite_are_broken(where: str) -> None:
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, :, 0, 1] = torch.tensor([-math.inf, 0, 0] if where == "label" else [0, -math.inf, -math.inf])
    labels = torch.zeros(1, 1, 2, dtype=torch.long)
    grad, log_odds, stats = reference.erosion_grad(logits, labels, torch.ones(1))
    assert log_odds.isnan().tolist() == [[[False, True]]]
    assert (grad[..., 1] == 0).all()
    assert stats[0, 3].isnan()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(6, 7), (3, 5), (1, 4), (1, 1), (30, 25)])
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("method", [None, "cospgd"])
def test_logits_of_another_resolution_stand_for_their_interpolation(
    method: str | None, classes: int, size: tuple[int, int], align_corners: bool
) -> None:
    logits, _ = case(classes, shape=(2, *size))
    _, labels = case(classes, shape=(2, 24, 28))
    options = {"align_corners": align_corners}

    def gradient(z: Tensor, **options: bool) -> tuple[Tensor, ...]:
        if method is None:
            return reference.erosion_grad(z, labels, torch.tensor([0.5, 2.0]), **options)
        return reference.pixel_grad(z, labels, method, **options)

    full = F.interpolate(logits, (24, 28), mode="bilinear", **options)
    of_full, *expected = gradient(full)
    grad, *found = gradient(logits, **options)
    assert all(map(torch.equal, found, expected))
    low = logits.double().requires_grad_()
    upsampled = F.interpolate(low, (24, 28), mode="bilinear", **options)
    (through,) = torch.autograd.grad(upsampled, low, of_full.double())
    torch.testing.assert_close(grad.double(), through, rtol=1e-5, atol=1e-5)

    assert torch.equal(reference.confidence(logits, labels, **options), reference.confidence(full, labels))
    count = max(classes, 2)
    assert torch.equal(reference.confusion(logits, labels, count, **options), reference.confusion(full, labels, count))


def test_the_gradient_of_logits_of_another_resolution_is_rounded_once() -> None:
    logits, _ = case(shape=(2, 6, 7))
    _, labels = case(shape=(2, 24, 28))
    logits = logits.bfloat16()
    out = torch.empty_like(logits)
    grad, _ = reference.pixel_grad(logits, labels, "pgd", out=out)
    exact, _ = reference.pixel_grad(logits.float(), labels, "pgd")
    assert grad is out
    assert torch.equal(grad, exact.bfloat16())
