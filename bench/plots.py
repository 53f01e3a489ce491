"""Plots of the figures in a result file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.report import LEADER, Group, pareto_points
from bench.results import Row, latest

COLOURS = {"fused": "#0072b2", "compiled": "#e69f00", "reference": "#999999"}
LIMIT = "#d55e00"


def time(figure: Figure, group: Group) -> None:
    """A group of bars for each operation, the time of a mere copy drawn in as the limit."""
    axes = figure.subplots()
    for row, case in enumerate(group.cases):
        for index, (name, colour) in enumerate(COLOURS.items()):
            p20, p50, p80 = (group.get(case, name, quantity) for quantity in ("p20", "p50", "p80"))
            if name in group.names(case):
                y = row + (index - 1) * 0.27
                axes.barh(y, p50, 0.27, color=colour, label=name)
                axes.plot([p20, p80], [y, y], color="black", linewidth=1)
        if "copy" in group.names(case):
            limit = [group.get(case, "copy")] * 2
            axes.plot(limit, [row - 0.45, row + 0.45], color=LIMIT, linewidth=2.5, label="limit: a mere copy")
    axes.set_yticks(range(len(group.cases)), [case.replace("/", " ") for case in group.cases], fontsize=8)
    axes.set(xscale="log", xlabel="milliseconds, median, with 20 to 80 %", ylim=(len(group.cases) - 0.4, -0.6))


def pareto(figure: Figure, group: Group) -> None:
    """Clean against worst-case scores, a curve for each training over what it was for; bars span the seeds.

    A colour for each method, and a style of line for each way to spend the gradients.
    """
    points = pareto_points(group)
    budgets = [s for s in dict.fromkeys(budget for found in points.values() for budget, _ in found) if s != "clean"]
    lines = [*itertools.product(dict.fromkeys(key[0] for key in points), ("miou", "aacc"))]
    names = sorted({key[1] for key in points} - {"none"})
    kinds = {", free, equal time": "-.", ", free": "-", ", 1 step": "--", "": ":"}
    kind_of = {name: next(kind for kind in kinds if name.endswith(kind)) for name in names}
    methods = [*dict.fromkeys(name.removesuffix(kind) for name, kind in kind_of.items())]
    figure.set_figheight(2.9 * len(lines) + 1)
    panels = figure.subplots(len(lines), len(budgets), squeeze=False).flat
    for axes, ((data, quantity), budget) in zip(panels, itertools.product(lines, budgets), strict=True):
        for name, kind in kind_of.items():
            x, y, below, above = [], [], [], []
            for eps in dict.fromkeys(key[2] for key in points if key[:2] == (data, name)):
                seeds = [found for key, found in points.items() if key[:3] == (data, name, eps)]
                worst = [found[budget, quantity] for found in seeds]
                x.append(sum(found["clean", quantity] for found in seeds) / len(seeds))
                y.append(sum(worst) / len(worst))
                below.append(y[-1] - min(worst))
                above.append(max(worst) - y[-1])
            style = {"color": f"C{methods.index(name.removesuffix(kind))}", "linestyle": kinds[kind], "elinewidth": 0.6}
            style |= {"marker": "o", "markersize": 3, "linewidth": 2.4 if name == LEADER else 1.2}
            axes.errorbar(x, y, [below, above], label=name, **style)
        told = {"miou": "mIoU", "aacc": "accuracy"}[quantity]
        axes.set(xlabel=f"clean {told}, %", ylabel=f"worst-case {told}, %")
        axes.set_title(f"{data}, {budget}", fontsize=9)


PLOTS = {
    "time": ("operations", time, (10, 14)),
    "pareto": ("pareto", pareto, (11, 7)),
}
"""Group, function and size of each plot."""


def draw(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Draws the last run of each group on each kind of device as ``KIND-NAME.png``; yields the paths."""
    for kind in ("cpu", "cuda"):
        for name, (group, plot, size) in PLOTS.items():
            if found := latest(rows, group, kind):
                figure = Figure(figsize=size, layout="constrained")
                plot(figure, Group(found))
                handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
                figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=3)
                for axes in figure.axes:
                    axes.grid(alpha=0.3)
                figure.suptitle(f"{name}: {found[0].device}, {found[0].date[:10]}", fontsize=9, x=0.01, ha="left")
                path = folder / f"{kind}-{name}.png"
                figure.savefig(path, dpi=110)
                yield path
