"""The options of ``eroseg train``: the fields of :class:`TrainSettings` under the same names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.cli import options
from eroseg_ext.training.settings import NO_ATTACK, TrainSettings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options; those that are not given are left to the settings' defaults."""
    files = parser.add_argument_group("data and results")
    options.add_data(files)
    _add(files, "val", options.path, "DIR", "folder to validate on, in the form of --data")
    _add(files, "classes", int, "C", "of --dataset folder, default: found by reading the labels")
    files.add_argument(
        "--out", type=options.path, required=True, metavar="DIR", help="for checkpoints, weights, log, curves"
    )
    _add(files, "resume", None, None, "continue the run in --out; start it where there is none")

    model = parser.add_argument_group("model")
    options.add_model(model, default="small")
    _add(model, "init", options.path, "FILE", "weights to start from: state dict, or checkpoint with one as 'model'")

    images = parser.add_argument_group("images")
    _add(images, "crop", options.size, "HxW", "random crops to train on, default: --size, else the first image's")
    _add(images, "scale", options.numbers, "LOW,HIGH", "random scale, default: 0.6,1.67; 1,1: off")
    images.add_argument("--no-flip", dest="flip", action="store_false", default=None, help="do not mirror")

    attack = parser.add_argument_group("attack")
    _add(attack, "attack", str, None, "default: eroseg", choices=(*METHODS, NO_ATTACK))
    _add(attack, "adv-fraction", float, "F", "part of each batch that is attacked, default: 0.5")
    _add(attack, "eps", options.budget, "E", "l_inf budget, default: 4/255")
    _add(attack, "attack-steps", int, "T", "default: 3")
    _add(attack, "step-size", options.budget, "A", "default: the larger of eps/4 and 1.5 eps/T")
    _add(attack, "attack-mode", str, None, "of the model, default: eval", choices=("eval", "train", "keep"))
    _add(attack, "attack-options", options.json_object, "JSON", "more of them, such as '{\"radius\": 0}'")
    _add(attack, "front-loss", float, "F", "undecided pixels count 1 + F times, default: 4 with eroseg, else 0")
    _add(attack, "backend", str, None, "default: auto", choices=("auto", "fused", "reference"))
    _add(attack, "compare-reference", int, "N", "time N updates with each backend first")

    training = parser.add_argument_group("training")
    _add(training, "epochs", int, "N", "default: 60")
    _add(training, "batch-size", int, "B", "images per update over all processes, default: 8")
    _add(training, "accumulate", int, "N", "pieces that a process's part of a batch goes through the model in")
    _add(training, "optimizer", str, None, "default: adamw", choices=("adamw", "sgd"))
    _add(training, "learning-rate", float, "R", "peak, default: 3e-3 (adamw), 1e-2 (sgd)")
    _add(training, "weight-decay", float, "W", "default: 1e-2 (adamw), 1e-4 (sgd)")
    _add(training, "warmup-epochs", float, "N", "default: 1")
    _add(training, "poly-power", float, "P", "default: 0.9")
    _add(training, "class-weights", _class_weights, "W", "none (default), median-frequency, or numbers: 1,2,...")
    _add(training, "ema", float, "D", "decay of the weights' moving average, such as 0.999; default: 0, none")
    _add(training, "amp", str, None, "autocast of the model, default: none", choices=("none", "bf16"))
    _add(training, "seed", int, "N", "default: 0")

    running = parser.add_argument_group("running")
    _add(running, "device", str, "NAME", options.DEVICE)
    _add(running, "threads", int, "N", "CPU threads of each process")
    _add(running, "workers", int, "N", "processes that read images, default: 4 with a GPU, else 0")
    _add(running, "cache", None, None, "keep decoded images in memory")
    _add(running, "val-every", int, "N", "epochs between validations, default: 5")
    _add(running, "val-attack-steps", int, "T", "of the attack in validation, default: 10; 0: clean images only")
    _add(running, "val-images", int, "N", "validate on so many evenly spaced images, default: all")
    _add(running, "checkpoint-every", int, "N", "updates between checkpoints, default: an epoch's")
    _add(running, "log-every", int, "N", "updates between lines of the log, default: 10")
    _add(running, "timeout", float, "S", "seconds that processes wait for each other, default: 600")


def settings(args: argparse.Namespace, progress: bool) -> dict[str, Any]:
    """The keywords of :func:`eroseg_ext.train` that the options give; ValueError if one is not allowed."""
    names = TrainSettings.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    try:
        TrainSettings(**given)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return {**given, "progress": progress}


def _add(
    group: argparse._ArgumentGroup,
    name: str,
    convert: Callable[[str], Any] | None,
    metavar: str | None,
    text: str,
    choices: tuple[str, ...] | None = None,
) -> None:
    if convert is None:
        group.add_argument(f"--{name}", action="store_true", default=None, help=text)
    else:
        group.add_argument(f"--{name}", type=convert, metavar=metavar, choices=choices, default=None, help=text)


def _class_weights(text: str) -> str | tuple[float, ...]:
    return text if text[:1].isalpha() else options.numbers(text)
