"""Markdown tables and plots of the figures in ``bench/results/results.csv``.

    python -m bench.report                     # every table
    python -m bench.report --write             # fill in README.md and docs/
    python -m bench.report --plots             # draw bench/results/*.png
    python -m bench.report mine.csv            # the tables of another file
    python -m bench.report after.csv --against before.csv    # what got slower or faster beyond the noise

A table shows the last run of its group on its kind of device. In the documentation it stands between
``<!-- bench:NAME -->`` and ``<!-- /bench -->``, where NAME is one of ``TABLES``, or NAME-cuda for a GPU's figures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from bench import ROOT, results
from bench.results import RESULTS, Row

NOT_MEASURED = "not measured"
LEAST_CHANGE = 0.05
MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


class Group:
    """The figures of one group, by case, name and quantity, in the order in which they were measured."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._value = {(row.case, row.name, row.quantity): row.value for row in self.rows}

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def names(self, case: str | None = None) -> list[str]:
        return list(dict.fromkeys(row.name for row in self.rows if case in (None, row.case)))

    def get(self, case: str, name: str, quantity: str = "p50") -> float:
        """A figure; NaN, which tables tell as not measured, if there is none."""
        return self._value.get((case, name, quantity), math.nan)

    def interval(self, case: str, name: str) -> str:
        """The median and, in parentheses, the 20 and 80 % percentiles."""
        p50, p20, p80 = (self.get(case, name, quantity) for quantity in ("p50", "p20", "p80"))
        return number(p50) if math.isnan(p50) else f"{number(p50)} ({number(p20)}-{number(p80)})"

    def scores(self, case: str, name: str, digits: int, *quantities: str) -> str:
        return " / ".join(fixed(self.get(case, name, quantity), digits) for quantity in quantities)


def fixed(value: float, digits: int, unit: str = "") -> str:
    """So many digits after the point."""
    return NOT_MEASURED if math.isnan(value) else f"{value:.{digits}f}{unit}"


def number(value: float, unit: str = "") -> str:
    """Three significant digits, without an exponent."""
    known = value != 0 and math.isfinite(value)
    return fixed(value, max(2 - math.floor(math.log10(abs(value))), 0) if known else 0, unit)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def operations(group: Group) -> list[str]:
    """Every operation in every implementation, and a copy of as many bytes, which is the limit."""
    head = ["operation", "data", "logits", "reference, ms", "`torch.compile` of it", "fused (20-80 %)"]
    head += ["against reference", "against compiled", "a mere copy", "share of the copy's speed"]
    rows = []
    for case in group.cases:
        op, data, logits = case.split("/", 2)
        name, _, method = op.partition(" ")
        reference, compiled, fused, copy = (group.get(case, n) for n in ("reference", "compiled", "fused", "copy"))
        shown = [number(reference), number(compiled), group.interval(case, "fused")]
        shown += [number(reference / fused, "x"), number(compiled / fused, "x"), number(copy)]
        rows.append([f"`{name}` {method}".strip(), data, logits, *shown, fixed(100 * copy / fused, 0, " %")])
    return markdown(head, rows)


def speed(group: Group) -> list[str]:
    """The fused operation and the whole step at the shape of each data set, for a front page."""
    wanted = re.compile(r"(erosion_grad|step)/[^/]*/\S+ float32$")
    return operations(Group(row for row in group.rows if wanted.match(row.case)))


def attacks(group: Group) -> list[str]:
    """One row per attack on a trained network: time, memory and strength."""
    (case,) = group.cases
    head = ["ms per step (20-80 %)", "against eroseg", "peak memory", "mIoU %", "pixel accuracy %"]
    rows = []
    for name in group.names():
        times = ["", "", ""]
        if name != "none":
            ratio = group.get(case, name) / group.get(case, "eroseg_ext eroseg")
            memory = number(group.get(case, name, "peak") / 2**20, " MiB")
            times = [group.interval(case, name), number(ratio, "x"), memory]
        rows.append([name, *times, *(group.scores(case, name, 1, quantity) for quantity in ("miou", "accuracy"))])
    return markdown([f"attack ({case})", *head], rows)


