"""Attack strength on a small network trained on real street scenes: the table of the README, remade from scratch.

The data is a folder with ``train`` and ``val``, each holding ``images/NAME.*`` and ``labels/NAME.png`` with the classes
0 to 10 and 11 for void (CamVid as in the SegNet tutorial). Weights and checkpoints go to a folder outside the
repository, the table to ``bench/results/strength_camvid.json``:

    python bench/strength.py train --data DATA --work WORK --net clean     # 60 epochs, about 13 minutes on 2 cores
    python bench/strength.py train --data DATA --work WORK --net robust    # 20 epochs from clean, about 15 minutes
    python bench/strength.py table --data DATA --work WORK                 # every method in seven settings
    python bench/strength.py scale --data DATA --work WORK                 # logits multiplied by 25

An interrupted training resumes from its last epoch. ``table --images 8 --rows pgd,eroseg --out FILE`` is a quick look;
rows that the file has already, of the same networks and images, are kept and printed with the new ones.

The networks: ``SmallDeepLab`` at 180x240, trained on ``train`` with random flip, zoom and position; ``clean`` on the
images as they are, ``robust`` on 3-step PGD examples at 4/255 from the clean weights. Attacked are evenly spaced images
of ``val``, with bfloat16 autocast, l_inf, step size eps/4, random start, last iterate, seed 0. Reported are mIoU and
pixel accuracy from one confusion matrix over all images; void never counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eroseg_ext import attack
from eroseg_ext.data.reading import SegmentationFolder
from eroseg_ext.evaluation.metrics import miou_and_accuracy
from eroseg_ext.models.small_deeplab import SmallDeepLab
from eroseg_ext.ops.reference import confusion
from eroseg_ext.utils.atomic_files import write_json

CLASSES = 11
VOID = 11
IGNORE = 255
SIZE = (180, 240)
BATCH = 8
EPOCHS = {"clean": 60, "robust": 20}
LEARNING_RATE = {"clean": 3e-3, "robust": 1.5e-3}
"""Peak rates of AdamW; the robust training starts from trained weights."""
RESULTS = Path(__file__).parent / "results" / "strength_camvid.json"


class Setting(NamedTuple):
    """One column of the table."""

    net: str
    eps: int
    """in 255ths"""
    steps: int

    def __str__(self) -> str:
        return f"{self.net} {self.eps}, T={self.steps}"


SETTINGS = (
    Setting("clean", 1, 10),
    Setting("clean", 2, 5),
    Setting("clean", 2, 20),
    Setting("robust", 2, 10),
    Setting("robust", 4, 10),
    Setting("robust", 8, 10),
    Setting("robust", 12, 10),
)
SCALE_SETTING = Setting("clean", 2, 5)

ROWS: dict[str, dict[str, Any]] = {
    "pgd": {"method": "pgd"},
    "segpgd": {"method": "segpgd"},
    "cospgd": {"method": "cospgd"},
    "mce": {"method": "mce"},
    "mce_bal": {"method": "mce_bal"},
    "js": {"method": "js"},
    "tsallis q=2": {"method": "tsallis", "q": 2.0},
    "eroseg preset progressive": {"preset": "progressive"},
    "eroseg schedule geometric": {"schedule": "geometric"},
    "eroseg radius 0": {"radius": 0},
    "eroseg": {},
}
"""Rows of the table: what each passes to ``attack``."""


def load(root: Path, images: int | None = None, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 180, 240] and labels [N, 180, 240] of a folder, void as IGNORE, all in memory.

    Args:
        root: folder with images/ and labels/.
        images: how many, evenly spaced over the folder in order of name; None takes all.
        offset: shifts the choice by this part of the spacing, to get other images.
    """
    folder = SegmentationFolder(root, SIZE)
    total = len(folder)
    count = total if images is None else min(images, total)
    pixels, labels = folder.load([min(int((i + offset) * total / count), total - 1) for i in range(count)])
    return pixels, labels.masked_fill(labels == VOID, IGNORE)


