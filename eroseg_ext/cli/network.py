"""The options that name a model, and the model that they name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eroseg_ext.models.loading import load_network
from eroseg_ext.utils.validate import check_choice, check_integer, usable_device

_AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model and how it is run."""

    model: str | None = None
    """``small``, ``tiny``, ``package.module:callable``, ``file.py:callable``, a folder that transformers or
    segmentation_models_pytorch saved a model to, or the name of one of theirs or torchvision's models; default:
    built-in, as the weights tell"""
    model_args: Mapping[str, Any] | None = None
    """keywords for it, such as {"num_classes": 21}"""
    weights: Path | None = field(default=None, metadata={"aliases": ["--checkpoint"]})
    """file with a state dict, or with one anywhere in it, also in safetensors' format"""
    classes: int | None = None
    """of the model; default: as --dataset or the weights tell"""
    amp: str = "none"
    """autocast of the model: ``none``, ``bf16`` or ``fp16``"""
    device: str | None = None
    """default: cuda if there is one, else cpu"""

    def __post_init__(self) -> None:
        check_choice("amp", self.amp, tuple(_AUTOCAST))
        if self.classes is not None:
            check_integer("classes", self.classes, 1, 2**15 - 1)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that ``amp`` names."""
        return _AUTOCAST[self.amp]

    def load(self, classes: int | None) -> nn.Module:
        """The model on its device, of so many classes unless ``classes`` says otherwise."""
        rank = os.environ.get("LOCAL_RANK")  # of torchrun, a GPU for each process
        device = usable_device(self.device, gpu=None if rank is None else int(rank))
        model = load_network(self.model, self.weights, classes=self.classes or classes, model_args=self.model_args)
        return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
