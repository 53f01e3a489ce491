"""Adversarial training from a folder to weights: data, updates, validations, checkpoints, log and summary."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from eroseg_ext.attacks.result import NotFiniteError
from eroseg_ext.models import loading
from eroseg_ext.ops import backend
from eroseg_ext.training import checkpoint, distributed, report, seeds
from eroseg_ext.training import clock as phases
from eroseg_ext.training.clock import Clock
from eroseg_ext.training.distributed import Processes
from eroseg_ext.training.log import Log
from eroseg_ext.training.loss import Loss
from eroseg_ext.training.network import Network, check_model
from eroseg_ext.training.samples import Augmentation, Batch, Reader, Samples, batches, loader
from eroseg_ext.training.settings import NOT_OF_THE_RESULT, TrainSettings
from eroseg_ext.training.task import Say, Task, load_task
from eroseg_ext.training.update import Updater
from eroseg_ext.training.validate import examples, validate
from eroseg_ext.utils import atomic_files, plots

WEIGHTS = "weights.pt"
SUMMARY = "summary.json"
EXAMPLES = "examples.png"


class TrainingStopped(RuntimeError):
    """Training cannot go on; one sentence says why and what is kept."""


def train(model: nn.Module | str = "small", *, say: Say = print, **settings: Any) -> dict[str, Any]:
    """Trains a segmentation model on adversarial examples; ``out`` then holds its weights, checkpoint, log and curves.

    >>> eroseg_ext.train(data="camvid/train", val="camvid/val", dataset="camvid", out="runs/eroseg", size=(180, 240))

    Each update attacks ``adv_fraction`` of the batch with the weights as they are (Madry et al., ICLR 2018; a mixed
    batch as in Gu et al., "SegPGD", ECCV 2022) and descends the cross-entropy of the whole batch. The attack runs
    with the model in eval mode, so that an image's attack does not depend on the other images, and dropout is off
    (Pang et al., "Bag of Tricks for Adversarial Training", ICLR 2021, find eval mode as robust and a little better on
    clean images); ``attack_mode="train"`` is the alternative.

    Every random number follows from the seed and the number of the update, so that an interrupted run, continued with
    ``resume=True``, ends with the weights of an uninterrupted one, on the CPU to the last bit. Started by torchrun,
    processes share each batch.

    Args:
        model: a module, trained in place; or ``small``, ``tiny`` or an import path ``package.module:callable``, see
            :class:`eroseg_ext.training.TrainSettings`. Gives logits [B, C, h, w] or any output that
            :func:`eroseg_ext.attack` takes.
        say: told what happens, a line at a time.
        **settings: the fields of :class:`eroseg_ext.training.TrainSettings`; ``data`` and ``out`` are required.

    Returns:
        The summary, as ``out/summary.json`` holds it: ``settings``, ``environment``, ``updates``, ``seconds``, ``time``
        (share of model, attack kernels, data and the rest), ``images_per_second``, ``validation`` (mIoU and pixel
        accuracy in percent, clean and under attack), ``comparison`` (of the backends, if asked for) and more.

    Raises:
        ValueError, TypeError, OSError: a setting or file is not as wanted; one sentence names it. Checkpoints stay.
        TrainingStopped: the loss or the weights are not finite; the last good checkpoint stays.
    """
    given = None if isinstance(model, str) else model
    try:
        config = TrainSettings(**settings, model=model if isinstance(model, str) else type(model).__name__)
    except TypeError as error:
        raise TypeError(str(error).replace("TrainSettings.__init__()", "train()")) from None
    with (
        distributed.joined(config.device, config.timeout) as processes,
        torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []),
        _own_folder(config, processes),
    ):
        threads = torch.get_num_threads()
        torch.set_num_threads(config.threads or threads)
        try:
            return _Run(config, given, processes, say if processes.first else lambda _: None).run()
        finally:
            torch.set_num_threads(threads)


class _Run:
    """One call of :func:`train`."""

    def __init__(self, settings: TrainSettings, model: nn.Module | None, processes: Processes, say: Say) -> None:
        self._settings = settings
        self._processes = processes
        self._say = say
        _check(settings, processes)
        self._task = task = load_task(settings, say)
        self._updates = settings.epochs * task.updates_per_epoch
        gpu = processes.device.type == "cuda"
        self._workers = settings.workers if settings.workers is not None else (4 if gpu else 0)
        self._clock = Clock(processes.device)
        torch.manual_seed(seeds.torch_seed(settings.seed, seeds.INITIAL))
        loss = Loss(settings, task.class_weights, processes.device)
        network = _network(settings, model, loss, task, processes, self._clock, say)
        self._updater = Updater(settings, network, loss, task, processes, self._clock)
        augmentation = Augmentation(settings.seed, task.crop, settings.scale, settings.flip)
        read, self._val = (Reader(source, task.to_class, settings.cache) for source in (task.source, task.val))
        self._samples = Samples(read, augmentation)
        self._done = 0
        """updates"""
        self._seconds = dict.fromkeys(phases.PHASES, 0.0)
        """of the run before it was resumed"""
        self._pending: list[Tensor] = []
        """losses of updates since the log's last line"""

    def run(self) -> dict[str, Any]:
        """Trains; returns the summary."""
        settings, processes, per_epoch = self._settings, self._processes, self._task.updates_per_epoch
        self._resume()
        self._say(report.described(settings, self._task, self._updater.model, self._updates))
        comparison = self._compare() if settings.compare_reference else None
        log = Log(settings.out, self._done) if processes.first else None
        every = settings.checkpoint_every or per_epoch
        # A run that was interrupted after a checkpoint may lack the validation that belongs to it.
        validation = self._validate(log) if self._validation_due() else {}
        images = {"total": self._updates * settings.batch_size, "initial": self._done * settings.batch_size}
        shown = settings.progress and processes.first
        with tqdm(**images, unit="img", disable=not shown, dynamic_ncols=True) as bar:
            for batch in self._batches():
                self._update(batch)
                bar.update(settings.batch_size)
                if self._done % settings.log_every == 0 or self._done % per_epoch == 0:
                    self._record(log, bar)
                if self._done % every == 0 or self._done == self._updates:
                    self._save(log)
                if self._validation_due():
                    validation = self._validate(log)
        summary = report.summary(settings, self._task, processes, self._done, self._all_seconds(), validation)
        summary["comparison"] = comparison
        if log is not None:
            self._finish(log, summary)
        processes.wait()
        return summary

    def _batches(self) -> Generator[Batch, None, None]:
        """This process's parts of the batches that are left; time spent waiting for them is booked as data."""
        settings, processes = self._settings, self._processes
        keys = batches(
            len(self._task.source),
            settings.batch_size,
            settings.seed,
            self._done,
            self._updates,
            processes.rank,
            processes.world,
        )
        self._clock.switch(phases.DATA)
        for batch in loader(self._samples, keys, self._workers, pin_memory=processes.device.type == "cuda"):
            yield batch
            self._clock.switch(phases.DATA)
        self._clock.switch(phases.OTHER)

    def _update(self, batch: Batch) -> None:
        try:
            loss = self._updater(self._done, batch)
        except NotFiniteError as error:
            # On a GPU, the loss of an update before may be the reason, and is not known yet.
            self._check_losses()
            raise self._stopped(self._done + 1, str(error)) from error
        self._clock.switch(phases.OTHER)
        self._done += 1
        self._pending.append(loss)
        if self._processes.device.type == "cpu":
            self._check_losses()

    def _check_losses(self) -> list[float]:
        """The losses since the log's last line; raises if one is not finite. Waits for the device."""
        losses: list[float] = torch.stack(self._pending).tolist() if self._pending else []
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self._stopped(self._done - len(losses) + number + 1, f"the loss is {loss}")
        return losses

    def _stopped(self, update: int, what: str) -> TrainingStopped:
        path = self._settings.out / checkpoint.NAME
        kept = f"{path} holds the last good state" if path.exists() else "no checkpoint was written yet"
        return TrainingStopped(f"training stopped at update {update} of {self._updates}: {what}; {kept}")

    def _record(self, log: Log | None, bar: tqdm[Any]) -> None:
        losses = self._check_losses()
        self._pending.clear()
        loss = sum(losses) / len(losses)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if log is not None:
            rate = self._updater.learning_rate(self._done - 1)
            log.write({**self._place(), "loss": loss, "learning_rate": rate, "seconds": self._all_seconds()})

    def _place(self) -> dict[str, float]:
        return {"update": self._done, "epoch": self._done / self._task.updates_per_epoch}

    def _all_seconds(self) -> dict[str, float]:
        """By phase, also of the run before it was resumed."""
        return {phase: self._seconds[phase] + value for phase, value in self._clock.seconds().items()}

    def _validation_due(self) -> bool:
        epoch, rest = divmod(self._done, self._task.updates_per_epoch)
        due = epoch > 0 and (epoch % self._settings.val_every == 0 or epoch == self._settings.epochs)
        return due and rest == 0 and len(self._val) > 0

    def _validate(self, log: Log | None) -> dict[str, float]:
        classes, workers = self._task.to_class.classes, min(self._workers, 2)
        result = validate(self._settings, self._updater.trained, classes, self._val, self._processes, workers)
        if log is not None:
            log.write({**self._place(), **result})
            if self._done < self._updates:
                log.draw()
        self._say(f"epoch {self._place()['epoch']:g}: {report.scores(result)}")
        return result

    def _save(self, log: Log | None) -> None:
        self._check_losses()
        if not self._updater.finite():
            raise self._stopped(self._done, "a weight is not finite")
        if log is not None:
            state = {**self._updater.state(), "done": self._done, "seconds": self._all_seconds()}
            state |= {"settings": self._settings.plain(), "data": self._task.fingerprint}
            checkpoint.write(self._settings.out, state)

    def _resume(self) -> None:
        settings = self._settings
        if not (settings.resume and checkpoint.exists(settings.out)):
            return
        state = checkpoint.read(settings.out)
        now, then = settings.plain(), state["settings"]
        for name in now:
            if name not in NOT_OF_THE_RESULT and now[name] != then.get(name):
                raise ValueError(f"{name} is {now[name]!r}, but the run in {settings.out} has {then.get(name)!r}")
        if state["data"] != self._task.fingerprint:
            raise ValueError(f"data {settings.data} holds other images than when {settings.out} was begun")
        checkpoint.check(settings.out, state, self._updater.state(), self._updater.optimizer, self._updates)
        self._updater.load_state(state)
        self._done = state["done"]
        self._seconds = {phase: state["seconds"][phase] for phase in phases.PHASES}
        self._say(f"continuing after update {self._done} of {self._updates}")

    def _compare(self) -> dict[str, Any]:
        """Times updates with both backends; everything is then as it was.

        Both take every update from the same state, which the reference's update then moves on: over several updates by
        themselves they would part, since a sign step turns a rounding error into a step of another direction.
        """
        with closing(self._batches()) as left:
            batches = list(islice(left, self._settings.compare_reference))
        before = state = copy.deepcopy(self._updater.state())
        seconds = {name: dict.fromkeys(phases.PHASES, 0.0) for name in ("fused", "reference")}
        losses: dict[str, list[float]] = {name: [] for name in seconds}
        for name in seconds:
            self._updater(self._done, batches[0], name)  # the first of a kind pays for memory and autotuning
        for number, batch in enumerate(batches):
            for name in seconds:
                self._updater.load_state(state)
                self._clock.reset()
                losses[name].append(self._updater(self._done + number, batch, name).item())
                for phase, value in self._clock.seconds().items():
                    seconds[name][phase] += value / len(batches)
            state = copy.deepcopy(self._updater.state())
        self._updater.load_state(before)
        self._clock.reset()
        result = {"updates": len(batches), "seconds_per_update": seconds, "losses": losses}
        self._say(report.compared(result))
        return result

    def _finish(self, log: Log, summary: dict[str, Any]) -> None:
        out = self._settings.out
        atomic_files.write_tensors(out / WEIGHTS, self._updater.trained.state_dict())
        log.draw()
        log.close()
        atomic_files.write_json(out / SUMMARY, summary)
        for line in report.finished(summary):
            self._say(line)
        names = [WEIGHTS, checkpoint.NAME, SUMMARY, "log.jsonl", "curves.png"]
        if len(self._val):
            names.append(EXAMPLES)
            shown = examples(self._settings, self._updater.trained, self._val, self._processes.device)
            with atomic_files.replacing(out / EXAMPLES) as file:
                plots.examples_panel(file, shown, self._task.class_names, self._settings.eps)
        self._say(f"written to {out}: {', '.join(names)}")


