"""Checks of what a user passes to an attack: one sentence that names the argument, before any work is done."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from eroseg_ext.settings import AttackSettings

LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)
IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(images: Tensor, labels: Tensor | None, mask: Tensor | None, config: AttackSettings) -> None:
    """Checks everything that can be known without running the model; raises ValueError or TypeError."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}, wanted a tensor [B, K, H, W]")
    if images.dim() != 4:
        raise ValueError(f"images has shape {list(images.shape)}, wanted [B, K, H, W]")
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(
            f"images is {images.dtype}, wanted float32, float16 or bfloat16 in the range clip={config.clip}"
        )
    if config.graph and images.device.type != "cuda":
        raise ValueError(f"graph is True and images is on {images.device}, wanted images on a CUDA device")
    batch, channels, height, width = images.shape
    if labels is not None:
        _check_map("labels", labels, images, [batch, height, width])
        if labels.dtype not in LABEL_DTYPES:
            raise TypeError(f"labels is {labels.dtype}, wanted class indices as int64, int32 or uint8")
    elif config.targeted:
        raise ValueError("labels is None, wanted the target classes [B, H, W] since targeted=True")
    if mask is not None:
        _check_map("mask", mask, images, [batch, 1, height, width])
        if mask.dtype != torch.bool:
            raise TypeError(f"mask is {mask.dtype}, wanted bool")
    if config.mean is not None and len(config.mean) not in (1, channels):
        raise ValueError(f"mean has {len(config.mean)} numbers, wanted {channels}, one per channel of images")
    _check_range(images, config.clip)


def _check_map(name: str, value: object, images: Tensor, shape: list[int]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, wanted a tensor of shape {shape}")
    if list(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, wanted {shape} to go with images {list(images.shape)}")
    if value.device != images.device:
        raise ValueError(f"{name} is on {value.device}, wanted {images.device} as images")


def _check_range(images: Tensor, clip: tuple[float, float]) -> None:
    if images.numel() == 0:
        return
    low, high = (float(value) for value in images.detach().aminmax())
    # The range's ends need not be representable in the images' dtype.
    slack = torch.finfo(images.dtype).eps * max(abs(clip[0]), abs(clip[1]))
    if not (clip[0] - slack <= low and high <= clip[1] + slack):
        raise ValueError(
            f"images has values from {low:.6g} to {high:.6g}, wanted them within clip={tuple(clip)}: pass unnormalised "
            "images with mean= and std=, or another clip"
        )


def check_first_logits(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Checks what only a forward pass tells: labels against the number of classes, and what the logits look like.

    Args:
        logits: ``[b, C, H, W]`` of the first images, detached.
        labels: ``[B, H, W]`` of all of them.
        ignore_index: the label of void pixels.

    Raises:
        ValueError: a label is neither a class nor ``ignore_index``.

    Warns:
        UserWarning: the output looks like probabilities, whose gradients vanish where logits' do not.
    """
    if logits.numel() == 0:
        return
    classes = max(logits.shape[1], 2)
    index = labels.long()
    low, high = (int(value) for value in index.where(index != ignore_index, 0).aminmax())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"labels has the value {wrong}, wanted classes from 0 to {classes - 1} or ignore_index={ignore_index}"
        )
    first = logits[:1]
    sums = first.sum(1, dtype=torch.float32)
    if logits.shape[1] > 1 and float(first.amin()) >= 0 and float((sums - 1).abs().max()) < 1e-2:
        warnings.warn(
            "the model's output looks like probabilities (every pixel's classes sum to 1), wanted logits: remove the "
            "model's softmax, or the attack is weaker than it could be",
            UserWarning,
            stacklevel=6,
        )
