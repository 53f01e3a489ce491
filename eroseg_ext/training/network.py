"""The model as training and attack call it: built by name, and with its output as full-size logits."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eroseg_ext.model import Logits
from eroseg_ext.nets import DEMO_WIDTH, FULL_WIDTH, SmallDeepLab
from eroseg_ext.training import clock as phases
from eroseg_ext.training.clock import Clock

BUILT_IN = {"small": FULL_WIDTH, "tiny": DEMO_WIDTH}


def build(name: str, classes: int, model_args: Mapping[str, Any]) -> nn.Module:
    """A fresh model.

    Args:
        name: ``small``, ``tiny``, or ``package.module:callable``.
        classes: number of classes, passed as ``classes`` or ``num_classes`` if the callable has such a parameter.
        model_args: keywords for the callable; they win.

    Raises:
        ValueError: the callable cannot be imported or called so, or gives no nn.Module; one sentence.
    """
    if name in BUILT_IN:
        return SmallDeepLab(classes, **{"width": BUILT_IN[name], **model_args})
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"model is {name!r}, wanted small, tiny or an import path package.module:callable")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model is {name!r}, which cannot be imported: {error}") from error
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some built-in callables tell none
        parameters = {}
    known = {key: classes for key in ("classes", "num_classes") if key in parameters}
    if not known and any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values()):
        known = {"num_classes": classes}
    try:
        model = make(**{**known, **model_args})
    except TypeError as error:
        raise ValueError(f"model {name!r} cannot be made with model_args={dict(model_args)}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} gives a {type(model).__name__}, wanted an nn.Module")
    return model


class Network(nn.Module):
    """``images [B, 3, H, W] in [0, 1] -> logits [B, C, H, W]``: normalises, runs the model under autocast, upsamples.

    Called while the clock is in an attack, it books its forward and backward as the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        clock: Clock,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._clock = clock
        self._logits = Logits(model, mean=mean, std=std, autocast=autocast)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        size = (images.shape[-2], images.shape[-1])
        if self._clock.phase != phases.ATTACK_KERNELS:
            return self._logits(images, size)
        self._clock.switch(phases.ATTACK_MODEL)
        logits = self._logits(images, size)
        self._clock.switch(phases.ATTACK_KERNELS)
        if images.requires_grad:
            logits.register_hook(lambda _: self._clock.switch(phases.ATTACK_MODEL))
            images.register_hook(lambda _: self._clock.switch(phases.ATTACK_KERNELS))
        return logits


def check_model(network: Network, classes: int, crop: tuple[int, int], device: torch.device) -> list[str]:
    """Tries a model on one grey image, and freezes the parameters that its logits do not depend on.

    Those (of auxiliary heads, say) get no gradient, which DistributedDataParallel would wait for.

    Returns:
        The names of the frozen parameters.

    Raises:
        ValueError: the logits have another number of classes, or do not depend on any parameter.
    """
    model = network.model
    training = model.training
    model.eval()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    logits = network(torch.full((1, 3, *crop), 0.5, device=device))
    model.train(training)
    if logits.shape[1] != classes:
        raise ValueError(f"the model's logits have {logits.shape[1]} classes, wanted {classes} as the labels")
    if not (named and logits.requires_grad):
        raise ValueError("the model's logits depend on no parameter, wanted a model that can be trained")
    gradients = torch.autograd.grad(logits.float().sum(), [parameter for _, parameter in named], allow_unused=True)
    unused = [(name, p) for (name, p), gradient in zip(named, gradients, strict=True) if gradient is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return [name for name, _ in unused]
