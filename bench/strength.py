"""Attack strength on a small network and real street scenes.

The data is CamVid as in the SegNet tutorial: a folder with ``train`` and ``val``, each holding ``images/NAME.*`` and
``labels/NAME.png`` with the classes 0 to 10 and 11 for void. All training and evaluation is the package's own:

    python -m bench.strength commands --data camvid --work runs      # prints the commands that make both networks
    python -m bench.strength table --data camvid --work runs         # attacks `clean` and `robust` with every method
    python -m bench.strength evaluation --work evaluation            # collects the table of one `eroseg evaluate`

The last two append their figures to ``bench/results/results.csv`` (or ``--csv``). Networks and attacks are in float32.
``table`` attacks evenly spaced images of ``val``, l_inf, steps of eps/4, random start, last iterate, seed 0.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.results import RESULTS, Run
from eroseg_ext import attack
from eroseg_ext.data import VOID, NamedDataset
from eroseg_ext.data.reading import evenly_spaced
from eroseg_ext.evaluation.metrics import miou_and_accuracy
from eroseg_ext.models.adapter import Model
from eroseg_ext.models.loading import load_network
from eroseg_ext.ops import backend

BATCH = 8
SETTINGS = [("clean", 1, 10), ("clean", 2, 5), ("clean", 2, 20), *(("robust", eps, 10) for eps in (2, 4, 8, 12))]
"""Network, eps in 255ths and steps of each column of the table."""
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("pgd", "segpgd", "cospgd", "mce", "mce_bal", "js")},
    "tsallis q=2": {"method": "tsallis", "q": 2.0},
    "eroseg preset progressive": {"preset": "progressive"},
    "eroseg schedule geometric": {"schedule": "geometric"},
    "eroseg radius 0": {"radius": 0},
    "eroseg": {},
}
"""Rows of the table: what each passes to ``attack``."""


def commands(data: Path, work: Path, size: str) -> list[list[str]]:
    """The command lines that train both networks: on clean images, and from there on examples of 3-step PGD."""
    train = ["eroseg", "train", "--dataset", "camvid", "--data", str(data / "train"), "--size", size, "--cache"]
    adversarial = ["--attack", "pgd", "--adv-fraction", "1", "--attack-steps", "3", "--eps", "4/255", "--epochs", "12"]
    adversarial += ["--learning-rate", "1.5e-3", "--init", str(work / "clean" / "weights.pt")]
    return [
        [*train, "--attack", "none", "--epochs", "40", "--out", str(work / "clean")],
        [*train, *adversarial, "--out", str(work / "robust")],
    ]


def scaled(model: nn.Module, factor: float) -> Model:
    """A network whose logits are multiplied by a constant: the same predictions, other confidences."""
    return lambda images: factor * model(images)


def scores(model: Model, images: Tensor, labels: Tensor, classes: int, **settings: Any) -> dict[str, float]:
    """mIoU and pixel accuracy from one confusion matrix over all images, attacked if there are settings for it."""
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)  # all rows start from the same noise
    for batch, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        if settings:
            batch = attack(model, batch, wanted, ignore_index=VOID, generator=generator, **settings)
        with torch.no_grad():
            logits = model(batch)
        matrix += backend.select(batch.device).confusion(logits, wanted, classes, ignore_index=VOID)
    return miou_and_accuracy(matrix)


def table(data: Path, work: Path, size: str, count: int, run: Run) -> None:
    """Attacks both networks with every row in every setting, and ``clean`` with its logits multiplied as well."""
    height, width = map(int, size.split("x"))
    folder = NamedDataset("camvid", data / "val", size=(height, width))
    images, labels = folder.load(evenly_spaced(len(folder), count))
    nets = {name: load_network(weights=work / name / "weights.pt") for name in ("clean", "robust")}
    columns = [(f"{net} {eps}, T={steps}", nets[net], eps, steps) for net, eps, steps in SETTINGS]
    columns.append(("clean 2, T=5, logits x25", scaled(nets["clean"], 25), 2, 5))
    for name in ("none", *ROWS):
        for case, model, eps, steps in columns:
            settings = {} if name == "none" else {**ROWS[name], "eps": eps / 255, "steps": steps}
            found = scores(model, images, labels, folder.to_class.classes, **settings)
            run.add("strength", case, name, torch.device("cpu"), found)
            print(f"{name}, {case}: {found['miou']:.2f} / {found['accuracy']:.2f}", flush=True)


def evaluation(work: Path, run: Run) -> None:
    """Adds what ``eroseg evaluate --out WORK`` has printed."""
    result = json.loads((work / "evaluation.json").read_text())
    for worst in result["worst"]:
        of_eps = {row["attack"]: row for row in result["rows"] if row["eps"] == worst["eps"]}
        for name, entry in {"none": result["clean"], **of_eps, "worst case": worst}.items():
            run.add("evaluation", budget(worst["eps"]), name, torch.device("cpu"), figures_of(entry))


def budget(eps: float) -> str:
    return f"eps {round(255 * eps)}/255"


def figures_of(entry: dict[str, Any]) -> dict[str, float]:
    """The scores of an entry of ``evaluation.json``."""
    return {key.replace("_", " "): entry[key] for key in ("miou", "miou_bound", "macc", "aacc") if key in entry}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.strength", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["commands", "table", "evaluation"])
    parser.add_argument("--data", type=Path, default=Path("camvid"), metavar="DIR", help="folder with train/ and val/")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the networks")
    parser.add_argument("--size", default="120x160", metavar="HxW", help="of all images (default: 120x160)")
    parser.add_argument("--images", type=int, default=39, help="how many of val the table attacks (default: 39)")
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE", help="default: bench/results/results.csv")
    args = parser.parse_args(argv)
    if args.part == "commands":
        print("\n".join(map(shlex.join, commands(args.data, args.work, args.size))))
    elif args.part == "table":
        table(args.data, args.work, args.size, args.images, Run(args.csv))
    else:
        evaluation(args.work, Run(args.csv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
