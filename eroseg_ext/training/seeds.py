"""Every random number of a training run is a function of the seed and of what it is for: nothing is carried along."""

from __future__ import annotations

import numpy as np

ORDER, AUGMENTATION, ATTACK, MODEL, INITIAL = range(5)
"""What for: (ORDER, epoch), (AUGMENTATION, epoch, image), (ATTACK, update), (MODEL, update, rank), (INITIAL,)."""


def numpy_generator(seed: int, *purpose: int) -> np.random.Generator:
    """The generator of one purpose."""
    return np.random.default_rng([seed, *purpose])


def torch_seed(seed: int, *purpose: int) -> int:
    """A seed in the range of ``torch.manual_seed`` for one purpose."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)[0] >> np.uint64(1))
