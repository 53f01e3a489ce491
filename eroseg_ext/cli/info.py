"""``eroseg info``: what is built and why the rest is not."""

from __future__ import annotations

import argparse

from eroseg_ext.cli import options
from eroseg_ext.ops import backend
from eroseg_ext.utils.atomic_files import write_json


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    options.add_json(parser)


def command(args: argparse.Namespace) -> None:
    """Tells versions, backends and devices."""
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
