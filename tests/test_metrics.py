"""Scores from counts, and the worst case over attacks, against brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eroseg_ext.evaluation.metrics import MIOU_CLASSES, counts_of, scores, worst_case


def random_counts(seed: int, attacks: int, images: int, classes: int, absent: bool = False) -> np.ndarray:
    """Counts ``[A, N, C, 3]`` of random predictions; all attacks see the same labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - absent, (images, 40))
    found = np.zeros((attacks, images, classes, 3), np.int64)
    for attack, image in itertools.product(range(attacks), range(images)):
        # Some attacks and images keep more of the labels than others.
        kept = rng.random(40) < rng.random()
        predicted = np.where(kept, labels[image], rng.integers(0, classes, 40))
        matrix = np.zeros((classes, classes), np.int64)
        np.add.at(matrix, (labels[image], predicted), 1)
        found[attack, image] = counts_of(torch.from_numpy(matrix)).numpy()
    return found


def test_counts_of_a_matrix() -> None:
    matrix = torch.tensor([[5, 2, 0], [1, 4, 3], [0, 0, 0]])
    assert counts_of(matrix).tolist() == [[5, 7, 6], [4, 8, 6], [0, 0, 3]]
    assert counts_of(torch.stack([matrix, matrix])).shape == (2, 3, 3)


def test_scores_of_a_small_case() -> None:
    # Class 2 has no label: its three predictions are errors of class 1, and it has no score of its own.
    found = scores(np.array([[[5, 7, 6], [4, 8, 6], [0, 0, 3]]]))
    assert found.iou == (pytest.approx(100 * 5 / 8), pytest.approx(100 * 4 / 10), None)
    assert found.miou == pytest.approx(100 * (5 / 8 + 4 / 10) / 2)
    assert found.macc == pytest.approx(100 * (5 / 7 + 4 / 8) / 2)
    assert found.aacc == pytest.approx(100 * 9 / 15)


def test_a_class_that_is_only_predicted_may_count_as_0() -> None:
    # The same case, as mmsegmentation and torchmetrics average it; a class that nothing has never counts.
    found = scores(np.array([[[5, 7, 6], [4, 8, 6], [0, 0, 3], [0, 0, 0]]]), "labelled_or_predicted")
    assert found.iou == (pytest.approx(100 * 5 / 8), pytest.approx(100 * 4 / 10), 0, None)
    assert found.miou == pytest.approx(100 * (5 / 8 + 4 / 10) / 3)
    assert found.macc == pytest.approx(100 * (5 / 7 + 4 / 8) / 2)
    assert found.aacc == pytest.approx(100 * 9 / 15)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    attacks=st.integers(1, 3),
    images=st.integers(1, 5),
    absent=st.booleans(),
    classes=st.sampled_from(MIOU_CLASSES),
)
def test_worst_case_against_every_choice(seed: int, attacks: int, images: int, absent: bool, classes: str) -> None:
    candidates = random_counts(seed, attacks, images, 4, absent)
    every = [
        scores(np.stack([candidates[attack, image] for image, attack in enumerate(choice)]), classes)
        for choice in itertools.product(range(attacks), repeat=images)
    ]
    worst = worst_case(candidates, classes)
    lowest = min(found.miou for found in every)
    assert worst.aacc == pytest.approx(min(found.aacc for found in every))
    assert worst.macc == pytest.approx(min(found.macc for found in every))
    assert worst.miou >= lowest - 1e-9
    assert worst.miou_bound <= lowest + 1e-9
    for attack in range(attacks):
        assert worst.miou <= scores(candidates[attack], classes).miou + 1e-9
    # The choices told are those behind the figures.
    chosen = np.stack([candidates[attack, image] for image, attack in enumerate(worst.chosen_miou)])
    assert scores(chosen, classes).miou == pytest.approx(worst.miou)
    chosen = np.stack([candidates[attack, image] for image, attack in enumerate(worst.chosen_aacc)])
    assert scores(chosen).aacc == pytest.approx(worst.aacc)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_bound_is_each_class_at_its_lowest(seed: int) -> None:
    candidates = random_counts(seed, 3, 4, 3)
    every = [
        scores(np.stack([candidates[attack, image] for image, attack in enumerate(choice)])).iou
        for choice in itertools.product(range(3), repeat=4)
    ]
    lowest = [min(value for value in column if value is not None) for column in zip(*every, strict=True)]
    assert worst_case(candidates).miou_bound == pytest.approx(np.mean(lowest))


def test_greedy_search_finds_the_lowest_most_often() -> None:
    """It is a search: how often it misses is measured, and bounded."""
    misses = []
    for seed in range(60):
        candidates = random_counts(seed, 3, 5, 4)
        lowest = min(
            scores(np.stack([candidates[attack, image] for image, attack in enumerate(choice)])).miou
            for choice in itertools.product(range(3), repeat=5)
        )
        misses.append(worst_case(candidates).miou - lowest)
    # Measured: 60 of 60 found.
    assert sum(miss > 1e-9 for miss in misses) <= 3


def test_one_attack_is_its_own_worst_case() -> None:
    candidates = random_counts(0, 1, 6, 5)
    worst, alone = worst_case(candidates), scores(candidates[0])
    assert worst.miou == pytest.approx(alone.miou)
    assert worst.miou_bound == pytest.approx(alone.miou)
    assert (worst.macc, worst.aacc) == (pytest.approx(alone.macc), pytest.approx(alone.aacc))
