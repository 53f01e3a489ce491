"""What the tests of the evaluation share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

QUICK: dict[str, Any] = {"steps": 4, "sanity": 0, "eps": 8 / 255}
"""Settings of an evaluation of a second."""


class Pairs:
    """A batch as a data set."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        return self.images[index], self.labels[index]
