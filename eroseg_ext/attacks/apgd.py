"""The evaluation-grade attack: APGD around any method's gradient, in one ball or in shrinking ones.

APGD (Croce & Hein, ICML 2020) is sign ascent with momentum that starts at steps of 2 radii and halves them, image by
image, where it no longer gets on; SEA (Croce, Singh & Hein, ECCV 2024) runs it first in larger balls, 2 eps and
1.5 eps, and projects between them. An image's progress is the number of its correct pixels: it is defined for every
method, it is what the evaluation reports, and every gradient operation returns it at no cost.

The larger balls pay on some models and methods and cost strength on others (``bench/NOTES.md``), so both are here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from tqdm import tqdm

from eroseg_ext.attacks.ball import Ball, noise_in_ball
from eroseg_ext.attacks.engine import Engine, Part
from eroseg_ext.attacks.options import StrongOptions, with_settings
from eroseg_ext.attacks.result import AttackInfo
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.models.adapter import Model
from eroseg_ext.utils.validate import check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

RADII = {"fixed": ((1.0, 100),), "shrinking": ((2.0, 30), (1.5, 30), (1.0, 40))}
"""Radii in units of eps, and the percentage of the steps spent in each; ``shrinking`` is SEA's."""
MOMENTUM = 0.75
"""Weight of the new step; the rest is that of the previous one."""
IMPROVING = 0.75
"""A step size is kept while at least this part of the steps since the last checkpoint improved."""
DEFAULTS: dict[str, Any] = {"steps": 100}
"""Defaults that differ from ``attack``'s."""
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
    """The balls of an attack of so many steps. Phases of zero steps are dropped; the final one (radius eps) stays."""
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
    **settings: Unpack[StrongOptions],
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
    **settings: Unpack[StrongOptions],
) -> tuple[Tensor, AttackInfo]: ...
@with_settings(StrongOptions, **DEFAULTS)
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
    """The evaluation-grade attack: APGD around the gradient of any method.

    >>> adversarial = eroseg_ext.strong_attack(model, images, labels, method="eroseg", eps=4 / 255, steps=100)

    Model, images and labels are as :func:`eroseg_ext.attack` takes them; the model is left as it was found. The loop
    never waits for the device: step sizes, restarts from the best iterate and the choice of the result are tensors.

    Args:
        model, images, labels, mask: as :func:`eroseg_ext.attack` takes them.
        seed: of the random starts. An image's noise depends on the seed, its index and the restart, on nothing else.
        indices: B numbers that name the images in a larger set; default 0 to B-1.
        radii: ``fixed``: all steps in the ball of eps; ``shrinking``: 30 % of them in that of 2 eps, then 30 % in
            1.5 eps, then 40 % in eps.
        return_info: also return an :class:`AttackInfo`; its ``stats[r, t]`` are of the iterate that step t evaluated,
            which lies in the ball of that step's phase.
        **settings: fields of :class:`eroseg_ext.AttackSettings`, explained below. Step sizes, the best iterate and the
            untargeted goal are this attack's own.

    Returns:
        Images as :func:`eroseg_ext.attack` returns them: of all iterates in the ball of eps the one with the fewest
        correct pixels, of equally many the earliest, over the restarts too.

    Raises:
        ValueError, TypeError, NotFiniteError: as :func:`eroseg_ext.attack`.

    Source: Croce & Hein, ICML 2020 (APGD); Croce, Singh & Hein, ECCV 2024 (radii of SEA).
    """
    config = checked(radii=radii, **settings)
    loop = Loop(config, model, images, labels, mask, indices=indices, seed=seed, radii=radii)
    found, info = loop.run(return_info=True)
    return found if info is None or not return_info else (found, info)


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


@dataclass
class Loop(Engine):
    """:func:`strong_attack` with settings that :func:`checked` has made."""

    seed: int = 0
    radii: str = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.phases = phases(self.config.eps, self.steps, self.radii)

    def noise(self, restart: int) -> Tensor:
        one, radius, noise = self.clean[:1].shape, self.phases[0].radius, []
        for number, changeable in zip(self.numbers, self.changeable.cpu().split(1), strict=True):
            generator = torch.Generator().manual_seed(noise_seed(self.seed, number, restart))
            noise.append(noise_in_ball(one, self.config.norm, radius, changeable, generator))
        return torch.cat(noise)

    def ascend(self, restart: int, part: Part, images: Tensor, bar: tqdm[Any]) -> None:
        x_adv = images
        for phase in self.phases:
            x_adv = self._phase(restart, part, x_adv, phase, bar)
        images.copy_(x_adv)

    def _evaluate(self, restart: int, part: Part, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Correct pixels ``[B]`` of the images, and the gradient with respect to them."""
        found = self.evaluate(part, images, restart, step)
        return found.stats[:, 1], found.grad

    def _phase(self, restart: int, part: Part, images: Tensor, phase: Phase, bar: tqdm[Any]) -> Tensor:
        """Takes a phase's steps from images that need not be in its ball; returns those that the next starts from."""
        radius = phase.radius
        ball = Ball(self.clean, self.config, self.changeable, radius)
        images = previous = ball.project(images)
        size = torch.full((len(images), 1, 1, 1), 2 * radius, dtype=torch.float32, device=images.device)
        halved_last = torch.ones(len(images), dtype=torch.bool, device=images.device)
        improvements = torch.zeros(len(images), dtype=torch.float32, device=images.device)
        checked = 0
        for number in range(phase.steps):
            correct, grad = self._evaluate(restart, part, images, phase.first + number)
            if radius == self.config.eps and self.best is not None:
                self.best.offer(part.at, images, correct)
            if number == 0:
                best, best_correct, best_grad = images, correct, grad
                correct_at_check, last_correct = correct, correct
            else:
                improvements = improvements + (correct < last_correct)
                better = correct < best_correct
                best, best_grad = _choose(better, images, best), _choose(better, grad, best_grad)
                best_correct, last_correct = torch.where(better, correct, best_correct), correct
            if number in phase.checkpoints:
                oscillates = improvements <= IMPROVING * (number - checked)
                stuck = ~halved_last & (best_correct >= correct_at_check)
                halve = oscillates | stuck
                size = torch.where(halve.view(-1, 1, 1, 1), size / 2, size)
                images, previous = _choose(halve, best, images), _choose(halve, best, previous)
                grad, last_correct = _choose(halve, best_grad, grad), torch.where(halve, best_correct, last_correct)
                halved_last, correct_at_check, checked = halve, best_correct, number
                improvements = torch.zeros_like(improvements)
            stepped = ball.step(images, grad, size)
            if number > 0:
                blend = images.lerp(stepped, MOMENTUM).add_(images - previous, alpha=1 - MOMENTUM)
                stepped = ball.project(blend)
            images, previous = stepped, images
            bar.update()
        return images


def _choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Images (or gradients) of ``yes`` where ``condition[B]`` holds, of ``no`` elsewhere."""
    return torch.where(condition.view(-1, 1, 1, 1), yes, no)
