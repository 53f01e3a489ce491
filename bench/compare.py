"""What got slower or faster between two results, beyond the noise.

    python -m bench.compare before after

A figure has changed if its 20 to 80 % interval no longer meets the former one and the medians differ by more than 5 %
and by more than either of them drifted while it was measured. Exits with 1 if anything got slower.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

from bench import results
from bench.results import Figure

LEAST_CHANGE = 0.05


class Change(NamedTuple):
    """One figure in both results."""

    figure: Figure
    before: float
    """median, ms"""
    after: float

    @property
    def factor(self) -> float:
        return self.after / self.before


def changed(before: dict[str, float], after: dict[str, float]) -> bool:
    """Whether two timings (``ms`` of a figure) differ beyond the noise."""
    apart = before["p80"] < after["p20"] or after["p80"] < before["p20"]
    difference = abs(after["p50"] - before["p50"]) / min(before["p50"], after["p50"])
    return apart and difference > max(LEAST_CHANGE, before["drift"], after["drift"])


def changes(before: list[Figure], after: list[Figure]) -> tuple[list[Change], int]:
    """Figures that changed, the one that grew most first, and how many figures both results have.

    Figures of one name but other shapes (of another profile) are different figures.
    """
    former = {(results.key(figure), str(figure.get("shape"))): figure for figure in before}
    pairs = [
        (former[name], figure)
        for figure in after
        if (name := (results.key(figure), str(figure.get("shape")))) in former
    ]
    found = [Change(new, old["ms"]["p50"], new["ms"]["p50"]) for old, new in pairs if changed(old["ms"], new["ms"])]
    return sorted(found, key=lambda change: -change.factor), len(pairs)


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
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a name under bench/results, or a path that ends in .json")
    parser.add_argument("after")
    args = parser.parse_args(argv)
    try:
        before, after = results.read(args.before), results.read(args.after)
    except ValueError as error:
        parser.error(str(error))
    for sentence in different_conditions(before, after):
        print(f"not the same conditions: {sentence}")
    found, common = changes(before["figures"], after["figures"])
    for change in found:
        figure = change.figure
        verdict = f"{change.factor:.2f}x slower" if change.factor > 1 else f"{1 / change.factor:.2f}x faster"
        what = f"{figure['suite']}: {figure['case']}, {figure['implementation']}, {figure['device']}"
        print(f"{verdict}: {what}: {change.before:.4g} -> {change.after:.4g} ms")
    print(f"{common} figures in both, {len(found)} changed beyond the noise")
    return int(any(change.factor > 1 for change in found))


if __name__ == "__main__":
    sys.exit(main())
