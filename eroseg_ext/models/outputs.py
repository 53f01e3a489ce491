"""What a model returned, read as logits: which part of it they are, in which units, and whether they fit the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eroseg_ext.models.see_through import LogitMap, source_of
from eroseg_ext.utils.validate import warn

OUTPUTS = ("logits", "probabilities", "sigmoid")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Of images, models and their outputs."""
_SMALLEST = {torch.float32: 2.0**-100, torch.bfloat16: 2.0**-100, torch.float16: 2.0**-11}
"""Probabilities below count as this, so that 1 / p, times a weight and summed by an upsampling, stays finite."""
_SCORES_AND_MASKS = (
    ("class_queries_logits", "masks_queries_logits"),
    ("pred_logits", "pred_masks"),
    ("logits", "pred_masks"),
)
"""What outputs call the classes ``[B, Q, C + 1]`` and the masks ``[B, Q, h, w]`` of Q queries: transformers'
MaskFormer, Mask2Former, OneFormer and EoMT; the same as their authors released them; transformers' DETR."""


class Reader:
    """A model's output -> logits; the settings are those of the same names of ``AttackSettings``.

    What an output says about itself is looked at once for each of its shapes, its range of values with the first only:
    a look makes the host wait for the device.
    """

    def __init__(
        self,
        output: str = "logits",
        output_key: int | str | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        align_corners: bool = False,
    ) -> None:
        self._output = output
        self._output_key = output_key
        self._logits = logits
        self.align_corners = align_corners
        self._seen: tuple[object, ...] | None = None

    def __call__(self, output: Any, batch: int, size: tuple[int, int]) -> LogitMap:
        """The logits of ``batch`` images of ``size``, differentiable; TypeError or ValueError if they are none.

        An output that is a :class:`LogitMap` was read before, and is returned.
        """
        if isinstance(output, LogitMap):
            return output
        found = self._taken(output, batch)
        if found.dim() != 4 or found.shape[0] != batch or found.shape[1] == 0:
            raise ValueError(f"the model's logits have shape {list(found.shape)}, wanted [B, C, H, W] with B = {batch}")
        if found.dtype not in DTYPES:
            raise TypeError(f"the model's logits are {found.dtype}, wanted float32, float16, bfloat16 or float64")
        shape = found.shape, size
        if shape != self._seen:
            if self._output != "logits" and self._seen is None:
                _check_probabilities(found, self._output)
            _check_size(found, size)
            self._seen = shape
        return self._as_logits(found)

    def auxiliary(self, output: Any, batch: int) -> list[LogitMap]:
        """Logits of auxiliary heads: what else the output has that differs from the logits in its size alone."""
        taken = self._taken(output, batch)
        entries = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
        others = (entry for entry in entries if isinstance(entry, Tensor) and entry is not taken and entry.dim() == 4)
        return [self._as_logits(entry) for entry in others if entry.shape[:2] == taken.shape[:2]]

    def _taken(self, output: Any, batch: int) -> Tensor:
        """What of the output is the logits."""
        if self._logits is None:
            return logits_of(output if self._output_key is None else _entry(output, self._output_key), batch)
        found = self._logits(output)
        if not isinstance(found, Tensor):
            raise TypeError(f"logits gives a {type(found).__name__} of the model's output, wanted a tensor")
        return found

    def _as_logits(self, found: Tensor) -> LogitMap:
        if self._output != "logits":
            # At their own size: the result is that of the model without its last layer, to rounding.
            return LogitMap(_converted(found, self._output), self.align_corners)
        logits = source_of(found, self.align_corners)
        return logits._replace(values=logits.values.float()) if found.dtype == torch.float64 else logits


def logits_of(output: Any, batch: int) -> Tensor:
    """The logits in a model's output: a tensor, an object with ``.logits``, a dict with ``"out"`` or a tuple's first.

    Of a model that classifies masks, they are computed, see :func:`mask_logits`.

    Raises TypeError for any other output, and ValueError where a tuple has several entries that could be the logits of
    ``batch`` images: tensors ``[B, C, H, W]``.
    """
    if isinstance(output, Tensor):
        return output
    masks = mask_logits(output)
    if masks is not None:
        return masks
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, dict):
        for key in ("out", "logits"):
            if isinstance(output.get(key), Tensor):
                return output[key]
        came = f"a dict with keys {', '.join(map(str, output))}"
        _refuse_several(output.items(), batch)
    elif isinstance(output, (tuple, list)) and output:
        _refuse_several(enumerate(output), batch)
        return logits_of(output[0], batch)
    else:
        came = f"a {type(output).__name__}"
    raise TypeError(
        f"the model's output is {came}, wanted logits: a tensor, a dict with 'out', an object with .logits, or a "
        "tuple, else output_key= or logits= to find them"
    )


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
            return scores.clamp(min=_SMALLEST[torch.float32]).log() + largest
    return None


