"""Options that the commands of ``eroseg`` share, and what turns an option's text into its value."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from eroseg_ext.datasets import DATASETS, FOLDER
from eroseg_ext.loading import BUILT_IN
from eroseg_ext.outputs import OUTPUTS

Options = argparse.ArgumentParser | argparse._ArgumentGroup

DATA = "folder with images/NAME.* and labels/NAME.png"
DEVICE = "where to run, default: cuda if there is one, else cpu"


def add_data(options: Options) -> None:
    """Adds ``--data``, ``--dataset``, ``--ignore-index`` and ``--size``; None where they are not given."""
    add = options.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help=f"{DATA}, or as the data set's publisher packs it")
    add("--dataset", choices=DATASETS, help=f"class map and layout of files, default: {FOLDER}")
    add("--ignore-index", type=int, metavar="I", help=f"label of void pixels of --dataset {FOLDER}, default: 255")
    add("--size", type=size, metavar="HxW", help="resize images and labels, default: their own sizes")


def add_model(options: Options, default: str) -> None:
    """Adds the options of the model, of its input and its output; None where they are not given."""
    add = options.add_argument
    add("--model", metavar="NAME", help=f"{', '.join(BUILT_IN)} or package.module:callable, default: {default}")
    add("--model-args", type=json_object, metavar="JSON", help='keywords for it, such as {"num_classes": 21}')
    mean = "with --std: the model wants (image - mean) / std; eps stays in pixel values"
    add("--mean", type=numbers, metavar="R,G,B", help=mean)
    add("--std", type=numbers, metavar="R,G,B", help="with --mean")
    add("--output", choices=OUTPUTS, help="what the model returns, default: logits")
    add("--output-key", type=output_key, metavar="KEY", help="number or name of the logits in the model's output")
    add("--align-corners", action="store_true", default=None, help="in upsampling logits smaller than the labels")


def budget(text: str) -> float:
    """A radius or step size in pixel values; how large it may be depends on the norm."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no budget, wanted a number such as 8/255 or 0.03")
    return value


def budgets(text: str) -> tuple[float, ...]:
    """Several, with commas between them."""
    return tuple(budget(part) for part in text.split(","))


def check_linf(*values: float) -> None:
    """Raises ValueError if a budget is no smaller than the range of pixel values: 8, where 8/255 was meant."""
    if max(values) >= 1:
        raise ValueError(f"--eps is {max(values):g}, wanted a number from 0 to below 1 such as 8/255 in the l_inf norm")


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers with commas between them."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers, wanted some such as 0.5,2")
    return values


def output_key(text: str) -> int | str:
    """A number where it is one, else a name."""
    try:
        return int(text)
    except ValueError:
        return text


def json_object(text: str) -> dict[str, Any]:
    """Keywords with their values."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is not a JSON object, wanted one such as {{"name": 1}}')
    return value


def at_least_1(text: str) -> int:
    """A count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed, wanted a whole number of at least 1")
    return int(text)


def size(text: str, smallest: int = 1) -> tuple[int, int]:
    """(height, width), both at least ``smallest``."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()) or min(int(height), int(width)) < smallest:
        least = f" of at least {smallest}x{smallest}" if smallest > 1 else ""
        raise argparse.ArgumentTypeError(f"{text} is not a size, wanted HEIGHTxWIDTH{least}")
    return int(height), int(width)


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(","))
