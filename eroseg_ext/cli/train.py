"""``eroseg train``: the fields of :class:`eroseg_ext.TrainSettings` are its options."""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from eroseg_ext import TrainingStopped, TrainSettings, train
from eroseg_ext.cli import options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    options.add_options(parser, TrainSettings, leave_out=["progress"])


def command(args: argparse.Namespace) -> None:
    """Trains a segmentation model on a folder of images and labels, part of each batch attacked. Under torchrun,
    processes share the batches."""
    settings = options.settings(TrainSettings, args)
    try:
        train(say=_say, **vars(settings) | {"progress": sys.stderr.isatty()})
    except TrainingStopped as stopped:
        raise ValueError(str(stopped)) from stopped


def _say(line: str) -> None:
    tqdm.write(line)  # above the bar
    sys.stdout.flush()
