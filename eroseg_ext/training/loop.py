"""Adversarial training from a folder to weights: data, updates, validations, checkpoints, log and summary."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from eroseg_ext.attacks.result import NotFiniteError
from eroseg_ext.models import loading
from eroseg_ext.ops import backend
from eroseg_ext.training import checkpoint, distributed, network, report, seeds
from eroseg_ext.training import clock as phases
from eroseg_ext.training.clock import Clock
from eroseg_ext.training.distributed import Processes
from eroseg_ext.training.log import Log
from eroseg_ext.training.samples import Augmentation, Batch, Batches, Reader, Samples, loader
from eroseg_ext.training.settings import NOT_OF_THE_RESULT, TrainSettings
from eroseg_ext.training.task import Say, load_task
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
        _own_random_numbers(processes),
        _own_folder(config, processes),
    ):
        threads = torch.get_num_threads()
        torch.set_num_threads(config.threads or threads)
        try:
            return _Run(config, given, processes, say if processes.first else _silent).run()
        finally:
            torch.set_num_threads(threads)


class _Run:
    """One call of :func:`train`."""

    def __init__(self, settings: TrainSettings, model: nn.Module | None, processes: Processes, say: Say) -> None:
        self._settings = settings
        self._processes = processes
        self._say = say
        pieces = processes.world * settings.accumulate
        if settings.batch_size % pieces:
            raise ValueError(
                f"batch_size is {settings.batch_size}, wanted a multiple of {pieces} = processes x accumulate"
            )
        if processes.world > 1 and processes.device.type == "cuda" and settings.attack_mode != "eval":
            raise ValueError(
                f"attack_mode is {settings.attack_mode!r}, wanted 'eval' with several GPUs: SyncBatchNorm would wait "
                "for the others in every step of the attack"
            )
        _check_backend(processes.device, settings)
        self._task = load_task(settings, say)
        self._updates_per_epoch = self._task.updates_per_epoch(settings.batch_size)
        self._updates = settings.epochs * self._updates_per_epoch
        gpu = processes.device.type == "cuda"
        self._workers = settings.workers if settings.workers is not None else (4 if gpu else 0)
        self._clock = Clock(processes.device)
        torch.manual_seed(seeds.torch_seed(settings.seed, seeds.INITIAL))
        if model is None:
            model = loading.build(settings.model, self._task.to_class.classes, settings.model_args)
        model = model.to(processes.device)
        if gpu and processes.world > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif processes.world > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
            say("BatchNorm normalises by the images of its process alone: there is no SyncBatchNorm on the CPU")
        # On CPUs with bfloat16 or AVX-512, and on GPUs, convolutions are fastest in this layout.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.init is not None:
            loading.load_weights(model, settings.init, settings.model)
        module = network.Network(model, self._clock, settings)
        unused = network.check_model(module, self._task.to_class.classes, self._task.crop, processes.device)
        if unused:
            say(f"{len(unused)} parameters do not change the logits and stay as they are, {unused[0]} the first")
        self._updater = Updater(
            settings,
            module,
            None if self._task.class_weights is None else self._task.class_weights.to(processes.device),
            self._updates,
            self._updates_per_epoch,
            processes,
            self._clock,
        )
        augmentation = Augmentation(settings.seed, self._task.crop, settings.scale, settings.flip)
        read = Reader(self._task.source, self._task.to_class, settings.cache)
        self._samples = Samples(read, augmentation)
        val = self._task.val
        self._val = None if val is None else Reader(val, self._task.to_class, settings.cache)
        self._done = 0
        """updates"""
        self._seconds = dict.fromkeys(phases.PHASES, 0.0)
        """of the run before it was resumed"""
        self._pending: list[Tensor] = []
        """losses of updates since the log's last line"""

    def run(self) -> dict[str, Any]:
        """Trains; returns the summary."""
        settings = self._settings
        self._resume()
        self._say(report.described(settings, self._task, self._updater.model, self._updates))
        comparison = self._compare() if settings.compare_reference else None
        log = Log(settings.out, self._done) if self._processes.first else None
        every = settings.checkpoint_every or self._updates_per_epoch
        # A run that was interrupted after a checkpoint may lack the validation that belongs to it.
        self._clock.reset()
        validation = self._validate(log) if self._validation_due() else {}
        with self._bar() as bar:
            for batch in self._batches(self._done, self._updates):
                self._update(batch)
                bar.update(settings.batch_size)
                if self._done % settings.log_every == 0 or self._done % self._updates_per_epoch == 0:
                    self._record(log, bar)
                if self._done % every == 0 or self._done == self._updates:
                    self._save(log)
                if self._validation_due():
                    validation = self._validate(log)
        summary = report.summary(
            settings, self._task, self._processes, self._done, self._all_seconds(), validation, comparison
        )
        if log is not None:
            self._finish(log, summary)
        self._processes.wait()
        return summary

    def _batches(self, first: int, last: int) -> Iterator[Batch]:
        """This process's parts of the batches of these updates; time spent waiting for them is booked as data."""
        settings, processes = self._settings, self._processes
        keys = Batches(
            len(self._task.source), settings.batch_size, settings.seed, first, last, processes.rank, processes.world
        )
        self._clock.switch(phases.DATA)
        for batch in loader(self._samples, keys, self._workers, pin_memory=processes.device.type == "cuda"):
            if isinstance(batch, Exception):
                raise batch
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
        losses = torch.stack(self._pending).tolist() if self._pending else []
        for number, loss in enumerate(losses):
            if not np.isfinite(loss):
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
            log.write(
                {
                    "update": self._done,
                    "epoch": self._done / self._updates_per_epoch,
                    "loss": loss,
                    "learning_rate": self._updater.learning_rate(self._done - 1),
                    "seconds": self._all_seconds(),
                }
            )

    def _all_seconds(self) -> dict[str, float]:
        """By phase, also of the run before it was resumed."""
        return {phase: self._seconds[phase] + value for phase, value in self._clock.seconds().items()}

    def _validation_due(self) -> bool:
        epoch, rest = divmod(self._done, self._updates_per_epoch)
        due = epoch > 0 and (epoch % self._settings.val_every == 0 or epoch == self._settings.epochs)
        return due and rest == 0 and self._val is not None

    def _validate(self, log: Log | None) -> dict[str, float]:
        assert self._val is not None
        classes = self._task.to_class.classes
        result = validate(
            self._settings, self._updater.trained, classes, self._val, self._processes, min(self._workers, 2)
        )
        if log is not None:
            log.write({"update": self._done, "epoch": self._done / self._updates_per_epoch, **result})
            if self._done < self._updates:
                log.draw()
        self._say(f"epoch {self._done / self._updates_per_epoch:g}: {report.scores(result)}")
        return result

    def _save(self, log: Log | None) -> None:
        self._check_losses()
        if not self._updater.finite():
            raise self._stopped(self._done, "a weight is not finite")
        if log is None:
            return
        settings = self._settings
        state = {
            **self._updater.state(),
            "done": self._done,
            "seconds": self._all_seconds(),
            "settings": settings.plain(),
            "data": self._task.fingerprint,
        }
        checkpoint.write(settings.out, state)

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

    def _bar(self) -> tqdm[Any]:
        settings = self._settings
        images = self._updates * settings.batch_size
        return tqdm(
            total=images,
            initial=self._done * settings.batch_size,
            unit="img",
            disable=not (settings.progress and self._processes.first),
            dynamic_ncols=True,
        )

    def _compare(self) -> dict[str, Any]:
        """Times updates with both backends; everything is then as it was.

        Both take every update from the same state, which the reference's update then moves on: over several updates by
        themselves they would part, since a sign step turns a rounding error into a step of another direction.
        """
        count = min(self._settings.compare_reference, self._updates - self._done)
        batches = list(self._batches(self._done, self._done + count))
        before = state = copy.deepcopy(self._updater.state())
        backends = ("fused", "reference")
        seconds = {name: dict.fromkeys(phases.PHASES, 0.0) for name in backends}
        losses: dict[str, list[float]] = {name: [] for name in backends}
        for name in backends:
            # The first update of a kind pays for memory and autotuning.
            self._updater(self._done, batches[0], name)
        for number, batch in enumerate(batches):
            for name in backends:
                self._updater.load_state(state)
                self._clock.reset()
                losses[name].append(self._updater(self._done + number, batch, name).item())
                for phase, value in self._clock.seconds().items():
                    seconds[name][phase] += value / count
            state = copy.deepcopy(self._updater.state())
        self._updater.load_state(before)
        # The comparison is no part of the run's time.
        self._clock.reset()
        result = {"updates": count, "seconds_per_update": seconds, "losses": losses}
        for line in report.compared(result):
            self._say(line)
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
        if self._val is not None:
            names.append(EXAMPLES)
            shown = examples(self._settings, self._updater.trained, self._val, self._processes.device)
            with atomic_files.replacing(out / EXAMPLES) as file:
                plots.examples_panel(file, shown, self._task.class_names, self._settings.eps)
        self._say(f"written to {out}: {', '.join(names)}")


def _own_random_numbers(processes: Processes) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else [])


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


def _silent(_: str) -> None:
    pass


def _check_backend(device: torch.device, settings: TrainSettings) -> None:
    if settings.backend != "fused" and not settings.compare_reference:
        return
    why_not = backend.why_not_fused(device)
    if why_not is not None:
        name = "backend is 'fused'" if settings.backend == "fused" else "compare_reference is set"
        raise ValueError(f"{name}, but {why_not}")
