"""Options that the commands of ``eroseg`` share, and what turns an option's text into its value."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from eroseg_ext.data.datasets import DATASETS, FOLDER
from eroseg_ext.models.loading import BUILT_IN
from eroseg_ext.models.outputs import OUTPUTS

Options = argparse.ArgumentParser | argparse._ArgumentGroup

MAX_PIXELS = 2**24
"""Of an image that is asked for: 4096x4096. Far more would be told of by the system's memory, not by us."""
MAX_BUDGET = 1e6
"""In the l_2 norm; no image of ``MAX_PIXELS`` pixels is farther from another."""
MAX_COUNT = 10**6
MAX_STEPS = 10**4
MAX_SEED = 2**63 - 1

DATA = "folder with images/NAME.* and labels/NAME.png"
DEVICE = "where to run, default: cuda if there is one, else cpu"


def add_data(options: Options) -> None:
    """Adds ``--data``, ``--dataset``, ``--ignore-index`` and ``--size``; None where they are not given."""
    add = options.add_argument
    add("--data", type=path, required=True, metavar="DIR", help=f"{DATA}, or as the data set's publisher packs it")
    add("--dataset", choices=DATASETS, help=f"class map and layout of files, default: {FOLDER}")
    add("--ignore-index", type=label, metavar="I", help=f"label of void pixels of --dataset {FOLDER}, default: 255")
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
    if not 0 <= value <= MAX_BUDGET:
        raise argparse.ArgumentTypeError(f"{text} is no budget, wanted a number such as 8/255 or 0.03, at most 1e6")
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
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is not a JSON object, wanted one such as {{"name": 1}}, without NaN')
    return value


def integer(text: str, low: int, high: int) -> int:
    """A whole number from low to high."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        wanted = f"at least {low}" if value is not None and value < low else f"{low} to {high}"
        raise argparse.ArgumentTypeError(f"{text} is not allowed, wanted a whole number of {wanted}")
    return value


def at_least_1(text: str) -> int:
    """A count, of at most ``MAX_COUNT``."""
    return integer(text, 1, MAX_COUNT)


def steps(text: str) -> int:
    """Steps of an attack, which keeps numbers of each."""
    return integer(text, 1, MAX_STEPS)


def seed(text: str) -> int:
    """A seed of torch's generators."""
    return integer(text, 0, MAX_SEED)


def label(text: str) -> int:
    """A label as tensors can hold it."""
    return integer(text, -(2**63), 2**63 - 1)


def path(text: str) -> Path:
    """A path; the empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, wanted a path")
    return Path(text)


def size(text: str, smallest: int = 1, most_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width), both at least ``smallest``."""
    height, _, width = text.lower().partition("x")
    try:
        sides = int(height), int(width)
    except ValueError:
        sides = 0, 0
    if min(sides) < smallest or sides[0] * sides[1] > most_pixels:
        least = f" of at least {smallest}x{smallest}" if smallest > 1 else ""
        raise argparse.ArgumentTypeError(
            f"{text} is not a size, wanted HEIGHTxWIDTH{least} of at most {most_pixels} pixels"
        )
    return sides


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(","))
