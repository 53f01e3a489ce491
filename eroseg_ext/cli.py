"""The command ``eroseg``: ``eroseg demo``, ``eroseg train``, ``eroseg evaluate`` and ``eroseg info``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class _UserError(Exception):
    """Something the user can put right; its text is one sentence."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise _UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: the arguments after the command's name; None (default) takes those of the process.

    Returns:
        0; 2 after an error that the user can put right, told in one sentence on stderr; 130 after Ctrl-C.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        run = {"demo": _demo, "train": _train, "evaluate": _evaluate, "info": _info}[args.command]
        run(args)
    except SystemExit as done:  # --help and --version end this way
        return int(done.code or 0)
    except KeyboardInterrupt:
        print("eroseg: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (_UserError, ValueError, OSError) as error:
        print(f"eroseg: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically: a reader finds the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    from eroseg_ext import __version__
    from eroseg_ext.training import command

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
    demo.add_argument("--data", type=Path, metavar="DIR", help="folder with images/NAME.* and labels/NAME.png")
    demo.add_argument("--out", type=Path, metavar="DIR", default=Path("eroseg-demo"), help="default: ./eroseg-demo")
    demo.add_argument("--quick", action="store_true", help="a few seconds: small images, hardly any training")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    demo.add_argument("--eps", type=_fraction, default=2 / 255, metavar="E", help="l_inf budget, default: 2/255")
    demo.add_argument("--steps", type=_at_least_1, default=10, metavar="T", help="steps of each attack, default: 10")
    demo.add_argument("--train-steps", type=_at_least_1, metavar="N", help="default: 600, with --quick 40")
    demo.add_argument("--size", type=_size, metavar="HxW", help="size of the images, default: 144x192")
    demo.add_argument("--ignore-index", type=int, default=255, metavar="I", help="label of void pixels, default: 255")
    demo.add_argument("--class-names", type=_names, metavar="A,B,...", help="names of the classes of --data")
    demo.add_argument("--device", help="where to run, default: cuda if there is one, else cpu")
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")

    train = commands.add_parser(
        "train",
        help="train a model on adversarial examples",
        description="Trains a segmentation model on a folder of images and labels, part of each batch attacked. Under "
        "torchrun, processes share the batches.",
    )
    command.add_options(train)
    _add_evaluate(commands)

    info = commands.add_parser(
        "info", help="versions, backends and devices", description="Tells versions, backends and devices."
    )
    info.add_argument("--json", type=Path, metavar="FILE", help="also write it here")
    return parser


def _add_evaluate(commands: argparse._SubParsersAction[_Parser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="scores of a model, clean, under attack and in the worst case",
        description="Attacks a model with APGD and the gradient of several methods, prints mIoU / mAcc / aAcc in "
        "percent per attack and in the worst case, and writes them to DIR/evaluation.json. An interrupted evaluation "
        "goes on where it was; a further attack or eps computes only what is new.",
    )
    add = evaluate.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder with images/NAME.* and labels/NAME.png")
    add("--model", metavar="NAME", help="small, tiny, or package.module:callable; default: as the weights tell")
    add("--model-args", type=_mapping, metavar="JSON", help='keywords for the callable, such as {"num_classes": 21}')
    add("--weights", "--checkpoint", type=Path, metavar="FILE", help="state dict, or checkpoint with one as 'model'")
    add("--classes", type=_at_least_1, metavar="N", help="classes of small or tiny, without weights")
    add("--attacks", type=_names, metavar="A,B,...", help="methods, default: eroseg,js:shrinking,cospgd")
    add("--eps", type=_budgets, default=(8 / 255,), metavar="E,...", help="such as 2/255,4/255 (default: 8/255)")
    add("--norm", choices=["linf", "l2"], default="linf", help="default: linf")
    add("--steps", type=_at_least_1, default=100, metavar="T", help="per attack and restart, default: 100")
    add("--restarts", type=_at_least_1, default=1, metavar="R", help="default: 1")
    add("--out", type=Path, default=Path("eroseg-evaluation"), metavar="DIR", help="default: ./eroseg-evaluation")
    add("--images", type=_at_least_1, metavar="N", help="evaluate on so many evenly spaced images, default: all")
    add("--size", type=_size, metavar="HxW", help="resize images and labels, default: their own sizes")
    add("--ignore-index", type=int, default=255, metavar="I", help="label of void pixels, default: 255")
    add(
        "--mean", type=_numbers, metavar="R,G,B", help="the model wants (image - mean) / std; eps stays in pixel values"
    )
    add("--std", type=_numbers, metavar="R,G,B")
    add("--amp", choices=["bf16", "fp16"], help="run the model under autocast")
    add("--batch-size", type=_at_least_1, default=8, metavar="B", help="images attacked at once, default: 8")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--sanity", type=int, default=4, metavar="N", help="images for the sanity checks, 0 for none, default: 4")
    add("--device", help="where to run, default: cuda if there is one, else cpu")


def _budgets(text: str) -> tuple[float, ...]:
    """Several budgets; how large they may be depends on the norm."""
    return tuple(_ratio(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers such as 0.485,0.456,0.406") from None


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is not a JSON object such as {{"num_classes": 21}}')
    return value


def _ratio(text: str) -> float:
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no budget, wanted a number such as 8/255 or 0.03")
    return value


def _fraction(text: str) -> float:
    try:
        value = _ratio(text)
    except argparse.ArgumentTypeError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no budget, wanted a number from 0 to 1 such as 8/255 or 0.03")
    return value


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of steps, wanted a whole number of at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()) or min(int(height), int(width)) < 32:
        raise argparse.ArgumentTypeError(f"{text} is not a size, wanted HEIGHTxWIDTH of at least 32x32")
    return int(height), int(width)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _check_json(path: Path | None) -> None:
    """Finds out before the work, not after it, that its result cannot be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise _UserError(f"--json {path} cannot be written, wanted a file in a folder that exists")


def _demo(args: argparse.Namespace) -> None:
    from eroseg_ext import demo

    _check_json(args.json)
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
    from eroseg_ext.training import command

    def say(line: str) -> None:
        tqdm.write(line)  # above the bar
        sys.stdout.flush()

    try:
        training.train(say=say, **command.settings(args, progress=sys.stderr.isatty()))
    except training.TrainingStopped as stopped:
        raise _UserError(str(stopped)) from stopped


def _evaluate(args: argparse.Namespace) -> None:
    import torch

    from eroseg_ext.data import SegmentationFolder
    from eroseg_ext.demo import _device
    from eroseg_ext.evaluation import evaluate
    from eroseg_ext.loading import load_network

    if args.norm == "linf" and max(args.eps) > 1:
        raise _UserError(f"--eps is {max(args.eps):g}, wanted numbers from 0 to 1 such as 8/255 with --norm linf")
    device = _device(args.device)
    data = SegmentationFolder(args.data, args.size)
    model = load_network(args.model, args.weights, classes=args.classes, model_args=args.model_args).to(device)
    keywords = {} if args.attacks is None else {"attacks": args.attacks}
    result = evaluate(
        model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        data,
        out=args.out,
        eps=args.eps,
        norm=args.norm,
        steps=args.steps,
        restarts=args.restarts,
        images=args.images,
        ignore_index=args.ignore_index,
        mean=args.mean,
        std=args.std,
        autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp),
        batch_size=args.batch_size,
        seed=args.seed,
        sanity=args.sanity,
        progress=sys.stderr.isatty(),
        **keywords,
    )
    print(f"mIoU / mAcc / aAcc in %, {len(result.images)} images, {args.steps} steps, {args.restarts} restart(s)\n")
    print(result.markdown())
    if result.sanity:
        print()
    for check in result.sanity:
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.verdict}")


def _info(args: argparse.Namespace) -> None:
    from eroseg_ext import backend

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
