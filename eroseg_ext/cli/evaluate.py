"""``eroseg evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eroseg_ext import EvaluationSettings, evaluate
from eroseg_ext.cli.main import ChecksFailed
from eroseg_ext.data.sources import Reading
from eroseg_ext.models.loading import load_network
from eroseg_ext.utils.validate import check_choice, check_integer, usable_device

_AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is evaluated on what, beside the settings of the evaluation."""

    data: Path
    """folder with ``images/NAME.*`` and ``labels/NAME.png``, or of a data set as its publisher packs it"""
    out: Path = Path("eroseg-evaluation")
    """folder for evaluation.json and results.jsonl, made if missing"""

    model: str | None = None
    """``small``, ``tiny`` or ``package.module:callable``; default: built-in, as the weights tell"""
    model_args: Mapping[str, Any] | None = None
    """keywords for it, such as {"num_classes": 21}"""
    weights: Path | None = field(default=None, metadata={"aliases": ["--checkpoint"]})
    """state dict, or checkpoint with one as 'model'"""
    classes: int | None = None
    """of the model; default: as --dataset or the weights tell"""
    amp: str = "none"
    """autocast of the model: ``none``, ``bf16`` or ``fp16``"""
    device: str | None = None
    """default: cuda if there is one, else cpu"""
    strict: bool = False
    """exit with 3 if a sanity check failed or an image had no gradient"""

    def __post_init__(self) -> None:
        check_choice("amp", self.amp, tuple(_AUTOCAST))
        if self.classes is not None:
            check_integer("classes", self.classes, 1, 2**15 - 1)


def command(files: Files, reading: Reading, settings: EvaluationSettings) -> None:
    """Attacks a model with APGD and the gradient of several methods, prints mIoU / mAcc / aAcc in percent per attack
    and in the worst case, and writes them to evaluation.json. An interrupted evaluation goes on where it was; a further
    attack or eps computes only what is new."""
    if files.strict and settings.sanity == 0:
        raise ValueError("--strict needs the sanity checks, which --sanity 0 leaves out")
    device = usable_device(files.device)
    data = reading.source(files.data, "val")
    classes = files.classes or (None if data.to_class is None else data.to_class.classes)
    model = load_network(files.model, files.weights, classes=classes, model_args=files.model_args).to(device)
    given = vars(settings) | {
        "autocast": _AUTOCAST[files.amp],
        "model_description": {"name": files.model, "args": files.model_args},
        "progress": sys.stderr.isatty(),
    }
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = evaluate(model, data, out=files.out, **given)
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
