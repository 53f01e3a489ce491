"""Checks of what a user passes to an attack: one sentence that names the argument, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eroseg_ext.attacks.ball import HALVES
from eroseg_ext.attacks.settings import AttackSettings, check_below_range
from eroseg_ext.models.outputs import DTYPES
from eroseg_ext.utils.validate import warn

LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)


def check(images: Tensor, labels: Tensor | None, mask: Tensor | None, config: AttackSettings) -> None:
    """Checks everything that can be known without running the model; raises ValueError or TypeError."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}, wanted a tensor [B, K, H, W]")
    if images.dim() != 4:
        raise ValueError(f"images has shape {list(images.shape)}, wanted [B, K, H, W]")
    if images.dtype not in DTYPES:
        raise TypeError(
            f"images is {images.dtype}, wanted float32, float64, float16 or bfloat16 in the range clip={config.clip}"
        )
    if config.graph and images.device.type != "cuda":
        raise ValueError(f"graph is True and images is on {images.device}, wanted images on a CUDA device")
    batch, channels, height, width = images.shape
    if labels is not None:
        size = (height, width) if not config.own_label_size else getattr(labels, "shape", ())[-2:]
        _check_map("labels", labels, images, [batch, *size])
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
    if config.images_are_normalized and images.dtype in HALVES:
        raise TypeError(f"images is {images.dtype}, wanted float32 or float64 since images_are_normalized is True")
    images = pixel_values(images, config)
    _check_range(images, config)
    if config.quantize:
        check_8_bits("images", images, config.clip)
    _check_lengths(images, config)
    _warn_of_spacing(images, config)


def pixel_values(images: Tensor, config: AttackSettings) -> Tensor:
    """``images`` as they are, or, where they are normalised, without that; see :func:`normalized`."""
    if not config.images_are_normalized:
        return images
    mean, std = (images.new_tensor(value).view(1, -1, 1, 1) for value in (config.mean, config.std))
    values = images * std + mean
    # Black and white pixels need not be quite that after both roundings.
    nearest = values.clamp(*config.clip)
    return torch.where((values - nearest).abs() < 1e-5 * config.range, nearest, values)


def normalized(pixels: Tensor, images: Tensor, config: AttackSettings) -> Tensor:
    """The inverse of :func:`pixel_values`; where ``pixels`` are those of ``images``, it is these bit for bit."""
    if not config.images_are_normalized:
        return pixels
    mean, std = (pixels.new_tensor(value).view(1, -1, 1, 1) for value in (config.mean, config.std))
    return torch.where(pixels == pixel_values(images, config), images, (pixels - mean) / std)


