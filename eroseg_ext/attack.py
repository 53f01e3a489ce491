"""The attack loop: ``attack(model, images, labels)`` returns adversarial images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm

from eroseg_ext import backend, inputs, methods
from eroseg_ext.model import Logits, Model, frozen, unwrapped
from eroseg_ext.settings import AttackSettings


@dataclass(frozen=True)
class AttackInfo:
    """What happened, on the images' device; R restarts, T steps, B images.

    ``stats[r, t, b]`` describes the images before step t moved them; rows of steps that an image did not take (see
    ``early_stop``) are 0.
    """

    stats: Tensor
    """``[R, T, B, 4]`` float64: valid pixels, right pixels, front pixels, summed movement of the front"""
    tau: Tensor | None
    """``[R, T, B]`` float32, width of the front in log-odds; None for methods that have no front"""
    right: Tensor
    """``[B]`` float64, right pixels of the returned images"""
    valid: Tensor
    """``[B]`` float64, valid pixels"""


@dataclass(frozen=True)
class StepInfo:
    """What a callback is given after each step. The tensors are on the images' device: reading one synchronises."""

    restart: int
    step: int
    images: Tensor
    """``[b]`` int64: which images of the batch these are (see ``micro_batch`` and ``early_stop``)"""
    stats: Tensor
    """``[b, 4]`` float64, of the images before this step: valid, right, front pixels, movement"""
    tau: Tensor | None
    """``[b]`` float32; None for methods that have no front"""
    logits: Tensor
    """``[b, C, H, W]`` of the images before this step, detached"""
    adversarial: Tensor
    """``[b, K, H, W]`` float32, the images after this step; the next step overwrites them"""


Callback = Callable[[StepInfo], None]


class NotFiniteError(RuntimeError):
    """The model's logits or gradients are NaN or infinite; told apart from other errors for whoever trains."""


@overload
def attack(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    return_info: Literal[False] = False,
    **settings: Any,
) -> Tensor: ...


