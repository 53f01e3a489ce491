"""What every attack loop shares: inputs checked and prepared once, the model's passes, what is recorded of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from eroseg_ext.attacks import gradients, inputs, volumes
from eroseg_ext.attacks.ball import delivered, shown
from eroseg_ext.attacks.graphs import GraphedPass, Graphs
from eroseg_ext.attacks.result import AttackInfo, BestIterates, NotFiniteError
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.models.adapter import Logits, Model, Pass, frozen, unwrapped
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops import backend
from eroseg_ext.ops.pixel_terms import predicted_classes
from eroseg_ext.utils.precision import wide


@dataclass
class Part:
    """Images of the batch that take their steps together, and what goes with them."""

    rows: Tensor
    """``[b]`` int64, their numbers in the batch"""
    at: slice | Tensor
    """these as an index: a slice, which is faster, as long as they are consecutive"""
    clean: Tensor
    mask: Tensor | None
    method: gradients.MethodGradient
    passes: Pass | GraphedPass

    def select(self, kept: Tensor) -> None:
        """Continues with these images only."""
        self.rows, self.clean = self.rows[kept], self.clean[kept]
        self.at = self.rows
        self.mask = None if self.mask is None else self.mask[kept]
        self.method.select(kept)


class Evaluated(NamedTuple):
    """What one forward and backward pass found of a part's images."""

    logits: LogitMap | None
    """where they are asked for; else they do not last through the backward pass"""
    stats: Tensor
    tau: Tensor | None
    grad: Tensor


