"""``eroseg attack``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eroseg_ext import AttackSettings, save_adversarial
from eroseg_ext.attacks import pgd
from eroseg_ext.cli.network import Network
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.reading import evenly_spaced
from eroseg_ext.data.sources import Reading
from eroseg_ext.utils.atomic_files import locked
from eroseg_ext.utils.validate import check_integer


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What is attacked, and how."""

    data: Path
    """folder with ``images/NAME.*`` and ``labels/NAME.png``, or of a data set as its publisher packs it"""
    out: Path
    """folder for NAME.png of each image, and attack.json with the settings; made if missing"""
    images: int | None = None
    """attack so many evenly spaced images; default: all"""
    batch_size: int = 8
    """images attacked at once, where --size makes them of one size"""
    seed: int = 0
    """of the random starts"""

    method: str = AttackSettings.method
    """``eroseg``, ``pgd``, ``segpgd``, ``cospgd``, ``mce``, ``mce_bal``, ``js`` or ``tsallis``"""
    eps: float = AttackSettings.eps
    """radius of the ball in pixel values"""
    steps: int = AttackSettings.steps
    """gradients per restart"""
    restarts: int = AttackSettings.restarts
    """independent runs; each image keeps its best one"""
    norm: str = AttackSettings.norm
    """of the ball: ``linf`` or ``l2``"""
    mean: tuple[float, ...] | None = None
    """with std: the model is given (image - mean) / std, per channel"""
    std: tuple[float, ...] | None = None
    """with mean"""
    output: str = AttackSettings.output
    """what the model returns: ``logits``, ``probabilities`` (of a softmax) or scores of a ``sigmoid``"""
    output_key: int | str | None = None
    """which entry of the model's output are the logits, where it returns several: a number or a name"""
    window: int | tuple[int, int] | None = None
    """give the model no more of an image at once than this, and average its logits where windows overlap"""
    stride: int | tuple[int, int] | None = None
    """with window: distance of two windows; default 3/4 of the window"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """further keywords of :func:`eroseg_ext.attack`, such as {"keep": "best"}"""

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seed", self.seed, 0, 2**63 - 1)
        if self.images is not None:
            check_integer("images", self.images, 1)


def command(attacked: Attacked, network: Network, reading: Reading) -> None:
    """Attacks images and writes them as 8-bit PNGs inside the ball, with the settings of the attack beside them, for
    other models to be evaluated on: eroseg evaluate --adversarial."""
    names = ("method", "eps", "steps", "restarts", "norm", "mean", "std", "output", "output_key", "window", "stride")
    given = {name: getattr(attacked, name) for name in names}
    given |= {"autocast": network.autocast, "ignore_index": VOID, "quantize": True, **attacked.options}
    config = AttackSettings.create(**given)
    source = reading.source(attacked.data, "val")
    model = network.load(None if source.to_class is None else source.to_class.classes)
    to_class = source.to_class or reading.class_map()
    device = next((kept.device for kept in model.parameters()), torch.device("cpu"))
    indices = evenly_spaced(len(source), attacked.images)
    stems = [source.stem(index) for index in indices]
    if len(set(stems)) < len(stems):
        raise ValueError(f"data {attacked.data} has images of one name in several folders, wanted different names")
    attacked.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device)
    generator.manual_seed(attacked.seed)
    size = 1 if source.size is None else attacked.batch_size
    with locked(attacked.out), tqdm(total=len(indices), unit="image", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(indices), size):
            read = [source.read(index) for index in indices[start : start + size]]
            labels = [
                to_class(values, source.where(indices[start + n])[1]).long() for n, (_, values) in enumerate(read)
            ]
            images = torch.stack([image for image, _ in read]).to(device) / 255
            part = slice(start, start + size)
            loop = pgd.Loop(
                config, model, images, torch.stack(labels).to(device), indices=indices[part], generator=generator
            )
            save_adversarial(attacked.out, loop.run()[0], images, names=stems[part], **given)
            bar.update(len(read))
    print(f"{len(indices)} images and attack.json are in {attacked.out}")
