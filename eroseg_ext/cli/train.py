"""``eroseg train``."""

from __future__ import annotations

import sys

from tqdm import tqdm

from eroseg_ext import TrainSettings, train
from eroseg_ext.data.sources import Reading


def command(_: Reading, settings: TrainSettings) -> None:
    """Trains a segmentation model on a folder of images and labels, part of each batch attacked. Under torchrun,
    processes share the batches."""
    train(say=_say, **vars(settings) | {"progress": sys.stderr.isatty()})


def _say(line: str) -> None:
    tqdm.write(line)  # above the bar
    sys.stdout.flush()
