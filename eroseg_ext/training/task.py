"""What a run trains and validates on: the files that its settings name, their classes and the weights of these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eroseg_ext.data.datasets import FOLDER, ClassMap
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.reading import evenly_spaced
from eroseg_ext.data.sources import Source
from eroseg_ext.training import labels
from eroseg_ext.training.labels import LabelCounts
from eroseg_ext.training.settings import TrainSettings

Say = Callable[[str], None]
"""Told what happens, a line at a time."""


class Task(NamedTuple):
    """What the settings' folders hold."""

    source: Source
    val: Source
    """empty where there is none"""
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
    source = settings.source(settings.data, "train")
    val = Source([]) if settings.val is None else settings.source(settings.val, "val")
    if len(source) < settings.batch_size:
        raise ValueError(f"data holds {len(source)} images, wanted at least batch_size = {settings.batch_size}")
    counting = settings.dataset == FOLDER and (settings.classes, settings.palette, source.to_class) == (None,) * 3
    # With the classes known, some label maps are enough to find what is wrong with all of them.
    every = counting or settings.class_weights == "median-frequency"
    read, val_read = evenly_spaced(len(source), None if every else 64), evenly_spaced(len(val), settings.val_images)
    say(f"reading {len(read) + len(val_read)} label maps")
    counts, val_counts = source.label_counts(read), val.label_counts(val_read)
    to_class = source.to_class or settings.class_map(settings.classes)
    if counting:
        to_class = settings.class_map(labels.count_classes(counts, val_counts, to_class))
    _check_labels(source, read, counts, to_class)
    _check_labels(val, val_read, val_counts, to_class)
    for line in labels.suspicions(counts, val_counts, to_class, every):
        say(line)
    weights: Tensor | None = None
    if isinstance(settings.class_weights, tuple):
        if len(settings.class_weights) != to_class.classes:
            raise ValueError(
                f"class_weights has {len(settings.class_weights)} numbers, wanted {to_class.classes}, one per class"
            )
        weights = torch.tensor(settings.class_weights, dtype=torch.float32)
    elif settings.class_weights == "median-frequency":
        weights = torch.from_numpy(labels.median_frequency_weights(counts, to_class))
    crop = settings.crop or settings.size
    if crop is None:
        image, _ = source.read(0)
        crop = (image.shape[1], image.shape[2])
    names = "\n".join(map(source.name, range(len(source))))
    fingerprint = hashlib.sha256(names.encode()).hexdigest()
    return Task(source, val, to_class, crop, weights, fingerprint, len(source) // settings.batch_size)


def _check_labels(source: Source, indices: Sequence[int], counts: LabelCounts, to_class: ClassMap) -> None:
    """Raises ValueError, naming label map and pixel, if a value must not occur."""
    for index in indices:
        name = source.where(index)[1]
        if any(to_class.of_value(value) < VOID for value in counts[name]):
            to_class(source.values(index), name)
