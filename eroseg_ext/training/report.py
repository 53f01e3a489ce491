"""What a run tells of itself: sentences for whoever watches it, and the summary that is kept."""

from __future__ import annotations

from typing import Any

from torch import nn

from eroseg_ext.ops import backend
from eroseg_ext.training import clock as phases
from eroseg_ext.training.distributed import Processes
from eroseg_ext.training.settings import TrainSettings
from eroseg_ext.training.task import Task


def described(settings: TrainSettings, task: Task, model: nn.Module, updates: int) -> str:
    """What is going to be trained on what."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    attacked = "clean images"
    if (config := settings.attack_settings()) is not None:
        steps = (
            f"{config.steps} steps" if settings.replays == 1 else f"{settings.replays} updates with each batch, steps"
        )
        attacked = (
            f"{settings.adv_fraction:.0%} attacked by {config.method}, eps {255 * config.eps:.3g}/255, "
            f"{steps} of {255 * config.alpha:.3g}/255"
        )
    return (
        f"{settings.model}, {parameters:,} parameters, {task.to_class.classes} classes; "
        f"{len(task.source)} images, crops of {task.crop[0]}x{task.crop[1]}; "
        f"{updates} updates of {settings.batch_size} images, {attacked}"
    )


def summary(
    settings: TrainSettings,
    task: Task,
    processes: Processes,
    updates: int,
    seconds: dict[str, float],
    validation: dict[str, float],
) -> dict[str, Any]:
    """What ``summary.json`` holds, see :func:`eroseg_ext.train`, after so many updates with these last scores."""
    total = sum(seconds.values())
    shares = {
        "model": seconds[phases.UPDATE] + seconds[phases.ATTACK_MODEL],
        "attack kernels": seconds[phases.ATTACK_KERNELS],
        "data": seconds[phases.DATA],
        "other": seconds[phases.OTHER],
    }
    training = total - seconds[phases.OTHER]
    return {
        "settings": settings.plain(),
        "classes": task.to_class.classes,
        "class_names": task.class_names,
        "environment": {**backend.report(), "device": str(processes.device), "processes": processes.world},
        "updates": updates,
        "epochs": updates / task.updates_per_epoch,
        "seconds": total,
        "seconds_by_phase": seconds,
        "seconds_per_epoch": training / updates * task.updates_per_epoch,
        "images_per_second": updates * settings.batch_size / training,
        "time": {name: share / total for name, share in shares.items()},
        "validation": validation,
    }


def finished(summary: dict[str, Any]) -> list[str]:
    """What is said at the end of a run, a line each."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in summary["time"].items())
    lines = [
        f"{summary['updates']} updates in {summary['seconds']:.0f} s, {summary['images_per_second']:.1f} images/s, "
        f"{summary['seconds_per_epoch']:.1f} s an epoch; of the time: {shares}"
    ]
    if summary["validation"]:
        lines.append(scores(summary["validation"]))
    return lines


def scores(result: dict[str, float]) -> str:
    """The scores of a validation in words."""
    text = f"validation mIoU {result['miou']:.1f} %, pixel accuracy {result['accuracy']:.1f} %"
    if "adversarial_miou" in result:
        text += f"; attacked {result['adversarial_miou']:.1f} %, {result['adversarial_accuracy']:.1f} %"
    return text


def compared(result: dict[str, Any]) -> str:
    """The comparison of the backends in words."""
    fused, plain = (result["seconds_per_update"][name] for name in ("fused", "reference"))
    kernels = (phases.ATTACK_KERNELS,)
    attack = (*kernels, phases.ATTACK_MODEL)
    parts = {"attack kernels": kernels, "whole attack": attack, "whole update": (*attack, phases.UPDATE)}
    told = [f"fused against reference, {result['updates']} updates, each from the same state on the same batch:"]
    for name, members in parts.items():
        fast, slow = (1000 * sum(seconds[member] for member in members) for seconds in (fused, plain))
        if fast > 0:  # with replays the attack takes no steps
            told.append(f"  {name}: {fast:.1f} ms instead of {slow:.1f} ms, {slow / fast:.2f}x")
    return "\n".join(told)