def parts(group: Group) -> list[str]:
    """Where a step's time goes, and memory beyond the model's own in buffers of the logits' size."""
    head = ["model", "images", "attack", "ms per step", "model forward", "model backward", "ours", "ours, share"]
    head.append("memory beyond the model's, in logits")
    rows = []
    for case in group.cases:
        for name in group.names(case):
            whole, *inside = (group.get(case, name, f"{part}p50") for part in ("", "forward ", "backward ", "ours "))
            peak, own, logits = (group.get(case, name, quantity) for quantity in ("peak", "model peak", "logits"))
            shares = [fixed(100 * inside[2] / whole, 1, " %"), fixed((peak - own) / logits, 2)]
            cells = [""] * 5 if math.isnan(logits) else [*map(number, inside), *shares]
            rows.append([*case.split("/", 1), name, number(whole), *cells])
    return markdown(head, rows)


def resolution(group: Group) -> list[str]:
    """``erosion_grad`` on low logits beside upsampling, operation and its backward, and beside full-size logits."""
    head = ["data", "logits", "on low logits, ms (20-80 %)", "upsampled, and back", "on full-size logits alone"]
    rows = []
    for case in group.cases:
        low, upsampled, full = (group.get(case, name) for name in ("low", "upsampled", "full"))
        ratios = [f"{number(time)} ({number(time / low, 'x')})" for time in (upsampled, full)]
        rows.append([*case.split("/", 1), group.interval(case, "low"), *ratios])
    return markdown(head, rows)


def loss(group: Group) -> list[str]:
    """Training's loss and its gradient from low logits: time and memory, fused and by autograd."""
    head = ["data", "logits", "fused, ms (20-80 %)", "by autograd", "peak memory", "by autograd"]
    rows = []
    for case in group.cases:
        fused, slow = (group.get(case, name) for name in ("fused", "autograd"))
        peaks = [number(group.get(case, name, "peak") / 2**20, " MiB") for name in ("fused", "autograd")]
        slower = f"{number(slow)} ({number(slow / fused, 'x')})"
        rows.append([*case.split("/", 1), group.interval(case, "fused"), slower, *peaks])
    return markdown(head, rows)


def steps(group: Group) -> list[str]:
    """A whole step of the attack without and with full-size logits: time, and memory beyond the model's weights."""
    head = ["model", "images", "ms per step", "with full-size logits", "peak memory", "with full-size logits"]
    rows = []
    for case in group.cases:
        low, full = (group.get(case, name) for name in ("low", "upsampled"))
        times = [number(low), f"{number(full)} ({number(full / low, 'x')})"]
        peaks = [number(group.get(case, name, "peak") / 2**20, " MiB") for name in ("low", "upsampled")]
        rows.append([*case.split("/", 1), *times, *peaks])
    return markdown(head, rows)


def scores(
    group: Group, head: str, cases: Sequence[str], names: Sequence[str], digits: int, *quantities: str, bold: str = ""
) -> list[str]:
    """A row for each name, a column for each case, the scores divided by slashes."""
    rows = []
    for name in names:
        label = name if name in ("none", "worst case") else f"`{name}`"
        row = [label, *(group.scores(case, name, digits, *quantities) for case in cases)]
        rows.append([f"**{cell}**" for cell in row] if name == bold else row)
    return markdown([head, *cases], rows)


def strength(group: Group) -> list[str]:
    """mIoU / pixel accuracy by method and setting."""
    cases = [case for case in group.cases if "logits" not in case]
    return scores(group, "method", cases, group.names(), 1, "miou", "accuracy", bold="eroseg")


def confident(group: Group) -> list[str]:
    """The same with logits as they are and multiplied."""
    cases = [case for case in group.cases if case.startswith("clean 2, T=5")]
    return scores(group, "method", cases, group.names(), 1, "miou", "accuracy")


PARETO = re.compile(r"(.*), trained at (\d+)/255, seed (\d+), (.*)")
LEADER = "eroseg, free"


