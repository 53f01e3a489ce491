"""Models that are attacked: random weights for speed, a trained light net for strength. Nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bench import ROOT
from bench.cases import Unavailable
from eroseg_ext.cli import demo
from eroseg_ext.models.small_deeplab import DEMO_WIDTH, SmallDeepLab
from eroseg_ext.utils.atomic_files import write_tensors


class Built(NamedTuple):
    """A model and what to call it."""

    model: nn.Module
    description: str


def light(classes: int) -> Built:
    """The package's own small DeepLab."""
    return Built(SmallDeepLab(classes), "SmallDeepLab, 1.06 M parameters")


def resnet50(classes: int) -> Built:
    """DeepLabV3 of torchvision, or where that cannot be had, UPerNet of transformers on the same backbone."""
    try:
        from torchvision.models.segmentation import deeplabv3_resnet50
    except (ImportError, RuntimeError) as error:  # a build for another torch raises RuntimeError
        why = str(error).splitlines()[0]
    else:
        built = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=classes)
        return Built(built, "torchvision deeplabv3_resnet50")
    try:
        from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation
    except ImportError as error:
        raise Unavailable(f"neither torchvision ({why}) nor transformers ({error}) can be imported") from error
    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(backbone_config=backbone, num_labels=classes, use_auxiliary_head=False)
    return Built(UperNetForSemanticSegmentation(config), "transformers UPerNet, ResNet-50")


def segformer(classes: int) -> Built:
    """SegFormer-B0 of transformers."""
    try:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error})") from error
    return Built(SegformerForSemanticSegmentation(SegformerConfig(num_labels=classes)), "transformers SegFormer-B0")


MODELS: dict[str, Callable[[int], Built]] = {"light": light, "resnet50": resnet50, "segformer": segformer}


def build(name: str, classes: int, device: torch.device) -> Built:
    """The model in eval mode on the device, the same random weights every time; raises Unavailable with the reason."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, description = MODELS[name](classes)
    return Built(model.to(device).to(memory_format=torch.channels_last).eval(), description)  # type: ignore[call-overload]


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
