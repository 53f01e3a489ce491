"""Markdown tables and plots of results.

    python -m bench.report                      # every result under bench/results
    python -m bench.report speed_cpu            # one of them
    python -m bench.report speed_cpu --plots DIR

What a result should hold and does not is marked "not measured", and so is a kind of device that none was made on.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, plots, results
from bench.cases import TORCH_SELECTIONS, Case, kernel_cases, operation_cases
from bench.loop import PARTS
from bench.measure import exponent
from bench.models import MODELS
from bench.peers import PEERS
from bench.results import Figure
from bench.whole import ATTACK, GRAPH, LOOP, VARIANTS

NOT_MEASURED = "not measured"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
GROWING = ("pixels", "classes", "batch", "radius")
FLAT = ("valid share", "content", "selection")

Cell = Callable[[Figure], str]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; all columns but the first are aligned right."""
    line = "|" + "|".join([" --- ", *[" ---: "] * (len(head) - 1)]) + "|"
    return [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows)]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(digits, 0)}f}"


def interval(ms: dict[str, float]) -> str:
    """The median and, in parentheses, the 20 and 80 % percentiles."""
    return f"{number(ms['p50'])} ({number(ms['p20'])}-{number(ms['p80'])})"


def ratio(above: Figure | None, below: Figure | None) -> str:
    """How many times as long as ``below`` ``above`` takes."""
    if above is None or below is None:
        return NOT_MEASURED
    return f"{number(above['ms']['p50'] / below['ms']['p50'])}x"


def cell(figure: Figure | None, text: Cell) -> str:
    return NOT_MEASURED if figure is None else text(figure)


def median(figure: Figure | None) -> str:
    return cell(figure, lambda f: number(f["ms"]["p50"]))


class Device:
    """The figures of one result on one device."""

    def __init__(self, result: dict[str, Any], kind: str) -> None:
        self.result = result
        self.kind = kind
        self.figures: list[Figure] = [f for f in result["figures"] if f["device"] == kind]
        self._by_name = {results.key(figure): figure for figure in self.figures}

    def get(self, suite: str, case: str, implementation: str) -> Figure | None:
        return self._by_name.get((suite, case, implementation, self.kind))

    def cases(self, suite: str) -> list[str]:
        """Names of the cases of a suite, in the order in which they were measured."""
        return list(dict.fromkeys(figure["case"] for figure in self.figures if figure["suite"] == suite))

    def planned(self) -> list[Case]:
        """The operations that a complete result would hold."""
        profile, device = self.result["profile"], torch.device(self.kind)
        if profile.startswith("kernels"):
            return kernel_cases(quick=profile == "kernels quick")
        return operation_cases(profile, device)

    @property
    def title(self) -> str:
        facts, result = self.result["devices"][self.kind], self.result
        parts = [facts["name"]]
        if "threads" in facts:
            parts.append(f"{facts['threads']} threads, {facts['capability']}")
        parts.append(f"torch {result['versions']['torch']}")
        changed = " with changes" if result["dirty"] else ""
        parts.append(f"commit {result['commit']}{changed}" if result["commit"] else "commit not known")
        parts.append(f"{result['profile']} run of {result['date'][:10]}, load {result['load']:g} before it")
        return f"{'; '.join(parts)}; a copy moves {facts['copy GB/s']} GB/s"


def operations_table(device: Device) -> list[str]:
    """Every operation in every implementation, and how near the fused one comes to a copy of the same bytes."""
    twice = any("again_ms" in figure for figure in device.figures)
    head = [
        *("operation", "data", "logits", "reference, ms", "`torch.compile` of it", "fused (20-80 %)"),
        *("against reference", "against compiled", "a mere copy", "share of the copy's speed", "GB/s"),
        *(["fused once more"] if twice else []),
    ]
    rows = []
    for case in device.planned():
        copy, eager, compiled, fused = (
            device.get("ops", case.name, name) for name in ("copy", "reference", "compiled", "fused")
        )
        shape = f"{list(case.shape)} {str(case.dtype).removeprefix('torch.')}".replace(", ", ",")
        row = [
            f"`{case.op}`" + (f" {case.method}" if case.method else ""),
            case.data + ("" if case.labels == torch.int64 else f", {case.labels} labels".replace("torch.", "")),
            shape + ("" if case.layout == "NCHW" else f" {case.layout}"),
            median(eager),
            median(compiled),
            cell(fused, lambda f: interval(f["ms"])),
            ratio(eager, fused),
            ratio(compiled, fused),
            median(copy),
            cell(fused, lambda f: f"{100 * f['extra']['share_of_copy']:.0f} %"),
            cell(fused, lambda f: number(f["extra"]["GB/s"])),
        ]
        if twice:
            row.append(cell(fused, lambda f: number(f["again_ms"]["p50"]) if "again_ms" in f else NOT_MEASURED))
        rows.append(row)
    return markdown(head, rows)


