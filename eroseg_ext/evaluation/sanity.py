"""Checks that an attack's figures can be believed: each says in one line what it looked at and what it found.

They find models whose robustness is an illusion (masked or noisy gradients, probabilities for logits, random answers)
and attacks that are broken, after Carlini et al., "On Evaluating Adversarial Robustness" (2019), and Athalye et al.,
"Obfuscated Gradients Give a False Sense of Security" (ICML 2018).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from eroseg_ext.attacks import volumes
from eroseg_ext.attacks.apgd import noise_seed, strong_attack
from eroseg_ext.models.adapter import SETTINGS as OF_THE_MODEL
from eroseg_ext.models.adapter import Logits, Model, Pass, frozen, unwrapped
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops.pixel_terms import predicted_classes
from eroseg_ext.utils.precision import wide

STEPS = 10
"""Steps of the attacks along the ladder of budgets."""
LADDER_OF_STEPS = (1, 3, 10, 30)
LARGE_EPS = 64 / 255
"""A budget that no model withstands, as a part of the range of pixel values."""
LARGEST_EPS = 0.99
"""The largest budget tried, as a part of the range: one of the whole range bounds nothing, and attacks refuse it."""
LARGE_STEPS = 60
"""Steps in that ball, which is a long way across: after 30 an attack that works can still be on its way."""
NEAR_ZERO = 5.0
"""Pixel accuracy in percent that counts as none left."""
SLACK = 1.0
"""Points of accuracy by which it may rise where it should fall: short attacks on few images are noisy."""
MASKED = 0.1
"""Share of pixels without a gradient from which on the gradient counts as masked."""

OF_CLEAN = frozenset({"deterministic", "logits"})
"""Checks without which not even the clean scores can be believed."""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    passed: bool
    verdict: str
    """one line"""


def budget(eps: float, norm: str = "linf") -> str:
    """``eps`` in words: in l_inf as 255ths where it is a multiple of a quarter of one."""
    quarters = eps * 255 * 4
    whole = norm == "linf" and eps < 1 and abs(quarters - round(quarters)) < 1e-6
    return f"{round(quarters) / 4:g}/255" if whole else f"{eps:.4g}"


def check(model: Model, images: Tensor, labels: Tensor, *, eps: float, **settings: Any) -> list[Check]:
    """Runs every check on a few images.

    Args:
        model: as :func:`eroseg_ext.attack` takes it.
        images: ``[B, K, H, W]``, a few are enough.
        labels: ``[B, H, W]``, on the same device.
        eps: largest budget of the evaluation; with 0 a quarter of ``LARGE_EPS`` takes its place.
        **settings: those of :func:`eroseg_ext.strong_attack` that all attacks of the evaluation share.

    Returns:
        The checks in a fixed order. One that could not be run, because the attack itself failed, has not passed.
    """
    checker = _Checker(unwrapped(model), images, labels, eps, settings)
    checks = {
        "deterministic": checker.deterministic,
        "logits": checker.are_logits,
        "gradients": checker.gradients,
        "eps 0": checker.zero_eps,
        "falls with eps": checker.falls_with_eps,
        "falls with steps": checker.falls_with_steps,
        "large eps": checker.large_eps,
        "beats noise": checker.beats_noise,
    }
    with frozen(unwrapped(model), "eval"), warnings.catch_warnings():
        # What the attack would warn of is a check of its own here.
        warnings.simplefilter("ignore", UserWarning)
        return [_tried(name, run) for name, run in checks.items()]


def _tried(name: str, run: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *run())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return Check(name, False, f"could not be checked: {' '.join(str(error).split())}")


class _Checker:
    """The checks of one model on some images; each returns whether it passed, and the verdict."""

    def __init__(self, model: Model, images: Tensor, labels: Tensor, eps: float, settings: dict[str, Any]) -> None:
        self._model = model
        self._images = images
        self._labels = labels
        self._norm = settings.get("norm", "linf")
        self._linf = self._norm == "linf"
        # An l_2 ball as large as the l_inf ball's, were it filled: its norm over an image of so many values.
        low, high = settings.get("clip", (0.0, 1.0))
        extent = high - low if self._linf else (high - low) * images[0].numel() ** 0.5
        self._large = LARGE_EPS * extent
        self._largest = LARGEST_EPS * extent
        self._eps = eps if eps > 0 else self._large / 4
        self._settings = settings
        self._valid = labels != settings.get("ignore_index", 255)
        of_the_model = {name: settings[name] for name in OF_THE_MODEL if name in settings}
        self._logits = volumes.reader(model, lambda model: Logits(model, **of_the_model))
        self._known: dict[tuple[float, int], float] = {}

    def deterministic(self) -> tuple[bool, str]:
        with torch.no_grad():
            first, second = self._predict(self._images), self._predict(self._images)
        changed = float(wide((predicted_classes(first) != predicted_classes(second))[self._valid]).mean())
        largest = float((first - second).abs().max())
        scale = float(first.abs().max())
        if largest <= 1e-4 * scale:
            return True, "two forward passes give the same logits"
        return False, (
            f"two forward passes differ, by up to {largest:.3g} in logits of up to {scale:.3g} and in "
            f"{100 * changed:.2f} % of the predictions: the model is stochastic, and an attack must average over that"
        )

    def are_logits(self) -> tuple[bool, str]:
        with torch.no_grad():
            output = self._predict(self._images)
        if self._settings.get("output", "logits") != "logits":
            return True, f"the outputs are made logits, they range from {output.amin():.3g} to {output.amax():.3g}"
        if bool(output.amin() >= 0) and bool(output.amax() <= 1):
            sums = output.shape[1] > 1 and bool(((output.sum(1) - 1).abs() < 1e-2).all())
            found = "every pixel's outputs are not negative and sum to 1" if sums else "all outputs lie within [0, 1]"
            layer, output_is = ("softmax", "probabilities") if sums else ("sigmoid", "sigmoid")
            return False, (
                f"{found}: these are probabilities, whose gradients vanish; remove the {layer}, or set "
                f"output={output_is!r}"
            )
        return True, f"the outputs are no probabilities, they range from {output.amin():.3g} to {output.amax():.3g}"

    def gradients(self) -> tuple[bool, str]:
        """The gradient of the prediction's negative log-odds, summed over all pixels, void or not.

        Unlike cross-entropy's it does not vanish where a model is sure.
        """
        model = Pass(lambda images: LogitMap(self._predict(images), False))
        with torch.enable_grad():
            try:
                logits = model.logits(self._images).values.requires_grad_()
            except ValueError as error:
                return False, f"{error}: no gradient reaches the attack"
            if logits.shape[1] == 1:
                loss = -logits.abs()
            else:
                top = logits.argmax(1, keepdim=True)
                loss = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True) - logits.gather(1, top)
            gradient = model.gradient(torch.autograd.grad(loss.sum(), logits)[0])
        broken = float(wide(~gradient.isfinite()).mean())
        if broken > 0:
            return False, f"{100 * broken:.2f} % of the gradient is NaN or infinite"
        zero = float(wide((gradient == 0).all(1)).mean())
        whole = int((gradient == 0).flatten(1).all(1).sum())
        if zero >= MASKED or whole:
            verdict = f"{100 * zero:.1f} % of the input pixels have a gradient of exactly 0: gradients are masked"
            return False, verdict + (f", on {whole} of {len(gradient)} images everywhere" if whole else "")
        return True, f"{100 * zero:.2f} % of the input pixels have a gradient of exactly 0"

    def zero_eps(self) -> tuple[bool, str]:
        clean, attacked = self._accuracy(self._images), self._attacked(0.0, 3)
        if clean == attacked:
            return True, f"with eps 0 the accuracy is the clean one, {clean:.2f} %"
        return False, f"with eps 0 the accuracy is {attacked:.2f} %, wanted the clean one, {clean:.2f} %"

    def falls_with_eps(self) -> tuple[bool, str]:
        budgets = [min(factor * self._eps, self._largest) for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
        found = [self._accuracy(self._images), *(self._attacked(eps, STEPS) for eps in budgets)]
        return _falls(found, f"from eps 0 over {', '.join(budget(eps, self._norm) for eps in budgets)}")

    def falls_with_steps(self) -> tuple[bool, str]:
        found = [self._attacked(self._eps, steps) for steps in LADDER_OF_STEPS]
        return _falls(found, f"over {', '.join(map(str, LADDER_OF_STEPS))} steps")

    def large_eps(self) -> tuple[bool, str]:
        eps = min(max(self._large, 4 * self._eps), self._largest)
        left = self._attacked(eps, LARGE_STEPS)
        words = f"eps {budget(eps, self._norm)} leaves an accuracy of {left:.2f} %"
        if left <= NEAR_ZERO:
            return True, words
        return False, f"{words}, wanted at most {NEAR_ZERO:g} %: the attack fails where no model can withstand"

    def beats_noise(self) -> tuple[bool, str]:
        attacked = self._attacked(self._eps, STEPS)
        generator = torch.Generator().manual_seed(noise_seed(0, 0, 0))
        signs = torch.randint(0, 2, self._images.shape, generator=generator).to(self._images) * 2 - 1
        size = self._eps if self._linf else self._eps / self._images[0].numel() ** 0.5
        noisy = self._accuracy((self._images + size * signs).clamp(*self._settings.get("clip", (0.0, 1.0))))
        eps = budget(self._eps, self._norm)
        words = f"eps {eps}: accuracy {attacked:.2f} % under attack, {noisy:.2f} % under noise of that size"
        if attacked < noisy - SLACK or noisy == 0:
            return True, words
        return False, f"{words}: the gradient is no better than chance"

    def _predict(self, images: Tensor) -> Tensor:
        height, width = self._labels.flatten(1, -2).shape[1:]
        logits = self._logits(images).at((height, width)).float()
        return logits.reshape(*logits.shape[:2], *self._labels.shape[1:])

    def _accuracy(self, images: Tensor) -> float:
        with torch.no_grad():
            correct = (predicted_classes(self._predict(images)) == self._labels) & self._valid
        return 100 * float(correct.sum()) / max(float(self._valid.sum()), 1.0)

    def _attacked(self, eps: float, steps: int) -> float:
        if (eps, steps) not in self._known:
            adversarial = strong_attack(self._model, self._images, self._labels, eps=eps, steps=steps, **self._settings)
            self._known[eps, steps] = self._accuracy(adversarial)
        return self._known[eps, steps]


def _falls(accuracies: list[float], where: str) -> tuple[bool, str]:
    listed = ", ".join(f"{value:.2f}" for value in accuracies)
    rises = max(after - before for before, after in pairwise(accuracies))
    if rises <= SLACK:
        return True, f"accuracy falls {where}: {listed} %"
    return False, f"accuracy rises by {rises:.2f} points {where}: {listed} %"
