"""The model as training and attack call it: with its output read as logits, and its time on the clock."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eroseg_ext.models.adapter import Logits
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.training import clock as phases
from eroseg_ext.training.clock import Clock
from eroseg_ext.training.loss import Loss
from eroseg_ext.training.settings import TrainSettings


class Network(nn.Module):
    """``images [B, 3, H, W] in [0, 1] -> logits``: normalises, runs the model under autocast, reads its output.

    The model is called, and its output read, as the settings say; None: as their defaults say.
    Called while the clock is in an attack, it books its forward and backward as the model's.
    """

    def __init__(self, model: nn.Module, clock: Clock, settings: TrainSettings | None = None) -> None:
        super().__init__()
        self.model = model
        self._clock = clock
        self._logits = Logits.under(model, settings)
        self.has_auxiliary = settings is not None and settings.auxiliary_weight > 0

    def forward(self, images: Tensor, heads: bool = False) -> LogitMap | list[LogitMap]:
        """The logits, of the images' size or of another; with ``heads`` a list of all that the loss is taken of."""
        size = (images.shape[-2], images.shape[-1])
        if heads:
            return self._logits.with_auxiliary(images, size) if self.has_auxiliary else [self._logits(images, size)]
        if self._clock.phase != phases.ATTACK_KERNELS:
            return self._logits(images, size)
        self._clock.switch(phases.ATTACK_MODEL)
        logits = self._logits(images, size)
        self._clock.switch(phases.ATTACK_KERNELS)
        if images.requires_grad:
            logits.values.register_hook(lambda _: self._clock.switch(phases.ATTACK_MODEL))
            images.register_hook(lambda _: self._clock.switch(phases.ATTACK_KERNELS))
        return logits


def check_model(network: Network, loss: Loss, classes: int, crop: tuple[int, int], device: torch.device) -> list[str]:
    """Tries a model and the loss on one grey image, and freezes the parameters that the loss does not depend on.

    Those (of auxiliary heads, say) get no gradient, which DistributedDataParallel would wait for. Returns their names.
    Raises ValueError if the model or the loss fails, or the logits have another number of classes or depend on no
    parameter.
    """
    model = network.model
    training = model.training
    model.eval()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        heads = network(torch.full((1, 3, *crop), 0.5, dtype=torch.float32, device=device), heads=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the model fails on an image of {crop[0]}x{crop[1]} pixels, where another crop may be wanted: {error}"
        ) from error
    model.train(training)
    found = heads[0].values.shape[1]
    if found != classes and (found, classes) != (1, 2):
        raise ValueError(f"the model's logits have {found} classes, wanted {classes} as the labels")
    if network.has_auxiliary and len(heads) == 1:
        raise ValueError(
            f"auxiliary_weight is set, and the model's output has no further logits of {found} classes, wanted a dict, "
            "tuple or list that has them"
        )
    if not (named and heads[0].values.requires_grad):
        raise ValueError("the model's logits depend on no parameter, wanted a model that can be trained")
    loss.try_on(heads[0], crop)
    parameters = [parameter for _, parameter in named]
    summed = sum((logits.values.float().sum() for logits in heads), torch.zeros((), device=device))
    gradients = torch.autograd.grad(summed, parameters, allow_unused=True)
    unused = [(name, p) for (name, p), gradient in zip(named, gradients, strict=True) if gradient is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return [name for name, _ in unused]
