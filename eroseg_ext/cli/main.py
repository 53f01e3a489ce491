"""The command ``eroseg``: ``eroseg demo``, ``eroseg train``, ``eroseg evaluate`` and ``eroseg info``."""

from __future__ import annotations

import argparse
import io
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_CHECKS_FAILED = 3
EXIT_INTERRUPTED = 130


class _UserError(Exception):
    """Something the user can put right; its text is one sentence."""


class _ChecksFailed(Exception):
    """``evaluate --strict`` ended with figures that cannot be believed; its text is one sentence."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise _UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: the arguments after the command's name; None (default) takes those of the process.

    Returns:
        0; 2 after an error that the user can put right, told in one sentence on stderr; 3 where ``evaluate --strict``
        finds that checks failed; 130 after Ctrl-C.
    """
    interrupts: list[int] = []

    def interrupt(number: int, _: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    ours = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        import torch

        from eroseg_ext.ops import backend

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
        try:
            args = _parser().parse_args(argv)
        except SystemExit as done:  # --help and --version end this way
            return int(done.code or 0)
        backend.select(torch.device("cpu"))  # raises for a wrong EROSEG_CPU_LEVEL
        run = {"demo": _demo, "train": _train, "evaluate": _evaluate, "info": _info}[args.command]
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            run(args)
    except BaseException as error:
        # A library may make an error of its own of an interrupt in the midst of its work.
        if interrupts or isinstance(error, KeyboardInterrupt):
            print("eroseg: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        return _told(error)
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"eroseg: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _told(error: BaseException) -> int:
    """Says in one line what is wrong; returns the exit code."""
    if isinstance(error, (_ChecksFailed, _UserError, ValueError, OSError)):
        sentence = str(error) or type(error).__name__
    elif isinstance(error, MemoryError):
        sentence = "there is not enough memory for images, batches or a model of this size"
    else:
        # The user's model can raise anything at any time; its last line tells where.
        last = traceback.extract_tb(error.__traceback__)[-1]
        sentence = f"{type(error).__name__} in {last.name} ({last.filename}, line {last.lineno}): {error}"
    print(f"eroseg: {' '.join(sentence.split())}", file=sys.stderr)
    return EXIT_CHECKS_FAILED if isinstance(error, _ChecksFailed) else EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    from eroseg_ext import __version__
    from eroseg_ext.cli import options
    from eroseg_ext.cli.train import add_options

    parser = _Parser(prog="eroseg", description="Adversarial attacks on semantic segmentation.")
    parser.add_argument("--version", action="version", version=f"eroseg_ext {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{demo,train,evaluate,info}", parser_class=_Parser
    )

    demo = commands.add_parser(
        "demo",
        help="train a small network, attack it with every method, draw pictures",
        description="Trains a small network for about a minute on scenes it draws (or on --data), attacks it with "
        "every method at equal budget, prints a table and writes pictures.",
    )
    demo.add_argument("--data", type=options.path, metavar="DIR", help=options.DATA)
    demo.add_argument(
        "--out", type=options.path, metavar="DIR", default=Path("eroseg-demo"), help="default: ./eroseg-demo"
    )
    demo.add_argument("--quick", action="store_true", help="a few seconds: small images, hardly any training")
    demo.add_argument("--seed", type=options.seed, default=0, metavar="N", help="default: 0")
    demo.add_argument("--eps", type=options.budget, default=2 / 255, metavar="E", help="l_inf budget, default: 2/255")
    demo.add_argument("--steps", type=options.steps, default=10, metavar="T", help="of each attack, default: 10")
    demo.add_argument("--train-steps", type=options.at_least_1, metavar="N", help="default: 600, with --quick 40")
    size = partial(options.size, smallest=32, most_pixels=2**20)
    demo.add_argument("--size", type=size, metavar="HxW", help="size of the images, default: 144x192")
    demo.add_argument(
        "--ignore-index", type=options.label, default=255, metavar="I", help="label of void pixels, default: 255"
    )
    demo.add_argument("--class-names", type=options.names, metavar="A,B,...", help="names of the classes of --data")
    demo.add_argument("--device", metavar="NAME", help=options.DEVICE)
    demo.add_argument("--json", type=options.path, metavar="FILE", help="also write the results here")

    training = commands.add_parser(
        "train",
        help="train a model on adversarial examples",
        description="Trains a segmentation model on a folder of images and labels, part of each batch attacked. Under "
        "torchrun, processes share the batches.",
    )
    add_options(training)
    _add_evaluate(commands)

    info = commands.add_parser(
        "info", help="versions, backends and devices", description="Tells versions, backends and devices."
    )
    info.add_argument("--json", type=options.path, metavar="FILE", help="also write it here")
    return parser


def _add_evaluate(commands: argparse._SubParsersAction[_Parser]) -> None:
    from eroseg_ext.cli import options
    from eroseg_ext.evaluation.metrics import MIOU_CLASSES

    classes = partial(options.integer, low=1, high=2**15 - 1)
    restarts = partial(options.integer, low=1, high=1000)
    evaluate = commands.add_parser(
        "evaluate",
        help="scores of a model, clean, under attack and in the worst case",
        description="Attacks a model with APGD and the gradient of several methods, prints mIoU / mAcc / aAcc in "
        "percent per attack and in the worst case, and writes them to DIR/evaluation.json. An interrupted evaluation "
        "goes on where it was; a further attack or eps computes only what is new.",
    )
    add = evaluate.add_argument
    options.add_data(evaluate)
    options.add_model(evaluate, default="built-in, as the weights tell")
    add(
        "--weights",
        "--checkpoint",
        type=options.path,
        metavar="FILE",
        help="state dict, or checkpoint with one as 'model'",
    )
    add("--classes", type=classes, metavar="C", help="of the model, default: as --dataset or weights tell")
    add("--attacks", type=options.names, metavar="A,B,...", help="methods, default: eroseg,js:shrinking,cospgd")
    add("--eps", type=options.budgets, default=(8 / 255,), metavar="E,...", help="such as 2/255,4/255 (default: 8/255)")
    add("--norm", choices=("linf", "l2"), default="linf", help="default: linf")
    add("--steps", type=options.steps, default=100, metavar="T", help="per attack and restart, default: 100")
    add("--restarts", type=restarts, default=1, metavar="R", help="default: 1")
    add(
        "--out",
        type=options.path,
        default=Path("eroseg-evaluation"),
        metavar="DIR",
        help="default: ./eroseg-evaluation",
    )
    add("--images", type=options.at_least_1, metavar="N", help="evaluate on so many evenly spaced images, default: all")
    miou = "classes that mIoU is the mean of, default: labelled; the other counts a class that no label has as 0"
    add("--miou-classes", choices=MIOU_CLASSES, default="labelled", help=miou)
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="autocast of the model, default: none")
    add("--batch-size", type=options.at_least_1, default=8, metavar="B", help="images attacked at once, default: 8")
    add("--seed", type=options.seed, default=0, metavar="N", help="default: 0")
    add("--sanity", type=int, default=4, metavar="N", help="images for the sanity checks, 0 for none, default: 4")
    add("--strict", action="store_true", help="exit with 3 if a sanity check failed or an image had no gradient")
    add("--device", metavar="NAME", help=options.DEVICE)


def _check_json(path: Path | None) -> None:
    """Finds out before the work, not after it, that its result cannot be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise _UserError(f"--json {path} cannot be written, wanted a file in a folder that exists")


def _demo(args: argparse.Namespace) -> None:
    from eroseg_ext.cli import demo, options
    from eroseg_ext.utils.atomic_files import write_json

    _check_json(args.json)
    options.check_linf(args.eps)
    if args.class_names and args.data is None:
        raise _UserError("--class-names names the classes of --data, which is missing")
    settings = demo.DemoSettings(
        data=args.data,
        out=args.out,
        quick=args.quick,
        seed=args.seed,
        eps=args.eps,
        steps=args.steps,
        train_steps=args.train_steps,
        size=args.size,
        ignore_index=args.ignore_index,
        class_names=args.class_names,
        device=args.device,
        progress=sys.stderr.isatty(),
    )
    result = demo.run(settings, say=lambda line: print(line, flush=True))
    if args.json is not None:
        write_json(args.json, result)


def _train(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from eroseg_ext import training
    from eroseg_ext.cli import train

    def say(line: str) -> None:
        tqdm.write(line)  # above the bar
        sys.stdout.flush()

    try:
        training.train(say=say, **train.settings(args, progress=sys.stderr.isatty()))
    except training.TrainingStopped as stopped:
        raise _UserError(str(stopped)) from stopped


def _evaluate(args: argparse.Namespace) -> None:
    import torch

    from eroseg_ext.cli import options
    from eroseg_ext.data.datasets import FOLDER, VOID, NamedDataset
    from eroseg_ext.data.reading import SegmentationFolder
    from eroseg_ext.evaluation.evaluate import evaluate
    from eroseg_ext.models.loading import load_network
    from eroseg_ext.utils.validate import usable_device

    if args.norm == "linf":
        options.check_linf(*args.eps)
    if args.strict and args.sanity == 0:
        raise _UserError("--strict needs the sanity checks, which --sanity 0 leaves out")
    device = usable_device(args.device)
    data: SegmentationFolder
    if args.dataset in (None, FOLDER):
        data, classes = SegmentationFolder(args.data, args.size), args.classes
        ignore_index = 255 if args.ignore_index is None else args.ignore_index
    else:
        data = NamedDataset(args.dataset, args.data, size=args.size)
        classes, ignore_index = args.classes or data.to_class.classes, VOID
    model = load_network(args.model, args.weights, classes=classes, model_args=args.model_args).to(device)
    optional = ("attacks", "output", "output_key", "align_corners")
    keywords = {name: getattr(args, name) for name in optional if getattr(args, name) is not None}
    result = evaluate(
        model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        data,
        out=args.out,
        eps=args.eps,
        norm=args.norm,
        steps=args.steps,
        restarts=args.restarts,
        images=args.images,
        ignore_index=ignore_index,
        mean=args.mean,
        std=args.std,
        autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp),
        batch_size=args.batch_size,
        seed=args.seed,
        sanity=args.sanity,
        miou_classes=args.miou_classes,
        model_description={"name": args.model, "args": args.model_args},
        progress=sys.stderr.isatty(),
        **keywords,
    )
    classes_told = args.miou_classes.replace("_", " ")
    print(
        f"mIoU ({classes_told} classes) / mAcc / aAcc in %, {len(result.images)} images, {args.steps} steps, "
        f"{args.restarts} restart(s)\n"
    )
    print(result.markdown())
    if result.sanity:
        print()
    for check in result.sanity:
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.verdict}")
    without = [f"{row.attack} without gradients" for row in result.rows if row.without_gradient]
    if args.strict and (result.failed_checks or without):
        raise _ChecksFailed(f"--strict: failed are {', '.join(dict.fromkeys([*result.failed_checks, *without]))}")


def _info(args: argparse.Namespace) -> None:
    from eroseg_ext.ops import backend
    from eroseg_ext.utils.atomic_files import write_json

    _check_json(args.json)
    report = backend.report()
    for name, value in report.items():
        if isinstance(value, dict):
            for key, text in value.items():
                print(f"{key:12}  {text}")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            print(f"{name.replace('_', ' '):12}  {text if text not in ('', None) else 'none'}")
    if args.json is not None:
        write_json(args.json, report)
