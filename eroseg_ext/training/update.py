"""One update of the weights: attack a part of the batch, then descend the loss of all of it."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eroseg_ext.attacks import pgd
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.models.adapter import SETTINGS as OF_THE_MODEL
from eroseg_ext.ops import backend as backends
from eroseg_ext.training import clock as phases
from eroseg_ext.training import seeds
from eroseg_ext.training.clock import Clock
from eroseg_ext.training.distributed import Processes
from eroseg_ext.training.loss import Loss
from eroseg_ext.training.network import Network
from eroseg_ext.training.replays import Perturbed
from eroseg_ext.training.samples import Batch
from eroseg_ext.training.settings import TrainSettings
from eroseg_ext.training.task import Task


class Updater:
    """The model, which is on the processes' device, with its optimiser and averages, and the step that moves them."""

    def __init__(
        self, settings: TrainSettings, network: Network, loss: Loss, task: Task, processes: Processes, clock: Clock
    ) -> None:
        self._settings = settings
        self._loss = loss
        self._updates = settings.epochs * task.updates_per_epoch
        self._warmup = settings.warmup_epochs * task.updates_per_epoch
        self._processes = processes
        self._clock = clock
        self.network = network
        self.model = model = network.model
        self._network: nn.Module = network
        if processes.world > 1:
            gpu = [processes.device] if processes.device.type == "cuda" else None
            self._network = DistributedDataParallel(network, device_ids=gpu)
        self.optimizer = _optimizer(settings, model)
        self.ema: AveragedModel | None = None
        if settings.ema > 0:
            average = get_ema_multi_avg_fn(settings.ema)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        config = settings.attack_settings()
        self._attack: AttackSettings | None = None
        if config is not None and settings.adv_fraction > 0:
            # The network normalises, casts, reads the model's output and sees through its upsampling by itself.
            defaults = AttackSettings(see_through=False)
            self._attack = dataclasses.replace(config, **{name: getattr(defaults, name) for name in OF_THE_MODEL})

    @property
    def trained(self) -> nn.Module:
        """The model to judge and to keep: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def learning_rate(self, update: int) -> float:
        """Of an update, counted from 0: linear warm-up times polynomial decay."""
        warmup = min(1.0, (update + 1) / self._warmup) if self._warmup > 0 else 1.0
        decay = (1 - update / self._updates) ** self._settings.poly_power
        return self._settings.peak_learning_rate * warmup * decay

    def state(self) -> dict[str, Any]:
        """All that the next updates depend on besides the settings; shares memory with it."""
        average = None if self.ema is None else self.ema.state_dict()
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": average}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from a state; hyperparameters follow from the settings."""
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def finite(self) -> bool:
        """Whether every weight is a finite number; waits for the device."""
        return all(bool(value.isfinite().all()) for value in self.model.state_dict().values())

    def __call__(self, update: int, batch: Batch, backend: str | None = None) -> Tensor:
        """Takes one step, or ``replays`` of them, with this process's part of a batch.

        The number of the update, from 0, decides the random numbers and the learning rate. ``backend`` is of the attack
        and the front loss, if not the settings'. Returns the last step's loss over all processes' parts, a scalar on
        the device. On the CPU, no step is taken if its loss is not finite.
        """
        settings, processes, clock = self._settings, self._processes, self._clock
        clock.switch(phases.DATA)
        images = batch.images.to(processes.device, non_blocking=True).float().div_(255)
        labels = batch.labels.to(processes.device, non_blocking=True).long()
        clock.switch(phases.UPDATE)
        self._network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(update) * group["factor"]
        # Dropout and its like: known from the update's number, so that nothing has to be carried over a resume.
        torch.manual_seed(seeds.torch_seed(settings.seed, seeds.MODEL, update, processes.rank))
        total = processes.sum_(self._loss.weight(labels)).clamp(min=1e-12)
        first = processes.rank * len(images)
        backend = backend or settings.backend
        ops = backends.select(processes.device, backend)
        parts = [*zip(images.chunk(settings.accumulate), labels.chunk(settings.accumulate), strict=True)]
        places = [first + number * len(part) for number, (part, _) in enumerate(parts)]
        free: list[Perturbed] = []
        if settings.replays > 1 and self._attack is not None:
            free = [self._perturbed(part, place, update) for (part, _), place in zip(parts, places, strict=True)]
        for replay in range(settings.replays):
            moves = replay + 1 < settings.replays
            loss = torch.zeros((), dtype=torch.float32, device=processes.device)
            for number, (part, wanted) in enumerate(parts):
                if free:
                    shown = free[number].images.requires_grad_(moves)
                else:
                    shown = self._attacked(part, wanted, places[number], update, backend)
                last = number + 1 == settings.accumulate
                with nullcontext() if last else self._without_sync():
                    share = self._loss(self._network(shown, heads=True), wanted, total, ops)
                    # DistributedDataParallel takes the mean over the processes, and the loss is their sum.
                    (share * processes.world).backward()
                if free and moves:
                    free[number].move()
                loss += share.detach()
            processes.sum_(loss)
            if processes.device.type != "cpu" or loss.isfinite():
                self._step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _step(self) -> None:
        """Moves the weights along their gradients, and the averages with them."""
        self.optimizer.step()
        self._average_buffers()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _without_sync(self) -> AbstractContextManager[None]:
        """Gradients stay in the process: more of them follow."""
        return self._network.no_sync() if isinstance(self._network, DistributedDataParallel) else nullcontext()

    def _attacked(self, images: Tensor, labels: Tensor, first: int, update: int, backend: str) -> Tensor:
        """The images from place ``first`` of the whole batch on, ``adv_fraction`` of them, evenly spaced, attacked."""
        index = self._rows(len(images), first)
        if self._attack is None or len(index) == 0:
            return images
        self._clock.switch(phases.ATTACK_KERNELS)
        generator = self._noise(update, first, images[0].numel())
        config = self._attack
        if backend != config.backend:
            config = dataclasses.replace(config, backend=backend)
        loop = pgd.Loop(config, self.network, images[index], labels[index], generator=generator)
        images = images.index_copy(0, index, loop.run()[0])
        self._clock.switch(phases.UPDATE)
        return images

    def _perturbed(self, images: Tensor, first: int, update: int) -> Perturbed:
        """The images from place ``first`` of the whole batch on, ``adv_fraction`` of them somewhere in the ball."""
        assert self._attack is not None
        generator = self._noise(update, first, images[0].numel())
        return Perturbed(images, self._rows(len(images), first), self._attack, generator)

    def _rows(self, count: int, first: int) -> Tensor:
        """Which of so many images, from place ``first`` of the whole batch on, are attacked."""
        rows = [row for row in range(count) if _chosen(first + row, self._settings.adv_fraction)]
        return torch.tensor(rows, dtype=torch.int64, device=self._processes.device)

    def _noise(self, update: int, first: int, values: int) -> torch.Generator:
        """A generator whose next numbers are the random starts of the images from place ``first`` of the batch on.

        On the CPU those of the images before it are drawn and thrown away, so that the noise of an image depends
        neither on the number of processes nor on gradient accumulation. A GPU's generator cannot be wound on so: there
        each process and piece has a seed of its own.
        """
        seed, cpu = self._settings.seed, self._processes.device.type == "cpu"
        before = sum(_chosen(place, self._settings.adv_fraction) for place in range(first))
        purpose = (seeds.ATTACK, update) if cpu else (seeds.ATTACK, update, before)
        generator = torch.Generator(self._processes.device).manual_seed(seeds.torch_seed(seed, *purpose))
        for _ in range(before if cpu else 0):
            torch.empty(values, dtype=torch.float32).uniform_(generator=generator)
        return generator

    def _average_buffers(self) -> None:
        """BatchNorm's running statistics become the mean over the processes, each of which has seen its own images.

        DistributedDataParallel alone would take those of the first.
        """
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        if self._processes.world == 1 or not buffers:
            return
        mean = self._processes.sum_(torch.cat([buffer.flatten() for buffer in buffers])).div_(self._processes.world)
        for buffer, values in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def _chosen(place: int, fraction: float) -> bool:
    """Whether the image at this place of the batch is one of ``fraction`` of them, evenly spaced."""
    return int((place + 1) * fraction + 1e-9) > int(place * fraction + 1e-9)


def _optimizer(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    by_factor: dict[float, list[nn.Parameter]] = {}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in names:
        keys = sorted((key for key in settings.lr_mult if key in name), key=len)
        factor = settings.lr_mult[keys[-1]] if keys else 1.0
        by_factor.setdefault(factor, []).append(model.get_parameter(name))
    for key in settings.lr_mult:
        if not any(key in name for name in names):
            raise ValueError(f"lr_mult names {key!r}, wanted a part of a parameter's name, such as {names[0]!r}")
    groups = [{"params": parameters, "factor": factor} for factor, parameters in by_factor.items()]
    rate, decay = settings.peak_learning_rate, settings.decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(groups, rate, weight_decay=decay)
