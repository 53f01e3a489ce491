"""The kernels of one device against its copy bandwidth, in minutes and in one file.

    python -m bench.kernels --device cuda --out kernels_h100.json
    python -m bench.kernels --device cpu --quick --out kernels.json

Every operation in every implementation, the fused and the reference one timed twice (the second time after everything
else was timed once, which shows the noise), and whole attacks on a light net and on a ResNet-50. Most important
first; what no time is left for is skipped and says so. The file is written anew after every part, whole each time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import results
from bench.cases import KERNEL_SHAPES, SECONDS, Case, Unavailable, figure, implementations, kernel_cases, timed
from bench.report import Device, cell, interval, markdown, median, mib, number, ratio
from bench.results import Figure
from bench.whole import ATTACKS, LOOP, PGD_LOOP, REFERENCE_LOOP, TEXTBOOK, Task, measure_attack, measure_loop

LIMIT_SECONDS = 240
COMPILE_SECONDS = 45
MODELS = ("light", "resnet50")

Result = TypeVar("Result")


class Run:
    """Figures and reasons, as they come in."""

    def __init__(self, device: torch.device, quick: bool, deadline: float) -> None:
        self.device = device
        self.figures: list[Figure] = []
        self.skipped: dict[str, str] = {}
        self.failed = False
        self._seconds = SECONDS["quick"] / 10 if quick else SECONDS["quick"]
        self._deadline = deadline

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _try(self, name: str, measure: Callable[[], Result]) -> Result | None:
        label = f"[{self.device.type}-{name}]"
        if self._left() <= 0:
            self.skipped[label] = "no time was left"
            return None
        try:
            return measure()
        except Unavailable as reason:
            self.skipped[label] = str(reason)
        except Exception as error:  # the others can still be measured
            self.skipped[label] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self.failed = True
        return None

    def operation(self, case: Case, implementation: str) -> None:
        """Times one implementation of a case, or notes why it cannot."""

        def measure() -> Figure:
            limit = max(min(COMPILE_SECONDS, self._left()), 1)
            timing = timed(case, implementation, self.device, self._seconds, limit)
            return figure(case, implementation, self.device, timing, self._seconds)

        found = self._try(f"{case.name}-{implementation}", measure)
        if found is not None:
            self.figures.append(found)

    def once_more(self, case: Case, implementation: str) -> None:
        """Times it again, if it was timed before."""
        for former in self.figures:
            if (former["case"], former["implementation"]) == (case.name, implementation):
                name = f"{case.name}-{implementation} once more"
                again = self._try(name, lambda: timed(case, implementation, self.device, self._seconds))
                if again is not None:
                    former["again_ms"] = again.to_json()

    def whole(self, task: Task, name: str) -> None:
        """Times a whole attack, or the loop with its split."""
        measure = measure_attack if name in ATTACKS else measure_loop
        found = self._try(f"{task.model}-{name}", lambda: measure(task, name)[0])
        if found is not None:
            self.figures.append(found)


def compile_order(cases: list[Case]) -> list[Case]:
    """torch.compile takes long: half precision before float32, NCHW before channels_last, gradients before the rest."""

    def order(case: Case) -> tuple[bool, ...]:
        is_other = case.op != "erosion_grad" or case.method is not None
        is_other |= case.data not in KERNEL_SHAPES or case.labels != torch.int64
        return is_other, case.layout != "NCHW", case.dtype != torch.bfloat16

    return sorted(cases, key=order)


def short_table(device: Device) -> list[str]:
    """One line per case."""
    rows = []
    for case in device.planned():
        eager, compiled, fused = (device.get("ops", case.name, name) for name in ("reference", "compiled", "fused"))
        share = cell(fused, lambda f: f"{100 * f['extra']['share_of_copy']:.0f} %")
        fused_ms = cell(fused, lambda f: interval(f["ms"]))
        rows.append([case.name, median(eager), median(compiled), fused_ms, ratio(eager, fused), share])
    name = device.result["devices"][device.kind]["name"]
    head = [f"ms on {name}", "reference", "compiled", "fused (20-80 %)", "against reference", "share of a copy's speed"]
    return markdown(head, rows)


def attacks_table(device: Device) -> list[str]:
    """One line per model and way to attack it."""
    rows = []
    for model in MODELS:
        slowest = device.get("end_to_end", model, TEXTBOOK)
        for name, way in ATTACKS.items():
            whole, split = device.get("end_to_end", model, name), device.get("end_to_end", model, way.loop or "")
            ours = "" if way.loop is None else cell(split, lambda f: number(f["extra"]["ours"]["p50"]))
            memory = [cell(whole, lambda f, key=key: mib(f["extra"][key])) for key in ("peak_bytes", "reserved_bytes")]
            row = [model, name, cell(whole, lambda f: interval(f["ms"])), ours, ratio(slowest, whole)]
            rows.append([*row, *memory])
    head = ["model", "attack", "ms per step (20-80 %)", "ours in the loop", f"{TEXTBOOK} against it"]
    return markdown([*head, "peak memory of a call", "all that torch holds"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--commit", help="what to call the code outside a git checkout")
    args = parser.parse_args(argv)
    if args.out.suffix != ".json" or not args.out.parent.is_dir():
        parser.error(f"--out is {args.out}, wanted a .json file in a folder that exists")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU")

    device = torch.device(args.device)
    run = Run(device, args.quick, time.monotonic() + args.limit)
    more: dict[str, Any] = {"clocks_before": results.clocks()} | ({"commit": args.commit} if args.commit else {})
    profile, load = "kernels quick" if args.quick else "kernels", results.load()

    def save() -> None:
        results.write(args.out, profile, [device], run.figures, run.skipped, load, **more)

    save()  # from here on there is a file, whatever becomes of the device
    cases = kernel_cases(args.quick)
    for case in cases:
        for name in implementations(case):
            if name != "compiled":
                run.operation(case, name)
    save()
    size = (1, 3, 64, 64) if args.quick else (8, 3, 512, 512)
    for model in MODELS:
        task = Task(model, size, steps=3 if args.quick else 10, rounds=2, device=device)
        for name in (LOOP, PGD_LOOP, REFERENCE_LOOP, *ATTACKS):
            run.whole(task, name)
    save()
    for case in cases:
        for name in ("fused", "reference"):
            run.once_more(case, name)
    save()
    for case in compile_order(cases)[: 1 if args.quick else None]:
        run.operation(case, "compiled")
    save()

    measured = Device(results.read(str(args.out)), device.type)
    for reason in dict.fromkeys(run.skipped.values()):
        print(f"skipped: {reason}")
    print(measured.title)
    print("\n".join([*attacks_table(measured), *short_table(measured)]))
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
