"""Docstrings as mkdocstrings reads them: ``:func:`` is a role of Sphinx's, and ``>>>`` a quotation in Markdown."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            value = re.sub(r":(func|class|data|meth|mod):(?=`)", "", obj.docstring.value)
            obj.docstring.value = re.sub(r"((?:^>>> .*\n?)+)", r"```pycon\n\1```\n", value, flags=re.MULTILINE)
