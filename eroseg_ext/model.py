"""The user's model during an attack: left as it was found, and its output read whatever its form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eroseg_ext.outputs import Reader

Model = Callable[[Tensor], Any]
NO_GRADIENT = "the model's logits do not depend on images by autograd, wanted a differentiable model"
SETTINGS = ("mean", "std", "autocast", "output", "output_key", "logits", "align_corners")
"""What :class:`Logits` takes, under the names that the settings of attack, training and evaluation have for it."""


def unwrapped(model: Model) -> Model:
    """The module inside DistributedDataParallel: its reducer must not see the attack's backward passes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def frozen(model: Model, mode: str) -> Iterator[None]:
    """Holds a module in ``eval`` or ``train`` mode (or ``keep``) with its parameters frozen, then restores it.

    Restored, also after an exception: the mode of every submodule, requires_grad of every parameter, and, where a
    submodule is in train mode meanwhile, every buffer (BatchNorm statistics). A callable that is no nn.Module is left
    alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    try:
        if mode != "keep":
            model.train(mode == "train")
        if any(module.training for module in model.modules()):
            buffers = [
                (module, name, buffer, buffer.detach().clone())
                for module in model.modules()
                for name, buffer in module.named_buffers(recurse=False)
            ]
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)  # a module may have put another tensor in its place
        for module, training in modes:
            module.training = training


class Logits:
    """``images in pixel values -> logits at the labels' resolution``, differentiable with respect to the images.

    Normalises by mean and std if given, runs the model (under autocast if asked), takes the logits out of its output,
    as ``reading`` tells :class:`eroseg_ext.outputs.Reader`, and upsamples them bilinearly to ``size`` if need be.
    """

    def __init__(
        self,
        model: Model,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        autocast: torch.dtype | None = None,
        **reading: Any,
    ) -> None:
        self._model = model
        self._read = Reader(**reading)
        self._mean = mean
        self._std = std
        self._constants: tuple[Tensor, ...] | None = None
        self._autocast = autocast

    @classmethod
    def under(cls, model: Model, settings: Any) -> Logits:
        """As the settings of an attack, a training or an evaluation say; what they do not have keeps its default."""
        return cls(model, **{name: getattr(settings, name) for name in SETTINGS if hasattr(settings, name)})

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """``images[B, K, H, W]`` -> logits ``[B, C, *size]``; TypeError or ValueError for an output of another form."""
        if self._mean is not None:
            if self._constants is None:
                # Kept: an upload makes the host wait for the device, which no step may.
                self._constants = tuple(images.new_tensor(v).view(1, -1, 1, 1) for v in (self._mean, self._std))
            mean, std = self._constants
            images = (images - mean) / std
        if self._autocast is None:
            output = self._model(images)
        else:
            with torch.autocast(images.device.type, self._autocast):
                output = self._model(images)
        return self._read(output, images.shape[0], size)


class Pass:
    """The model's forward and backward pass with respect to the images, step after step."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward
        self._under_way: tuple[Tensor, Tensor] | None = None

    def logits(self, images: Tensor) -> Tensor:
        """``images[B, K, H, W]`` -> logits, detached; ValueError for logits that are cut off from the images."""
        leaf = images.detach().requires_grad_()
        logits = self._forward(leaf)
        if not logits.requires_grad:
            raise ValueError(NO_GRADIENT)
        self._under_way = leaf, logits
        return logits.detach()

    def gradient(self, grad_logits: Tensor) -> Tensor:
        """The gradient with respect to the images of the last ``logits``, whose graph is freed."""
        assert self._under_way is not None
        leaf, logits = self._under_way
        self._under_way = None  # or the logits would live on beside those of the next forward pass
        # Of a callable's parameters, which nobody froze, the logits may depend where they do not of the images.
        grad: Tensor | None = torch.autograd.grad(logits, leaf, grad_logits, allow_unused=True)[0]
        if grad is None:
            raise ValueError(NO_GRADIENT)
        return grad