@overload
def attack(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    return_info: Literal[True],
    **settings: Any,
) -> tuple[Tensor, AttackInfo]: ...


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
    object with ``.logits``, or a tuple with logits first. Logits smaller than the labels are upsampled bilinearly.
    After the call the model is as it was: mode, requires_grad, .grad and BatchNorm statistics.

    Args:
        model: nn.Module (also compiled, or wrapped in DistributedDataParallel) or any differentiable callable.
        images: ``[B, K, H, W]`` float32, float16 or bfloat16, pixel values within ``clip``.
        labels: ``[B, H, W]`` int64, int32 or uint8: classes in [0, C) or ``ignore_index``. None: the model's own
            prediction on the clean images.
        mask: ``[B, 1, H, W]`` bool: the pixels that may change; default all.
        generator: source of the random start; default torch's global one.
        callback: called after each step with a :class:`StepInfo`.
        return_info: also return an :class:`AttackInfo` (costs one more forward pass).
        **settings: ``preset`` (None or ``"progressive"``, the literal reading of the paper's abstract) and the fields
            of :class:`eroseg_ext.AttackSettings`, with these defaults: ``method="eroseg"``, ``eps=8/255``,
            ``step_size=None`` (eps / 4), ``steps=10``, ``norm="linf"``, ``targeted=False``, ``ignore_index=255``,
            ``random_start=True``, ``restarts=1``, ``keep="last"``, ``early_stop=False``, ``clip=(0, 1)``,
            ``mean=None, std=None`` (the model wants normalised input; eps and clip stay in pixel values),
            ``autocast=None``, ``micro_batch=None``, ``backend="auto"``, ``model_mode="eval"``, ``progress=False``; for
            eroseg ``confidence``, ``front``, ``direction``, ``radius``, ``slope``, ``within``, ``threshold``,
            ``schedule``, ``reach``, ``front_first``, ``front_min``, ``front_max``, ``balance``, ``rho_range``; for
            cospgd ``variant``; for tsallis ``q``.

    Returns:
        Images like ``images`` (shape, dtype), ``|result - images| <= eps`` and within ``clip``, to rounding; with
        ``return_info`` also the info. ``eps=0`` and an image without valid pixels return the input bit for bit.

    Raises:
        ValueError, TypeError: an argument is not as described; one sentence names it. Nothing was done then.
        RuntimeError: the model's logits or gradients are NaN or infinite; names step and image. Raised at the end of
            the call, so that the loop needs no synchronisation.

    Source: arXiv 2601.14950 for ``eroseg``; the other methods' sources are in :func:`eroseg_ext.reference.pixel_grad`.
    """
    config = AttackSettings.create(**settings)
    inputs.check(images, labels, mask, config)
    model = unwrapped(model)
    logits = Logits(model, mean=config.mean, std=config.std, autocast=config.autocast)
    ops = backend.select(images.device, config.backend)
    with torch.inference_mode(False), torch.enable_grad(), frozen(model, config.model_mode):
        loop = _Loop(config, logits, ops, images, labels, mask)
        adversarial, info = loop.run(generator, callback, return_info)
    return (adversarial, info) if return_info else adversarial


class _Best:
    """The best images so far and how many of their pixels are right (minus that, if targeted); never synchronises."""

    def __init__(self, clean: Tensor, targeted: bool) -> None:
        self.images = clean.clone()
        self._sign = -1 if targeted else 1
        self._score = torch.full((clean.shape[0],), float("inf"), dtype=torch.float64, device=clean.device)

    @property
    def right(self) -> Tensor:
        return self._sign * self._score

    def offer(self, index: Tensor, images: Tensor, right: Tensor) -> None:
        """Keeps those of ``images`` (numbers ``index`` of the batch) that beat what is held; ties keep the later."""
        score = self._sign * right
        held = self._score[index]
        better = score <= held
        self._score[index] = torch.where(better, score, held)
        self.images[index] = torch.where(better.view(-1, 1, 1, 1), images, self.images[index])


class _Loop:
    """One call of :func:`attack`: what stays the same over its steps, and what is recorded of them."""

    def __init__(
        self,
        config: AttackSettings,
        logits: Logits,
        ops: ModuleType,
        images: Tensor,
        labels: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self._config = config
        self._logits = logits
        self._ops = ops
        self._dtype = images.dtype
        self._clean = images.detach().float()
        self._mask = mask
        batch, device = len(images), images.device
        self._parts = torch.arange(batch, device=device).split(config.micro_batch or max(batch, 1))
        self._labels = self._predicted() if labels is None else labels
        self._labels_checked = False
        self._valid = (self._labels.long() != config.ignore_index).sum((1, 2)).double()
        self._steps = config.steps if config.eps > 0 and images.numel() > 0 else 0
        self._buffer = methods.GradientBuffer()
        self._best = _Best(self._clean, config.targeted)
        # The row after the last step is for the final images, so that one look at the end covers every forward pass.
        self._stats = torch.zeros(config.restarts, self._steps + 1, batch, 4, dtype=torch.float64, device=device)
        self._tau = torch.zeros(config.restarts, self._steps, batch, device=device)
        self._broken_images = torch.zeros(batch, dtype=torch.bool, device=device)

    def run(
        self, generator: torch.Generator | None, callback: Callback | None, return_info: bool
    ) -> tuple[Tensor, AttackInfo]:
        config = self._config
        judge = return_info or config.keep == "best" or config.restarts > 1
        total = config.restarts * self._steps * len(self._parts)
        with tqdm(total=total, desc=config.method, disable=not config.progress) as bar:
            for restart in range(config.restarts):
                # Drawn for the whole batch at once, so that micro_batch does not change it.
                x_adv = self._start(generator)
                for rows in self._parts:
                    self._ascend(restart, rows, x_adv, callback, bar)
                    if judge:
                        self._judge(restart, rows, x_adv[rows])
                self._broken_images |= x_adv.isnan().flatten(1).any(1)
        self._raise_unless_finite()
        stats, tau = self._stats[:, :-1], self._tau if config.method == "eroseg" else None
        adversarial = self._best.images if judge else x_adv
        # Images of void pixels only have no gradient of their own, but -0.0 becomes 0.0 in a step, and batch statistics
        # (model_mode "train") couple the images.
        adversarial = adversarial.where((self._valid > 0).view(-1, 1, 1, 1), self._clean)
        return adversarial.to(self._dtype), AttackInfo(stats, tau, self._best.right, self._valid)

    def _start(self, generator: torch.Generator | None) -> Tensor:
        """The first iterate of a restart; images without a valid pixel start, and so end, at the clean image."""
        config, clean = self._config, self._clean
        if not (config.random_start and self._steps):
            return clean.clone()
        device = clean.device if generator is None else generator.device
        if config.norm == "linf":
            noise = torch.empty(clean.shape, device=device).uniform_(-config.eps, config.eps, generator=generator)
            noise = noise.to(clean.device)
        else:
            noise = torch.randn(clean.shape, device=device, generator=generator).to(clean.device)
            radius = torch.rand(len(clean), device=device, generator=generator).to(clean.device)
        changeable = (self._valid > 0).view(-1, 1, 1, 1)
        if self._mask is not None:
            changeable = changeable & self._mask
        noise = noise.where(changeable, 0.0)
        if config.norm == "l2":
            # Uniform in the ball: a Gaussian direction, and a radius whose d-th power is uniform.
            dimensions = changeable.expand_as(noise).flatten(1).sum(1).clamp(min=1)
            length = config.eps * radius.double() ** (1 / dimensions)
            norm = noise.double().flatten(1).norm(dim=1).clamp(min=1e-30)
            noise = noise * (length / norm).float().view(-1, 1, 1, 1)
        return (clean + noise).clamp(*config.clip).where(changeable, clean)

    def _ascend(self, restart: int, rows: Tensor, x_adv_all: Tensor, callback: Callback | None, bar: tqdm[Any]) -> None:
        """Takes the steps of the images ``rows``; their last iterates are in ``x_adv_all`` afterwards."""
        config = self._config
        x_adv, clean, labels = x_adv_all[rows], self._clean[rows], self._labels[rows]
        mask = None if self._mask is None else self._mask[rows]
        method = methods.create(config, self._ops, labels, self._buffer)
        for step in range(self._steps):
            leaf = x_adv.detach().requires_grad_()
            logits = self._forward(leaf)
            grad_logits, stats = method.gradient(logits.detach(), step)
            right = stats[:, 1]
            self._stats[restart, step, rows] = stats
            if method.tau is not None:
                self._tau[restart, step, rows] = method.tau
            if config.keep == "best":
                self._best.offer(rows, x_adv, right)
            (grad,) = torch.autograd.grad(logits, leaf, grad_logits)
            if config.early_stop:
                x_adv_all[rows] = x_adv
            self._step_(x_adv, clean, grad, mask)
            if callback is not None:
                callback(StepInfo(restart, step, rows, stats, method.tau, logits.detach(), x_adv))
            del logits  # or they would live on beside those of the next forward
            bar.update()
            if config.early_stop:
                going = right != (stats[:, 0] if config.targeted else 0)
                if not going.all():
                    rows, x_adv, clean, labels = rows[going], x_adv[going], clean[going], labels[going]
                    mask = None if mask is None else mask[going]
                    method.select(going)
                if len(rows) == 0:
                    bar.update(self._steps - 1 - step)
                    break
        x_adv_all[rows] = x_adv

    def _forward(self, images: Tensor) -> Tensor:
        size = (self._clean.shape[-2], self._clean.shape[-1])
        logits = self._logits(images.to(self._dtype), size)
        if images.requires_grad and not self._labels_checked:
            inputs.check_first_logits(logits, self._labels, self._config.ignore_index)
            self._labels_checked = True
        return logits

    def _step_(self, x_adv: Tensor, clean: Tensor, grad: Tensor, mask: Tensor | None) -> None:
        config = self._config
        step_ = self._ops.linf_step_ if config.norm == "linf" else self._ops.l2_step_
        step_(x_adv, clean, grad, config.eps, config.alpha, *config.clip, mask)

    def _judge(self, restart: int, rows: Tensor, x_adv: Tensor) -> None:
        """Counts the right pixels of final images and keeps the best; every gradient op counts, so ask the plainest."""
        with torch.no_grad():
            logits = self._forward(x_adv)
            _, stats = self._ops.pixel_grad(
                logits, self._labels[rows], "pgd", ignore_index=self._config.ignore_index, out=self._buffer.like(logits)
            )
        self._stats[restart, -1, rows] = stats
        self._best.offer(rows, x_adv, stats[:, 1])

    def _predicted(self) -> Tensor:
        """The model's own prediction on the clean images, ``[B, H, W]`` int64."""
        with torch.no_grad():
            logits = (self._forward(self._clean[rows]) for rows in self._parts)
            return torch.cat([(z[:, 0] > 0).long() if z.shape[1] == 1 else z.argmax(1) for z in logits])

    def _raise_unless_finite(self) -> None:
        broken_logits = self._stats[..., 3].isnan()
        if bool(broken_logits.any() | self._broken_images.any()):
            if broken_logits.any():
                restart, step, image = broken_logits.nonzero()[0].tolist()
                where = "after the last step" if step == self._steps else f"at step {step}"
                raise NotFiniteError(
                    f"the model's logits are NaN or infinite {where} for image {image}"
                    + (f" of restart {restart}" if self._config.restarts > 1 else "")
                )
            image = self._broken_images.nonzero()[0].item()
            raise NotFiniteError(f"the model's gradient with respect to image {image} is NaN")
