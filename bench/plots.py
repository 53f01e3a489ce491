"""Plots of a result's figures on one device: time bars, roofline, scaling, memory."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from bench.measure import exponent
from bench.results import Figure

COLOURS = {"fused": "#0072b2", "compiled": "#e69f00", "reference": "#999999"}
LABELS = {"fused": "fused", "compiled": "reference under torch.compile", "reference": "reference, eager"}
LIMIT = "#d55e00"
OTHER_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")


def _suite(figures: Sequence[Figure], suite: str) -> list[Figure]:
    return [figure for figure in figures if figure["suite"] == suite]


def _head(canvas: Canvas, title: str, under: str) -> None:
    wrapped = textwrap.fill(under, int(13.5 * canvas.get_figwidth()))
    canvas.suptitle(f"{title}\n{wrapped}", x=0.01, ha="left", fontsize=9)


def time_bars(figures: list[Figure], under: str) -> Canvas:
    """A group of bars for each case, the time of a mere copy drawn in as the limit."""
    cases = list(dict.fromkeys(figure["case"] for figure in figures))
    by_name = {(figure["case"], figure["implementation"]): figure for figure in figures}
    height = 0.8 / len(COLOURS)
    canvas, axes = plt.subplots(figsize=(10, 1.2 + 0.38 * len(cases)), layout="constrained")
    for row, case in enumerate(cases):
        for index, name in enumerate(COLOURS):
            figure = by_name.get((case, name))
            y = row + (index - 1) * height
            if figure is None:
                continue
            ms = figure["ms"]
            axes.barh(y, ms["p50"], height, color=COLOURS[name], label=LABELS[name] if row == 0 else None)
            axes.plot([ms["p20"], ms["p80"]], [y, y], color="black", linewidth=1)
        copy = by_name.get((case, "copy"))
        if copy is not None:
            x = copy["ms"]["p50"]
            label = "limit: a copy of as many bytes" if row == 0 else None
            axes.plot([x, x], [row - 0.45, row + 0.45], color=LIMIT, linewidth=2.5, label=label)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, median, with 20 to 80 % (logarithmic)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    canvas.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _head(canvas, "Time of each operation", under)
    return canvas


def roofline(figures: list[Figure], under: str) -> Canvas:
    """The bandwidth that each operation reaches, counted by its least traffic, under that of a copy."""
    canvas, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    copies = sorted({(f["extra"]["bytes"], f["extra"]["bytes"] / f["extra"]["copy_ms"] / 1e6) for f in figures})
    axes.plot(*zip(*copies, strict=True), color=LIMIT, linewidth=2, label="limit: a copy of as many bytes")
    markers = {"erosion_grad": "o", "pixel_grad": "s", "step": "D"}
    for name, colour in COLOURS.items():
        for op in (*markers, "other"):
            chosen = [f for f in figures if f["implementation"] == name and _kind(f, markers) == op]
            if chosen:
                axes.scatter(
                    [f["extra"]["bytes"] for f in chosen],
                    [f["extra"]["GB/s"] for f in chosen],
                    color=colour,
                    marker=markers.get(op, "x"),
                    label=f"{LABELS[name]}: {op}",
                    alpha=0.8,
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("least traffic, bytes")
    axes.set_ylabel("GB/s, of the least traffic")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside right center", fontsize=7, frameon=False)
    _head(canvas, "Bandwidth against that of a copy", under)
    return canvas


def _kind(figure: Figure, kinds: dict[str, str]) -> str:
    op: str = figure["extra"]["op"]
    return op if op in kinds else "other"


def scaling(figures: list[Figure], under: str) -> Canvas:
    """Time and memory along each axis, log-log, relative to its first point, with the fitted exponents."""
    canvas, panels = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for colour, axis in zip(OTHER_COLOURS, ("pixels", "classes", "batch", "radius"), strict=True):
        found = [f for f in figures if f["extra"]["axis"] == axis and f["extra"]["x"] >= 1]
        if len(found) < 2:
            continue
        x = [f["extra"]["x"] for f in found]
        for panel, y in (
            (panels[0], [f["ms"]["p50"] for f in found]),
            (panels[1], [max(f["extra"]["peak_bytes"], 1) / 2**20 for f in found]),
        ):
            label = f"{axis}: exponent {exponent(x, y):.2f}"
            panel.plot([value / x[0] for value in x], y, "o-", color=colour, label=label)
    for panel, what in zip(panels, ("ms", "MiB beyond the kept gradient"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}x")
        panel.yaxis.set_major_formatter("{x:.3g}")
        panel.set_xlabel("size along the axis, relative to its first point")
        panel.set_ylabel(what)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    _head(canvas, "erosion_grad and next_tau: how time and memory grow", under)
    return canvas


def memory(figures: list[Figure], under: str) -> Canvas:
    """Peak memory of the attacks on one network, and of attacks on several beside what these need by themselves."""
    groups = {suite: chosen for suite in ("peers", "end_to_end") if (chosen := _suite(figures, suite))}
    heights = [len(chosen) for chosen in groups.values()]
    canvas, panels = plt.subplots(
        len(groups),
        figsize=(9, 2 + 0.35 * len(figures)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axes, (suite, chosen) in zip(panels[:, 0], groups.items(), strict=True):
        peers = suite == "peers"
        for row, figure in enumerate(chosen):
            extra = figure["extra"]
            ours = not peers or figure["implementation"].startswith("eroseg_ext")
            axes.barh(row, extra["peak_bytes"] / 2**20, color=COLOURS["fused" if ours else "reference"])
            if "model_peak_bytes" in extra:
                x = extra["model_peak_bytes"] / 2**20
                label = "the model's own forward and backward pass" if row == 0 else None
                axes.plot([x, x], [row - 0.45, row + 0.45], color=LIMIT, linewidth=2.5, label=label)
        names = [f["implementation"] if peers else f"{f['case']}, {f['implementation']}" for f in chosen]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("peak MiB during the attack", fontsize=8)
        axes.set_title(chosen[0]["case"] if peers else "whole attacks", fontsize=8, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if not peers:
            axes.legend(fontsize=8, frameon=False)
    _head(canvas, "Peak memory", under)
    return canvas


def draw(figures: Sequence[Figure], under: str, stem: Path) -> Iterator[tuple[str, Path]]:
    """Draws what the figures allow into ``STEM-time.png`` and so on; yields description and path of each."""
    ops = _suite(figures, "ops")
    wholes = [f for suite in ("peers", "end_to_end") for f in _suite(figures, suite) if "peak_bytes" in f["extra"]]
    wanted = (
        ("time", "Time of each operation", time_bars, ops),
        ("roofline", "Bandwidth against that of a copy", roofline, ops),
        ("scaling", "How time and memory grow", scaling, _suite(figures, "scaling")),
        ("memory", "Peak memory", memory, wholes),
    )
    for name, what, plot, chosen in wanted:
        if not chosen:
            continue
        canvas = plot(chosen, under)
        path = stem.with_name(f"{stem.name}-{name}.png")
        canvas.savefig(path, dpi=110)
        plt.close(canvas)
        yield what, path
