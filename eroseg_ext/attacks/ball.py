"""The ball that an attack may reach: noise in it, projection on it, and results in the type of the clean images."""

from __future__ import annotations

import torch
from torch import Tensor

from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.utils.precision import wide

HALVES = (torch.float16, torch.bfloat16)


class Ball:
    """The images within ``radius`` of the clean ones and within ``clip`` that differ where ``changeable`` says only."""

    def __init__(self, clean: Tensor, config: AttackSettings, changeable: Tensor, radius: float) -> None:
        self._clean = clean
        self._changeable = changeable
        self._radius = radius
        self._linf = config.norm == "linf"
        # Where the bounds coincide, at pixels that may not change, projection gives the clean value.
        reach = radius if self._linf else torch.inf
        self._low = (clean - reach).clamp(*config.clip).where(changeable, clean)
        self._high = (clean + reach).clamp(*config.clip).where(changeable, clean)

    def project(self, images: Tensor) -> Tensor:
        """The nearest images in the ball."""
        if not self._linf:
            delta = (images - self._clean).where(self._changeable, 0.0)
            length = _length(delta)
            shrunk = self._clean + (self._radius / length).to(delta.dtype) * delta
            images = torch.where(length > self._radius, shrunk, images)
        return images.clamp(self._low, self._high)

    def step(self, images: Tensor, grad: Tensor, size: Tensor) -> Tensor:
        """``images`` moved along the gradient by ``size[B, 1, 1, 1]``, projected. NaN gradients make NaN images."""
        if self._linf:
            direction = grad.sign().masked_fill_(grad.isnan(), torch.nan)
        else:
            grad = grad.where(self._changeable, 0.0)
            length = _length(grad)
            direction = grad * torch.where(length == 0, 0.0, 1 / length).float()
        return self.project(direction.mul_(size).add_(images))


def noise_in_ball(
    shape: torch.Size, norm: str, radius: float, changeable: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Noise uniform in the ball of ``radius``, drawn and returned on the generator's device.

    In l_2 it is uniform in the ball of the pixels that may change, and 0 elsewhere: a Gaussian direction, and a length
    whose d-th power is uniform, d being the number of values that may change.

    Args:
        shape: ``[B, K, H, W]``.
        norm: ``linf`` or ``l2``.
        radius: of the ball.
        changeable: bool, to be broadcast to ``[B, 1, H, W]``.
        generator: None: the global one of ``changeable``'s device.
    """
    device = changeable.device if generator is None else generator.device
    if norm == "linf":
        return torch.empty(shape, dtype=torch.float32, device=device).uniform_(-radius, radius, generator=generator)
    normal = torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
    uniform = torch.rand(shape[0], dtype=torch.float32, device=device, generator=generator)
    changeable = changeable.to(device)
    noise = normal.where(changeable, 0.0)
    dimensions = changeable.expand_as(noise).flatten(1).sum(1).clamp(min=1)
    length = radius * wide(uniform) ** (1 / dimensions.float())
    return noise * (length.view(-1, 1, 1, 1) / _length(noise).clamp(min=1e-30)).float()


def shown(images: Tensor, clean: Tensor, dtype: torch.dtype, config: AttackSettings) -> Tensor:
    """Iterates as the model sees them: what can be returned, so that what is counted is what is.

    In a half type, and with ``quantize``, they are rounded towards the clean images, since a nearest value may lie
    outside the ball.

    Args:
        images: ``[B, K, H, W]`` float32.
        clean: like images, with values that ``dtype`` has.
        dtype: that of the clean images as they came.
        config: for ``quantize``.

    Returns:
        Like images; for other types than float16 and bfloat16, without ``quantize``, the images themselves.
    """
    if config.quantize:
        return quantized(images, clean, config.clip)
    if dtype not in HALVES:
        return images
    nearest = images.to(dtype)
    beyond = torch.where(images > clean, nearest > images, nearest < images)
    return torch.where(beyond, nearest.nextafter(clean.to(dtype)), nearest).float()


def quantized(images: Tensor, clean: Tensor, clip: tuple[float, float]) -> Tensor:
    """8-bit images: 255ths of the range of ``clip``, rounded towards the clean images, which must be of that kind."""
    unit = (clip[1] - clip[0]) / 255
    moved = (images - clean) / unit
    # The thousandth of a 255th is for the rounding of floats.
    levels = ((clean - clip[0]) / unit).round() + moved.sign() * (moved.abs() + 1e-3).floor()
    return clip[0] + levels * (clip[1] - clip[0]) / 255


def delivered(adversarial: Tensor, images: Tensor, changeable: Tensor, config: AttackSettings) -> Tensor:
    """The result of an attack: in the dtype of ``images``, in their ball and within ``clip``.

    Args:
        adversarial: ``[B, K, H, W]`` float32.
        images: the clean images as they came.
        changeable: bool, broadcast to them; elsewhere the result is the clean image, bit for bit.
        config: for the ball.
    """
    images = images.detach()
    if config.eps == 0:
        return images.clone()
    clean = images.to(torch.promote_types(images.dtype, torch.float32))
    found = Ball(clean, config, changeable, config.eps).project(adversarial.to(clean.dtype))
    return shown(found, clean, images.dtype, config).to(images.dtype).where(changeable, images)


def _length(images: Tensor) -> Tensor:
    """``[B, 1, 1, 1]`` float64, the l_2 norm of each image."""
    return wide(images).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
