"""``eroseg demo``: train a small network, attack it with every method, tell and draw what happened."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from eroseg_ext.attacks import methods
from eroseg_ext.attacks.pgd import StepInfo, attack
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.cli.options import Output
from eroseg_ext.data.reading import SegmentationFolder, one_class
from eroseg_ext.data.scenes import IGNORE_INDEX, generated_scenes
from eroseg_ext.evaluation.metrics import miou_and_accuracy
from eroseg_ext.models.small_deeplab import DEMO_WIDTH, SmallDeepLab
from eroseg_ext.ops import backend, reference
from eroseg_ext.utils import plots
from eroseg_ext.utils.validate import check_integer, require, usable_device

METHODS = ("pgd", "segpgd", "cospgd", "mce", "mce_bal", "js", "tsallis", "eroseg")
"""Methods in the order of the table, with their default settings."""

BATCH = 8
MAX_CLASSES = 256


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What ``run`` does; the fields are the options of ``eroseg demo``."""

    data: Path | None = None
    """folder with images/ and labels/; default: drawn scenes"""
    out: Path = Path("eroseg-demo")
    """folder for the pictures, made if missing"""
    quick: bool = False
    """a few seconds instead of a minute or two"""
    seed: int = 0
    """of the scenes, the network and the random starts"""
    eps: float = 2 / 255
    """l_inf budget of every method"""
    steps: int = 10
    """of each attack"""
    train_steps: int | None = None
    """default 600, quick 40"""
    size: tuple[int, int] | None = None
    """(height, width); default 144x192, quick 72x96"""
    ignore_index: int = 255
    """label of void pixels in ``data``; drawn scenes have 255"""
    class_names: tuple[str, ...] | None = None
    """names of the classes of ``data``"""
    device: str | None = None
    """default: cuda if there is one, else cpu"""
    progress: bool = False
    """show bars on stderr"""

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0, 2**63 - 1)
        check_integer("steps", self.steps, 1, 10**4)  # numbers of each step are kept
        if self.train_steps is not None:
            check_integer("train_steps", self.train_steps, 1, 10**6)
        if self.size is not None:
            height, width = self.size
            fits = min(height, width) >= 32 and height * width <= 2**20
            require(fits, "size", self.size, "(height, width) of at least 32x32 and at most 2^20 pixels")
        check_integer("ignore_index", self.ignore_index, -(2**63), 2**63 - 1)
        named = self.class_names is None or self.data is not None
        require(named, "class_names", self.class_names, "None without data, whose classes they name")
        AttackSettings(eps=self.eps, steps=self.steps)


