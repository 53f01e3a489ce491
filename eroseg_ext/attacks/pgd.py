"""The attack loop: ``attack(model, images, labels)`` returns adversarial images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm

from eroseg_ext.attacks import inputs, methods
from eroseg_ext.attacks.ball import delivered, shown
from eroseg_ext.attacks.graphs import GraphedPass, Graphs
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.models.adapter import Logits, Model, Pass, frozen, unwrapped
from eroseg_ext.ops import backend


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
    without_gradient: Tensor
    """``[B]`` bool, images with pixels left to attack whose gradient was 0 everywhere in the first step"""


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
    """``[b, C, H, W]`` of the images before this step, detached; with ``graph``, the next step overwrites them"""
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
        **settings: ``preset`` (None or ``"progressive"``, the literal reading of the paper's abstract) and the fields
            of :class:`eroseg_ext.AttackSettings`, with these defaults: ``method="eroseg"``, ``eps=8/255``,
            ``step_size=None`` (eps / 4), ``steps=10``, ``norm="linf"``, ``targeted=False``, ``ignore_index=255``,
            ``random_start=True``, ``restarts=1``, ``keep="last"``, ``early_stop=False``, ``clip=(0, 1)``,
            ``mean=None, std=None`` (the model wants normalised input; eps and clip stay in pixel values),
            ``autocast=None``, ``output="logits"`` (or ``"probabilities"``, ``"sigmoid"``), ``output_key=None``,
            ``logits=None``, ``align_corners=False``, ``micro_batch=None``, ``backend="auto"``, ``model_mode="eval"``,
            ``graph=False``, ``progress=False``; for eroseg ``confidence``, ``front``, ``direction``, ``radius``,
            ``slope``, ``within``, ``threshold``, ``schedule``, ``reach``, ``front_first``, ``front_min``,
            ``front_max``, ``balance``,
            ``rho_range``; for cospgd ``variant``; for tsallis ``q``.

    Returns:
        Images like ``images`` (shape, dtype), ``|result - images| <= eps`` and within ``clip``, to rounding; with
        ``return_info`` also the info. ``eps=0`` and an image without valid pixels return the input bit for bit. Of
        iterates (``keep="best"``) or restarts with equally many right pixels the earliest is returned.
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
    return run_attack(config, Graphs(), model, images, labels, mask, generator, callback, return_info)


def run_attack(
    config: AttackSettings,
    graphs: Graphs,
    model: Model,
    images: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    generator: torch.Generator | None,
    callback: Callback | None,
    return_info: bool,
) -> Tensor | tuple[Tensor, AttackInfo]:
    """:func:`attack` for settings that have been checked, with the graphs of earlier calls with the same settings."""
    inputs.check(images, labels, mask, config)
    model = unwrapped(model)
    logits = Logits.under(model, config, dtype=images.dtype)
    ops = backend.select(images.device, config.backend, methods.reference_option(config))
    with torch.inference_mode(False), torch.enable_grad(), frozen(model, config.model_mode):
        if config.graph:
            graphs.expect(model)
        loop = _Loop(config, graphs, logits, ops, images, labels, mask)
        adversarial, info = loop.run(generator, callback, return_info)
    return adversarial if info is None else (adversarial, info)


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
        """Keeps those of ``images`` (numbers ``index`` of the batch) that beat what is held; ties keep the earlier."""
        score = self._sign * right
        held = self._score[index]
        better = score < held
        self._score[index] = torch.where(better, score, held)
        self.images[index] = torch.where(better.view(-1, 1, 1, 1), images, self.images[index])


def uniform_in_l2_ball(normal: Tensor, uniform: Tensor, radius: float, changeable: Tensor) -> Tensor:
    """Noise uniform in the l_2 ball of the pixels that may change, 0 elsewhere: a Gaussian direction, and a length
    whose d-th power is uniform, d being the number of values that may change.

    Args:
        normal: ``[B, K, H, W]``, Gaussian.
        uniform: ``[B]``, uniform in [0, 1).
        radius: of the ball.
        changeable: bool, ``[B, 1, H, W]`` or to be broadcast to it.
    """
    noise = normal.where(changeable, 0.0)
    dimensions = changeable.expand_as(noise).flatten(1).sum(1).clamp(min=1)
    length = radius * uniform.double() ** (1 / dimensions.float())
    norm = noise.double().flatten(1).norm(dim=1).clamp(min=1e-30)
    return noise * (length / norm).float().view(-1, 1, 1, 1)


def _host_waits(device: torch.device) -> bool:
    """Whether reading a tensor makes the host wait for work that it has queued."""
    return device.type != "cpu"


class _Leavers:
    """Under ``early_stop``, which images of a part still take steps, where the host must not wait to know.

    Images that have left stay in the batch and are put back after each step, so that no result depends on when the host
    learns of it; it does some steps later, and ends the steps once all have left.
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


