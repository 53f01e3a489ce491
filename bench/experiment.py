"""Adversarial training compared: one network trained clean, and on from there against several attacks at equal budget.

    python -m bench.experiment commands --data camvid --out runs
    python -m bench.experiment report runs --seeds 0 1 --save training_camvid

The first prints the commands that make every row, the second the table, with its JSON and curves in bench/results.
Every training takes the same batches, steps and learning rates; ``eroseg evaluate`` attacks every network.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from bench.results import FOLDER
from eroseg_ext.utils.atomic_files import write_json

SIZE = ["--size", "180x240", "--amp", "bf16"]
CLEAN = ["--attack", "none", "--epochs", "40"]
ROBUST = ["--adv-fraction", "1", "--attack-steps", "3", "--eps", "4/255", "--learning-rate", "1e-3", "--epochs", "30"]
EVALUATE = ["--ignore-index", "11", "--eps", "2/255,4/255,8/255", "--steps", "50", "--images", "48"]
ATTACKS: dict[str, list[str]] = {
    "pgd": ["--attack", "pgd"],
    "segpgd": ["--attack", "segpgd"],
    "cospgd": ["--attack", "cospgd"],
    "eroseg": ["--attack", "eroseg"],
    "eroseg_balanced": ["--attack", "eroseg", "--front-loss", "0"],
    "eroseg_plain": ["--attack", "eroseg", "--front-loss", "0", "--attack-options", '{"balance": 0.15}'],
    "eroseg_half": ["--attack", "eroseg", "--attack-options", '{"balance": 0.5}'],
    "pgd_front": ["--attack", "pgd", "--front-loss", "4"],
}
"""Name of a run and what it is trained against; the last four take a part of EroSeg-AT each, or none."""


def commands(data: Path, out: Path, seed: int) -> list[list[str]]:
    """The command lines of the experiment; the first makes the network that the others start from."""
    train = ["eroseg", "train", "--dataset", "camvid", "--data", str(data / "train"), *SIZE, "--cache", "--resume"]
    train += ["--seed", str(seed)]
    clean = out / f"clean_{seed}"
    lines = [[*train, *CLEAN, "--out", str(clean)]]
    for name, attack in ATTACKS.items():
        run = out / f"{name}_{seed}"
        lines.append([*train, *attack, *ROBUST, "--init", str(clean / "weights.pt"), "--out", str(run)])
    for name in ("clean", *ATTACKS):
        run = out / f"{name}_{seed}"
        evaluate = ["eroseg", "evaluate", "--data", str(data / "val"), "--weights", str(run / "weights.pt")]
        lines.append([*evaluate, *SIZE, *EVALUATE, "--out", str(out / f"eval_{name}_{seed}")])
    return lines


def collect(out: Path, seed: int) -> list[dict[str, Any]]:
    """What the runs that are there came to: scores, and the loss by epoch."""
    rows = []
    for name in ("clean", *ATTACKS):
        evaluation = out / f"eval_{name}_{seed}" / "evaluation.json"
        if not evaluation.is_file():
            continue
        scores = json.loads(evaluation.read_text())
        log = [json.loads(line) for line in (out / f"{name}_{seed}" / "log.jsonl").read_text().splitlines()]
        rows.append(
            {
                "name": name,
                "seed": seed,
                "options": ATTACKS.get(name, []),
                "images": len(scores["images"]),
                "clean": {key: scores["clean"][key] for key in ("miou", "macc", "aacc")},
                "attacks": [{key: value for key, value in row.items() if key != "iou"} for row in scores["rows"]],
                "worst": [
                    {key: worst[key] for key in ("eps", "miou", "miou_bound", "macc", "aacc")}
                    for worst in scores["worst"]
                ],
                "loss": [[round(line["epoch"], 2), line["loss"]] for line in log if "loss" in line],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: mIoU / pixel accuracy, clean and in the worst case, as means over the seeds."""
    budgets = [f"eps {round(255 * worst['eps'])}/255" for worst in rows[0]["worst"]]
    lines = [
        "| trained against | seeds | clean | " + " | ".join(budgets) + " |",
        "|---|---|---|" + "---|" * len(budgets),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        runs = [row for row in rows if row["name"] == name]
        cells = []
        for scores in zip(*((run["clean"], *run["worst"]) for run in runs), strict=True):
            cells.append(" / ".join(f"{mean(score[key] for score in scores):.1f}" for key in ("miou", "aacc")))
        lines.append(f"| `{name}` | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The training loss of every run of the first seed, each point the mean over an epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for row in (row for row in rows if row["seed"] == rows[0]["seed"]):
        epochs: dict[int, list[float]] = {}
        for epoch, loss in row["loss"]:
            epochs.setdefault(int(epoch - 1e-9) + 1, []).append(loss)
        means = [mean(losses) for losses in epochs.values()]
        axes.plot(list(epochs), means, label=row["name"], color="black" if row["name"] == "clean" else None)
    axes.set(xlabel="epoch", ylabel="loss on the images trained on", ylim=(0.2, 0.8))
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.experiment", description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    plan = parts.add_parser("commands")
    plan.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with train/ and val/")
    plan.add_argument("--out", type=Path, required=True, metavar="DIR")
    plan.add_argument("--seed", type=int, default=0)
    report = parts.add_parser("report")
    report.add_argument("out", type=Path, metavar="DIR")
    report.add_argument("--seeds", type=int, nargs="+", default=[0])
    report.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json and .png")
    args = parser.parse_args(argv)
    if args.part == "commands":
        print("\n".join(shlex.join(line) for line in commands(args.data, args.out, args.seed)))
        return 0
    rows = [row for seed in args.seeds for row in collect(args.out, seed)]
    if not rows:
        parser.error(f"{args.out} has no evaluation of seed {', '.join(map(str, args.seeds))}")
    if args.save:
        write_json(FOLDER / f"{args.save}.json", {"train": ROBUST, "evaluate": EVALUATE, "size": SIZE, "rows": rows})
        draw(rows, FOLDER / f"{args.save}.png")
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
