"""The numbers that a model's input is normalised by, also from the object that normalises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eroseg_ext.utils.validate import require


def take_statistics(settings: Any, clip: tuple[float, float] = (0.0, 1.0)) -> None:
    """Puts numbers in the place of ``settings.mean`` and ``settings.std`` where mean is an object that has both.

    Such are transformers' processors, of which those that do not normalise leave both at None, and torchvision's
    transforms. Theirs are of images in [0, 1] and become those of the range ``clip``.

    Raises:
        ValueError: std is given too; or the processor also turns RGB into BGR.
    """
    source = getattr(settings.mean, "image_processor", settings.mean)
    mean, std = (getattr(source, f"image_{name}", getattr(source, name, None)) for name in ("mean", "std"))
    if isinstance(mean, Sequence) and isinstance(std, Sequence):
        name = type(source).__name__
        require(settings.std is None, "std", settings.std, f"None, as the {name} that mean is has both")
        flips = getattr(source, "do_flip_channel_order", False)
        require(not flips, "mean", name, "one that keeps RGB: flip the channels in a model, lambda x: model(x.flip(1))")
        low, extent = clip[0], clip[1] - clip[0]
        if getattr(source, "do_normalize", True):
            object.__setattr__(settings, "mean", tuple(low + extent * value for value in mean))
            object.__setattr__(settings, "std", tuple(extent * value for value in std))
        else:
            object.__setattr__(settings, "mean", None)
