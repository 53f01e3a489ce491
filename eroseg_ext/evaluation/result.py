"""What an evaluation found, as JSON and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eroseg_ext.evaluation import sanity
from eroseg_ext.evaluation.metrics import Scores, WorstCase
from eroseg_ext.evaluation.sanity import budget
from eroseg_ext.evaluation.settings import CLEAN


@dataclass(frozen=True)
class AttackRow:
    """One attack at one budget."""

    attack: str
    eps: float
    scores: Scores
    without_gradient: tuple[str, ...] = ()
    """names of the images whose gradient was 0 everywhere in the attack's first step: their scores are noise's"""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. Scores are in percent."""

    clean: Scores
    rows: tuple[AttackRow, ...]
    """by budget, and within it by attack"""
    worst: dict[float, WorstCase]
    """by eps, over the clean images and the attacks of that eps; ``chosen_...`` number these, clean as 0"""
    sanity: tuple[sanity.Check, ...]
    seconds: dict[str, float]
    """per image and budget, by row name; of interrupted runs too"""
    settings: dict[str, Any]
    environment: dict[str, Any]
    images: tuple[str, ...]
    """names of the images, or their numbers"""

    def as_json(self) -> dict[str, Any]:
        """Plain values; everything but the times, so that an interrupted evaluation ends like any other."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "images": list(self.images),
            "failed_checks": list(self.failed_checks),
            "clean": {**asdict(self.clean), "checks_passed": self._passed(of_clean=True)},
            "rows": [
                {
                    "attack": row.attack,
                    "eps": row.eps,
                    **asdict(row.scores),
                    "checks_passed": self._passed(),
                    "without_gradient": list(row.without_gradient),
                }
                for row in self.rows
            ],
            "worst": [
                {"eps": eps, **asdict(worst), "checks_passed": self._passed()} for eps, worst in self.worst.items()
            ],
            "sanity": [asdict(check) for check in self.sanity],
        }

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """Names of the sanity checks that failed; the figures are no measure of robustness then."""
        return tuple(check.name for check in self.sanity if not check.passed)

    def _passed(self, of_clean: bool = False) -> bool | None:
        """Whether all checks passed that figures rest on, the clean or the attacks'; None where no check was run."""
        if not self.sanity:
            return None
        return not (set(self.failed_checks) & sanity.OF_CLEAN if of_clean else self.failed_checks)

    def markdown(self) -> str:
        """A table of one row per attack, one column per eps, and below it the worst case with its bound.

        Lines whose figures cannot be believed say so, and a sentence below the table why.
        """
        budgets = list(self.worst)
        norm, size = self.settings["norm"], self.settings["size"]
        resized = f", at {size[0]}x{size[1]}" if size else ""
        head = [f"attack{resized}", *(f"eps {budget(eps, norm)}" for eps in budgets), "s per image"]
        lines = [head, ["---"] * len(head)]
        mark = " (checks failed)" if self._passed() is False else ""
        of_clean = mark if self._passed(of_clean=True) is False else ""
        lines.append([f"none{of_clean}", *([_triple(self.clean)] * len(budgets)), f"{self.seconds[CLEAN]:.2f}"])
        failed = ", ".join(self.failed_checks)
        notes = [f"checks failed: {failed}; these figures are no measure of robustness"] if mark else []
        for name in dict.fromkeys(row.attack for row in self.rows):
            found = {row.eps: row for row in self.rows if row.attack == name}
            without = list(dict.fromkeys(image for row in found.values() for image in row.without_gradient))
            said = f" (no gradient on {len(without)} of {len(self.images)} images)" if without else ""
            triples = (_triple(found[eps].scores) for eps in budgets)
            lines.append([f"`{name}`{mark}{said}", *triples, f"{self.seconds[name]:.2f}"])
            if without:
                more = f" and {len(without) - 8} more" if len(without) > 8 else ""
                notes.append(f"`{name}` finds a gradient of 0 everywhere on {', '.join(without[:8])}{more}")
        lines.append([f"**worst case**{mark}", *(f"**{_triple(self.worst[eps])}**" for eps in budgets), ""])
        bounds = (f"{self.worst[eps].miou_bound:.2f}" for eps in budgets)
        lines.append([f"lower bound of its mIoU{mark}", *bounds, ""])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([table, *notes])


def _triple(found: Scores | WorstCase) -> str:
    return f"{found.miou:.2f} / {found.macc:.2f} / {found.aacc:.2f}"
