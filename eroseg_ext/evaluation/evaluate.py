"""``evaluate(model, data)``: clean and adversarial scores of a model, per attack and in the worst case."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eroseg_ext.attacks import apgd
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.reading import evenly_spaced, one_class
from eroseg_ext.data.sources import SegmentationData, Source
from eroseg_ext.evaluation import sanity
from eroseg_ext.evaluation.adversarial import SavedImages
from eroseg_ext.evaluation.fingerprint import digest_of_weights, fingerprint, projected_logits
from eroseg_ext.evaluation.metrics import Counts, counts_of, scores, worst_case
from eroseg_ext.evaluation.result import AttackRow, Evaluation
from eroseg_ext.evaluation.result_cache import ResultCache, key_of
from eroseg_ext.evaluation.sanity import budget
from eroseg_ext.evaluation.settings import (
    CLEAN,
    OF_THE_ATTACKS,
    OF_THE_DATA_AND_MODEL,
    OF_THE_LABELS,
    EvaluationSettings,
    plain,
)
from eroseg_ext.models.adapter import Logits, Model, frozen, unwrapped
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops import backend, reference
from eroseg_ext.utils.atomic_files import locked, write_json


def evaluate(
    model: Model, data: str | Path | SegmentationData | Source, *, out: str | Path | None = None, **settings: Any
) -> Evaluation:
    """Scores of a segmentation model on clean images, under each attack, and in the worst case over the attacks.

    >>> result = eroseg_ext.evaluate(model, "camvid/val", eps=[2 / 255, 4 / 255], ignore_index=11, out="evaluation")
    >>> print(result.markdown())

    Every attack is :func:`eroseg_ext.strong_attack` with another method's gradient. With ``out`` each finished batch is
    on the disk at once, image by image in ``out/results.jsonl``: an evaluation that was interrupted, even killed, goes
    on where it was when it is called again, and gives the same result as one that was not. A further attack or eps
    computes only what is new.

    A kept result is used again for the same image, labels and number of the image, the same settings of the attack and
    versions of this package and torch, and the same model: of the same weights, class and ``repr``, with the same
    ``model_description``, and with the same logits, to 1e-4 of their size, of the first image, its mirror image and
    noise, computed by one thread. So a model that only differs in an attribute or in the order of its classes is told
    apart, as far as it answers these three otherwise, and the number of threads does not matter. Nor does the batch
    size: an image's result is taken to depend on its neighbours by the last bits of sums at most.

    Args:
        model: nn.Module or any differentiable callable, as :func:`eroseg_ext.attack` takes it; run in eval mode and
            left as it was.
        data: folder with ``images/`` and ``labels/``, or anything with ``len`` whose items begin with an image and its
            labels, or are dicts that hold both, as PIL images, arrays or tensors: images of 8 bits, or floats within
            ``clip``, and labels that are classes, or ``ignore_index`` or -1 for void; such as torchvision's data sets.
        out: folder for ``results.jsonl`` and ``evaluation.json``, made if missing; None keeps nothing.
        **settings: the fields of :class:`EvaluationSettings`.

    Returns:
        Scores in percent: mIoU over the classes that some label has (``miou_classes`` has the other convention), mAcc
        over these too, aAcc over all valid pixels. The worst case chooses for each image the clean image or one of the
        attacks: exactly for aAcc and mAcc, by greedy search for mIoU, with a lower bound of what any choice could
        reach.

    Raises:
        ValueError, TypeError: an argument is not as described, another process writes into ``out``, or a label is no
            class; one sentence names it.
        RuntimeError: the model's logits or gradients are NaN or infinite.
        OSError: ``out`` cannot be written.

    Source: Croce, Singh & Hein, ECCV 2024 (SEA).
    """
    config = EvaluationSettings(**settings)
    source = config.source(data, "val")
    saved = None if config.adversarial is None else SavedImages(Path(config.adversarial))
    if saved is not None:
        rows = {f"saved {saved.method}": {"method": saved.method}}
        config = replace(config, attacks=rows, eps=saved.eps, norm=saved.norm, sanity=0)
    if len(source) == 0:
        raise ValueError("data has no image, wanted at least one")
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "evaluation.json").is_dir():
            raise ValueError(f"out {folder} cannot be used, its evaluation.json is a folder")
    path = None if folder is None else folder / "results.jsonl"
    alone = nullcontext() if folder is None else locked(folder)
    with alone, ResultCache(path) as cache, frozen(unwrapped(model), "eval"), torch.random.fork_rng():
        result = _Evaluator(config, unwrapped(model), source, cache, saved).run()
        if folder is not None:
            write_json(folder / "evaluation.json", result.as_json())
    return result


class _Evaluator:
    """One call of :func:`evaluate`."""

    def __init__(
        self, given: EvaluationSettings, model: Model, data: Source, cache: ResultCache, saved: SavedImages | None
    ) -> None:
        self._saved = saved
        self._given = given
        self._to_class = data.to_class or given.class_map()
        # From here on void is one label, whatever the data have for it. What the model upsamples to the images' size
        # is interpolated from there to labels of another.
        see_through = given.see_through and not given.own_label_size
        self._config = config = replace(given, ignore_index=VOID, see_through=see_through)
        self._model = model
        self._data = data
        self._cache = cache
        self._logits = Logits.under(model, config)
        image, _ = self._load(0)
        channels = len(image)
        if config.mean is not None and len(config.mean) not in (1, channels):
            raise ValueError(f"mean has {len(config.mean)} numbers, wanted {channels}, one per channel of images")
        kept = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        self._device = kept[0].device if kept else image.device
        self._ops = backend.select(self._device, config.backend)
        self._environment = {
            "eroseg_ext": backend.report()["eroseg_ext"],
            "torch": torch.__version__,
            "device": self._device.type,
            "fused": self._ops is not reference,
        }
        chosen = evenly_spaced(len(data), config.images)
        self._indices = chosen
        self._batches = [chosen[i : i + config.batch_size] for i in range(0, len(chosen), config.batch_size)]
        self._attacks = {(row, eps): config.attack(row, eps) for eps in config.budgets for row in config.rows}
        self._digests = {index: data.digest(index) for index in chosen}
        self._model_digest = self._fingerprint()

    def run(self) -> Evaluation:
        config = self._config
        plan = [(CLEAN, 0.0), *self._attacks]
        counts: dict[tuple[str, float], Counts] = {}
        without: dict[tuple[str, float], list[int]] = {key: [] for key in plan}
        seconds = dict.fromkeys((CLEAN, *config.rows), 0.0)
        with tqdm(total=len(plan) * len(self._indices), unit="image", disable=not config.progress) as bar:
            checks: list[sanity.Check] = []
            for name, eps in plan:
                bar.set_description(name if name == CLEAN else f"{name} {budget(eps, config.norm)}")
                parts = []
                for batch in self._batches:
                    for index, found in zip(batch, self._unit(name, eps, batch), strict=True):
                        seconds[name] += found["seconds"]
                        parts.append(_dense(found["counts"], found["classes"]))
                        if found["without_gradient"]:
                            without[name, eps].append(index)
                    bar.update(len(batch))
                counts[name, eps] = np.stack(parts)
                if not counts[name, eps].any():
                    raise ValueError(
                        f"data has no pixel with a label other than ignore_index={self._given.ignore_index}"
                    )
                if name == CLEAN:
                    self._warn_of_one_class(counts[name, eps])
                    checks = self._sanity()
        worst = {}
        for eps in config.budgets:
            candidates = np.stack([counts[CLEAN, 0.0], *(counts[row, eps] for row in config.rows)])
            worst[eps] = worst_case(candidates, config.miou_classes)
        return Evaluation(
            clean=scores(counts[CLEAN, 0.0], config.miou_classes),
            rows=tuple(
                AttackRow(
                    name,
                    eps,
                    scores(counts[name, eps], config.miou_classes),
                    tuple(self._data.name(number) for number in without[name, eps]),
                )
                for name, eps in plan[1:]
            ),
            worst=worst,
            sanity=tuple(checks),
            seconds={
                name: total / len(self._indices) / (1 if name == CLEAN else len(config.budgets))
                for name, total in seconds.items()
            },
            settings=self._plain_settings(),
            environment={**self._environment, "model": self._model_digest},
            images=tuple(map(self._data.name, self._indices)),
        )

    def _warn_of_one_class(self, counts: Counts) -> None:
        """Such as of a mask of 0 and 255 with ignore_index 255: whatever the model answers, its mIoU looks fine."""
        classes, void = np.flatnonzero(counts[..., 1].sum(0)).tolist(), self._given.ignore_index
        if len(classes) == 1:
            beside = any((self._load(index)[1] == VOID).any() for index in self._indices)
            told = one_class(classes + [void] * beside, {void})
            warnings.warn(f"in data {told}, which says nothing about the others", UserWarning, stacklevel=4)

    def _plain_settings(self) -> dict[str, Any]:
        config = self._given
        others = ("seed", "batch_size", "sanity", "miou_classes", "model_description")
        names = (*OF_THE_ATTACKS, *OF_THE_DATA_AND_MODEL, *OF_THE_LABELS, *others)
        values = {name: plain(getattr(config, name)) for name in names}
        rows = {name: {key: plain(value) for key, value in row.items()} for name, row in config.rows.items()}
        adversarial = None if config.adversarial is None else str(config.adversarial)
        about = {"attacks": rows, "eps": list(config.budgets), "size": plain(self._data.size)}
        return about | {"adversarial": adversarial, **values}

    def _unit(self, name: str, eps: float, batch: list[int]) -> list[dict[str, Any]]:
        """Counts of a batch's images under one attack: from the cache, or made now and put there.

        A batch of which anything is missing is made as a whole, as it would have been without an interruption.
        """
        config = self._config
        attack = self._attacks.get((name, eps))
        # With every default as it is now: another version may have others.
        resolved = {} if attack is None else {**vars(attack[0]), "radii": attack[1]}
        about = {"attack": {key: plain(value) for key, value in resolved.items()}}
        if attack is not None and self._saved is not None:
            keys = [self._key({"saved": self._saved.digest(self._data.stem(index))}, [index]) for index in batch]
        else:
            keys = [self._key(about, [index]) for index in batch]
        if not all(key in self._cache for key in keys):
            start = time.perf_counter()
            # For models that draw random numbers: this batch gets the same ones, whatever was computed before it.
            torch.manual_seed(apgd.noise_seed(config.seed, batch[0], 0))
            images = [self._load(index) for index in batch]
            counts: list[Tensor] = []
            without: list[int] = []
            for part in _same_size_runs(images):
                pixels = torch.stack([images[i][0] for i in part]).to(self._device)
                labels = torch.stack([images[i][1] for i in part]).to(self._device)
                if attack is not None and self._saved is not None:
                    read = [self._saved.image(self._data.stem(batch[i]), images[i][0], config.clip) for i in part]
                    pixels = torch.stack(read).to(self._device)
                elif attack is not None:
                    numbers, (settings, radii) = [batch[i] for i in part], attack
                    loop = apgd.Loop(
                        settings, self._model, pixels, labels, indices=numbers, seed=config.seed, radii=radii
                    )
                    pixels, info = loop.run(return_info=True)
                    assert info is not None
                    flags = info.without_gradient.tolist()
                    without += [number for number, flag in zip(numbers, flags, strict=True) if flag]
                counts += self._count(pixels, labels, [batch[i] for i in part])
            sparse = [_sparse(part) for part in torch.stack(counts).cpu().numpy()]
            under = name if name == CLEAN else f"{name}, eps {budget(eps, config.norm)}"
            took = round((time.perf_counter() - start) / len(batch), 4)
            for key, index, found in zip(keys, batch, sparse, strict=True):
                if key not in self._cache:
                    value = {"classes": len(counts[0]), "counts": found, "seconds": took}
                    self._cache.put(key, f"{under}, image {index}", value | {"without_gradient": index in without})
        return [self._cache[key] for key in keys]

    def _key(self, what: dict[str, Any], images: list[int]) -> str:
        """Of everything that a result on these images depends on."""
        shared = {name: plain(getattr(self._config, name)) for name in ("seed", *OF_THE_DATA_AND_MODEL)}
        about = {
            "model": self._model_digest,
            "classes": self._to_class.digest(),
            "images": [[index, self._digests[index]] for index in images],
            **{name: self._environment[name] for name in ("eroseg_ext", "torch", "device", "fused")},
        }
        return key_of({**shared, **about, **what})

    def _load(self, index: int) -> tuple[Tensor, Tensor]:
        """An image float32 in the range of ``clip``, and its classes and VOID."""
        image, values = self._data.read(index)
        if image.dtype == torch.uint8:
            low, high = self._config.clip
            image = low + (high - low) * (image / 255)
        return image, self._to_class(values, self._data.where(index)[1]).long()

    def _answer(self, pixels: Tensor, number: int) -> LogitMap:
        """The model's logits of images of one size, of which ``number`` is the first."""
        height, width = pixels.shape[-2:]
        try:
            with torch.no_grad():
                return self._logits(pixels, (height, width))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"the model fails on {self._data.name(number)} of {height}x{width} pixels, where another size may "
                f"be wanted (--size): {error}"
            ) from error

    def _count(self, pixels: Tensor, labels: Tensor, numbers: list[int]) -> list[Tensor]:
        """Counts ``[C, 3]`` of each image, on the device."""
        logits, align_corners = self._answer(pixels, numbers[0])
        broken = ~logits.isfinite().flatten(1).all(1)
        if broken.any():
            name = self._data.name(numbers[int(broken.int().argmax())])
            raise ValueError(f"the model's logits of {name} are NaN or infinite")
        classes = max(logits.shape[1], 2)
        wrong = labels >= classes
        if wrong.any():
            image, row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{self._data.name(numbers[image])} has the label {int(labels[image, row, column])} at row {row}, "
                f"column {column}, wanted classes from 0 to {classes - 1} or ignore_index={self._given.ignore_index}"
            )
        reading = {"ignore_index": VOID, "align_corners": align_corners}
        rows = [slice(i, i + 1) for i in range(len(labels))]
        return [counts_of(self._ops.confusion(logits[i], labels[i], classes, **reading)) for i in rows]

    def _fingerprint(self) -> str:
        """What tells the model from others."""
        config, model = self._config, self._model
        first = self._indices[0]
        about: dict[str, Any] = {
            **{name: plain(getattr(config, name)) for name in ("seed", "clip", "mean", "std", "autocast")},
            **self._environment,
            "image": self._digests[first],
            "description": config.model_description,
        }
        if isinstance(model, nn.Module):
            about["weights"] = digest_of_weights(model)
        image = self._load(first)[0].to(self._device)
        logits = projected_logits(lambda pixels: self._answer(pixels, first).values, image, config.clip, config.seed)
        return fingerprint(about, logits, self._cache)

    def _sanity(self) -> list[sanity.Check]:
        config = self._config
        if config.sanity == 0:
            return []
        numbers = [self._indices[i] for i in evenly_spaced(len(self._indices), config.sanity)]
        key = self._key({"sanity": list(config.budgets)}, numbers)
        if key not in self._cache:
            loaded = [self._load(number) for number in numbers]
            loaded = [pair for pair in loaded if _shapes(pair) == _shapes(loaded[0])]
            images, labels = (torch.stack(part).to(self._device) for part in zip(*loaded, strict=True))
            shared = {name: getattr(config, name) for name in OF_THE_DATA_AND_MODEL}
            torch.manual_seed(config.seed)
            checks = sanity.check(self._model, images, labels, eps=max(config.budgets), **shared)
            self._cache.put(key, "sanity checks", [asdict(check) for check in checks])
        return [sanity.Check(**check) for check in self._cache[key]]


def _same_size_runs(images: list[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Numbers of consecutive images of one size: what can be a batch."""
    return [list(run) for _, run in groupby(range(len(images)), key=lambda i: _shapes(images[i]))]


def _shapes(pair: tuple[Tensor, Tensor]) -> list[torch.Size]:
    return [part.shape for part in pair]


def _sparse(counts: Counts) -> list[list[int]]:
    """``[class, correct, labels, predicted]`` of the classes that occur."""
    return [[index, *row] for index, row in enumerate(counts.tolist()) if any(row)]


def _dense(sparse: list[list[int]], classes: int) -> Counts:
    counts = np.zeros((classes, 3), np.int64)
    for index, *row in sparse:
        counts[index] = row
    return counts
