"""Free adversarial training: the gradient of an update makes the perturbation of the next, with the same batch.

Source: Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eroseg_ext.attacks.ball import Ball, noise_in_ball
from eroseg_ext.attacks.settings import AttackSettings


class Perturbed:
    """Images in a ball that move with the gradient which a backward pass leaves with them.

    Args:
        clean: ``[B, K, H, W]`` float32.
        rows: ``[N]`` int64, the images that are perturbed.
        config: norm, eps, step size, range, and whether they start at random.
        generator: of the noise, which is drawn for these images alone.
    """

    def __init__(self, clean: Tensor, rows: Tensor, config: AttackSettings, generator: torch.Generator) -> None:
        changeable = torch.zeros(len(clean), 1, 1, 1, dtype=torch.bool, device=clean.device).index_fill(0, rows, True)
        self._ball = Ball(clean, config, changeable, config.eps)
        self._step = torch.full_like(changeable, config.alpha, dtype=torch.float32)
        images = clean.clone()
        if config.random_start:
            images[rows] += noise_in_ball(clean[rows].shape, config.norm, config.eps, changeable[rows], generator)
        self.images = self._ball.project(images)

    def move(self) -> None:
        """A step along the gradient, projected on the ball."""
        assert self.images.grad is not None
        self.images = self._ball.step(self.images.detach(), self.images.grad, self._step)