def save_atomically(value: Any, path: Path) -> None:
    """``torch.save`` that leaves either the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(value, part)
    os.replace(part, path)


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random flip, zoom (0.75x to 1.67x) and position of every image; what lies outside becomes void."""
    count = images.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    window = torch.exp(uniform(math.log(0.6), math.log(1.33)))
    flip = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    # The window's centre moves over what the window leaves free, in either direction.
    free = (1 - window).abs()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = window * flip
    theta[:, 1, 1] = window
    theta[:, 0, 2] = uniform(-1, 1) * free
    theta[:, 1, 2] = uniform(-1, 1) * free
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # Shifted by one so that the zeros outside become a value of their own.
    shifted = (labels + 1).float()[:, None]
    shifted = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0].long()
    return moved.clamp_(0, 1), torch.where(shifted == 0, IGNORE, shifted - 1)


def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, perturb: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, float]:
    """Scores of the model over all images, one confusion matrix for all, batch by batch.

    Args:
        model: network in eval mode.
        images, labels: [N, 3, H, W] and [N, H, W].
        perturb: maps (images, labels) of a batch to the images to predict on; None leaves them as they are.
    """
    matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for batch, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        if perturb is not None:
            batch = perturb(batch, wanted)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            prediction = model(batch.contiguous(memory_format=torch.channels_last)).argmax(1)
        matrix += confusion(prediction, wanted, CLASSES, ignore_index=IGNORE)
    return miou_and_accuracy(matrix)


def network(work: Path | None = None, name: str = "clean") -> SmallDeepLab:
    """A fresh network in channels_last, or the trained one of that name from the work folder in eval mode."""
    model = SmallDeepLab(CLASSES).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if work is not None:
        path = work / f"{name}.pt"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: run `train --net {name}` first")
        model.load_state_dict(torch.load(path, weights_only=True))
        model.eval()
    return model


def train(data: Path, work: Path, name: str, epochs: int) -> None:
    """Trains the clean or the robust network, saving a checkpoint after each epoch and the weights at the end."""
    torch.manual_seed(0)
    images, labels = load(data / "train")
    val_images, val_labels = load(data / "val", 39)
    model = network() if name == "clean" else network(work, "clean")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[name], weight_decay=1e-2)
    batches = len(images) // BATCH
    checkpoint = work / f"{name}.checkpoint.pt"
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        start = time.perf_counter()
        # A generator per epoch: a resumed training sees the same batches as an uninterrupted one.
        generator = torch.Generator().manual_seed(1000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for index in range(batches):
            progress = (epoch * batches + index) / (epochs * batches)
            warmup = min(1.0, (epoch * batches + index + 1) / batches)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE[name] * warmup * (0.5 + 0.5 * math.cos(math.pi * progress))
            chosen = order[index * BATCH : (index + 1) * BATCH]
            batch, wanted = augment(images[chosen], labels[chosen], generator)
            if name == "robust":
                batch = attack(
                    model,
                    batch,
                    wanted,
                    method="pgd",
                    eps=4 / 255,
                    step_size=2 / 255,
                    steps=3,
                    model_mode="eval",
                    ignore_index=IGNORE,
                    autocast=torch.bfloat16,
                    generator=generator,
                )
            model.train()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), wanted, ignore_index=IGNORE)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        save_atomically(state, checkpoint)
        line = f"{name} epoch {epoch + 1}/{epochs}: loss {total / batches:.3f}, {time.perf_counter() - start:.1f} s"
        if (epoch + 1) % 5 == 0 or epoch + 1 == epochs:
            model.eval()
            result = evaluate(model, val_images, val_labels)
            line += f", val mIoU {result['miou']:.2f}, accuracy {result['accuracy']:.2f}"
        print(line, flush=True)
    save_atomically(model.state_dict(), work / f"{name}.pt")


class Scaled(nn.Module):
    """A network whose logits are multiplied by a constant: the same predictions, other confidences."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C, H, W] of images [B, 3, H, W]."""
        logits: Tensor = self.model(images)
        return logits * self.factor


def attacked(model: nn.Module, images: Tensor, labels: Tensor, setting: Setting, row: str) -> dict[str, float]:
    """Scores of the model on the images that one method perturbs, and the seconds that took."""
    # The same seed for every row: all start from the same noise.
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()

    def perturb(batch: Tensor, wanted: Tensor) -> Tensor:
        return attack(
            model,
            batch.contiguous(memory_format=torch.channels_last),
            wanted,
            eps=setting.eps / 255,
            steps=setting.steps,
            ignore_index=IGNORE,
            autocast=torch.bfloat16,
            generator=generator,
            **ROWS[row],
        )

    result = evaluate(model, images, labels, perturb)
    return {**result, "seconds": time.perf_counter() - start}


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "size": list(SIZE),
        "batch": BATCH,
        "seed": 0,
    }


