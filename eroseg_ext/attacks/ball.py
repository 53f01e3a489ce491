"""The adversarial images in the type that the clean ones came in, and there, too, in the ball."""

from __future__ import annotations

import torch
from torch import Tensor

from eroseg_ext.attacks.settings import AttackSettings

HALVES = (torch.float16, torch.bfloat16)


def shown(images: Tensor, clean: Tensor, dtype: torch.dtype) -> Tensor:
    """Iterates as the model sees them: what ``dtype`` can hold, so that what is counted is what can be returned.

    In a half type they are rounded towards the clean images, since a nearest value may lie outside the ball.

    Args:
        images: ``[B, K, H, W]`` float32.
        clean: like images, with values that ``dtype`` has.
        dtype: that of the clean images as they came.

    Returns:
        Like images; for other types than float16 and bfloat16 the images themselves.
    """
    if dtype not in HALVES:
        return images
    nearest = images.to(dtype)
    beyond = torch.where(images > clean, nearest > images, nearest < images)
    return torch.where(beyond, nearest.nextafter(clean.to(dtype)), nearest).float()


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
    found = adversarial.to(clean.dtype)
    if config.norm == "linf":
        found = found.clamp(clean - config.eps, clean + config.eps)
    else:
        delta = found - clean
        length = delta.double().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        found = torch.where(length > config.eps, clean + (config.eps / length).to(delta.dtype) * delta, found)
    found = shown(found.clamp(*config.clip), clean, images.dtype)
    return found.to(images.dtype).where(changeable, images)
