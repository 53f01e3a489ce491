"""Models that classify masks, or take more than images: their output as logits of a class per pixel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eroseg_ext.models.outputs import logits_of, mask_logits
from eroseg_ext.utils.validate import check_integer


def semantic(
    model: nn.Module, *, log: bool = True, through_no_grad: bool = False, multiple_of: int = 1, **inputs: Any
) -> nn.Module:
    """The model as one from images to logits per pixel, with further inputs held fixed.

    >>> adversarial = eroseg_ext.attack(semantic(oneformer, task_inputs=task), images, labels)
    >>> adversarial = eroseg_ext.attack(semantic(unet, multiple_of=32), images, labels)

    Mask classification alone needs no call of this: its output is recognised. The images are passed as
    ``pixel_values`` where the model has such an argument, else as the first one.

    Args:
        model: nn.Module, which is not copied.
        log: False takes a mask classifier's scores themselves as logits, instead of their logarithms.
        through_no_grad: also differentiate what the model computes under ``torch.no_grad``, such as the features of a
            frozen backbone: without them the images get no gradient.
        multiple_of: pad the images with zeros, at the right and below, to sides that are multiples of it; the logits of
            what was added are cut off. After normalisation by mean and std zero is the mean colour.
        **inputs: further arguments of the model. Of tensors, one row is every image's, and several rows are one for
            each class: the model is then run on every pair of image and row, whose maps become the classes' logits.

    Raises:
        TypeError: the model is no nn.Module.
        ValueError: the inputs have different numbers of rows, or ``multiple_of`` is no whole number from 1.
    """
    check_integer("multiple_of", multiple_of, 1)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, wanted an nn.Module")
    rows = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor)}
    if len(set(rows.values())) > 1:
        raise ValueError(f"inputs have {rows} rows, wanted the same number, 1 or that of the classes")
    return _Semantic(model, log, through_no_grad, multiple_of, inputs, max(rows.values(), default=1))


class _IgnoringNoGrad(TorchFunctionMode):
    """Leaves gradients on where ``torch.no_grad`` would switch them off."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch._C._set_grad_enabled and not args[0]:
            return None
        return function(*args, **(kwargs or {}))


class _Semantic(nn.Module):
    """What :func:`semantic` returns."""

    def __init__(
        self,
        model: nn.Module,
        log: bool,
        through_no_grad: bool,
        multiple_of: int,
        inputs: dict[str, Any],
        rows: int,
    ) -> None:
        super().__init__()
        self.model = model
        self._log = log
        self._through_no_grad = through_no_grad
        self._multiple_of = multiple_of
        self._rows = rows
        self._inputs = inputs
        device = next((parameter.device for parameter in model.parameters()), None)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                # A buffer goes where the model goes: an upload in every step would make the host wait for the device.
                self.register_buffer(f"input_{name}", value.to(device), persistent=False)
        self._by_name = "pixel_values" in inspect.signature(model.forward).parameters

    def forward(self, images: Tensor) -> Any:
        """``images[B, K, H, W]`` -> logits ``[B, C, h, w]``, or the model's output where it is read otherwise."""
        batch, rows, (height, width) = len(images), self._rows, images.shape[-2:]
        if rows > 1:
            images = images.repeat_interleave(rows, 0)
        images = F.pad(images, (0, -width % self._multiple_of, 0, -height % self._multiple_of))
        given = {name: self._of_batch(name, value, batch) for name, value in self._inputs.items()}
        with _IgnoringNoGrad() if self._through_no_grad and torch.is_grad_enabled() else nullcontext():
            output = self.model(pixel_values=images, **given) if self._by_name else self.model(images, **given)
        masks = mask_logits(output, self._log)
        if masks is not None:
            output = masks
        logits = getattr(output, "logits", output)
        if isinstance(logits, Tensor) and (rows > 1 or logits.dim() == 3):
            output = logits.reshape(batch, rows, *logits.shape[-2:])
        if images.shape[-2:] != (height, width):
            # At the padded images' size, where what was added is whole pixels.
            logits = F.interpolate(logits_of(output, batch), size=images.shape[-2:], mode="bilinear")
            output = logits[..., :height, :width]
        return output

    def _of_batch(self, name: str, value: Any, batch: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        held: Tensor = getattr(self, f"input_{name}")
        return held.repeat(batch, *[1] * (held.dim() - 1))
