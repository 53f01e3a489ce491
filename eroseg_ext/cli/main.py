"""The command ``eroseg``: ``eroseg demo``, ``train``, ``evaluate``, ``attack`` and ``info``."""

from __future__ import annotations

import io
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module

from eroseg_ext import __version__
from eroseg_ext.cli.options import Parser, add_options, plain, settings, settings_of

EXIT_USER_ERROR = 2
EXIT_CHECKS_FAILED = 3
EXIT_INTERRUPTED = 130

COMMANDS = {
    "demo": "train a small network, attack it with every method, draw pictures",
    "train": "train a model on adversarial examples",
    "evaluate": "scores of a model, clean, under attack and in the worst case",
    "attack": "adversarial images of a folder, as 8-bit PNGs",
    "info": "versions, backends and devices",
}
"""What each does. The module of that name has the function ``command``, whose parameters are settings dataclasses."""


class ChecksFailed(Exception):
    """``evaluate --strict`` ended with figures that cannot be believed; its text is one sentence."""


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
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
        argv = sys.argv[1:] if argv is None else argv
        name = next((argument for argument in argv if argument in COMMANDS), None)
        try:
            args = _parser(name).parse_args(argv)
        except SystemExit as done:  # --help and --version end this way
            return int(done.code or 0)
        from torch import device

        from eroseg_ext.ops import backend

        backend.select(device("cpu"))  # raises for a wrong EROSEG_CPU_LEVEL
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command = import_module(f"eroseg_ext.cli.{args.command}").command
            command(*(settings(kind, args) for kind in settings_of(command)))
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


def _parser(command: str | None) -> Parser:
    """The parser with the options of one command: those of the others would load modules that are not needed."""
    parser = Parser(prog="eroseg", description="Adversarial attacks on semantic segmentation.")
    parser.add_argument("--version", action="version", version=f"eroseg_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, text in COMMANDS.items():
        added = commands.add_parser(name, help=text, usage="%(prog)s [options]")
        if name == command:
            run = import_module(f"eroseg_ext.cli.{name}").command
            added.description = plain(run.__doc__)
            for kind in settings_of(run):
                add_options(added, kind)
    return parser


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"eroseg: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _told(error: BaseException) -> int:
    """Says in one line what is wrong; returns the exit code."""
    ours = type(error).__module__.startswith("eroseg_ext.")
    if ours or isinstance(error, (ValueError, OSError)):
        sentence = str(error) or type(error).__name__
    elif isinstance(error, MemoryError):
        sentence = "there is not enough memory for images, batches or a model of this size"
    else:
        # The user's model can raise anything at any time; its last line tells where.
        last = traceback.extract_tb(error.__traceback__)[-1]
        sentence = f"{type(error).__name__} in {last.name} ({last.filename}, line {last.lineno}): {error}"
    print(f"eroseg: {' '.join(sentence.split())}", file=sys.stderr)
    return EXIT_CHECKS_FAILED if isinstance(error, ChecksFailed) else EXIT_USER_ERROR