def _check(settings: TrainSettings, processes: Processes) -> None:
    """Raises ValueError for settings that do not fit the processes."""
    pieces, gpu = processes.world * settings.accumulate, processes.device.type == "cuda"
    if settings.batch_size % pieces:
        raise ValueError(f"batch_size is {settings.batch_size}, wanted a multiple of {pieces} = processes x accumulate")
    if processes.world > 1 and gpu and settings.attack_mode != "eval":
        raise ValueError(
            f"attack_mode is {settings.attack_mode!r}, wanted 'eval' with several GPUs: SyncBatchNorm would wait for "
            "the others in every step of the attack"
        )
    if settings.backend == "fused" or settings.compare_reference:
        name = "backend is 'fused'" if settings.backend == "fused" else "compare_reference is set"
        if why_not := backend.why_not_fused(processes.device):
            raise ValueError(f"{name}, but {why_not}")


def _network(
    settings: TrainSettings,
    model: nn.Module | None,
    loss: Loss,
    task: Task,
    processes: Processes,
    clock: Clock,
    say: Say,
) -> Network:
    """The model on its device with the weights to start from, tried on one image."""
    if model is None:
        model = loading.build(settings.model, task.to_class.classes, settings.model_args)
    model = model.to(processes.device)
    if processes.world > 1 and processes.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif processes.world > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        say("BatchNorm normalises by the images of its process alone: there is no SyncBatchNorm on the CPU")
    # On CPUs with bfloat16 or AVX-512, and on GPUs, convolutions are fastest in this layout.
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.init is not None:
        loading.load_weights(model, settings.init, settings.model)
    network = Network(model, clock, settings)
    if unused := check_model(network, loss, task.to_class.classes, task.crop, processes.device):
        say(f"{len(unused)} parameters do not change the loss and stay as they are, {unused[0]} the first")
    return network


@contextmanager
def _own_folder(settings: TrainSettings, processes: Processes) -> Iterator[None]:
    """The folder of the run, made if missing, which no other run writes into meanwhile."""
    if processes.first:
        settings.out.mkdir(parents=True, exist_ok=True)
    with atomic_files.locked(settings.out) if processes.first else nullcontext():
        # Other processes must not find the folder or a checkpoint half made.
        processes.wait()
        if checkpoint.exists(settings.out) and not settings.resume:
            raise ValueError(f"out {settings.out} holds a run already: continue it with resume, or take another folder")
        yield
