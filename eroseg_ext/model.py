"""The user's model during an attack: left as it was found, and its output read whatever its form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Model = Callable[[Tensor], Any]
NO_GRADIENT = "the model's logits do not depend on images by autograd, wanted a differentiable model"
LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, an object with ``.logits``, a dict with ``"out"`` or a tuple's first.

    Raises TypeError for any other output.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, dict):
        for key in ("out", "logits"):
            if isinstance(output.get(key), Tensor):
                return output[key]
        came = f"a dict with keys {', '.join(map(str, output))}"
    elif isinstance(output, (tuple, list)) and output:
        return logits_of(output[0])
    else:
        came = f"a {type(output).__name__}"
    raise TypeError(
        f"the model's output is {came}, wanted logits: a tensor, a dict with 'out', an object with .logits, or a tuple"
    )


class Logits:
    """``images in pixel values -> logits at the labels' resolution``, differentiable with respect to the images.

    Normalises by mean and std if given, runs the model (under autocast if asked), takes the logits out of its output
    and upsamples them bilinearly (``align_corners=False``) if they are smaller than ``size``.
    """

    def __init__(
        self,
        model: Model,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._mean = mean
        self._std = std
        self._constants: tuple[Tensor, ...] | None = None
        self._autocast = autocast

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """``images[B, K, H, W]`` -> logits ``[B, C, *size]``; TypeError or ValueError for an output of another form."""
        if self._mean is not None:
            if self._constants is None:
                # Kept: an upload makes the host wait for the device, which no step may.
                self._constants = tuple(images.new_tensor(v).view(1, -1, 1, 1) for v in (self._mean, self._std))
            mean, std = self._constants
            images = (images - mean) / std
        if self._autocast is None:
            logits = logits_of(self._model(images))
        else:
            with torch.autocast(images.device.type, self._autocast):
                logits = logits_of(self._model(images))
        if logits.dim() != 4 or logits.shape[0] != images.shape[0] or logits.shape[1] == 0:
            raise ValueError(
                f"the model's logits have shape {list(logits.shape)}, wanted [B, C, H, W] with B = {images.shape[0]}"
            )
        if logits.dtype not in LOGIT_DTYPES:
            raise TypeError(f"the model's logits are {logits.dtype}, wanted float32, float16 or bfloat16")
        if logits.shape[-2:] != size:
            if logits.shape[-2] > size[0] or logits.shape[-1] > size[1]:
                raise ValueError(
                    f"the model's logits are {list(logits.shape[-2:])} pixels, wanted at most the labels' {list(size)}"
                )
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits


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