def pareto_points(group: Group) -> dict[tuple[str, str, int, int], dict[tuple[str, str], float]]:
    """By data, method, 255ths trained for and seed: a score for each pair of budget (or ``clean``) and quantity."""
    found: dict[tuple[str, str, int, int], dict[tuple[str, str], float]] = {}
    for row in group.rows:
        if case := PARETO.fullmatch(row.case):
            key = case[1], row.name, int(case[2]), int(case[3])
            found.setdefault(key, {})[case[4], row.quantity] = row.value
    return dict(sorted(found.items()))


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """The mean, and half the range of several."""
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):{sign}.1f}{spread}"


def pareto(group: Group) -> list[str]:
    """mIoU / pixel accuracy, clean and in the worst case, by what was trained: means over the seeds."""
    rows, points = [], pareto_points(group)
    scored = dict.fromkeys(budget for found in points.values() for budget, _ in found)
    for data, name, eps in dict.fromkeys(key[:3] for key in points):
        seeds = [found for key, found in points.items() if key[:3] == (data, name, eps)]
        cells = [
            " / ".join(mean_and_spread([found[s, q] for found in seeds]) for q in ("miou", "aacc")) for s in scored
        ]
        of_what = [name, ""] if name == "none" else [f"`{name}`", f"{eps}/255"]
        rows.append([data, *of_what, str(len(seeds)), *cells])
    return markdown(["data", "trained against", "for eps", "seeds", *scored], rows)


def pareto_lead(group: Group) -> list[str]:
    """How far the curve of ``LEADER`` lies above each other one at the same clean mIoU, in mIoU / pixel accuracy.

    Of each seed the mean over the clean mIoU that both curves reach, with straight lines between three points or more.
    """
    rows, points = [], pareto_points(group)
    budgets = [s for s in dict.fromkeys(budget for found in points.values() for budget, _ in found) if s != "clean"]
    axes = [("clean", "miou"), *itertools.product(budgets, ("miou", "aacc"))]
    curves: dict[tuple[str, str, int], list[list[float]]] = {}
    for (data, name, _, seed), found in points.items():
        curves.setdefault((data, name, seed), []).append([found[axis] for axis in axes])
    for data, name in dict.fromkeys(key[:2] for key in points if key[1] not in (LEADER, "none")):
        leads = []
        for seed in (seed for *of_what, seed in curves if of_what == [data, name]):
            (x, *ours), (y, *others) = (
                np.array(sorted(curves.get((data, n, seed), []))).T.reshape(len(axes), -1) for n in (LEADER, name)
            )
            if min(x.size, y.size) > 2 and (low := max(x[0], y[0])) < (high := min(x[-1], y[-1])):
                at = np.linspace(low, high, 100)
                pairs = zip(ours, others, strict=True)
                leads.append([float((np.interp(at, x, a) - np.interp(at, y, b)).mean()) for a, b in pairs])
        if leads:
            cells = [mean_and_spread(values, "+") for values in zip(*leads, strict=True)]
            shown = [f"{miou} / {accuracy}" for miou, accuracy in zip(cells[::2], cells[1::2], strict=True)]
            rows.append([data, f"`{name}`", str(len(leads)), *shown])
    return markdown(["data", "above", "seeds", *budgets], rows)


def evaluation(group: Group) -> list[str]:
    """mIoU / mAcc / aAcc as ``eroseg evaluate`` prints them."""
    lines = scores(group, "attack", group.cases, group.names(), 2, "miou", "macc", "aacc", bold="worst case")
    bounds = [group.scores(case, "worst case", 2, "miou bound") for case in group.cases]
    return [*lines, f"| lower bound of its mIoU | {' | '.join(bounds)} |"]


def demo(group: Group) -> list[str]:
    """What ``eroseg demo`` prints."""
    (case,) = group.cases
    rows = []
    for name in group.names():
        times = [number(group.get(case, name, f"{part} p50"), " ms") for part in ("fused", "reference")]
        shown = ["", ""] if name == "none" else times
        cells = [group.scores(case, name, 1, quantity) for quantity in ("miou", "accuracy")]
        rows.append([name if name == "none" else f"`{name}`", *cells, *shown])
    head = ["mIoU", "pixel accuracy", "our part of a step, fused", "in plain PyTorch"]
    return markdown([f"method ({case})", *head], rows)


