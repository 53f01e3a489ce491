"""``eroseg demo``: train a small network, attack it with every method, tell and draw what happened."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import eroseg_ext
from eroseg_ext import AttackSettings, StepInfo, attack
from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.cli.options import Output
from eroseg_ext.data.reading import evenly_spaced, one_class
from eroseg_ext.data.scenes import IGNORE_INDEX, generated_scenes
from eroseg_ext.data.sources import SegmentationFolder
from eroseg_ext.evaluation.metrics import miou_and_accuracy
from eroseg_ext.models.small_deeplab import DEMO_WIDTH, SmallDeepLab
from eroseg_ext.ops import backend, reference
from eroseg_ext.utils import plots
from eroseg_ext.utils.validate import check_integer, require, usable_device

ORDER = (*(name for name in METHODS if name != "eroseg"), "eroseg")
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
    """half a minute instead of some minutes: smaller images, less training"""
    seed: int = 0
    """of the scenes, the network and the random starts"""
    eps: float = 2 / 255
    """l_inf budget of every method"""
    steps: int = 10
    """of each attack"""
    train_steps: int | None = None
    """updates, rounded to whole epochs; default 600, quick 400"""
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


class DemoData(NamedTuple):
    """Images float32 [N, 3, H, W] in [0, 1] and labels int64 [N, H, W], to train and to test on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int


