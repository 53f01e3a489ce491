"""Models that are attacked: random weights for speed, a trained light net for strength. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from eroseg_ext.cli import demo
from eroseg_ext.models.small_deeplab import SmallDeepLab


def upernet(classes: int) -> nn.Module:
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(backbone_config=backbone, num_labels=classes, use_auxiliary_head=False)
    return UperNetForSemanticSegmentation(config)


def segformer(classes: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=classes))


def deeplab(classes: int) -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "SmallDeepLab, 1.06 M parameters": SmallDeepLab,
    "transformers UPerNet, ResNet-50": upernet,
    "transformers SegFormer-B0": segformer,
    "torchvision DeepLabV3-MobileNet": deeplab,
}


def build(name: str, classes: int, device: torch.device) -> nn.Module:
    """The model in eval mode on the device, the same random weights every time; ImportError if it is not installed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name](classes)
    return model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


@cache
def trained(quick: bool, device: torch.device) -> tuple[nn.Module, demo.DemoData]:
    """The demo's network, trained on its scenes: only on such one does the strength of an attack mean anything."""
    data = demo.load_data(demo.DemoSettings(quick=quick))
    return demo.train(data, 150 if quick else 600, 0, device), data
