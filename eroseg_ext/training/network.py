"""The model as training and attack call it: with its output read as logits, and its time on the clock."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eroseg_ext.models.adapter import Logits
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.training import clock as phases
from eroseg_ext.training.clock import Clock
from eroseg_ext.training.settings import TrainSettings


class Network(nn.Module):
    """``images [B, 3, H, W] in [0, 1] -> LogitMap``: normalises, runs the model under autocast, reads its output.

    The model is called, and its output read, as the settings say; None: as their defaults say.
    Called while the clock is in an attack, it books its forward and backward as the model's.
    """

    def __init__(self, model: nn.Module, clock: Clock, settings: TrainSettings | None = None) -> None:
        super().__init__()
        self.model = model
        self._clock = clock
        self._logits = Logits.under(model, settings)

    def forward(self, images: Tensor) -> LogitMap:
        """The logits, of the images' size or of another."""
        size = (images.shape[-2], images.shape[-1])
        if self._clock.phase != phases.ATTACK_KERNELS:
            return self._logits(images, size)
        self._clock.switch(phases.ATTACK_MODEL)
        logits = self._logits(images, size)
        self._clock.switch(phases.ATTACK_KERNELS)
        if images.requires_grad:
            logits.values.register_hook(lambda _: self._clock.switch(phases.ATTACK_MODEL))
            images.register_hook(lambda _: self._clock.switch(phases.ATTACK_KERNELS))
        return logits


def check_model(network: Network, classes: int, crop: tuple[int, int], device: torch.device) -> list[str]:
    """Tries a model on one grey image, and freezes the parameters that its logits do not depend on.

    Those (of auxiliary heads, say) get no gradient, which DistributedDataParallel would wait for. Returns their names.
    Raises ValueError if the model fails, or its logits have another number of classes or depend on no parameter.
    """
    model = network.model
    training = model.training
    model.eval()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        logits = network(torch.full((1, 3, *crop), 0.5, dtype=torch.float32, device=device)).values
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the model fails on an image of {crop[0]}x{crop[1]} pixels, where another crop may be wanted: {error}"
        ) from error
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