class Task(NamedTuple):
    """Images float32 [N, 3, H, W] in [0, 1] and labels int64 [N, H, W], to train and to test on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int


def run(settings: DemoSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the whole demo.

    Args:
        settings: what to do.
        say: told every finished part, one line at a time, and the table.

    Returns:
        Everything told and more, as plain values: ``settings``, ``environment``, ``task``, ``training``,
        ``unattacked``, ``methods`` (by name: miou, accuracy, seconds_per_step, fused_ms, reference_ms) and
        ``pictures``.

    Raises:
        ValueError, OSError: the data or a setting is wrong, or ``out`` cannot be written; one sentence.
    """
    device = usable_device(settings.device)
    settings.out.mkdir(parents=True, exist_ok=True)
    task = load_task(settings)
    where = "drawn scenes" if settings.data is None else f"images of {settings.data}"
    say(
        f"{len(task.train_images)} {where} to train on, {len(task.test_images)} to test on, "
        f"{len(task.classes)} classes, {task.test_images.shape[-2]}x{task.test_images.shape[-1]} pixels"
    )

    start = time.perf_counter()
    train_steps = settings.train_steps or (40 if settings.quick else 600)
    model = train(task, train_steps, settings.seed, device, settings.progress)
    images, labels = task.test_images.to(device), task.test_labels.to(device)
    unattacked = evaluate(model, images, labels, task)
    training = {
        "steps": train_steps,
        "seconds": time.perf_counter() - start,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    say(
        f"trained {training['parameters']:,} parameters for {train_steps} steps in {training['seconds']:.0f} s: "
        f"mIoU {unattacked['miou']:.1f} %, pixel accuracy {unattacked['accuracy']:.1f} %"
    )

    results, curves = {}, {}
    for method in METHODS:
        results[method], curves[method] = _attacked(model, images, labels, task, settings, method)
    say("")
    say(f"every method with eps {settings.eps * 255:.3g}/255, {settings.steps} steps of eps/4, random start")
    for line in table(unattacked, results):
        say(line)
    why_not = backend.why_not_fused(device)
    if why_not is not None:
        say(f"no fused kernels: {why_not}")

    files = [settings.out / "accuracy.png"]
    plots.accuracy_curves(files[0], curves, len(images))
    count = 1 if settings.quick else min(4, len(images))
    for index in (int(i * len(images) / count) for i in range(count)):
        story = _story(model, images[index : index + 1], labels[index : index + 1], task, settings)
        files.append(settings.out / f"example-{len(files)}.png")
        plots.attack_panel(files[-1], story)
    say("")
    say(f"pictures: {', '.join(map(str, files))}")

    return {
        "settings": {
            "data": None if settings.data is None else str(settings.data),
            "quick": settings.quick,
            "seed": settings.seed,
            "eps": settings.eps,
            "steps": settings.steps,
            "ignore_index": task.ignore_index,
            "size": list(task.test_images.shape[-2:]),
        },
        "environment": {**backend.report(), "device": str(device)},
        "task": {
            "train": len(task.train_images),
            "test": len(task.test_images),
            "classes": list(task.classes),
        },
        "training": training,
        "unattacked": unattacked,
        "methods": results,
        "pictures": [str(file) for file in files],
    }


def load_task(settings: DemoSettings) -> Task:
    """The images and labels that the settings name, every fifth of a folder (16 at most) held back to test on."""
    size = settings.size or ((72, 96) if settings.quick else (144, 192))
    if settings.data is None:
        trained, tested = (24, 4) if settings.quick else (160, 16)
        scenes = generated_scenes(trained + tested, size, settings.seed)
        return Task(
            scenes.images[:trained],
            scenes.labels[:trained],
            scenes.images[trained:],
            scenes.labels[trained:],
            scenes.classes,
            scenes.palette,
            IGNORE_INDEX,
        )
    folder = SegmentationFolder(settings.data, size)
    if len(folder) < 2:
        raise ValueError(
            f"{settings.data} holds {len(folder)} image, wanted at least 2: some to train on, some to test on"
        )
    held_back = max(1, min(len(folder) // 5, 4 if settings.quick else 16))
    test = sorted({int((i + 0.5) * len(folder) / held_back) for i in range(held_back)})
    rest = [index for index in range(len(folder)) if index not in test]
    if settings.quick:
        rest = rest[:: max(1, len(rest) // 24)]
    train_images, train_labels = folder.load(rest)
    test_images, test_labels = folder.load(test)
    classes = _count_classes(settings, train_labels, test_labels)
    names = settings.class_names or tuple(f"class {index}" for index in range(classes))
    if len(names) < classes:
        raise ValueError(f"class_names has {len(names)} names, wanted {classes}: labels go up to {classes - 1}")
    return Task(
        train_images,
        train_labels,
        test_images,
        test_labels,
        names,
        plots.distinct_colours(len(names)),
        settings.ignore_index,
    )


def _count_classes(settings: DemoSettings, *labels: Tensor) -> int:
    values = torch.cat([part.unique() for part in labels]).unique()
    values = values[values != settings.ignore_index]
    if len(values) == 0:
        raise ValueError(f"{settings.data} has no pixel with a label other than ignore_index {settings.ignore_index}")
    if told := one_class(values.tolist(), ()):
        raise ValueError(f"{settings.data}: {told} beside ignore_index {settings.ignore_index}, wanted at least two")
    classes = int(values[-1]) + 1
    if classes > MAX_CLASSES:
        raise ValueError(
            f"labels of {settings.data} go up to {classes - 1}, wanted class indices below {MAX_CLASSES}, and void as "
            f"ignore_index {settings.ignore_index}"
        )
    return classes


def train(task: Task, steps: int, seed: int, device: torch.device, progress: bool = False) -> SmallDeepLab:
    """Trains a small network on a task's training images, with random flips and brightness.

    Args:
        task: images and labels.
        steps: optimiser steps, of 8 images each.
        seed: of the weights and the order of images.
        device: where.
        progress: show a bar.

    Returns:
        The network in eval mode, on the device, in channels_last.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallDeepLab(len(task.classes), DEMO_WIDTH)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=max(steps, 2), pct_start=0.15)
    images, labels = task.train_images, task.train_labels
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for _ in tqdm(range(steps), desc="training", disable=not progress, leave=False):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = order[:BATCH], order[BATCH:]
        flip = torch.rand(BATCH, 1, 1, dtype=torch.float32, generator=generator) < 0.5
        gain = 1 + 0.3 * (torch.rand(BATCH, 1, 1, 1, dtype=torch.float32, generator=generator) - 0.5)
        batch, wanted = images[chosen], labels[chosen]
        batch = (torch.where(flip[:, None], batch.flip(-1), batch) * gain).clamp(0, 1)
        wanted = torch.where(flip, wanted.flip(-1), wanted)
        logits = model(batch.to(device).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, wanted.to(device), ignore_index=task.ignore_index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, task: Task) -> dict[str, float]:
    """Scores of the network over images [N, 3, H, W] with labels [N, H, W], as :func:`miou_and_accuracy` gives them."""
    classes = len(task.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=images.device)
    ops = backend.select(images.device)
    for batch, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        matrix += ops.confusion(model(batch), wanted, classes, ignore_index=task.ignore_index)
    return miou_and_accuracy(matrix)


def _attacked(
    model: nn.Module, images: Tensor, labels: Tensor, task: Task, settings: DemoSettings, method: str
) -> tuple[dict[str, float | None], list[float]]:
    """One method's row of the table, and the pixel accuracy in percent before every step and at the end."""
    start = time.perf_counter()
    adversarial, info = attack(
        model,
        images,
        labels,
        method=method,
        eps=settings.eps,
        steps=settings.steps,
        ignore_index=task.ignore_index,
        generator=torch.Generator().manual_seed(settings.seed),
        progress=settings.progress,
        return_info=True,
    )
    right = info.right.sum().item()
    seconds = (time.perf_counter() - start) / settings.steps
    counts = info.stats[0].sum(1)
    curve = [*(100 * counts[:, 1] / counts[:, 0]).tolist(), 100 * right / info.valid.sum().item()]
    row: dict[str, float | None] = {**evaluate(model, adversarial, labels, task), "seconds_per_step": seconds}
    with torch.no_grad():
        logits = model(adversarial)
    row["reference_ms"] = _our_part(reference, logits, images, adversarial, labels, task, settings, method)
    row["fused_ms"] = None
    if backend.why_not_fused(images.device) is None:
        ops = backend.select(images.device, "fused")
        row["fused_ms"] = _our_part(ops, logits, images, adversarial, labels, task, settings, method)
    return row, curve


def _our_part(
    ops: ModuleType,
    logits: Tensor,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    task: Task,
    settings: DemoSettings,
    method: str,
) -> float:
    """Milliseconds of what a step does besides the network: from logits to their gradient, and the step itself."""
    config = AttackSettings.create(
        method=method, eps=settings.eps, steps=settings.steps + 3, ignore_index=task.ignore_index
    )
    state = methods.create(config, ops, labels, methods.GradientBuffer())
    moved, gradient = adversarial.clone(), adversarial - images
    times = []
    # The first steps are not like the others: memory is new, and the front's width is not measured yet.
    for step in range(2 if settings.quick else 6):
        _wait(images.device)
        start = time.perf_counter()
        state.gradient(logits, step)
        ops.linf_step_(moved, images, gradient, config.eps, config.alpha)
        _wait(images.device)
        times.append(1000 * (time.perf_counter() - start))
    return median(times[1:])


def table(unattacked: dict[str, float], results: dict[str, dict[str, float | None]]) -> list[str]:
    """The lines of the demo's table, aligned for reading."""
    head = ("method", "mIoU %", "pixel acc. %", "s/step", "ours: fused ms", "reference ms", "speed-up")
    rows = [head, ("none", f"{unattacked['miou']:.1f}", f"{unattacked['accuracy']:.1f}", "", "", "", "")]
    for method, row in results.items():
        fused, plain = row["fused_ms"], row["reference_ms"]
        assert plain is not None
        timed = (
            ("-", f"{plain:.1f}", "-") if fused is None else (f"{fused:.2f}", f"{plain:.1f}", f"{plain / fused:.0f}x")
        )
        rows.append((method, f"{row['miou']:.1f}", f"{row['accuracy']:.1f}", f"{row['seconds_per_step']:.3f}", *timed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _story(model: nn.Module, image: Tensor, labels: Tensor, task: Task, settings: DemoSettings) -> plots.Story:
    """Attacks one image [1, 3, H, W] with eroseg and keeps what a picture of it needs."""
    shown = sorted({round(i * (settings.steps - 1) / 3) for i in range(4)})
    config = AttackSettings(eps=settings.eps, steps=settings.steps, ignore_index=task.ignore_index)
    fronts: list[tuple[int, Tensor]] = []

    def keep_front(info: StepInfo) -> None:
        if info.step in shown and info.tau is not None:
            fronts.append((info.step, front_weight(info.logits, labels, info.tau, config)[0].cpu()))

    adversarial = attack(
        model,
        image,
        labels,
        eps=settings.eps,
        steps=settings.steps,
        ignore_index=task.ignore_index,
        generator=torch.Generator().manual_seed(settings.seed),
        callback=keep_front,
    )
    with torch.no_grad():
        before, after = model(image), model(adversarial)
    valid = labels != task.ignore_index
    return plots.Story(
        image=image[0].cpu(),
        adversarial=adversarial[0].cpu(),
        labels=labels[0].where(valid[0], -1).cpu(),
        before=before.argmax(1)[0].cpu(),
        after=after.argmax(1)[0].cpu(),
        confidence=tuple(
            reference.confidence(logits, labels, ignore_index=task.ignore_index)[0].cpu() for logits in (before, after)
        ),
        fronts=fronts,
        eps=settings.eps,
        steps=settings.steps,
        classes=task.classes,
        palette=task.palette,
    )


def front_weight(logits: Tensor, labels: Tensor, tau: Tensor, settings: AttackSettings) -> Tensor:
    """How much each pixel counts in a step of eroseg with the default front.

    Args:
        logits: [B, C, H, W] of the step.
        labels: [B, H, W] int64.
        tau: [B] width of the step's front.
        settings: of the attack; ``front``, ``radius``, ``slope`` and ``ignore_index`` are used.

    Returns:
        [B, H, W] float32 in [0, 1], NaN on void pixels.
    """
    confidence = reference.confidence(logits, labels, ignore_index=settings.ignore_index)
    valid = labels != settings.ignore_index
    eroded = reference.erode(confidence, valid, settings.radius, settings.slope * tau)
    return reference.front_weight(eroded, tau, settings.front).where(valid, math.nan)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def command(settings: DemoSettings, output: Output) -> None:
    """Trains a small network for about a minute on scenes it draws (or on --data), attacks it with every method at
    equal budget, prints a table and writes pictures."""
    settings = replace(settings, progress=sys.stderr.isatty())
    output.write(run(settings, say=lambda line: print(line, flush=True)))