def run(settings: DemoSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the whole demo; ``say`` is told every finished part and the table, a line at a time.

    Returns:
        Everything told and more, as plain values: ``settings``, ``environment``, ``task``, ``training``,
        ``unattacked``, ``methods`` (by name: miou, accuracy, seconds_per_step, fused_ms, reference_ms) and
        ``pictures``.

    Raises:
        ValueError, OSError: the data or a setting is wrong, or ``out`` cannot be written; one sentence.
    """
    device = usable_device(settings.device)
    settings.out.mkdir(parents=True, exist_ok=True)
    data = load_data(settings)
    images, labels = data.test_images.to(device), data.test_labels.to(device)
    size = list(images.shape[-2:])
    count, where = len(data.train_images), settings.data and f"images of {settings.data}"
    say(
        f"{count} {where or 'drawn scenes'} to train on, {len(images)} to test on, {len(data.classes)} classes, "
        f"{size[0]}x{size[1]} pixels"
    )
    start, updates = time.perf_counter(), settings.train_steps or (400 if settings.quick else 600)
    model = train(data, updates, settings.seed, device, settings.progress)
    training = {"steps": updates, "seconds": time.perf_counter() - start}
    training["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    unattacked = evaluate(model, images, labels, data)
    say(
        f"trained {training['parameters']:,} parameters for {updates} updates in {training['seconds']:.0f} s: "
        f"mIoU {unattacked['miou']:.1f} %, pixel accuracy {unattacked['accuracy']:.1f} %"
    )
    results, curves = {}, {}
    for method in ORDER:
        results[method], curves[method] = _attacked(model, images, labels, data, settings, method)
    say(f"\nevery method with eps {settings.eps * 255:.3g}/255, {settings.steps} steps of eps/4, random start")
    for line in table(unattacked, results):
        say(line)
    if why_not := backend.why_not_fused(device):
        say(f"no fused kernels: {why_not}")

    files = [settings.out / "accuracy.png"]
    plots.accuracy_curves(files[0], curves, len(images))
    for index in evenly_spaced(len(images), 1 if settings.quick else 4):
        files.append(settings.out / f"example-{len(files)}.png")
        _draw(files[-1], model, images[index, None], labels[index, None], data, settings)
    say(f"\npictures: {', '.join(map(str, files))}")
    told = {"data": settings.data and str(settings.data), "ignore_index": data.ignore_index, "size": size}
    return {
        "settings": told | {name: getattr(settings, name) for name in ("quick", "seed", "eps", "steps")},
        "environment": {**backend.report(), "device": str(device)},
        "task": {"train": count, "test": len(images), "classes": list(data.classes)},
        "training": training,
        "unattacked": unattacked,
        "methods": results,
        "pictures": [str(file) for file in files],
    }


def load_data(settings: DemoSettings) -> DemoData:
    """The images and labels that the settings name, every fifth of a folder (16 at most) held back to test on."""
    size = settings.size or ((72, 96) if settings.quick else (144, 192))
    trained, tested = 96 if settings.quick else 160, 16
    if settings.data is None:
        images, labels, classes, palette = generated_scenes(tested + trained, size, settings.seed)
        return DemoData(
            images[tested:], labels[tested:], images[:tested], labels[:tested], classes, palette, IGNORE_INDEX
        )
    folder = SegmentationFolder(settings.data, size)
    if len(folder) < 2:
        raise ValueError(f"{settings.data} holds {len(folder)} image, wanted at least 2: to train on and to test on")
    held_back = max(1, min(len(folder) // 5, tested))
    test = sorted({int((i + 0.5) * len(folder) / held_back) for i in range(held_back)})
    rest = [index for index in range(len(folder)) if index not in test]
    if settings.quick:
        rest = rest[:: max(1, len(rest) // trained)]
    train_images, train_labels = folder.load(rest)
    test_images, test_labels = folder.load(test)
    count = _count_classes(settings, train_labels, test_labels)
    names = settings.class_names or tuple(f"class {index}" for index in range(count))
    if len(names) < count:
        raise ValueError(f"class_names has {len(names)} names, wanted {count}: labels go up to {count - 1}")
    colours = plots.distinct_colours(len(names))
    return DemoData(train_images, train_labels, test_images, test_labels, names, colours, settings.ignore_index)


def _count_classes(settings: DemoSettings, *labels: Tensor) -> int:
    values = torch.cat([part.unique() for part in labels]).unique()
    values = values[values != settings.ignore_index]
    if len(values) == 0:
        raise ValueError(f"{settings.data} has no pixel with a label other than ignore_index {settings.ignore_index}")
    if told := one_class(values.tolist(), ()):
        raise ValueError(f"{settings.data}: {told} beside ignore_index {settings.ignore_index}, wanted at least two")
    if values[-1] >= MAX_CLASSES:
        raise ValueError(
            f"labels of {settings.data} go up to {values[-1]}, wanted class indices below {MAX_CLASSES}, and void as "
            f"ignore_index {settings.ignore_index}"
        )
    return int(values[-1]) + 1


def train(data: DemoData, steps: int, seed: int, device: torch.device, progress: bool = False) -> SmallDeepLab:
    """Trains a small network with :func:`eroseg_ext.train`, on clean images, for about so many updates of 8 images.

    The updates are rounded to whole epochs. Returns the network in eval mode, on the device, in channels_last.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallDeepLab(len(data.classes), DEMO_WIDTH)
    batch = min(BATCH, len(data.train_images))
    updates = min(steps, len(data.train_images) // batch)
    void = 2**16 - 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("images", "labels"):
            (folder / kind).mkdir()
        for index in range(updates * batch):
            pixels = (data.train_images[index].permute(1, 2, 0) * 255).round().byte().numpy()
            labels = data.train_labels[index].where(data.train_labels[index] != data.ignore_index, void).numpy()
            Image.fromarray(pixels).save(folder / "images" / f"{index:05}.png", compress_level=1)
            Image.fromarray(labels.astype(np.uint16)).save(folder / "labels" / f"{index:05}.png", compress_level=1)
        eroseg_ext.train(
            model,
            say=lambda line: None,
            data=folder,
            out=folder / "run",
            classes=len(data.classes),
            ignore_index=void,
            epochs=max(round(steps / updates), 1),
            batch_size=batch,
            learning_rate=5e-3,
            scale=(0.8, 1.25),
            attack="none",
            cache=True,
            checkpoint_every=steps,
            seed=seed,
            device=str(device),
            progress=progress,
        )
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, data: DemoData) -> dict[str, float]:
    """Scores of the network over images [N, 3, H, W] with labels [N, H, W], as :func:`miou_and_accuracy` gives them."""
    ops = backend.select(images.device)
    matrix = ops.confusion(model(images), labels, len(data.classes), ignore_index=data.ignore_index)
    return miou_and_accuracy(matrix)


def _attack(model: Any, images: Tensor, labels: Tensor, data: DemoData, settings: DemoSettings, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(settings.seed)
    options: dict[str, Any] = {"eps": settings.eps, "steps": settings.steps, "ignore_index": data.ignore_index}
    return attack(model, images, labels, **{**options, "generator": generator, **more})


def _attacked(
    model: nn.Module, images: Tensor, labels: Tensor, data: DemoData, settings: DemoSettings, method: str
) -> tuple[dict[str, float | None], list[float]]:
    """One method's row of the table, and the pixel accuracy in percent before every step and at the end."""
    start = time.perf_counter()
    more = {"method": method, "progress": settings.progress, "return_info": True}
    adversarial, info = _attack(model, images, labels, data, settings, **more)
    row: dict[str, float | None] = {"seconds_per_step": (time.perf_counter() - start) / settings.steps}
    counts = info.stats[0].sum(1)
    curve = [*(100 * counts[:, 1] / counts[:, 0]).tolist(), 100 * info.correct.sum().item() / info.valid.sum().item()]
    row |= evaluate(model, adversarial, labels, data)
    with torch.no_grad():
        known = known_logits(model(adversarial))

    def our_part(backend: str) -> float:
        """Milliseconds of a step besides the network, from two attacks that differ in the number of steps."""
        seconds = []
        for steps in (1, 2, 6):  # the first loads what is needed
            start = time.perf_counter()
            _attack(known, images, labels, data, settings, method=method, backend=backend, steps=steps)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds.append(time.perf_counter() - start)
        return max(1000 * (seconds[2] - seconds[1]) / 4, 1e-3)

    row["fused_ms"] = None if backend.why_not_fused(images.device) else our_part("fused")
    row["reference_ms"] = our_part("reference")
    return row, curve


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def known_logits(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """A network that costs nothing: it has these logits, and the images themselves as gradient."""
    return lambda images: _Known.apply(images, logits)


def table(unattacked: dict[str, float], results: dict[str, dict[str, float | None]]) -> list[str]:
    """The lines of the demo's table, aligned for reading."""
    head = ("method", "mIoU %", "pixel acc. %", "s/step", "ours: fused ms", "reference ms", "speed-up")
    rows = [head, tuple("-" * len(name) for name in head)]
    rows.append(("none", f"{unattacked['miou']:.1f}", f"{unattacked['accuracy']:.1f}", "", "", "", ""))
    for method, row in results.items():
        fused, plain = row["fused_ms"], row["reference_ms"]
        assert plain is not None
        timed = ("-", f"{plain:.1f}", "-")
        if fused is not None:
            timed = (f"{fused:.2f}", f"{plain:.1f}", f"{plain / fused:.0f}x")
        rows.append((method, f"{row['miou']:.1f}", f"{row['accuracy']:.1f}", f"{row['seconds_per_step']:.3f}", *timed))
    return ["{:8}{:>8}{:>14}{:>8}{:>16}{:>14}{:>10}".format(*row).rstrip() for row in rows]


def _draw(path: Path, model: nn.Module, image: Tensor, labels: Tensor, data: DemoData, settings: DemoSettings) -> None:
    """Attacks one image [1, 3, H, W] with eroseg and draws what happens."""
    shown = sorted({round(i * (settings.steps - 1) / 3) for i in range(4)})
    config = AttackSettings(eps=settings.eps, steps=settings.steps, ignore_index=data.ignore_index)
    valid = labels != data.ignore_index
    fronts: list[tuple[int, Tensor]] = []

    def confidence(logits: Tensor) -> Tensor:
        return reference.confidence(logits, labels, ignore_index=data.ignore_index)

    def keep_front(info: StepInfo) -> None:
        if info.step in shown and info.tau is not None:
            eroded = reference.erode(confidence(info.logits), valid, config.radius, config.slope * info.tau)
            weight = reference.front_weight(eroded, info.tau, config.front).where(valid, math.nan)
            fronts.append((info.step, weight[0].cpu()))

    adversarial = _attack(model, image, labels, data, settings, callback=keep_front)
    with torch.no_grad():
        before, after = model(image), model(adversarial)
    parts = (image, labels.where(valid, -1), before.argmax(1), adversarial, after.argmax(1))
    plots.attack_panel(
        path,
        plots.Example(*(part[0].cpu() for part in parts)),
        [confidence(logits)[0].cpu() for logits in (before, after)],
        fronts,
        eps=settings.eps,
        steps=settings.steps,
        classes=data.classes,
        palette=data.palette,
    )


def command(settings: DemoSettings, output: Output) -> None:
    """Trains a small network for some minutes on scenes it draws (or on --data), attacks it with every method at
    equal budget, prints a table and writes pictures."""
    settings = replace(settings, progress=sys.stderr.isatty())
    output.write(run(settings, say=lambda line: print(line, flush=True)))