TABLES: dict[str, tuple[str, Callable[[Group], list[str]]]] = {
    "operations": ("operations", operations),
    "speed": ("operations", speed),
    "attacks": ("attacks", attacks),
    "parts": ("parts", parts),
    "resolution": ("resolution", resolution),
    "steps": ("resolution steps", steps),
    "loss": ("resolution loss", loss),
    "strength": ("strength", strength),
    "confident": ("strength", confident),
    "pareto": ("pareto", pareto),
    "pareto_lead": ("pareto", pareto_lead),
    "evaluation": ("evaluation", evaluation),
    "demo": ("demo", demo),
}
"""Group and renderer of each table."""


def table(name: str, rows: Sequence[Row] | None = None) -> str:
    """A table in Markdown, of the committed figures or of others; one sentence where there are none."""
    bare, _, kind = name.partition("-")
    if bare not in TABLES:
        raise ValueError(f"{name} is no table, wanted one of: {', '.join(TABLES)}")
    group, render = TABLES[bare]
    found = results.latest(results.read() if rows is None else rows, group, kind or "cpu")
    return "\n".join(render(Group(found)) if found else [f"{name}: {NOT_MEASURED}."]) + "\n"


def tables(rows: Sequence[Row], kind: str) -> list[str]:
    """The lines of every table that there are figures for, each under the device, commit and time of its run."""
    lines = []
    for name, (group, _) in TABLES.items():
        if found := results.latest(rows, group, kind):
            lines += ["", f"**{name}** ({found[0].device}; commit {found[0].commit}; {found[0].date})", ""]
            lines += table(name if kind == "cpu" else f"{name}-{kind}", rows).splitlines()
    return lines or [f"{kind}: {NOT_MEASURED}."]


def pages() -> list[Path]:
    """The files whose marked tables are ours."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with its marked tables rendered anew."""
    return MARKED.sub(lambda found: found[1] + table(found[2]) + found[4], text)


def changed(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether two times, each (p20, p50, p80), differ by more than 5 % with intervals that do not meet."""
    apart = before[2] < after[0] or after[2] < before[0]
    return apart and abs(before[1] - after[1]) / min(before[1], after[1]) > LEAST_CHANGE


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[float, str]]:
    """What changed beyond the noise between two files: factor and sentence, the slowest first."""

    def times(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, float]]:
        found: dict[tuple[str, ...], dict[str, float]] = {}
        for row in rows:
            if row.quantity in ("p20", "p50", "p80"):
                found.setdefault((row.group, row.case, row.name, row.device), {})[row.quantity] = row.value
        return found

    old, new = times(before), times(after)
    common = [(key, [[t[q] for q in ("p20", "p50", "p80")] for t in (old[key], new[key])]) for key in old if key in new]
    found = [(b[1] / a[1], key, a[1], b[1]) for key, (a, b) in common if changed(a, b)]
    return [
        (factor, f"{factor:.2f}x the time: {', '.join(key)}: {number(a)} -> {number(b)} ms")
        for factor, key, a, b in sorted(found, reverse=True)
    ]


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 if ``--against`` finds anything slower."""
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS, help="default: bench/results/results.csv")
    parser.add_argument("--against", type=Path, metavar="FILE", help="tell what changed since these figures")
    parser.add_argument("--write", action="store_true", help="fill the marked tables of README.md and docs/")
    parser.add_argument("--plots", action="store_true", help="draw bench/results/*.png")
    args = parser.parse_args(argv)
    try:
        rows = results.read(args.file)
        before = [] if args.against is None else results.read(args.against)
    except ValueError as error:
        parser.error(str(error))
    if args.against is not None:
        found = changes(before, rows)
        print("\n".join([sentence for _, sentence in found] or ["nothing changed beyond the noise"]))
        return int(any(factor > 1 for factor, _ in found))
    for page in pages() if args.write else []:
        page.write_text(filled(page.read_text()))
    if args.plots:
        from bench import plots

        print("\n".join(str(path) for path in plots.draw(rows, RESULTS.parent)))
    for kind in ("cpu", "cuda"):
        print("\n".join(tables(rows, kind)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
