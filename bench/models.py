"""Models that are attacked: random weights for speed, a trained light net for strength. Nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bench import ROOT
from eroseg_ext.cli import demo
from eroseg_ext.models.small_deeplab import DEMO_WIDTH, SmallDeepLab
from eroseg_ext.utils.atomic_files import write_tensors


def upernet(classes: int) -> nn.Module:
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(backbone_config=backbone, num_labels=classes, use_auxiliary_head=False)
    return UperNetForSemanticSegmentation(config)


def segformer(classes: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=classes))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "SmallDeepLab, 1.06 M parameters": SmallDeepLab,
    "transformers UPerNet, ResNet-50": upernet,
    "transformers SegFormer-B0": segformer,
}


def build(name: str, classes: int, device: torch.device) -> nn.Module:
    """The model in eval mode on the device, the same random weights every time; ImportError if it is not installed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name](classes)
    return model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


class Trained(NamedTuple):
    """A network that knows its task: only on such one does the strength of an attack mean anything."""

    model: nn.Module
    task: demo.Task


def trained(quick: bool, device: torch.device, cache: Path) -> Trained:
    """The demo's network trained on the demo's scenes; ``cache`` keeps its weights, named after what made them."""
    task = demo.load_task(demo.DemoSettings(quick=quick))
    sources = b"".join(
        (ROOT / "eroseg_ext" / name).read_bytes()
        for name in ("models/small_deeplab.py", "cli/demo.py", "data/scenes.py")
    )
    path = cache / f"{hashlib.sha256(sources).hexdigest()[:12]}-{quick}.pt"
    if path.is_file():
        model = SmallDeepLab(len(task.classes), DEMO_WIDTH)
        model.load_state_dict(torch.load(path, weights_only=True))
        return Trained(model.to(device).to(memory_format=torch.channels_last).eval(), task)  # type: ignore[call-overload]
    model = demo.train(task, 150 if quick else 600, 0, device)
    write_tensors(path, model.state_dict())
    return Trained(model, task)
