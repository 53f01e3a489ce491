"""Which robustness for which price: clean scores against worst-case scores, a curve for each attack trained against.

    python -m bench.pareto row --method eroseg --eps 4 --seed 0 --work runs                  # on drawn scenes
    python -m bench.pareto row --data camvid --method eroseg --eps 4 --seed 0 --work runs    # on real ones
    python -m bench.pareto collect --work runs

``row`` trains and evaluates one network; what is there already, or half done, is not made again. All rows of a seed
start from one network trained on clean images, and take as many gradients. ``camvid`` is a folder as of
``bench.strength``. Recipes are chosen with ``--images choose`` (20 gradients an attack), and scores are those of the
other images that are held back, ``report`` (50): of CamVid's validation set the odd and the even ones. ``collect``
appends these scores to ``bench/results/results.csv`` (or ``--csv``), of which ``bench.report`` makes table and plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import eroseg_ext
from bench.results import RESULTS, Run
from bench.strength import budget
from eroseg_ext.data import NamedDataset
from eroseg_ext.data.palettes import CAMVID
from eroseg_ext.data.scenes import SCENE_CLASSES, generated_scenes
from eroseg_ext.models.loading import load_network

SCENES = "scenes"
BALANCED_PGD: dict[str, Any] = {"balance": 1, "radius": 0, "direction": "ce", "front": "hard"}
BALANCED_PGD |= {"schedule": "linear", "rho_range": (1, 1), "threshold": "exact"}
"""All pixels in the front, and the direction of the cross-entropy: PGD but for the weight of a pixel's class."""
METHODS: dict[str, dict[str, Any]] = {
    "none": {"attack": "none"},
    **{name: {"attack": name} for name in ("pgd", "segpgd", "cospgd", "mce_bal")},
    "pgd, balanced": {"attack": "eroseg", "attack_options": BALANCED_PGD},
    "eroseg": {"attack": "eroseg"},
}
METHODS |= {f"{name}, 1 step": given | {"attack_steps": 1} for name, given in METHODS.items() if name != "none"}
METHODS["pgd, free"] = METHODS["pgd"] | {"replays": 2}
METHODS |= {f"pgd, balance {power}, free": METHODS["pgd, free"] | {"loss_balance": power} for power in (0.1, 0.25)}
METHODS["eroseg, free"] = METHODS["eroseg"] | {"replays": 2, "loss_balance": 0.1}
METHODS["eroseg, balance 0.25, free"] = METHODS["eroseg, free"] | {"loss_balance": 0.25}
METHODS["eroseg, free, equal time"] = METHODS["eroseg, free"] | {"epochs": 15}
"""What each passes to ``eroseg_ext.train``. 15 epochs of two updates with each batch take as long as 10 with 3 steps of
``pgd``."""
BUDGETS = (2 / 255, 4 / 255, 8 / 255)
GRADIENTS = {"choose": 20, "report": 50}
COUNTS = {"train": 160, "choose": 24, "report": 24}
"""Scenes that are drawn."""
Pairs = tuple[Tensor, Tensor]


class Setting(NamedTuple):
    """How networks are trained on one kind of data."""

    model: str
    size: tuple[int, int]
    clean_epochs: int
    gradients: int
    """that adversarial training takes of each image, for attacks and updates"""
    learning_rate: float


OF_SCENES = Setting("tiny", (48, 64), clean_epochs=40, gradients=40, learning_rate=1.5e-3)
OF_CAMVID = Setting("tiny", (60, 80), clean_epochs=30, gradients=40, learning_rate=1.5e-3)


def images(data: str, part: str) -> tuple[Pairs, int]:
    """Images uint8 and labels to train on (``train``) or held back (``choose``, ``report``), and their classes."""
    if data == SCENES:
        scenes = generated_scenes(COUNTS[part], OF_SCENES.size, seed=[*COUNTS].index(part))
        return ((scenes.images * 255).round().to(torch.uint8), scenes.labels), len(SCENE_CLASSES)
    folder = NamedDataset("camvid", Path(data) / ("train" if part == "train" else "val"), size=OF_CAMVID.size)
    first, step = {"train": (0, 1), "choose": (1, 2), "report": (0, 2)}[part]
    pixels, labels = folder.load(list(range(first, len(folder), step)))
    return ((pixels * 255).round().to(torch.uint8), labels), len(CAMVID)


def row(data: str, method: str, eps: int, seed: int, work: Path, part: str) -> str:
    """Trains a row's network, from the clean one of its seed, and evaluates it on one of the two sets."""
    setting = OF_SCENES if data == SCENES else OF_CAMVID
    clean = work / name_of(data, "none", 0, seed)
    trainings = [(clean, {**METHODS["none"], "epochs": setting.clean_epochs})]
    if method != "none":
        attack_steps = METHODS[method].get("attack_steps", 3)
        per_epoch = METHODS[method].get("replays", attack_steps + 1)
        robust: dict[str, Any] = {"epochs": setting.gradients // per_epoch, **METHODS[method]}
        robust |= {"eps": eps / 255, "init": clean / "weights.pt", "learning_rate": setting.learning_rate}
        if attack_steps == 1:
            robust["step_size"] = 1.25 * eps / 255  # Wong et al., "Fast is better than free", ICLR 2020
        trainings.append((work / name_of(data, method, eps, seed), robust))
    for out, options in trainings:
        if not (out / "weights.pt").exists():
            pairs, classes = images(data, "train")
            usual: dict[str, Any] = {"adv_fraction": 1.0, "seed": seed, "resume": True, "cache": True}
            eroseg_ext.train(setting.model, data=pairs, classes=classes, out=out, **usual, **options)
    network = load_network(weights=out / "weights.pt")
    usual = {"steps": GRADIENTS[part], "batch_size": 24, "sanity": 0}
    return eroseg_ext.evaluate(network, images(data, part)[0], out=out / part, eps=BUDGETS, **usual).markdown()


def name_of(data: str, method: str, eps: int, seed: int) -> str:
    """The folder of a row in the folder of all."""
    return f"{Path(data).name}-{method}-{eps}-{seed}"


def collect(work: Path, run: Run) -> int:
    """Adds scores, clean and in the worst case, of the rows that are there; returns how many."""
    found = sorted(work.glob("*/report/evaluation.json"))
    for path in found:
        data, method, eps, seed = path.parts[-3].split("-")
        result = json.loads(path.read_text())
        scores = {budget(worst["eps"]): worst for worst in result["worst"]}
        for scored, entry in {"clean": result["clean"], **scores}.items():
            case = f"{data}, trained at {eps}/255, seed {seed}, {scored}"
            run.add("pareto", case, method, torch.device("cpu"), {key: entry[key] for key in ("miou", "aacc")})
    return len(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.pareto", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["row", "collect"])
    parser.add_argument("--data", default=SCENES, metavar="DIR", help="folder with train/ and val/; default: scenes")
    parser.add_argument("--method", choices=METHODS, default="eroseg")
    parser.add_argument("--eps", type=int, default=4, help="what is trained for, in 255ths (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", choices=GRADIENTS, default="report", help="which to evaluate on (default: report)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the networks")
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE", help="default: bench/results/results.csv")
    args = parser.parse_args(argv)
    if args.part == "row":
        print(row(args.data, args.method, args.eps, args.seed, args.work, args.images))
    elif not collect(args.work, Run(args.csv)):
        parser.error(f"{args.work} has no row that was evaluated on report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