class _Loop:
    """One call of :func:`attack`: what stays the same over its steps, and what is recorded of them."""

    def __init__(
        self,
        config: AttackSettings,
        graphs: Graphs,
        logits: Logits,
        ops: ModuleType,
        images: Tensor,
        labels: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        dtype, image_size = images.dtype, (images.shape[-2], images.shape[-1])
        self._graphs = graphs
        # Not a method: graphs keep it beyond this call, whose tensors they must not keep.
        self._forward = lambda pixels: logits(pixels, image_size)
        self._is_sharded = logits.is_sharded
        self._ops = ops
        self._dtype = dtype
        self._images = images
        self._clean = images.detach().float()
        self._mask = mask
        batch, device = len(images), images.device
        size = config.micro_batch or max(batch, 1)
        self._parts = [slice(begin, begin + size) for begin in range(0, batch, size)] or [slice(0, 0)]
        self._index = torch.arange(batch, device=device)
        self._ignore_index = config.ignore_index  # as the caller has it
        self._labels, self._config, self._largest_label = inputs.narrowed(
            self._predicted() if labels is None else labels, config
        )
        self._logits_checked = False
        self._valid = (self._labels.long() != self._config.ignore_index).sum((1, 2)).double()
        self._steps = config.steps if config.eps > 0 and images.numel() > 0 else 0
        self._buffer = methods.GradientBuffer()
        self._best: _Best | None = None
        # The row after the last step is for the final images, so that one look at the end covers every forward pass.
        self._stats = torch.zeros(config.restarts, self._steps + 1, batch, 4, dtype=torch.float64, device=device)
        self._tau = torch.zeros(config.restarts, self._steps, batch, dtype=torch.float32, device=device)
        self._nan_gradients = torch.zeros(config.restarts, self._steps + 1, batch, dtype=torch.bool, device=device)
        self._broken_images = torch.zeros(batch, dtype=torch.bool, device=device)
        self._without_gradient = torch.zeros(batch, dtype=torch.bool, device=device)

    def run(
        self, generator: torch.Generator | None, callback: Callback | None, return_info: bool
    ) -> tuple[Tensor, AttackInfo | None]:
        config = self._config
        judge = return_info or config.keep == "best" or config.restarts > 1
        self._best = _Best(self._clean, config.targeted) if judge else None
        total = config.restarts * self._steps * len(self._parts)
        with tqdm(total=total, desc=config.method, disable=not config.progress) as bar:
            for restart in range(config.restarts):
                # Drawn for the whole batch at once, so that micro_batch does not change it.
                x_adv = self._start(generator)
                for part in self._parts:
                    self._ascend(restart, part, x_adv, callback, bar)
                    if self._best is not None:
                        self._judge(self._best, restart, part, x_adv[part])
                self._broken_images |= x_adv.isnan().flatten(1).any(1)
        self._raise_unless_finite()
        inputs.warn_without_gradient(self._without_gradient, self._index.tolist())
        adversarial = x_adv if self._best is None else self._best.images
        adversarial = delivered(adversarial, self._images, self._changeable(), config)
        if self._best is None or not return_info:
            return adversarial, None
        tau = self._tau if config.method == "eroseg" else None
        return adversarial, AttackInfo(self._stats[:, :-1], tau, self._best.right, self._valid, self._without_gradient)

    def _changeable(self) -> Tensor:
        """Where an image may differ from the clean one.

        Not where it has void pixels only: there is no gradient of its own then, but -0.0 becomes 0.0 in a step, and
        batch statistics (model_mode "train") couple the images.
        """
        changeable = (self._valid > 0).view(-1, 1, 1, 1)
        return changeable if self._mask is None else changeable & self._mask

    def _start(self, generator: torch.Generator | None) -> Tensor:
        """The first iterate of a restart; images without a valid pixel start, and so end, at the clean image."""
        config, clean = self._config, self._clean
        if not (config.random_start and self._steps):
            return clean.clone()
        device = clean.device if generator is None else generator.device
        if config.norm == "linf":
            noise = torch.empty(clean.shape, dtype=clean.dtype, device=device)
            noise = noise.uniform_(-config.eps, config.eps, generator=generator).to(clean.device)
        else:
            noise = torch.randn(clean.shape, dtype=clean.dtype, device=device, generator=generator).to(clean.device)
            radius = torch.rand(len(clean), dtype=clean.dtype, device=device, generator=generator).to(clean.device)
        changeable = self._changeable()
        if config.norm == "l2":
            noise = uniform_in_l2_ball(noise, radius, config.eps, changeable)
        return (clean + noise).clamp(*config.clip).where(changeable, clean)

    def _ascend(self, restart: int, part: slice, x_adv_all: Tensor, callback: Callback | None, bar: tqdm[Any]) -> None:
        """Takes the steps of a part of the images; their last iterates are in ``x_adv_all`` afterwards."""
        config = self._config
        rows, x_adv, clean, labels = self._index[part], x_adv_all[part], self._clean[part], self._labels[part]
        if config.early_stop:
            x_adv = x_adv.clone()  # x_adv_all then has the images before the step, which those that are done keep
        mask = None if self._mask is None else self._mask[part]
        model = self._pass(x_adv)
        method = methods.create(config, self._ops, labels, self._buffer)
        stays_whole = self._is_sharded or _host_waits(x_adv.device)
        leavers = _Leavers(len(rows), x_adv.device) if config.early_stop and stays_whole else None
        for step in range(self._steps):
            logits = model.logits(shown(x_adv, clean, self._dtype))
            if not self._logits_checked:
                inputs.check_first_logits(logits, self._largest_label, self._ignore_index, self._config.output)
                self._logits_checked = True
            grad_logits, stats = method.gradient(logits, step)
            right, tau = stats[:, 1], method.tau
            going = right != (stats[:, 0] if config.targeted else 0)
            if config.keep == "best" and self._best is not None:
                self._best.offer(rows, x_adv, right)
            if leavers is not None:
                stats = stats.where(leavers.going.view(-1, 1), 0.0)
                tau = None if tau is None else tau.where(leavers.going, 0.0)
                leavers.update(going)
            self._stats[restart, step, rows] = stats
            if tau is not None:
                self._tau[restart, step, rows] = tau
            grad = model.gradient(grad_logits)
            is_nan, is_zero = inputs.gradient_flags(grad)
            if leavers is not None:
                is_nan = is_nan & leavers.going
            self._nan_gradients[restart, step, rows] = is_nan
            if step == 0:
                self._without_gradient[rows] |= is_zero & going
            if config.early_stop:
                x_adv_all[rows] = x_adv
            self._step_(x_adv, clean, grad, mask)
            if leavers is not None:
                x_adv.copy_(x_adv.where(leavers.going.view(-1, 1, 1, 1), x_adv_all[rows]))
            if callback is not None:
                callback(StepInfo(restart, step, rows, stats, tau, logits, x_adv))
            del logits, grad  # or they would live on beside those of the next forward pass
            bar.update()
            if leavers is not None:
                # Every pass of a sharded model waits for the other processes, whose images may still take steps.
                ends = leavers.all_have_left and not self._is_sharded
            elif config.early_stop:
                if not going.all():
                    rows, x_adv, clean, labels = rows[going], x_adv[going], clean[going], labels[going]
                    mask = None if mask is None else mask[going]
                    method.select(going)
                ends = len(rows) == 0
            else:
                ends = False
            if ends:
                bar.update(self._steps - 1 - step)
                break
        if config.early_stop:
            x_adv_all[rows] = x_adv

    def _pass(self, images: Tensor) -> Pass | GraphedPass:
        """The model's passes over images of this shape."""
        if not self._config.graph:
            return Pass(self._forward)
        graphed = self._graphs.of(self._forward, images, self._dtype)
        self._buffer.adopt(graphed.grad_logits)
        return graphed

    def _step_(self, x_adv: Tensor, clean: Tensor, grad: Tensor, mask: Tensor | None) -> None:
        config = self._config
        step_ = self._ops.linf_step_ if config.norm == "linf" else self._ops.l2_step_
        step_(x_adv, clean, grad, config.eps, config.alpha, *config.clip, mask)

    def _judge(self, best: _Best, restart: int, part: slice, x_adv: Tensor) -> None:
        """Counts the right pixels of final images and keeps the best; every gradient op counts, so ask the plainest."""
        with torch.no_grad():
            logits = self._forward(shown(x_adv, self._clean[part], self._dtype))
            _, stats = self._ops.pixel_grad(
                logits, self._labels[part], "pgd", ignore_index=self._config.ignore_index, out=self._buffer.like(logits)
            )
        self._stats[restart, -1, part] = stats
        best.offer(self._index[part], x_adv, stats[:, 1])

    def _predicted(self) -> Tensor:
        """The model's own prediction on the clean images, ``[B, H, W]`` int64."""
        with torch.no_grad():
            logits = (self._forward(self._clean[part]) for part in self._parts)
            return torch.cat([(z[:, 0] > 0).long() if z.shape[1] == 1 else z.argmax(1) for z in logits])

    def _raise_unless_finite(self) -> None:
        # In the order of events: a step's logits come before its gradient, which breaks the next step's logits.
        broken = torch.stack([self._stats[..., 3].isnan(), self._nan_gradients], 2)
        if bool(broken.any() | self._broken_images.any()):
            if not broken.any():
                image = self._broken_images.nonzero()[0].item()
                raise NotFiniteError(f"the model's gradient with respect to image {image} is infinite")
            restart, step, of_gradient, image = broken.nonzero()[0].tolist()
            where = "after the last step" if step == self._steps else f"at step {step}"
            raise NotFiniteError(
                (
                    f"the model's gradient with respect to image {image} is NaN {where}"
                    if of_gradient
                    else f"the model's logits are NaN or infinite {where} for image {image}"
                )
                + (f" of restart {restart}" if self._config.restarts > 1 else "")
            )