def recorded(path: Path) -> dict[str, Any]:
    """The JSON file of results: ``table`` and ``scale``, as far as they have been made."""
    parts: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return parts


def record(path: Path, part: str, value: dict[str, Any]) -> None:
    """Puts one part into the JSON file of results, atomically, and leaves its other parts as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**recorded(path), part: value})


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    rows = [head, ["---"] * len(head), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def pair(result: dict[str, float]) -> str:
    """``mIoU / pixel accuracy`` of a result."""
    return f"{result['miou']:.2f} / {result['accuracy']:.2f}"


def table(data: Path, work: Path, images: int, rows: list[str], out: Path) -> None:
    """Attacks both networks with every row in every setting; prints the table and records it after each row."""
    pixels, labels = load(data / "val", images)
    nets = {name: network(work, name) for name in EPOCHS}
    unattacked = {name: evaluate(net, pixels, labels) for name, net in nets.items()}
    for name, result in unattacked.items():
        print(f"unattacked {name}: {pair(result)}", flush=True)
    made: dict[str, dict[str, dict[str, float]]] = {}
    former = recorded(out).get("table", {})
    if former.get("images") == len(pixels) and former.get("unattacked") == unattacked:
        made = former["rows"]
    for row in rows:
        columns = {}
        for setting in SETTINGS:
            columns[str(setting)] = attacked(nets[setting.net], pixels, labels, setting, row)
            print(f"{row}, {setting}: {pair(columns[str(setting)])}", flush=True)
        made[row] = columns
        made = {name: made[name] for name in ROWS if name in made}
        value = {"environment": environment(), "images": len(pixels), "unattacked": unattacked, "rows": made}
        record(out, "table", value)
    print(f"\nmIoU / pixel accuracy in %, {len(pixels)} images, lower is a stronger attack\n")
    lines = [[row, *(pair(columns[str(setting)]) for setting in SETTINGS)] for row, columns in made.items()]
    lines.insert(0, ["none", *(pair(unattacked[setting.net]) for setting in SETTINGS)])
    print(markdown(["method", *map(str, SETTINGS)], lines))


def scale(data: Path, work: Path, images: int, rows: list[str], out: Path, factor: float = 25.0) -> None:
    """Attacks the clean network as it is and with its logits multiplied, on images between those of the table."""
    pixels, labels = load(data / "val", images, offset=0.5)
    net = network(work, SCALE_SETTING.net)
    nets = {"1": net, f"{factor:g}": Scaled(net, factor).eval()}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        results[row] = {name: attacked(model, pixels, labels, SCALE_SETTING, row) for name, model in nets.items()}
        print(f"{row}: " + ", ".join(f"x{name} {pair(result)}" for name, result in results[row].items()), flush=True)
        value = {"environment": environment(), "images": len(pixels), "setting": str(SCALE_SETTING), "rows": results}
        record(out, "scale", value)
    print(f"\nmIoU / pixel accuracy in %, {SCALE_SETTING}, {len(pixels)} images\n")
    lines = [[row, *(pair(results[row][name]) for name in nets)] for row in rows]
    print(markdown(["method", *(f"logits x{name}" for name in nets)], lines))


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    common.add_argument("--work", type=Path, required=True, help="folder for weights and checkpoints")
    training = commands.add_parser("train", parents=[common], help="train one of the two networks")
    training.add_argument("--net", choices=list(EPOCHS), required=True)
    training.add_argument("--epochs", type=int, help="default: 60 for clean, 20 for robust")
    for name, images, text in (
        ("table", 39, "attack both networks in every setting"),
        ("scale", 20, "attack the clean network with its logits multiplied by 25"),
    ):
        command = commands.add_parser(name, parents=[common], help=text)
        command.add_argument("--images", type=int, default=images, help="how many of val (default: %(default)s)")
        command.add_argument("--rows", default=",".join(ROWS), help="rows to compute, separated by commas")
        command.add_argument("--out", type=Path, default=RESULTS, help="JSON file (default: in bench/results)")
    args = parser.parse_args(argv)
    if args.command == "train":
        train(args.data, args.work, args.net, args.epochs or EPOCHS[args.net])
        return 0
    rows = args.rows.split(",")
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        parser.error(f"--rows has {', '.join(unknown)}, wanted some of: {', '.join(ROWS)}")
    (table if args.command == "table" else scale)(args.data, args.work, args.images, rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