def _refuse_several(entries: Iterable[tuple[Any, Any]], batch: int) -> None:
    candidates = [
        f"{key!r} of shape {list(entry.shape)}"
        for key, entry in entries
        if isinstance(entry, Tensor) and entry.dim() == 4 and entry.shape[0] == batch
    ]
    if len(candidates) > 1:
        raise ValueError(
            f"the model's output has several entries that could be the logits, {', '.join(candidates)}: choose one by "
            "output_key=, or by logits=, a callable from the output to the logits"
        )


def _entry(output: Any, key: int | str) -> Any:
    """The part of an output that ``output_key`` names: of a tuple by number, of a dict or an object by name."""
    if isinstance(output, dict):
        if key in output:
            return output[key]
        came = f"a dict with keys {', '.join(map(repr, output))}"
    elif isinstance(output, (tuple, list)) and isinstance(key, int):
        if -len(output) <= key < len(output):
            return output[key]
        came = f"a {type(output).__name__} of {len(output)} entries"
    else:
        if isinstance(key, str) and not isinstance(output, Tensor) and hasattr(output, key):
            return getattr(output, key)
        came = f"a {type(output).__name__}"
    raise ValueError(f"output_key is {key!r}, and the model's output is {came}, wanted one that it has")


def _converted(found: Tensor, output: str) -> Tensor:
    p = found.float().clamp(min=_SMALLEST[found.dtype])
    if output == "probabilities" and found.shape[1] > 1:
        return p.log()
    # The largest number below 1 of the model's own type: beyond it there is nothing to tell values apart.
    p = p.clamp(max=1 - torch.finfo(found.dtype).eps / 2)
    return p.log() - torch.log1p(-p)


def _check_probabilities(found: Tensor, output: str) -> None:
    """Raises ValueError for values that are not what the setting ``output`` says; NaN is left to the attack."""
    if found.numel() == 0:
        return
    first = found.detach()[:1].float()
    low, high = (float(value) for value in first.aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"output is {output!r}, and the model's output has values from {low:.4g} to {high:.4g}, wanted values "
            "within [0, 1]: for logits leave output at 'logits'"
        )
    if output == "probabilities" and found.shape[1] > 1 and float((first.sum(1) - 1).abs().max()) > 0.05:
        raise ValueError(
            "output is 'probabilities', and a pixel's classes do not sum to 1 in the model's output, wanted a "
            "softmax's: for a score of its own per class it is 'sigmoid'"
        )


def _check_size(found: Tensor, size: tuple[int, int]) -> None:
    """Finds logits that are not those of the whole image at some stride, or at some whole multiple.

    Raises ValueError if they are of another aspect ratio, to the rounding of a stride. Warns if there is no whole
    number that both of their sides are the image's divided by, rounded up or down, and none for the reverse.
    """
    (height, width), (h, w) = size, found.shape[-2:]
    looks_last = _same_aspect(size, (found.shape[1], h))
    hint = "; they look like [B, H, W, C]: pass logits=lambda output: output.permute(0, 3, 1, 2)" if looks_last else ""
    if min(h, w) == 0:
        return
    if not _same_aspect(size, (h, w)):
        raise ValueError(
            f"the model's logits have shape {list(found.shape)}, whose {h} x {w} pixels have not the aspect ratio of "
            f"the images' {height} x {width}{hint or ', wanted logits of the whole image'}"
        )
    if not (_at_a_stride((height, width), (h, w)) or _at_a_stride((h, w), (height, width))):
        warn(
            f"the model's logits are {h} x {w} pixels for images of {height} x {width}, which no stride gives: they "
            "are stretched over the whole image, which is wrong if the model crops; let it pad its input, or return "
            "logits of the images' size"
        )


def _at_a_stride(size: tuple[int, int], found: tuple[int, int]) -> bool:
    strides = range(1, max(size) + 1)
    return any(all(_at(side, stride, of) for side, of in zip(size, found, strict=True)) for stride in strides)


def _at(side: int, stride: int, found: int) -> bool:
    return found in (max(side // stride, 1), -(-side // stride))


def _same_aspect(size: tuple[int, int], found: tuple[int, int]) -> bool:
    """Whether one stride, not necessarily whole, gives both sides to less than a pixel."""
    (height, width), (h, w) = size, found
    return height * (w - 1) < width * (h + 1) and width * (h - 1) < height * (w + 1)