def selection_table(device: Device) -> list[str]:
    """The k-th smallest by our selection and by what torch has."""
    names = ("fused", "reference", *TORCH_SELECTIONS)
    case = next((case.name for case in device.planned() if case.op == "kth_value"), "")
    rows = [
        [name, cell(figure, lambda f: interval(f["ms"])), ratio(figure, device.get("ops", case, "fused"))]
        for name in names
        for figure in [device.get("ops", case, name)]
    ]
    return markdown([f"two k-th values, {case}", "ms (20-80 %)", "against fused"], rows)


def mib(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{number(value / 2**20)} MiB"


def peers_table(device: Device) -> list[str]:
    """One row per attack: time, memory and strength."""
    rows = []
    case = next(iter(device.cases("peers")), "")
    ours = device.get("peers", case, next(iter(PEERS)))
    if ours is not None:
        unattacked = ours["extra"]["unattacked"]
        rows.append(["none", "", "", "", f"{unattacked['miou']:.1f}", f"{unattacked['accuracy']:.1f}"])
    for name in PEERS:
        figure = device.get("peers", case, name)
        rows.append(
            [
                name,
                cell(figure, lambda f: interval(f["ms"])),
                ratio(figure, ours),
                cell(figure, lambda f: mib(f["extra"]["peak_bytes"])),
                cell(figure, lambda f: f"{f['extra']['miou']:.1f}"),
                cell(figure, lambda f: f"{f['extra']['accuracy']:.1f}"),
            ]
        )
    head = [f"attack ({case})", "ms per step (20-80 %)", "against eroseg", "peak memory", "mIoU %", "pixel accuracy %"]
    return markdown(head, rows)


def end_to_end_table(device: Device) -> list[str]:
    """Throughput, where a step's time goes, and memory beyond the model's own."""
    head = [
        *("model", "images", "images/s", "ms per step", "model forward", "model backward", "ours", "ours, share"),
        "memory beyond the model's, in logits",
    ]
    rows = []
    for case in MODELS:
        whole, split = device.get("end_to_end", case, ATTACK), device.get("end_to_end", case, LOOP)
        graph = device.get("end_to_end", case, GRAPH)
        some = whole or split or graph
        row = [case, ""] if some is None else [some["extra"]["model"], str(some["shape"])]
        row.append(cell(whole, lambda f: f"{number(f['extra']['images/s'])} at {f['extra']['steps']} steps"))
        row.append(median(whole) + ("" if graph is None else f", CUDA graph {median(graph)}"))
        row += [
            cell(split, lambda f, part=part: number(f["extra"]["parts"][part]["p50"])) for part in (PARTS[0], PARTS[2])
        ]
        row.append(cell(split, lambda f: number(f["extra"]["ours"]["p50"])))
        row.append(cell(split, lambda f: f"{100 * f['extra']['ours']['p50'] / f['ms']['p50']:.1f} %"))
        row.append(
            cell(
                whole,
                lambda f: (
                    f"{(f['extra']['peak_bytes'] - f['extra']['model_peak_bytes']) / f['extra']['logits_bytes']:.2f}"
                ),
            )
        )
        rows.append(row)
    return markdown(head, rows)


def habits_table(device: Device) -> list[str]:
    """What a step takes when one habit of the loop is changed."""
    rows = []
    for name in VARIANTS:
        figures = [(device.get("end_to_end", case, name), device.get("end_to_end", case, LOOP)) for case in MODELS]
        rows.append(
            [
                name,
                *(
                    NOT_MEASURED if figure is None else f"{median(figure)} ({ratio(figure, loop)})"
                    for figure, loop in figures
                ),
            ]
        )
    return markdown(["ms per step", *MODELS], rows)


def points(device: Device, axis: str) -> list[Figure]:
    return [f for f in device.figures if f["suite"] == "scaling" and f["extra"]["axis"] == axis]


def exponents(figures: Sequence[Figure]) -> tuple[float, float] | None:
    """Fitted exponents of time and peak memory along an axis, from x = 1 on; None for fewer than two points."""
    used = [f for f in figures if f["extra"]["x"] >= 1]
    if len(used) < 2:
        return None
    x = [f["extra"]["x"] for f in used]
    return (
        exponent(x, [f["ms"]["p50"] for f in used]),
        exponent(x, [max(f["extra"]["peak_bytes"], 1) for f in used]),
    )


def scaling_tables(device: Device) -> list[str]:
    """Fitted exponents where time may grow, and the spread where it must not."""
    rows = []
    for axis in GROWING:
        found = points(device, axis)
        fit = exponents(found)
        if fit is None:
            rows.append([axis, *[NOT_MEASURED] * 4])
            continue
        x = [f["extra"]["x"] for f in found]
        times = f"{median(found[0])} - {median(found[-1])}"
        rows.append([axis, f"{min(x)} - {max(x)}", times, f"{fit[0]:.2f}", f"{fit[1]:.2f}"])
    head = ["axis", "from - to", "ms", "exponent of time", "exponent of memory beyond the kept gradient"]
    lines = [*markdown(head, rows), ""]
    rows = []
    for axis in FLAT:
        found = sorted(points(device, axis), key=lambda f: f["ms"]["p50"])
        if not found:
            rows.append([axis, *[NOT_MEASURED] * 3])
            continue
        ends = [f"{number(f['ms']['p50'])} ({f['extra']['x']})" for f in (found[0], found[-1])]
        rows.append([axis, *ends, ratio(found[-1], found[0])])
    return lines + markdown(["what the pixels hold", "fastest, ms", "slowest, ms", "slowest against fastest"], rows)


SECTIONS: dict[str, tuple[str, tuple[Callable[[Device], list[str]], ...]]] = {
    "ops": ("Operations", (operations_table, selection_table)),
    "peers": ("Peers", (peers_table,)),
    "end_to_end": ("Whole attacks", (end_to_end_table, habits_table)),
    "scaling": ("Scaling", (scaling_tables,)),
}


def reasons(result: dict[str, Any], kind: str) -> list[str]:
    """Why figures are missing, the most frequent reason first."""
    found = Counter(reason for name, reason in result["skipped"].items() if f"[{kind}" in name or f"-{kind}-" in name)
    return [f"- {NOT_MEASURED} ({count}): {reason}" for reason, count in found.most_common()]


def report(found: Sequence[dict[str, Any]], folder: Path | None) -> list[str]:
    """The lines of the report; plots go to ``folder``, if one is given."""
    lines: list[str] = []
    for kind, title in DEVICES.items():
        devices = [Device(result, kind) for result in found if kind in result["devices"]]
        if not any(device.figures for device in devices):
            lines += [f"### {title}", "", f"{title}: {NOT_MEASURED}.", ""]
        for device in devices:
            if not device.figures:
                continue
            lines += [f"### {title}: {device.result['name']}", "", device.title + ". Medians in ms.", ""]
            for suite, (name, tables) in SECTIONS.items():
                lines += [f"**{name}**", ""]
                if not device.cases(suite):
                    lines += [f"{NOT_MEASURED}.", ""]
                    continue
                for table in tables:
                    lines += [*table(device), ""]
            if missing := reasons(device.result, kind):
                lines += [*missing, ""]
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                for what, path in plots.draw(device.figures, device.title, folder / f"{device.result['name']}-{kind}"):
                    lines += [f"![{what}]({os.path.relpath(path, ROOT)})", ""]
    return lines[:-1]


def _all() -> list[dict[str, Any]]:
    """Every result under bench/results, the oldest first; other files there are none of ours."""
    found = []
    for path in sorted(results.FOLDER.glob("*.json")):
        try:
            found.append(results.read(str(path)))
        except ValueError:
            continue
    return sorted(found, key=lambda result: result["date"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="under bench/results, or paths that end in .json; default: all")
    parser.add_argument("--plots", type=Path, default=results.FOLDER, metavar="DIR", help="default: bench/results")
    args = parser.parse_args(argv)
    try:
        found = [results.read(name) for name in args.names] or _all()
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(report(found, args.plots)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
