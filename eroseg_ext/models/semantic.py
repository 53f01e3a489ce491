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

_SCORES_AND_MASKS = (
    ("class_queries_logits", "masks_queries_logits"),
    ("pred_logits", "pred_masks"),
    ("logits", "pred_masks"),
)
"""What outputs call the classes ``[B, Q, C + 1]`` and the masks ``[B, Q, h, w]`` of Q queries: transformers'
MaskFormer, Mask2Former, OneFormer and EoMT; the same as their authors released them; transformers' DETR."""
_SMALLEST = 2.0**-100
"""Sums of probabilities below count as this, so that their logarithm and its gradient stay finite."""


def mask_logits(output: Any, log: bool = True) -> Tensor | None:
    """Per-pixel logits ``[B, C, h, w]`` of a model that classifies masks; None for any other output.

    A class's score is the sum over the queries of its probability, the last class being void, times the mask's
    probability, as in the models' own semantic inference; the logits are its logarithm.

    Args:
        output: dict or object with one of the pairs of ``_SCORES_AND_MASKS``.
        log: False: the scores themselves.
    """
    for names in _SCORES_AND_MASKS:
        classes, masks = (
            output.get(name) if isinstance(output, dict) else getattr(output, name, None) for name in names
        )
        if isinstance(classes, Tensor) and isinstance(masks, Tensor) and classes.dim() == 3 and masks.dim() == 4:
            probabilities = classes.float().softmax(-1)[..., :-1]
            log_masks = F.logsigmoid(masks.float())
            if not log:
                return torch.einsum("bqc,bqhw->bchw", probabilities, log_masks.exp())
            # Relative to the pixel's largest mask: where all of them are faint, their probabilities round to 0.
            largest = log_masks.detach().amax(1, keepdim=True)
            scores = torch.einsum("bqc,bqhw->bchw", probabilities, (log_masks - largest).exp())
            return scores.clamp(min=_SMALLEST).log() + largest
    return None


def semantic(model: nn.Module, *, log: bool = True, through_no_grad: bool = False, **inputs: Any) -> nn.Module:
    """The model as one from images to logits per pixel: of mask classification, and with further inputs held fixed.

    >>> adversarial = eroseg_ext.attack(semantic(oneformer, task_inputs=task), images, labels)

    Mask classification alone needs no call of this: its output is recognised. The images are passed as
    ``pixel_values`` where the model has such an argument, else as the first one.

    Args:
        model: nn.Module, which is not copied.
        log: False takes a mask classifier's scores themselves as logits, instead of their logarithms.
        through_no_grad: also differentiate what the model computes under ``torch.no_grad``, such as the features of a
            frozen backbone: without them the images get no gradient.
        **inputs: further arguments of the model. Of tensors, one row is every image's, and several rows are one for
            each class: the model is then run on every pair of image and row, whose maps become the classes' logits.

    Raises:
        TypeError: the model is no nn.Module.
        ValueError: the inputs have different numbers of rows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, wanted an nn.Module")
    rows = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor)}
    if len(set(rows.values())) > 1:
        raise ValueError(f"inputs have {rows} rows, wanted the same number, 1 or that of the classes")
    return _Semantic(model, log, through_no_grad, inputs, max(rows.values(), default=1))


class _IgnoringNoGrad(TorchFunctionMode):
    """Leaves gradients on where ``torch.no_grad`` would switch them off; at the end they are as they were before."""

    def __enter__(self) -> Any:
        self._before = torch.is_grad_enabled()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_grad_enabled(self._before)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch._C._set_grad_enabled and not args[0]:
            return None
        return function(*args, **(kwargs or {}))


class _Semantic(nn.Module):
    """What :func:`semantic` returns."""

    def __init__(self, model: nn.Module, log: bool, through_no_grad: bool, inputs: dict[str, Any], rows: int) -> None:
        super().__init__()
        self.model = model
        self._log = log
        self._through_no_grad = through_no_grad
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
        batch, rows = len(images), self._rows
        if rows > 1:
            images = images.repeat_interleave(rows, 0)
        given = {name: self._of_batch(name, value, batch) for name, value in self._inputs.items()}
        with _IgnoringNoGrad() if self._through_no_grad and images.requires_grad else nullcontext():
            output = self.model(pixel_values=images, **given) if self._by_name else self.model(images, **given)
        logits = mask_logits(output, self._log)
        if logits is not None:
            return logits
        logits = getattr(output, "logits", output)
        if isinstance(logits, Tensor) and (rows > 1 or logits.dim() == 3):
            return logits.reshape(batch, rows, *logits.shape[-2:])
        return output

    def _of_batch(self, name: str, value: Any, batch: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        held: Tensor = getattr(self, f"input_{name}")
        return held.repeat(batch, *[1] * (held.dim() - 1))
