"""The evaluation-grade attack: APGD around any method's gradient, in one ball or in shrinking ones.

APGD (Croce & Hein, ICML 2020) is sign ascent with momentum that starts at steps of 2 radii and halves them, image by
image, where it no longer gets on; SEA (Croce, Singh & Hein, ECCV 2024) runs it first in larger balls, 2 eps and
1.5 eps, and projects between them. An image's progress is the number of its right pixels: it is defined for every
method, it is what the evaluation reports, and every gradient operation returns it at no cost.

The larger balls pay on some models and methods and cost strength on others (``bench/NOTES.md``), so both are here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from tqdm import tqdm

from eroseg_ext.attacks import inputs, methods
from eroseg_ext.attacks.ball import delivered, shown
from eroseg_ext.attacks.pgd import AttackInfo, NotFiniteError, uniform_in_l2_ball
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.models.adapter import Logits, Model, Pass, frozen, unwrapped
from eroseg_ext.ops import backend
from eroseg_ext.utils.validate import check_choice

RADII = {"fixed": ((1.0, 100),), "shrinking": ((2.0, 30), (1.5, 30), (1.0, 40))}
"""Radii in units of eps, and the percentage of the steps spent in each; ``shrinking`` is SEA's."""
MOMENTUM = 0.75
"""Weight of the new step; the rest is that of the previous one."""
IMPROVING = 0.75
"""A step size is kept while at least this part of the steps since the last checkpoint improved."""
DEFAULTS: dict[str, Any] = {"steps": 100, "front_min": 0.1}
"""Defaults that differ from ``attack``'s: over many steps a front of 3 % leaves too many pixels alone."""
NOT_OF_APGD = ("step_size", "targeted", "keep", "early_stop", "micro_batch", "graph", "preset")
"""Settings of ``attack`` that this attack decides for itself."""


class Phase(NamedTuple):
    """Some consecutive steps in one ball."""

    radius: float
    first: int
    steps: int
    checkpoints: tuple[int, ...]
    """numbers of the evaluations, counted from 0 within the phase, after which step sizes are reconsidered"""


