"""What got slower or faster between two results, beyond the noise.

    python -m bench.compare before after
    python -m bench.compare before after --noise before_again

A figure has changed if its 20 to 80 % interval no longer meets the former one and the medians differ by more than 5 %,
by more than either of them drifted while it was measured, and by more than two runs of the same code differed, where
``--noise`` names the second of them. Exits with 1 if anything got slower.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench import results
from bench.results import Figure

LEAST_CHANGE = 0.05
BUSY = 0.5
"""Load average of a machine that does something else as well."""


class Change(NamedTuple):
    """One figure in both results."""

    figure: Figure
    before: float
    """median, ms"""
    after: float

    @property
    def factor(self) -> float:
        return self.after / self.before


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Of the medians of two timings, relative to the smaller."""
    return abs(one["p50"] - other["p50"]) / min(one["p50"], other["p50"])


def changed(before: dict[str, float], after: dict[str, float], again: dict[str, float] | None = None) -> bool:
    """Whether two timings (``ms`` of a figure) differ beyond the noise; ``again`` is of the same code as ``before``."""
    apart = before["p80"] < after["p20"] or after["p80"] < before["p20"]
    noise = max(LEAST_CHANGE, before["drift"], after["drift"], 0 if again is None else difference(before, again))
    return apart and difference(before, after) > noise


def _by_name(figures: list[Figure]) -> dict[object, Figure]:
    """Figures of one name but other shapes (of another profile) are different figures."""
    return {(results.key(figure), str(figure.get("shape"))): figure for figure in figures}


def changes(before: list[Figure], after: list[Figure], again: Sequence[Figure] = ()) -> tuple[list[Change], int]:
    """Figures that changed, the one that grew most first, and how many figures both results have."""
    former, later, noise = _by_name(before), _by_name(after), _by_name(list(again))
    common = former.keys() & later.keys()
    found = [
        Change(later[name], former[name]["ms"]["p50"], later[name]["ms"]["p50"])
        for name in common
        if changed(former[name]["ms"], later[name]["ms"], noise[name]["ms"] if name in noise else None)
    ]
    return sorted(found, key=lambda change: -change.factor), len(common)


def different_conditions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What besides the package differs between two results, one sentence each."""
    parts = [("versions", name) for name in ("torch", "python")]
    found = [
        f"{name} was {before[part].get(name)} and is {after[part].get(name)}"
        for part, name in parts
        if before[part].get(name) != after[part].get(name)
    ]
    for kind in before["devices"].keys() & after["devices"].keys():
        old, new = before["devices"][kind], after["devices"][kind]
        found += [
            f"{kind} {name} was {old.get(name)} and is {new.get(name)}"
            for name in ("name", "threads", "capability")
            if old.get(name) != new.get(name)
        ]
    found += [
        f"other processes were at work, load {result['load']} before the run {result['name']}"
        for result in (before, after)
        if result["load"] >= BUSY
    ]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a name under bench/results, or a path that ends in .json")
    parser.add_argument("after")
    parser.add_argument("--noise", metavar="AGAIN", help="a second run of the code of BEFORE")
    args = parser.parse_args(argv)
    try:
        before, after = results.read(args.before), results.read(args.after)
        again = results.read(args.noise)["figures"] if args.noise else []
    except ValueError as error:
        parser.error(str(error))
    for sentence in different_conditions(before, after):
        print(f"not the same conditions: {sentence}")
    found, common = changes(before["figures"], after["figures"], again)
    for change in found:
        figure = change.figure
        verdict = f"{change.factor:.2f}x slower" if change.factor > 1 else f"{1 / change.factor:.2f}x faster"
        what = f"{figure['suite']}: {figure['case']}, {figure['implementation']}, {figure['device']}"
        print(f"{verdict}: {what}: {change.before:.4g} -> {change.after:.4g} ms")
    print(f"{common} figures in both, {len(found)} changed beyond the noise")
    return int(any(change.factor > 1 for change in found))


if __name__ == "__main__":
    sys.exit(main())
