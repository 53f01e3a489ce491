"""Scores of a model on a validation set, clean and under attack, over all processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from eroseg_ext.attacks import pgd
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.reading import evenly_spaced
from eroseg_ext.evaluation.metrics import miou_and_accuracy
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops import backend
from eroseg_ext.ops.pixel_terms import predicted_classes
from eroseg_ext.training import seeds
from eroseg_ext.training.clock import Clock
from eroseg_ext.training.distributed import Processes
from eroseg_ext.training.network import Network
from eroseg_ext.training.samples import Key, Reader, Samples, loader
from eroseg_ext.training.settings import TrainSettings
from eroseg_ext.utils.plots import Example


def examples(settings: TrainSettings, model: nn.Module, read: Reader, device: torch.device) -> list[Example]:
    """Up to four evenly spaced validation images, attacked as in :func:`validate`."""
    keys = [[Key(index)] for index in evenly_spaced(len(read), 4)]
    shown = []
    for labels, judged in _judged(settings, model, read, keys, device, 0):
        size = (labels.shape[-2], labels.shape[-1])
        found = [(images[0].cpu(), predicted_classes(logits.at(size))[0].cpu()) for images, logits in judged]
        (image, before), *attacked = found
        shown.append(Example(image, labels[0].cpu(), before, *(attacked[0] if attacked else (None, None))))
    return shown


def validate(
    settings: TrainSettings, model: nn.Module, classes: int, read: Reader, processes: Processes, workers: int
) -> dict[str, float]:
    """mIoU and pixel accuracy in percent, on clean images and under eroseg's attack of ``settings.val_attack_steps``.

    Every process judges its own images; one confusion matrix over all of them is what the scores are made from:
    ``miou``, ``accuracy``, and with an attack ``adversarial_miou``, ``adversarial_accuracy``.
    """
    keys = [Key(index) for index in evenly_spaced(len(read), settings.val_images)[processes.rank :: processes.world]]
    # Images at their own sizes do not go into one batch.
    size = 1 if settings.size is None else max(1, settings.batch_size // processes.world // settings.accumulate)
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    ops = backend.select(processes.device, settings.backend)
    names = ("", "adversarial_")[: 1 if _attack(settings) is None else 2]
    matrices = torch.zeros(len(names), classes, classes, dtype=torch.int64, device=processes.device)
    for labels, judged in _judged(settings, model, read, batches, processes.device, workers):
        for matrix, (_, logits) in zip(matrices, judged, strict=True):
            values, align_corners = logits
            matrix += ops.confusion(values, labels, classes, ignore_index=VOID, align_corners=align_corners)
    processes.sum_(matrices)
    scores = zip(names, map(miou_and_accuracy, matrices), strict=True)
    return {f"{prefix}{name}": value for prefix, found in scores for name, value in found.items()}


def _attack(settings: TrainSettings) -> AttackSettings | None:
    """The attack of ``settings.val_attack_steps``; None where there is none."""
    if settings.val_attack_steps == 0 or settings.eps == 0:
        return None
    return AttackSettings(
        eps=settings.eps,
        norm=settings.norm,
        steps=settings.val_attack_steps,
        ignore_index=VOID,
        backend=settings.backend,
        see_through=False,  # which the network does
    )


def _judged(
    settings: TrainSettings,
    model: nn.Module,
    read: Reader,
    batches: list[list[Key]],
    device: torch.device,
    workers: int,
) -> Iterator[tuple[Tensor, list[tuple[Tensor, LogitMap]]]]:
    """Labels of each batch; the images, and the attacked ones where there is an attack, with the logits of them.

    A random start depends on the run's seed and on the number of the batch's first image.
    """
    network, config = Network(model, Clock(device), settings), _attack(settings)
    training = model.training
    model.eval()
    for keys, batch in zip(batches, loader(Samples(read, None), batches, workers), strict=True):
        images = [batch.images.to(device).float().div_(255)]
        labels = batch.labels.to(device).long()
        if config is not None:
            seed = seeds.torch_seed(settings.seed, seeds.ATTACK, keys[0].image)
            generator = torch.Generator(device).manual_seed(seed)
            images.append(pgd.Loop(config, network, images[0], labels, generator=generator).run()[0])
        with torch.no_grad():
            judged = [(pixels, network(pixels)) for pixels in images]
        yield labels, judged
    model.train(training)