def phases(eps: float, steps: int, radii: str = "fixed") -> list[Phase]:
    """The balls of an attack of so many steps; parts of less than a step are left out, and the last one is not."""
    parts = RADII[radii]
    ends = [steps * sum(percentage for _, percentage in parts[: index + 1]) // 100 for index in range(len(parts))]
    starts = [0, *ends[:-1]]
    return [
        Phase(factor * eps, start, end - start, _checkpoints(end - start))
        for (factor, _), start, end in zip(parts, starts, ends, strict=True)
        if end > start
    ]


def _checkpoints(steps: int) -> tuple[int, ...]:
    """APGD's: the first after 22 % of the steps, every interval 3 % shorter than the one before, but at least 6 %."""
    interval, shortest, shrink = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    found, at = [], interval
    while at < steps:
        found.append(at)
        interval = max(interval - shrink, shortest)
        at += interval
    return tuple(found)


@overload
def strong_attack(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    radii: str = "fixed",
    return_info: Literal[False] = False,
    **settings: Any,
) -> Tensor: ...


@overload
def strong_attack(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    radii: str = "fixed",
    return_info: Literal[True],
    **settings: Any,
) -> tuple[Tensor, AttackInfo]: ...


def strong_attack(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    radii: str = "fixed",
    return_info: bool = False,
    **settings: Any,
) -> Tensor | tuple[Tensor, AttackInfo]:
    """Adversarial images as strong as this package can make them: APGD and the best iterate, image by image.

    >>> adversarial = eroseg_ext.strong_attack(model, images, labels, method="eroseg", eps=4 / 255, steps=100)

    Model, images and labels are as :func:`eroseg_ext.attack` takes them; the model is left as it was found. The loop
    never waits for the device: step sizes, restarts from the best iterate and the choice of the result are tensors.

    Args:
        model: nn.Module or any differentiable callable from images to logits.
        images: ``[B, K, H, W]`` float32, float64, float16 or bfloat16, pixel values within ``clip``.
        labels: ``[B, H, W]`` int64, int32 or uint8; None: the model's own prediction on the clean images.
        mask: ``[B, 1, H, W]`` bool: the pixels that may change; default all.
        seed: of the random starts. An image's noise depends on the seed, its index and the restart, on nothing else.
        indices: B numbers that name the images in a larger set; default 0 to B-1.
        radii: ``fixed``: all steps in the ball of eps; ``shrinking``: 30 % of them in that of 2 eps, then 30 % in
            1.5 eps, then 40 % in eps.
        return_info: also return an :class:`AttackInfo`; its ``stats[r, t]`` are of the iterate that step t evaluated,
            which lies in the ball of that step's phase.
        **settings: fields of :class:`eroseg_ext.AttackSettings` with its defaults, but ``steps=100`` and, for
            eroseg, ``front_min=0.1``: ``method``, ``eps``, ``steps`` (gradients per restart), ``restarts``, ``norm``,
            ``ignore_index``, ``random_start``, ``clip``, ``mean``, ``std``, ``autocast``, ``output``,
            ``output_key``, ``logits``, ``align_corners``, ``backend``, ``model_mode``, ``progress`` and what
            ``method`` takes. Step sizes, the best iterate and the untargeted goal are this attack's own.

    Returns:
        Images like ``images``, ``|result - images| <= eps`` and within ``clip``, to rounding: of all iterates in the
        ball of eps the one with the fewest right pixels, of equally many the earliest, over the restarts too. ``eps=0``
        and an image without valid pixels return the input. float16 and bfloat16 images are rounded towards the clean
        ones, as :func:`eroseg_ext.attack` does.

    Raises:
        ValueError, TypeError: an argument is not as described; one sentence names it. Nothing was done then.
        NotFiniteError: (a RuntimeError) the model's logits or gradients are NaN or infinite.

    Source: Croce & Hein, ICML 2020 (APGD); Croce, Singh & Hein, ECCV 2024 (radii of SEA).
    """
    config = checked(radii=radii, **settings)
    inputs.check(images, labels, mask, config)
    numbers = list(range(len(images))) if indices is None else list(indices)
    if len(numbers) != len(images):
        raise ValueError(f"indices has {len(numbers)} numbers, wanted {len(images)}, one per image")
    model = unwrapped(model)
    logits = Logits.under(model, config, dtype=images.dtype)
    ops = backend.select(images.device, config.backend, methods.reference_option(config))
    with torch.inference_mode(False), torch.enable_grad(), frozen(model, config.model_mode):
        search = _Search(config, radii, logits, ops, images, labels, mask)
        adversarial, info = search.run(seed, numbers)
    return (adversarial, info) if return_info else adversarial


def checked(*, radii: str = "fixed", **settings: Any) -> AttackSettings:
    """The settings that :func:`strong_attack` would run with; raises as it does if they are not allowed."""
    check_choice("radii", radii, tuple(RADII))
    for name in NOT_OF_APGD:
        if name in settings:
            raise TypeError(f"{name} is not a setting of strong_attack(), which decides it itself")
    return AttackSettings.create(**{**DEFAULTS, **settings})


def noise_seed(seed: int, index: int, restart: int) -> int:
    """Seed of the generator that draws an image's random start."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {restart}".encode()).digest()[:8], "little")


class _Ball:
    """The images that may be reached: the l_p ball around the clean ones, the range of pixel values, the mask."""

    def __init__(self, clean: Tensor, config: AttackSettings, mask: Tensor, radius: float) -> None:
        self._clean = clean
        self._mask = mask
        self._radius = radius
        self._linf = config.norm == "linf"
        # Bounds that coincide hold a pixel where it is: outside the mask, and where the image has no valid pixel.
        reach = radius if self._linf else torch.inf
        self._low = (clean - reach).clamp(*config.clip).where(mask, clean)
        self._high = (clean + reach).clamp(*config.clip).where(mask, clean)

    def project(self, images: Tensor) -> Tensor:
        """The nearest images in the ball."""
        if not self._linf:
            delta = (images - self._clean).where(self._mask, 0.0)
            length = _length(delta)
            images = self._clean + torch.where(length > self._radius, self._radius / length, 1.0).float() * delta
        return images.clamp(self._low, self._high)

    def step(self, images: Tensor, grad: Tensor, size: Tensor) -> Tensor:
        """``images`` moved along the gradient by ``size[B, 1, 1, 1]``, projected. NaN gradients make NaN images."""
        if self._linf:
            direction = grad.sign().masked_fill_(grad.isnan(), torch.nan)
        else:
            grad = grad.where(self._mask, 0.0)
            length = _length(grad)
            direction = grad * torch.where(length == 0, 0.0, 1 / length).float()
        return self.project(direction.mul_(size).add_(images))


def _length(images: Tensor) -> Tensor:
    return images.double().flatten(1).norm(dim=1).view(-1, 1, 1, 1)


class _Search:
    """One call of :func:`strong_attack`."""

    def __init__(
        self,
        config: AttackSettings,
        radii: str,
        logits: Logits,
        ops: ModuleType,
        images: Tensor,
        labels: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        steps = config.steps if config.eps > 0 and images.numel() > 0 else 0
        dtype, image_size = images.dtype, (images.shape[-2], images.shape[-1])
        self._forward = lambda pixels: logits(pixels, image_size)
        self._pass = Pass(self._forward)
        self._ops = ops
        self._dtype = dtype
        self._images = images
        self._clean = images.detach().float()
        self._ignore_index = config.ignore_index  # as the caller has it
        self._labels, self._config, self._largest_label = inputs.narrowed(
            self._predicted() if labels is None else labels, dataclasses.replace(config, steps=max(steps, 1))
        )
        self._logits_checked = False
        self._valid = (self._labels.long() != self._config.ignore_index).sum((1, 2)).double()
        # An image of void pixels has no gradient, but momentum and noise would move it.
        changeable = (self._valid > 0).view(-1, 1, 1, 1)
        self._mask = changeable if mask is None else mask & changeable
        self._phases = phases(config.eps, steps, radii)
        self._buffer = methods.GradientBuffer()
        batch, device = len(images), images.device
        self._best_images = self._clean.clone()
        self._best_right = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
        # The row after the last step is for the final images, so that one look at the end covers every forward pass.
        self._stats = torch.zeros(config.restarts, steps + 1, batch, 4, dtype=torch.float64, device=device)
        self._tau = torch.zeros(config.restarts, steps, batch, dtype=torch.float32, device=device)
        self._nan_gradients = torch.zeros(config.restarts, steps + 1, batch, dtype=torch.bool, device=device)
        self._without_gradient = torch.zeros(batch, dtype=torch.bool, device=device)

    def run(self, seed: int, indices: list[int]) -> tuple[Tensor, AttackInfo]:
        config = self._config
        total = config.restarts * (self._stats.shape[1] - 1)
        with tqdm(total=total, desc=config.method, disable=not config.progress) as bar:
            for restart in range(config.restarts):
                images = self._start(seed, indices, restart)
                method = methods.create(config, self._ops, self._labels, self._buffer)
                for phase in self._phases:
                    images = self._ascend(images, method, phase, restart, bar)
                self._judge(images, restart)
        self._raise_unless_finite()
        inputs.warn_without_gradient(self._without_gradient, indices)
        tau = self._tau if config.method == "eroseg" else None
        info = AttackInfo(self._stats[:, :-1], tau, self._best_right, self._valid, self._without_gradient)
        return delivered(self._best_images, self._images, self._mask, config), info

    def _start(self, seed: int, indices: list[int], restart: int) -> Tensor:
        clean, config = self._clean, self._config
        if not (config.random_start and self._phases):
            return clean.clone()
        radius = self._phases[0].radius
        normal, uniform = [], []
        for index in indices:
            generator = torch.Generator().manual_seed(noise_seed(seed, index, restart))
            shape = clean.shape[1:]
            if config.norm == "linf":
                draw = torch.empty(shape, dtype=torch.float32)
                uniform.append(draw.uniform_(-radius, radius, generator=generator))
            else:
                normal.append(torch.randn(shape, dtype=torch.float32, generator=generator))
                uniform.append(torch.rand((), dtype=torch.float32, generator=generator))
        noise = torch.stack(uniform).to(clean.device)
        if config.norm == "l2":
            noise = uniform_in_l2_ball(torch.stack(normal).to(clean.device), noise, radius, self._mask)
        return clean + noise

    def _ascend(self, images: Tensor, method: methods.Method, phase: Phase, restart: int, bar: tqdm[Any]) -> Tensor:
        """Takes a phase's steps from images that need not be in its ball; returns those that the next starts from."""
        radius = phase.radius
        ball = _Ball(self._clean, self._config, self._mask, radius)
        images = previous = ball.project(images)
        size = torch.full((len(images), 1, 1, 1), 2 * radius, dtype=torch.float32, device=images.device)
        halved_last = torch.ones(len(images), dtype=torch.bool, device=images.device)
        improvements = torch.zeros(len(images), dtype=torch.float32, device=images.device)
        checked = 0
        for number in range(phase.steps):
            right, grad = self._evaluate(images, method, restart, phase.first + number)
            if radius == self._config.eps:
                self._offer(images, right)
            if number == 0:
                best, best_right, best_grad = images, right, grad
                right_at_check, last_right = right, right
            else:
                improvements = improvements + (right < last_right)
                better = right < best_right
                best, best_grad = _choose(better, images, best), _choose(better, grad, best_grad)
                best_right, last_right = torch.where(better, right, best_right), right
            if number in phase.checkpoints:
                oscillates = improvements <= IMPROVING * (number - checked)
                stuck = ~halved_last & (best_right >= right_at_check)
                halve = oscillates | stuck
                size = torch.where(halve.view(-1, 1, 1, 1), size / 2, size)
                images, previous = _choose(halve, best, images), _choose(halve, best, previous)
                grad, last_right = _choose(halve, best_grad, grad), torch.where(halve, best_right, last_right)
                halved_last, right_at_check, checked = halve, best_right, number
                improvements = torch.zeros_like(improvements)
            stepped = ball.step(images, grad, size)
            if number > 0:
                blend = images.lerp(stepped, MOMENTUM).add_(images - previous, alpha=1 - MOMENTUM)
                stepped = ball.project(blend)
            images, previous = stepped, images
            bar.update()
        return images

    def _evaluate(self, images: Tensor, method: methods.Method, restart: int, step: int) -> tuple[Tensor, Tensor]:
        """Right pixels ``[B]`` of the images, and the gradient with respect to them."""
        logits = self._pass.logits(shown(images, self._clean, self._dtype))
        if not self._logits_checked:
            inputs.check_first_logits(logits, self._largest_label, self._ignore_index, self._config.output)
            self._logits_checked = True
        grad_logits, stats = method.gradient(logits, step)
        self._stats[restart, step] = stats
        if method.tau is not None:
            self._tau[restart, step] = method.tau
        grad = self._pass.gradient(grad_logits)
        self._nan_gradients[restart, step], is_zero = inputs.gradient_flags(grad)
        if step == 0:
            self._without_gradient |= is_zero & (stats[:, 1] > 0)
        return stats[:, 1], grad

    def _judge(self, images: Tensor, restart: int) -> None:
        """Counts the right pixels of a restart's last iterate."""
        with torch.no_grad():
            logits = self._forward(shown(images, self._clean, self._dtype))
            _, stats = self._ops.pixel_grad(
                logits, self._labels, "pgd", ignore_index=self._config.ignore_index, out=self._buffer.like(logits)
            )
        self._stats[restart, -1] = stats
        self._offer(images, stats[:, 1])

    def _offer(self, images: Tensor, right: Tensor) -> None:
        better = right < self._best_right
        self._best_images = _choose(better, images, self._best_images)
        self._best_right = torch.where(better, right, self._best_right)

    def _predicted(self) -> Tensor:
        with torch.no_grad():
            logits = self._forward(self._clean)
        return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)

    def _raise_unless_finite(self) -> None:
        # In the order of events: a step's logits come before its gradient, which breaks the next step's logits.
        broken = torch.stack([self._stats[..., 3].isnan(), self._nan_gradients], 2)
        if bool(broken.any()):
            restart, step, of_gradient, image = broken.nonzero()[0].tolist()
            raise NotFiniteError(
                (
                    f"the model's gradient with respect to image {image} is NaN at step {step}"
                    if of_gradient
                    else f"the model's logits are NaN or infinite at step {step} for image {image}"
                )
                + (f" of restart {restart}" if self._config.restarts > 1 else "")
            )


def _choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Images (or gradients) of ``yes`` where ``condition[B]`` holds, of ``no`` elsewhere."""
    return torch.where(condition.view(-1, 1, 1, 1), yes, no)
