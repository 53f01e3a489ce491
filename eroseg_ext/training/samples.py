"""What training reads: samples of a data set, augmented, in batches whose content depends on (seed, update) alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eroseg_ext.data.datasets import ClassMap
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.sources import Source
from eroseg_ext.training import seeds

_PADDING = 128
"""Grey of what a crop reaches beyond the image; its label is void."""


class Batch(NamedTuple):
    """A process's part of a batch, as it comes from the loader."""

    images: Tensor
    """uint8 [b, 3, H, W]"""
    labels: Tensor
    """int16 [b, H, W], VOID where void"""


class Key(NamedTuple):
    """Names a sample: the image, and in training the epoch, which decides its augmentation."""

    image: int
    epoch: int = 0


class Reader:
    """Images with 8 bits and their classes; keeps them in memory if asked."""

    def __init__(self, source: Source, to_class: ClassMap, cache: bool) -> None:
        self._source = source
        self._to_class = to_class
        self._kept: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image uint8 [3, H, W], and int16 [H, W] classes and VOID; ValueError names what cannot be used."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        image, values = self._source.read(index)
        name, label_name = self._source.where(index)
        if len(image) != 3:
            raise ValueError(f"{name} has {len(image)} channels, wanted 3: training reads red, green and blue")
        if image.dtype != torch.uint8:
            low, high = (float(value) for value in image.aminmax())
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}, wanted [0, 1], or uint8")
            image = (image * 255).round().to(torch.uint8)
        read = image, self._to_class(values, label_name)
        if self._kept is not None:
            self._kept[index] = read
        return read


class Samples(Dataset[Batch | Exception]):
    """Single images as batches of one, whole or augmented.

    A file that cannot be used comes as the exception that tells so: raised in a worker process, it would arrive wrapped
    in a traceback.
    """

    def __init__(self, read: Reader, augment: Augmentation | None) -> None:
        self._read = read
        self._augment = augment

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, key: Key) -> Batch | Exception:
        try:
            image, label = self._read(key.image)
        except (ValueError, TypeError, OSError) as error:
            return error
        if self._augment is not None:
            image, label = self._augment(image, label, key)
        return Batch(image[None], label[None])


def _joined(samples: Sequence[Batch | Exception]) -> Batch | Exception:
    """Samples as one batch, or the first exception among them."""
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    return Batch(*map(torch.cat, zip(*samples, strict=True)))


def loader(samples: Samples, keys: Iterable[list[Key]], workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Batches of these keys, read by so many processes; 0 reads in this one.

    Raises ValueError or OSError that names a file that cannot be used.
    """
    # With fork, workers exit when this process dies; forkserver workers would not. They do nothing on a GPU.
    context = "fork" if workers else None
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory, "multiprocessing_context": context}
    for batch in DataLoader(samples, batch_sampler=keys, collate_fn=_joined, **options):
        if isinstance(batch, Exception):
            raise batch
        yield batch


@dataclass(frozen=True)
class Augmentation:
    """Random scale, crop and flip of an image with its labels, by (seed, epoch, index).

    The crop has ``crop`` pixels; what it reaches beyond the image is grey, and void.
    """

    seed: int
    crop: tuple[int, int]
    scale: tuple[float, float]
    flip: bool

    def __call__(self, pixels: Tensor, labels: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """The augmented pair, both of the crop's size."""
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        label = Image.fromarray(labels.to(torch.int32).numpy())
        random = seeds.numpy_generator(self.seed, seeds.AUGMENTATION, key.epoch, key.image)
        low, high = map(math.log, self.scale)
        scale = math.exp(random.uniform(low, high))
        left, right, width, x = _window(image.width, self.crop[1], scale, random.random())
        top, bottom, height, y = _window(image.height, self.crop[0], scale, random.random())
        # One resampling of what is seen, not a scaling of all and a crop of that.
        box, seen, size = (left, top, right, bottom), (width, height), self.crop[::-1]
        new_image = Image.new("RGB", size, (_PADDING,) * 3)
        new_image.paste(image.resize(seen, Image.Resampling.BILINEAR, box), (x, y))
        new_label = Image.new("I", size, VOID)
        new_label.paste(label.resize(seen, Image.Resampling.NEAREST, box), (x, y))
        if self.flip and random.random() < 0.5:
            mirror = Image.Transpose.FLIP_LEFT_RIGHT
            new_image, new_label = new_image.transpose(mirror), new_label.transpose(mirror)
        shown = torch.from_numpy(np.array(new_image)).permute(2, 0, 1)
        return shown, torch.from_numpy(np.array(new_label).astype(np.int16))


def _window(source: int, crop: int, scale: float, position: float) -> tuple[float, float, int, int]:
    """One side of a crop of ``crop`` pixels from ``source`` pixels scaled by ``scale``, at ``position`` in [0, 1].

    Returns from where to where it sees the source, in how many pixels, and where these lie in the crop.
    """
    length = crop / scale
    if length <= source:
        start = (source - length) * position
        return start, min(start + length, source), crop, 0
    pixels = min(max(round(source * scale), 1), crop)
    return 0.0, source, pixels, int((crop - pixels + 1) * position)


def batches(
    images: int, batch_size: int, seed: int, first: int, last: int, rank: int = 0, world: int = 1
) -> Iterator[list[Key]]:
    """The keys of a process's part of every batch, from update ``first`` to ``last``.

    A batch is ``batch_size`` consecutive images of the epoch's random order; process ``rank`` of ``world`` has the
    rank-th of ``world`` equal parts, so that all together see what one process would. (DistributedSampler deals single
    images out in turn and cannot start within an epoch.) An epoch's last, incomplete batch is left out.
    """
    part, known = batch_size // world, -1
    for update in range(first, last):
        epoch, number = divmod(update, images // batch_size)
        if epoch != known:
            order, known = seeds.numpy_generator(seed, seeds.ORDER, epoch).permutation(images).tolist(), epoch
        start = number * batch_size + rank * part
        yield [Key(index, epoch) for index in order[start : start + part]]
