"""``eroseg info``: what is built and why the rest is not."""

from __future__ import annotations

from eroseg_ext.cli.options import Output
from eroseg_ext.ops import backend


def command(output: Output) -> None:
    """Tells versions, backends and devices."""
    report = backend.report()
    for name, value in report.items():
        if isinstance(value, dict):
            for key, text in value.items():
                print(f"{key:12}  {text}")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            print(f"{name.replace('_', ' '):12}  {text if text not in ('', None) else 'none'}")
    output.write(report)