@dataclass
class Engine:
    """One call of an attack. A loop is a subclass that has ``noise`` and ``ascend``.

    The settings were checked when they were made. What else can be known before the model is called is checked here
    and at the start of ``run``.
    """

    config: AttackSettings
    model: Model
    images: Tensor
    labels: Tensor | None
    mask: Tensor | None = None
    graphs: Graphs = field(default_factory=Graphs)
    """of earlier calls with the same settings"""
    indices: Sequence[int] | None = None
    """what messages call the images; None: 0 to B-1"""
    _shape: torch.Size | None = field(default=None, init=False)
    """of volumes"""

    def __post_init__(self) -> None:
        config, depth = self.config, 0
        self.model = unwrapped(self.model)
        if isinstance(self.images, Tensor) and self.images.dim() == 5:
            depth = self._take_slices()
        images = self.images
        inputs.check(images, self.labels, self.mask, config)
        self._given = images.detach()
        images = self.images = inputs.pixel_values(self._given, config)
        batch = len(images)
        self.numbers = range(batch) if self.indices is None else self.indices
        if len(self.numbers) != batch:
            raise ValueError(f"indices has {len(self.numbers)} numbers, wanted {batch}, one per image")
        option = gradients.reference_option(config)
        if erodes_volumes := depth > 1 and config.method == "eroseg" and config.radius > 0:
            option = "the erosion of volumes"
        self.ops = backend.select(images.device, config.backend, option)
        if erodes_volumes:
            self.ops = volumes.operations(depth)
        self.steps = config.steps if config.eps > 0 and images.numel() > 0 else 0
        self.size = size = (images.shape[-2], images.shape[-1])
        # What the model upsamples to the images' size is interpolated from there to labels of another.
        see_through = config.see_through and not config.own_label_size
        logits = Logits.under(self.model, config, dtype=images.dtype, see_through=see_through)
        # Not a method: graphs keep it beyond this call, whose tensors they must not keep.
        self._forward = lambda pixels: logits(pixels, size)
        self._eager = Pass(self._forward)
        self.is_sharded = logits.is_sharded
        self._logits_checked = False
        self._buffer = gradients.GradientBuffer()
        length = config.micro_batch or max(batch, 1)
        self._slices = [slice(begin, begin + length) for begin in range(0, batch, length)] or [slice(0, 0)]

    def _take_slices(self) -> int:
        """Volumes become images of their slices; returns how many each has."""
        volumes.check(self.images, self.labels, self.mask, self.config)
        self._shape, depth = self.images.shape, self.images.shape[2]
        self.model = volumes.of_slices(self.model, depth)
        self.images = self.images.flatten(2, 3)
        self.labels = self.labels if self.labels is None else self.labels.flatten(1, 2)
        self.mask = self.mask if self.mask is None else self.mask.flatten(2, 3)
        return depth

    def noise(self, restart: int) -> Tensor:
        """``[B, K, H, W]`` float32: the random start less the clean images."""
        raise NotImplementedError

    def ascend(self, restart: int, part: Part, images: Tensor, bar: tqdm[Any]) -> None:
        """Takes the steps of a part; ``images`` are its first iterates, and in place become its last."""
        raise NotImplementedError

    def run(self, return_info: bool = False) -> tuple[Tensor, AttackInfo | None]:
        """The adversarial images, in the dtype of the clean ones, and the info if it is asked for."""
        with torch.inference_mode(False), torch.enable_grad():
            if self.labels is not None:
                self._take(self.labels)
            with frozen(self.model, self.config.model_mode):
                found, info = self._run(return_info or self.config.keep == "best" or self.config.restarts > 1)
        return found if self._shape is None else found.view(self._shape), info if return_info else None

    def _run(self, judge: bool) -> tuple[Tensor, AttackInfo | None]:
        config = self.config
        if config.graph:
            self.graphs.expect(self.model)
        self.clean = self.images.detach().float()
        if self.labels is None:
            self._take(self._predicted())
        self._prepare(judge)
        total = config.restarts * self.steps * len(self._slices)
        with tqdm(total=total, desc=config.method, disable=not config.progress) as bar:
            for restart in range(config.restarts):
                last = self._restart(restart, bar)
        self._raise_unless_finite()
        inputs.warn_without_gradient(self._without_gradient, self.numbers)
        found = delivered(last if self.best is None else self.best.images, self.images, self.changeable, config)
        found = inputs.normalized(found, self._given, config)
        if self.best is None:
            return found, None
        tau = self._tau if config.method == "eroseg" else None
        return found, AttackInfo(self._stats[:, :-1], tau, self.best.correct, self._valid, self._without_gradient)

    def evaluate(
        self,
        part: Part,
        images: Tensor,
        restart: int,
        step: int,
        active: Tensor | None = None,
        keep_logits: bool = False,
    ) -> Evaluated:
        """One forward and backward pass over a part's images, recorded; of those that are not ``active``, as zeros."""
        logits = part.passes.logits(shown(images, part.clean, self.images.dtype, self.config))
        if not self._logits_checked:
            inputs.check_first_logits(logits.values, self._largest_label, self.config)
            self._logits_checked = True
        grad_logits, stats = part.method.gradient(logits, step)
        kept = logits if keep_logits else None
        del logits
        tau = part.method.tau
        if active is not None:
            stats = stats.where(active.view(-1, 1), 0.0)
            tau = None if tau is None else tau.where(active, 0.0)
        self._stats[restart, step, part.at] = stats
        if tau is not None:
            self._tau[restart, step, part.at] = tau
        grad = part.passes.gradient(grad_logits)
        is_nan, is_zero = inputs.gradient_flags(grad)
        self._nan_gradients[restart, step, part.at] = is_nan if active is None else is_nan & active
        if step == 0:
            self._without_gradient[part.at] |= is_zero & self.unfinished(stats)
        return Evaluated(kept, stats, tau, grad)

    def unfinished(self, stats: Tensor) -> Tensor:
        """``[b]`` bool: which images have pixels left to attack."""
        return stats[:, 1] != (stats[:, 0] if self.config.targeted else 0)

    def _take(self, labels: Tensor) -> None:
        self._labels, self._ignore_index, self._largest_label = inputs.narrowed(labels, self.config.ignore_index)

    def _predicted(self) -> Tensor:
        """The model's own prediction on the clean images, ``[B, H, W]`` int64."""
        with torch.no_grad():
            return torch.cat(
                [predicted_classes(self._forward(self.clean[rows]).at(self.size)) for rows in self._slices]
            )

    def _prepare(self, judge: bool) -> None:
        self._valid = wide((self._labels.long() != self._ignore_index).sum((1, 2)))
        # Not where an image has void pixels only: there is no gradient of its own then, but -0.0 becomes 0.0 in a step,
        # batch statistics (model_mode "train") couple the images, and momentum and noise would move it.
        changeable = (self._valid > 0).view(-1, 1, 1, 1)
        self.changeable = changeable if self.mask is None else changeable & self.mask
        self.best = BestIterates(self.clean, self.config.targeted) if judge else None
        restarts, batch, device = self.config.restarts, len(self.clean), self.clean.device
        self._rows = torch.arange(batch, device=device)
        # The row after the last step is for the final images, so that one look at the end covers every forward pass.
        self._stats = torch.zeros(restarts, self.steps + 1, batch, 4, dtype=self._valid.dtype, device=device)
        self._nan_gradients = torch.zeros(restarts, self.steps + 1, batch, dtype=torch.bool, device=device)
        self._tau = torch.zeros(restarts, self.steps, batch, dtype=torch.float32, device=device)
        self._broken_images = torch.zeros(batch, dtype=torch.bool, device=device)
        self._without_gradient = torch.zeros(batch, dtype=torch.bool, device=device)

    def _start(self, restart: int) -> Tensor:
        if not (self.config.random_start and self.steps):
            return self.clean.clone()
        # Drawn for the whole batch at once, so that micro_batch does not change it.
        noise = self.noise(restart).to(self.clean.device)
        return (self.clean + noise).clamp(*self.config.clip).where(self.changeable, self.clean)

    def _restart(self, restart: int, bar: tqdm[Any]) -> Tensor:
        """The last iterates of a restart, ``[B, K, H, W]`` float32."""
        images = self._start(restart)
        for rows in self._slices:
            self.ascend(restart, self._part(rows, images[rows]), images[rows], bar)
            if self.best is not None:
                self._judge(self.best, restart, rows, images[rows])
        self._broken_images |= images.isnan().flatten(1).any(1)
        return images

    def _part(self, rows: slice, images: Tensor) -> Part:
        passes: Pass | GraphedPass = self._eager
        if self.config.graph:
            passes = graphed = self.graphs.of(self._forward, images, self.images.dtype)
            self._buffer.adopt(graphed.grad_logits)
        method = gradients.create(self.config, self.ops, self._labels[rows], self._buffer, self._ignore_index)
        mask = None if self.mask is None else self.mask[rows]
        return Part(self._rows[rows], rows, self.clean[rows], mask, method, passes)

    def _judge(self, best: BestIterates, restart: int, rows: slice, images: Tensor) -> None:
        """Counts the correct pixels of final images and keeps the best; all gradient ops count, so ask the plainest."""
        with torch.no_grad():
            logits = self._forward(shown(images, self.clean[rows], self.images.dtype, self.config))
            _, stats = self.ops.pixel_grad(
                logits.values,
                self._labels[rows],
                "pgd",
                ignore_index=self._ignore_index,
                align_corners=logits.align_corners,
                out=self._buffer.like(logits.values),
            )
        self._stats[restart, -1, rows] = stats
        best.offer(rows, images, stats[:, 1])

    def _raise_unless_finite(self) -> None:
        # In the order of events: a step's logits come before its gradient, which breaks the next step's logits.
        broken = torch.stack([self._stats[..., 3].isnan(), self._nan_gradients], 2)
        if not bool(broken.any() | self._broken_images.any()):
            return
        if not broken.any():
            image = self._broken_images.nonzero()[0].item()
            raise NotFiniteError(f"the model's gradient with respect to image {image} is infinite")
        restart, step, of_gradient, image = broken.nonzero()[0].tolist()
        where = "after the last step" if step == self.steps else f"at step {step}"
        found = (
            f"the model's gradient with respect to image {image} is NaN {where}"
            if of_gradient
            else f"the model's logits are NaN or infinite {where} for image {image}"
        )
        raise NotFiniteError(found + (f" of restart {restart}" if self.config.restarts > 1 else ""))