def _check_map(name: str, value: object, images: Tensor, shape: list[int]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, wanted a tensor of shape {shape}")
    if name == "labels" and value.dim() == images.dim() and value.shape[1] > 1 and value.shape[2:] == images.shape[2:]:
        raise ValueError(
            f"labels has shape {list(value.shape)}, a map for each class, wanted one class for each pixel, {shape}: "
            "labels.argmax(1) of one-hot labels; where a pixel may have several classes attack one of them, c, with "
            "labels[:, c] and logits=lambda output: output[:, c : c + 1]"
        )
    if list(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, wanted {shape} to go with images {list(images.shape)}")
    if value.device != images.device:
        raise ValueError(f"{name} is on {value.device}, wanted {images.device} as images")


def _check_range(images: Tensor, config: AttackSettings) -> None:
    clip = config.clip
    if images.numel() == 0:
        return
    low, high = (float(value) for value in images.detach().aminmax())
    # The range's ends need not be representable in the images' dtype.
    slack = torch.finfo(images.dtype).eps * max(abs(clip[0]), abs(clip[1]))
    if not (clip[0] - slack <= low and high <= clip[1] + slack):
        name = "images"
        hint = "pass mean= and std=, and unnormalised images or images_are_normalized=True, or another clip"
        if config.images_are_normalized:
            name, hint = "images * std + mean", "are images normalised by this mean and std?"
        came = f"{name} has values from {low:.6g} to {high:.6g}"
        raise ValueError(f"{came}, wanted them within clip={tuple(clip)}: {hint}")
    if 0 < high - low <= (clip[1] - clip[0]) / 255:
        warn(
            f"images has values from {low:.6g} to {high:.6g}, a 255th of the range of clip={tuple(clip)} at most: are "
            "images in the units of clip, which eps is in too?"
        )


def check_8_bits(name: str, images: Tensor, clip: tuple[float, float]) -> None:
    """Raises ValueError or TypeError unless images are float32 or float64 and 255ths of the range of ``clip``."""
    if images.dtype in HALVES:
        raise TypeError(f"{name} is {images.dtype}, wanted float32 since quantize is True")
    levels = (images.detach() - clip[0]) * (255 / (clip[1] - clip[0]))
    if bool(((levels - levels.round()).abs() > 1e-3).any()):
        raise ValueError(
            f"{name} has values between the 255ths of the range of clip={tuple(clip)}, wanted 8-bit images: round them "
            "to 255ths first"
        )


def _check_lengths(images: Tensor, config: AttackSettings) -> None:
    """Finds lengths in other units than the images'; in l_inf, settings have refused those beyond clip's range."""
    extent, what = config.range, f"the range of clip={tuple(config.clip)}"
    if config.norm == "l2":
        extent *= images[:1].numel() ** 0.5
        what = f"the l_2 norm of {what} over an image"
    if len(images) == 0 or extent == 0:
        return
    for name in ("eps", "step_size"):
        value = getattr(config, name)
        check_below_range(name, value, extent, what)
        if value is not None and value > extent / 2:
            warn(f"{name} is {value:g}, more than half of {extent:.6g}, {what}: is it in the units of images?")


def _warn_of_spacing(images: Tensor, config: AttackSettings) -> None:
    """In a half type, a ball smaller than the distance between two values holds hardly more than the clean image."""
    per_pixel = config.eps if config.norm == "linf" else config.eps / math.sqrt(max(images[:1].numel(), 1))
    spacing = torch.finfo(images.dtype).eps / 2 * max(map(abs, config.clip))
    if images.dtype in HALVES and 0 < per_pixel < spacing:
        warn(
            f"images is {images.dtype}, whose values are up to {spacing:.2g} apart, wanted float32: rounding leaves "
            f"little of a perturbation of eps={config.eps:.2g}"
        )


NARROW_VOID = 255


def narrowed(labels: Tensor, ignore_index: int) -> tuple[Tensor, int, int]:
    """Labels in the smallest type that holds them, the ``ignore_index`` of these, and the largest class among them.

    Every step reads the labels: as uint8, with void pixels 255, they are an eighth of int64's bytes.

    Raises ValueError for a negative label that is not ``ignore_index``.
    """
    if labels.numel() == 0:
        return labels, ignore_index, -1
    valid = labels.long() != ignore_index
    low, high = torch.stack(labels.where(valid, 0).aminmax()).tolist()
    if low < 0:
        raise ValueError(f"labels has the value {low}, wanted classes from 0 or ignore_index={ignore_index}")
    if high < NARROW_VOID and not (labels.dtype == torch.uint8 and ignore_index == NARROW_VOID):
        return labels.where(valid, NARROW_VOID).to(torch.uint8), NARROW_VOID, high
    return labels, ignore_index, high


def check_first_logits(logits: Tensor, largest_label: int, config: AttackSettings) -> None:
    """Checks what only a forward pass tells: labels against the number of classes, and what the logits look like.

    Args:
        logits: ``[b, C, H, W]`` of the first images, detached.
        largest_label: the largest label of all images that is not void.
        config: whose ``output`` says what the model should return.

    Raises:
        ValueError: a label is no class.

    Warns:
        UserWarning: the output looks like probabilities, whose gradients vanish where logits' do not.
    """
    if logits.numel() == 0:
        return
    classes = max(logits.shape[1], 2)
    if largest_label >= classes:
        raise ValueError(
            f"labels has the value {largest_label}, wanted classes from 0 to {classes - 1} or "
            f"ignore_index={config.ignore_index}"
        )
    first = logits[:1]
    if config.output == "logits" and float(first.amin()) >= 0 and float(first.amax()) <= 1:
        sums = first.sum(1, dtype=torch.float32)
        if logits.shape[1] > 1 and float((sums - 1).abs().max()) < 1e-2:
            found, layer, setting = "every pixel's classes sum to 1", "softmax", "probabilities"
        else:
            found, layer, setting = "all values lie within [0, 1]", "sigmoid", "sigmoid"
        warn(
            f"the model's output looks like probabilities ({found}), wanted logits: remove the model's {layer}, or "
            f"pass output={setting!r}; else pixels may be counted wrongly, and the attack is weaker than it could be"
        )


def gradient_flags(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Which images' gradients have a NaN, and which are 0 everywhere, ``[B]`` bool each; never synchronises."""
    low, high = grad.amin((1, 2, 3)), grad.amax((1, 2, 3))
    return high.isnan(), (low == 0) & (high == 0)


def warn_without_gradient(without_gradient: Tensor, numbers: Sequence[int]) -> None:
    """Warns of the images, by number, that the gradient of the first step did not reach."""
    if without_gradient.any():
        found = [str(number) for number, flag in zip(numbers, without_gradient.tolist(), strict=True) if flag]
        named = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        warn(
            f"the model's gradient with respect to image {named} is 0 everywhere in the first step, so the attack is "
            "no better than noise: the model rounds or detaches its input, or its output is saturated"
        )
