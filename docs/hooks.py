"""What mkdocs cannot do by options: formulas as MathML, and pictures from bench/results."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures that the benchmarks drew, so that the repository holds each once."""
    for picture in sorted(Path("bench/results").glob("*.png")):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture.resolve())))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Finds the pictures where the site has them; the repository shows the same pages with its own."""
    return markdown.replace("](../bench/results/", "](images/")


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers show without a script."""

    def mathml(found: re.Match[str]) -> str:
        display = "inline" if found[1] == "span" else "block"
        return convert(html.unescape(found[2]).strip(), display=display)

    return FORMULA.sub(mathml, content)
