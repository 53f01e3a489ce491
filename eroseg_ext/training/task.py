"""What a run trains and validates on: the files that its settings name, their classes and the weights of these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eroseg_ext.data import datasets
from eroseg_ext.data.datasets import FOLDER, ClassMap
from eroseg_ext.data.reading import Pair, evenly_spaced
from eroseg_ext.training.samples import Reader
from eroseg_ext.training.settings import TrainSettings

Say = Callable[[str], None]
"""Told what happens, a line at a time."""


class Task(NamedTuple):
    """What the settings' folders hold."""

    pairs: list[Pair]
    val_pairs: list[Pair]
    to_class: ClassMap
    crop: tuple[int, int]
    class_weights: Tensor | None
    fingerprint: str
    """changes with the images' names, whose order the run depends on"""
    updates_per_epoch: int
    """an epoch's last, incomplete batch is left out"""

    @property
    def class_names(self) -> list[str]:
        """Of every class; their numbers where the data set names none."""
        return list(self.to_class.names) or [f"class {index}" for index in range(self.to_class.classes)]


def load_task(settings: TrainSettings, say: Say) -> Task:
    """Finds the files of a run and reads as many as must be read; raises if they are not what the settings say."""
    pairs = datasets.find(settings.dataset, settings.data, "train")
    val_pairs = [] if settings.val is None else datasets.find(settings.dataset, settings.val, "val")
    if len(pairs) < settings.batch_size:
        raise ValueError(
            f"{settings.data} holds {len(pairs)} images, wanted at least batch_size = {settings.batch_size}"
        )
    counting = settings.dataset == FOLDER and settings.classes is None
    # With the classes known, some label maps are enough to find what is wrong with all of them.
    every = counting or settings.class_weights == "median-frequency"
    read = pairs if every else [pairs[index] for index in evenly_spaced(len(pairs), 64)]
    val_read = [val_pairs[index] for index in evenly_spaced(len(val_pairs), settings.val_images)]
    say(f"reading {len(read) + len(val_read)} label maps")
    counts, val_counts = datasets.label_counts(read), datasets.label_counts(val_read)
    classes = datasets.count_classes(counts, val_counts, settings.ignore_index) if counting else settings.classes
    to_class = datasets.class_map(settings.dataset, classes, settings.ignore_index)
    datasets.check_labels({**counts, **val_counts}, to_class)
    for line in datasets.suspicions(counts, val_counts, to_class, every):
        say(line)
    weights: Tensor | None = None
    if isinstance(settings.class_weights, tuple):
        if len(settings.class_weights) != to_class.classes:
            raise ValueError(
                f"class_weights has {len(settings.class_weights)} numbers, wanted {to_class.classes}, one per class"
            )
        weights = torch.tensor(settings.class_weights, dtype=torch.float32)
    elif settings.class_weights == "median-frequency":
        weights = torch.from_numpy(datasets.median_frequency_weights(counts, to_class))
    crop = settings.crop or settings.size
    if crop is None:
        image, _ = Reader(pairs[:1], to_class, None, False)(0)
        crop = (image.height, image.width)
    names = "\n".join(image.name for image, _ in pairs)
    fingerprint = hashlib.sha256(names.encode()).hexdigest()
    return Task(pairs, val_pairs, to_class, crop, weights, fingerprint, len(pairs) // settings.batch_size)
