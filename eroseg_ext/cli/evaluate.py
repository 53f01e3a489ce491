"""``eroseg evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eroseg_ext import EvaluationSettings, evaluate
from eroseg_ext.cli.main import ChecksFailed
from eroseg_ext.cli.network import Network
from eroseg_ext.data.sources import Reading
from eroseg_ext.evaluation.settings import share_of
from eroseg_ext.utils.processes import started


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is evaluated, and where the result goes."""

    data: Path
    """folder with ``images/NAME.*`` and ``labels/NAME.png``, or of a data set as its publisher packs it"""
    out: Path = Path("eroseg-evaluation")
    """folder for evaluation.json and results.jsonl, made if missing"""
    shard: str | None = None
    """make share i of n alone, as ``0/4`` to ``3/4``; without it, a later run with the same --out reports all"""

    strict: bool = False
    """exit with 3 if a sanity check failed or an image had no gradient"""

    def __post_init__(self) -> None:
        if self.shard is not None:
            share_of(self.shard)


def command(files: Files, network: Network, reading: Reading, settings: EvaluationSettings) -> None:
    """Attacks a model with APGD and the gradient of several methods, prints mIoU / mAcc / aAcc in percent per attack
    and in the worst case, and writes them to evaluation.json. An interrupted evaluation goes on where it was; a further
    attack or eps computes only what is new. With --adversarial, the images of such a folder take the attacks' place.
    Under torchrun, processes share the work."""
    if files.strict and settings.sanity == 0:
        raise ValueError("--strict needs the sanity checks, which --sanity 0 leaves out")
    data = reading.source(files.data, "val")
    model = network.load(None if data.to_class is None else data.to_class.classes)
    given = vars(settings) | {
        "autocast": network.autocast,
        "model_description": {"name": network.model, "args": network.model_args},
        "progress": True,
    }
    result = evaluate(model, data, out=files.out, shard=files.shard, **given)
    if result is None:
        print(f"share {files.shard} is in {files.out}")
        return
    if started()[0] > 0:  # the first process reports
        return
    print(
        f"mIoU ({settings.miou_classes.replace('_', ' ')} classes) / mAcc / aAcc in %, {len(result.images)} images, "
        f"{settings.steps} steps, {settings.restarts} restart(s)\n"
    )
    print(result.markdown())
    if result.sanity:
        print()
    for check in result.sanity:
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.verdict}")
    without = [f"{row.attack} without gradients" for row in result.rows if row.without_gradient]
    if files.strict and (result.failed_checks or without):
        raise ChecksFailed(f"--strict: failed are {', '.join(dict.fromkeys([*result.failed_checks, *without]))}")
