"""Scores of a model on a validation set, clean and under attack, over all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eroseg_ext.attacks import pgd
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.reading import evenly_spaced
from eroseg_ext.evaluation.metrics import miou_and_accuracy
from eroseg_ext.ops import backend
from eroseg_ext.training import seeds
from eroseg_ext.training.clock import Clock
from eroseg_ext.training.distributed import Processes
from eroseg_ext.training.network import Network
from eroseg_ext.training.samples import Key, Reader, Samples, loader
from eroseg_ext.training.settings import TrainSettings
from eroseg_ext.utils.plots import Example


def examples(settings: TrainSettings, model: nn.Module, read: Reader, device: torch.device) -> list[Example]:
    """Up to four evenly spaced validation images, attacked as in :func:`validate`."""
    network, config = Network(model, Clock(device), settings), _attack(settings)
    training = model.training
    model.eval()
    shown = []
    for place, index in enumerate(evenly_spaced(len(read), 4)):
        batch = Samples(read, None)[Key(index)]
        if isinstance(batch, Exception):
            raise batch
        images = batch.images.to(device).float().div_(255)
        labels = batch.labels.to(device).long()
        with torch.no_grad():
            before = network(images).argmax(1)
        adversarial = after = None
        if config is not None:
            attacked = _attacked(config, settings.seed, network, images, labels, place)
            with torch.no_grad():
                after = network(attacked).argmax(1)[0].cpu()
            adversarial = attacked[0].cpu()
        shown.append(Example(images[0].cpu(), labels[0].cpu(), before[0].cpu(), adversarial, after))
    model.train(training)
    return shown


def validate(
    settings: TrainSettings, model: nn.Module, classes: int, read: Reader, processes: Processes, workers: int
) -> dict[str, float]:
    """mIoU and pixel accuracy in percent, on clean images and under eroseg's attack of ``settings.val_attack_steps``.

    Every process judges its own images; one confusion matrix over all of them is what the scores are made from.

    Returns:
        ``miou``, ``accuracy``, and with an attack ``adversarial_miou``, ``adversarial_accuracy``.
    """
    keys = [Key(index) for index in evenly_spaced(len(read), settings.val_images)[processes.rank :: processes.world]]
    # Images at their own sizes do not go into one batch.
    size = 1 if settings.size is None else max(1, settings.batch_size // processes.world // settings.accumulate)
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    network = Network(model, Clock(processes.device), settings)
    ops = backend.select(processes.device, settings.backend)
    config = _attack(settings)
    matrices = torch.zeros(1 + (config is not None), classes, classes, dtype=torch.int64, device=processes.device)
    training = model.training
    model.eval()
    for keys_of_batch, batch in zip(batches, loader(Samples(read, None), batches, workers), strict=True):
        if isinstance(batch, Exception):
            raise batch
        images = batch.images.to(processes.device).float().div_(255)
        labels = batch.labels.to(processes.device).long()
        for number in range(len(matrices)):
            if number == 1 and config is not None:
                images = _attacked(config, settings.seed, network, images, labels, keys_of_batch[0].image)
            with torch.no_grad():
                prediction = network(images).argmax(1)
            matrices[number] += ops.confusion(prediction, labels, classes, ignore_index=VOID)
    model.train(training)
    processes.sum_(matrices)
    result = miou_and_accuracy(matrices[0])
    if config is not None:
        result |= {f"adversarial_{name}": value for name, value in miou_and_accuracy(matrices[1]).items()}
    return result


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
    )


def _attacked(
    config: AttackSettings, seed: int, network: Network, images: Tensor, labels: Tensor, number: int
) -> Tensor:
    """The images after the attack, whose random start depends on the run's ``seed`` and on ``number``."""
    generator = torch.Generator(images.device)
    generator.manual_seed(seeds.torch_seed(seed, seeds.ATTACK, number))
    return pgd.Loop(config, network, images, labels, generator=generator).run()[0]
