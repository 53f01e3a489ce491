"""The attack loop: ``attack(model, images, labels)`` returns adversarial images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm

from eroseg_ext.attacks.ball import noise_in_ball
from eroseg_ext.attacks.engine import Engine, Part
from eroseg_ext.attacks.options import AttackCall, AttackOptions, with_settings
from eroseg_ext.attacks.result import AttackInfo, Callback, StepInfo
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.models.adapter import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def attack(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    return_info: Literal[False] = False,
    **keywords: Unpack[AttackCall],
) -> Tensor: ...
@overload
def attack(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    return_info: Literal[True],
    **keywords: Unpack[AttackCall],
) -> tuple[Tensor, AttackInfo]: ...
@with_settings(AttackOptions)
def attack(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    return_info: bool = False,
    **settings: Any,
) -> Tensor | tuple[Tensor, AttackInfo]:
    """Adversarial images for a segmentation model, inside an l_inf or l_2 ball around the given ones.

    >>> adversarial = eroseg_ext.attack(model, images, labels, eps=8 / 255, steps=10)

    The model is any callable from images ``[B, K, H, W]`` to logits ``[B, C, h, w]``, or to a dict with ``"out"``, an
    object with ``.logits``, or a tuple with logits first; ``output_key`` or ``logits`` find them in any other output.
    Logits smaller than the labels are upsampled bilinearly. Probabilities are no logits: see ``output``.
    After the call the model is as it was: mode, requires_grad, .grad and BatchNorm statistics; so are the modules that
    a lambda, a partial, a method or an adapter object calls. A second thread that attacks the same model waits.

    Args:
        model: nn.Module (also compiled, or wrapped in DistributedDataParallel, or sharded: then every process must
            attack as many images in as many steps) or any differentiable callable.
        images: ``[B, K, H, W]`` float32, float64, float16 or bfloat16, pixel values within ``clip``. The attack itself
            is in float32, and the model is given the dtype of its first parameter.
        labels: ``[B, H, W]`` int64, int32 or uint8: classes in [0, C) or ``ignore_index``. None: the model's own
            prediction on the clean images.
        mask: ``[B, 1, H, W]`` bool: the pixels that may change; default all.
        generator: source of the random start; default torch's global one.
        callback: called after each step with a :class:`StepInfo`.
        return_info: also return an :class:`AttackInfo` (costs one more forward pass).
        preset: None, or ``"progressive"``, the literal reading of the paper's abstract: other defaults for eroseg.
        **settings: the fields of :class:`eroseg_ext.AttackSettings`, explained below.

    Returns:
        Images like ``images`` (shape, dtype), ``|result - images| <= eps`` and within ``clip``, to rounding; with
        ``return_info`` also the info. ``eps=0`` and an image without valid pixels return the input bit for bit. Of
        iterates (``keep="best"``) or restarts with equally many correct pixels the earliest is returned.
        float16 and bfloat16 images are rounded towards the clean ones, as the nearest value may lie outside the ball:
        their perturbation is up to a rounding step weaker, and float32 images have none of that.

    Raises:
        ValueError, TypeError: an argument is not as described; one sentence names it. Nothing was done then.
        NotFiniteError: (a RuntimeError) the model's logits or gradients are NaN or infinite; names step and image.
            Raised at the end of the call, so that the loop needs no synchronisation.
        RuntimeError: with ``graph``, the model cannot be captured.

    Warns:
        UserWarning: the output looks like probabilities, or is of a size that no stride gives; an image's gradient is 0
            everywhere in the first step; or a length can hardly be in the images' units.

    Source: arXiv 2601.14950 for ``eroseg``; the other methods' are in :func:`eroseg_ext.ops.reference.pixel_grad`.
    """
    config = AttackSettings.create(**settings)
    return Loop(config, model, images, labels, mask, generator=generator, callback=callback).result(return_info)


def _host_waits(device: torch.device) -> bool:
    """Whether reading a tensor makes the host wait for work that it has queued."""
    return device.type != "cpu"


class _Leavers:
    """Under ``early_stop``, which images of a part still take steps, where the host must not wait to know.

    Finished images stay in the batch and are restored after each step, so that no result depends on when the host
    learns of them: it polls asynchronously, and ends the steps some time after all have finished.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.going = torch.ones(count, dtype=torch.bool, device=device)
        self.all_have_left = False
        self._any_going = torch.ones((), dtype=torch.bool, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._is_copying = False

    def update(self, going: Tensor) -> None:
        """Takes note of who goes on after this step."""
        self.going = self.going & going
        if self._is_copying and (self._copied is None or self._copied.query()):
            self.all_have_left = not bool(self._any_going)
            self._is_copying = False
        if not self._is_copying:
            self._any_going.copy_(self.going.any(), non_blocking=True)
            if self._copied is not None:
                self._copied.record(torch.cuda.current_stream(self.going.device))
            self._is_copying = True


@dataclass
class Loop(Engine):
    """:func:`attack` with settings that were made before: projected steps of one size."""

    generator: torch.Generator | None = None
    callback: Callback | None = None

    def result(self, return_info: bool) -> Tensor | tuple[Tensor, AttackInfo]:
        """What :func:`attack` returns."""
        found, info = self.run(return_info)
        return found if info is None else (found, info)

    def noise(self, restart: int) -> Tensor:
        config = self.config
        return noise_in_ball(self.clean.shape, config.norm, config.eps, self.changeable, self.generator)

    def ascend(self, restart: int, part: Part, images: Tensor, bar: tqdm[Any]) -> None:
        config = self.config
        # Without early_stop the steps are taken in place; with it, images holds those from before the step.
        x_adv = images.clone() if config.early_stop else images
        first = part.rows[:1]
        stays_whole = self.is_sharded or _host_waits(x_adv.device)
        leavers = _Leavers(len(images), x_adv.device) if config.early_stop and stays_whole else None
        for step in range(self.steps):
            active = leavers.going if leavers else None
            found = self.evaluate(part, x_adv, restart, step, active, keep_logits=self.callback is not None)
            if config.keep == "best" and self.best is not None:
                self.best.offer(part.at, x_adv, found.stats[:, 1])
            if config.early_stop:
                going = self.unfinished(found.stats)
                images[part.rows - first] = x_adv
            step_ = self.ops.linf_step_ if config.norm == "linf" else self.ops.l2_step_
            step_(x_adv, part.clean, found.grad, config.eps, config.alpha, *config.clip, part.mask)
            if leavers is not None:
                leavers.update(going)
                x_adv.copy_(x_adv.where(leavers.going.view(-1, 1, 1, 1), images))
            if self.callback is not None and found.logits is not None:
                logits = found.logits.at(self.size)
                self.callback(StepInfo(restart, step, part.rows, found.stats, found.tau, logits, x_adv))
                del logits  # or they would live on beside those of the next forward pass
            del found
            bar.update()
            if leavers is not None:
                # Every pass of a sharded model waits for the other processes, whose images may still take steps.
                ends = leavers.all_have_left and not self.is_sharded
            elif config.early_stop:
                if not going.all():
                    x_adv = x_adv[going]
                    part.select(going)
                ends = len(x_adv) == 0
            else:
                ends = False
            if ends:
                bar.update(self.steps - 1 - step)
                break
        if config.early_stop:
            images[part.rows - first] = x_adv
