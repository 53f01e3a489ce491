"""Volumes ``[B, K, D, H, W]``, attacked as images ``[B, K, D * H, W]``: their slices one below the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.models.adapter import Logits, Model
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops import reference
from eroseg_ext.ops.protocol import Operations
from eroseg_ext.utils.validate import require


def check(images: Tensor, labels: Tensor | None, mask: Tensor | None, config: AttackSettings) -> None:
    """Raises ValueError for labels or a mask that are not a volume's, or a setting that is of images alone."""
    batch, _, *size = images.shape
    for name, value, wanted in (("labels", labels, [batch, *size]), ("mask", mask, [batch, 1, *size])):
        if isinstance(value, Tensor) and list(value.shape) != wanted:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, wanted {wanted} to go with images {list(images.shape)}"
            )
    for setting, came, needed in (("within", config.within, "any"), ("window", config.window, None)):
        require(came == needed, setting, came, f"{needed!r} for volumes, images of shape {list(images.shape)}")


def of_slices(model: Model, depth: int) -> Model:
    """The model of volumes as one of images; tensors ``[B, C, d, h, w]`` in its output become those of images."""

    def model_of_slices(images: Tensor) -> Any:
        volumes = images.unflatten(2, (depth, -1))

        def flat(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() != 5:
                return value
            if value.shape[2:] != volumes.shape[2:]:
                value = F.interpolate(value, size=volumes.shape[2:], mode="trilinear")
            return value.flatten(2, 3)

        return tree_map(flat, model(volumes))

    return model_of_slices


def reader(model: Model, make: Callable[[Model], Logits]) -> Callable[[Tensor], LogitMap]:
    """``images or volumes -> logits``, of volumes as of images; ``make`` is called with the model of images."""
    of_depth = functools.cache(lambda depth: make(of_slices(model, depth) if depth else model))

    def logits(images: Tensor) -> LogitMap:
        depth = images.shape[2] if images.dim() == 5 else 0
        images = images.flatten(2, -2)
        found: LogitMap = of_depth(depth)(images, (images.shape[-2], images.shape[-1]))
        return found

    return logits


def operations(depth: int) -> Operations:
    """The reference, whose erosion goes over three dimensions."""
    erosion_grad = functools.partial(reference.erosion_grad, depth=depth)
    return cast("Operations", SimpleNamespace(**{**vars(reference), "erosion_grad": erosion_grad}))
