"""``evaluate(model, data)``: clean and adversarial scores of a model, per attack and in the worst case."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from eroseg_ext.attacks import apgd, volumes
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.data.datasets import place_of
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
    share_of,
)
from eroseg_ext.models.adapter import Logits, Model, frozen, unwrapped
from eroseg_ext.models.modules import modules_behind
from eroseg_ext.models.see_through import LogitMap
from eroseg_ext.ops import backend, reference
from eroseg_ext.utils.atomic_files import locked, plain, write_json
from eroseg_ext.utils.processes import Meeting, started
from eroseg_ext.utils.progress import Progress
from eroseg_ext.utils.validate import require

Data = str | Path | SegmentationData | Source
Shard = str | tuple[int, int] | None


@overload
def evaluate(
    model: Model, data: Data, *, out: str | Path | None = None, shard: None = None, **settings: Any
) -> Evaluation: ...
@overload
def evaluate(
    model: Model, data: Data, *, out: str | Path | None = None, shard: Shard, **settings: Any
) -> Evaluation | None: ...
def evaluate(
    model: Model, data: Data, *, out: str | Path | None = None, shard: Shard = None, **settings: Any
) -> Evaluation | None:
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
    noise. The numbers of threads, of images in a batch and of processes do not matter.

    The processes that torchrun started share the batches and attacks, if all of them call this with the same ``out``,
    which is not None; each returns the whole result, which the first one writes. With ``shard`` a process makes its
    share alone.

    Args:
        model: nn.Module or any differentiable callable, as :func:`eroseg_ext.attack` takes it; run in eval mode and
            left as it was.
        data: folder with ``images/`` and ``labels/``, or anything with ``len`` whose items begin with an image and its
            labels, or are dicts that hold both, as PIL images, arrays or tensors: images of 8 bits, or floats within
            ``clip``, and labels that are classes, or ``ignore_index`` or -1 for void; such as torchvision's data sets.
            Volumes are ``[K, D, H, W]`` with labels ``[D, H, W]``, also ``[1, D, H, W]``.
        out: folder for ``results.jsonl`` and ``evaluation.json``, made if missing; None keeps nothing.
        shard: ``"i/n"`` or ``(i, n)``: make and keep share i of n, i from 0 to n - 1, and return None. A call without
            it, afterwards and with the same ``out``, finds what all shares kept. ``(0, 1)`` is the whole evaluation by
            this process alone, also under torchrun.
        **settings: the fields of :class:`EvaluationSettings`.

    Returns:
        Scores in percent: mIoU over the classes that some label has (``miou_classes`` has the other convention), mAcc
        over these too, aAcc over all valid pixels. The worst case chooses for each image the clean image or one of the
        attacks: exactly for aAcc and mAcc, by greedy search for mIoU, with a lower bound of what any choice could
        reach.

    Raises:
        ValueError, TypeError: an argument is not as described, another evaluation writes into ``out``, or a label is
            no class; one sentence names it.
        RuntimeError: the model's logits or gradients are NaN or infinite.
        OSError: ``out`` cannot be written.

    Source: Croce, Singh & Hein, ECCV 2024 (SEA).
    """
    config = EvaluationSettings(**settings)
    share = None if shard is None else share_of(shard)
    if share is not None and share[1] > 1:
        require(out is not None, "out", out, "a folder that the shares are kept in")
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
    number, count = share or (started() if folder is not None else (0, 1))
    together = Meeting() if count > 1 and share is None else None
    # One process of those that are together has the folder for all, writes what was found, and tells how far it is.
    writer = together is None or number == 0
    config = replace(config, progress=config.progress and writer)
    own = locked(folder, shared=together is None and count > 1) if folder is not None and writer else nullcontext()
    devices = range(torch.cuda.device_count())  # named, as torch warns of several that are not
    with own, ResultCache(path) as cache, frozen(unwrapped(model), "eval"), torch.random.fork_rng(devices):
        evaluator = _Evaluator(config, unwrapped(model), source, cache, saved)
        if count > 1:
            evaluator.make(number, count)
            if together is None:
                return None
            together.end()
            cache.read()
        result = evaluator.run()
        if folder is not None and writer:
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
        self._logits = volumes.reader(model, lambda model: Logits.under(model, config))
        image, labels = self._load(0)
        channels = len(image)
        if config.mean is not None and len(config.mean) not in (1, channels):
            raise ValueError(f"mean has {len(config.mean)} numbers, wanted {channels}, one per channel of images")
        modules = modules_behind(model)
        kept = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        self._device = next(kept, image).device
        self._ops = backend.select(self._device, config.backend)
        self._environment = {
            "eroseg_ext": backend.report()["eroseg_ext"],
            "torch": torch.__version__,
            "device": self._device.type,
            "fused": self._ops is not reference,
        }
        self._indices = evenly_spaced(len(data), config.images)
        starts = range(0, len(self._indices), config.batch_size)
        self._batches = [self._indices[start : start + config.batch_size] for start in starts]
        self._attacks = {(row, eps): config.attack(row, eps) for eps in config.budgets for row in config.rows}
        if image.dim() == 4:
            for attack, _ in self._attacks.values():
                volumes.check(image[None], labels[None], None, attack)
        self._plan = [(CLEAN, 0.0), *self._attacks]
        self._digests = {index: data.digest(index) for index in self._indices}
        self._model_digest = self._fingerprint()

    def make(self, number: int, count: int) -> None:
        """Puts share ``number`` of ``count`` of the results into the cache.

        Batches are shared whole: a result's last bits may depend on the other images of its batch.
        """
        work = [(name, eps, batch) for name, eps in self._plan for batch in self._batches][number::count]
        with self._progress(sum(len(batch) for _, _, batch in work)) as bar:
            for unit in work:
                self._unit(*unit, bar)
        if number == count - 1:
            self._sanity()

    def run(self) -> Evaluation:
        config, plan = self._config, self._plan
        counts: dict[tuple[str, float], Counts] = {}
        without: dict[tuple[str, float], tuple[str, ...]] = {}
        seconds = dict.fromkeys((CLEAN, *config.rows), 0.0)
        checks: list[sanity.Check] = []
        with self._progress(len(plan) * len(self._indices)) as bar:
            for name, eps in plan:
                found = [result for batch in self._batches for result in self._unit(name, eps, batch, bar)]
                counts[name, eps] = np.array([result["counts"] for result in found], np.int64)
                numbers = [
                    index for index, result in zip(self._indices, found, strict=True) if result["without_gradient"]
                ]
                without[name, eps] = tuple(map(self._data.name, numbers))
                share = 1 if name == CLEAN else len(config.budgets)
                seconds[name] += sum(result["seconds"] for result in found) / len(found) / share
                if not counts[name, eps].any():
                    raise ValueError(
                        f"data has no pixel with a label other than ignore_index={self._given.ignore_index}"
                    )
                if name == CLEAN:
                    self._warn_of_one_class(counts[name, eps])
                    checks = self._sanity()
        clean, classes = counts[CLEAN, 0.0], config.miou_classes
        worst = {
            eps: worst_case(np.stack([clean, *(counts[row, eps] for row in config.rows)]), classes)
            for eps in config.budgets
        }
        return Evaluation(
            clean=scores(clean, classes),
            rows=tuple(AttackRow(*key, scores(counts[key], classes), without[key]) for key in self._attacks),
            worst=worst,
            sanity=tuple(checks),
            seconds=seconds,
            settings=self._plain_settings(),
            environment={**self._environment, "model": self._model_digest},
            images=tuple(map(self._data.name, self._indices)),
        )

    def _progress(self, total: int) -> Progress:
        return Progress(total=total, unit="image", disable=not self._config.progress)

    def _warn_of_one_class(self, counts: Counts) -> None:
        """Such as of a mask of 0 and 255 with ignore_index 255: whatever the model answers, its mIoU looks fine."""
        classes, void = np.flatnonzero(counts[..., 1].sum(0)).tolist(), self._given.ignore_index
        if len(classes) == 1:
            beside = any((self._load(index)[1] == VOID).any() for index in self._indices)
            told = one_class(classes + [void] * beside, {void})
            warnings.warn(f"in data {told}, which says nothing about the others", UserWarning, stacklevel=4)

    def _plain_settings(self) -> dict[str, Any]:
        config = self._given
        others = ("adversarial", "seed", "batch_size", "sanity", "miou_classes", "model_description")
        names = (*OF_THE_ATTACKS, *OF_THE_DATA_AND_MODEL, *OF_THE_LABELS, *others)
        values = {name: getattr(config, name) for name in names}
        about = {"attacks": config.rows, "eps": config.budgets, "size": self._data.size}
        found: dict[str, Any] = plain({**about, **values})
        return found

    def _unit(self, name: str, eps: float, batch: list[int], bar: Progress) -> list[dict[str, Any]]:
        """Results of a batch's images under one attack: from the cache, or made now and put there.

        A batch of which anything is missing is made as a whole, as it would have been without an interruption.
        """
        config, attack = self._config, self._attacks.get((name, eps))
        # With every default as it is now: another version may have others.
        resolved = {} if attack is None else {**vars(attack[0]), "radii": attack[1]}
        abouts: list[dict[str, Any]] = [{"attack": plain(resolved)} for _ in batch]
        if attack is not None and self._saved is not None:
            abouts = [{"saved": self._saved.digest(self._data.stem(index))} for index in batch]
        keys = [self._key(about, [index]) for about, index in zip(abouts, batch, strict=True)]
        under = name if name == CLEAN else f"{name}, eps {budget(eps, config.norm)}"
        bar.set_description(under, refresh=False)
        if not all(key in self._cache for key in keys):
            start = time.perf_counter()
            # For models that draw random numbers: this batch gets the same ones, whatever was computed before it.
            torch.manual_seed(apgd.noise_seed(config.seed, batch[0], 0))
            found = self._attacked_and_counted(batch, attack)
            took = round((time.perf_counter() - start) / len(batch), 4)
            for key, index, result in zip(keys, batch, found, strict=True):
                if key not in self._cache:
                    self._cache.put(key, f"{under}, image {index}", {**result, "seconds": took})
        bar.update(len(batch))
        return [self._cache[key] for key in keys]

    def _attacked_and_counted(
        self, batch: list[int], attack: tuple[AttackSettings, str] | None
    ) -> list[dict[str, Any]]:
        """Counts of each image, and whether its attack found no gradient; clean without an attack."""
        results = []
        loaded = [(index, *self._load(index)) for index in batch]
        # Consecutive images of one size can be a batch.
        for _, run in groupby(loaded, key=lambda item: (item[1].shape, item[2].shape)):
            numbers, images, maps = zip(*run, strict=True)
            pixels, labels = (torch.stack(part).to(self._device) for part in (images, maps))
            without = [False] * len(numbers)
            if attack is not None and self._saved is not None:
                named = zip(map(self._data.stem, numbers), images, strict=True)
                read = [self._saved.image(stem, image, self._config.clip) for stem, image in named]
                pixels = torch.stack(read).to(self._device)
            elif attack is not None:
                settings, radii = attack
                loop = apgd.Loop(
                    settings, self._model, pixels, labels, indices=numbers, seed=self._config.seed, radii=radii
                )
                pixels, info = loop.run(return_info=True)
                assert info is not None
                without = info.without_gradient.tolist()
            counts = self._count(pixels, labels, numbers)
            results += [{"counts": c, "without_gradient": w} for c, w in zip(counts, without, strict=True)]
        return results

    def _key(self, what: dict[str, Any], images: list[int]) -> str:
        """Of everything that a result on these images depends on."""
        shared = plain({name: getattr(self._config, name) for name in ("seed", *OF_THE_DATA_AND_MODEL)})
        about = {
            "model": self._model_digest,
            "classes": self._to_class.digest(),
            "images": [[index, self._digests[index]] for index in images],
            **{name: self._environment[name] for name in ("eroseg_ext", "torch", "device", "fused")},
        }
        return key_of({**shared, **about, **what, "result": "counts [C, 3]"})

    def _load(self, index: int) -> tuple[Tensor, Tensor]:
        """An image float32 in the range of ``clip``, and its classes and VOID."""
        image, values = self._data.read(index)
        if image.dtype == torch.uint8:
            low, high = self._config.clip
            image = low + (high - low) * (image / 255)
        return image, self._to_class(values, self._data.where(index)[1]).long()

    def _answer(self, pixels: Tensor, number: int) -> LogitMap:
        """The model's logits of images of one size, of which ``number`` is the first."""
        try:
            with torch.no_grad():
                return self._logits(pixels)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            size = "x".join(map(str, pixels.shape[2:]))
            raise ValueError(
                f"the model fails on {self._data.name(number)} of {size} pixels, where another size may be wanted "
                f"(--size): {error}"
            ) from error

    def _count(self, pixels: Tensor, labels: Tensor, numbers: Sequence[int]) -> list[list[list[int]]]:
        """Counts ``[C, 3]`` of each image."""
        logits, align_corners = self._answer(pixels, numbers[0])
        broken = ~logits.isfinite().flatten(1).all(1)
        if broken.any():
            name = self._data.name(numbers[int(broken.int().argmax())])
            raise ValueError(f"the model's logits of {name} are NaN or infinite")
        classes = max(logits.shape[1], 2)
        wrong = labels >= classes
        if wrong.any():
            image = int(wrong.flatten(1).any(1).int().argmax())
            raise ValueError(
                f"{self._data.name(numbers[image])} has the label {int(labels[wrong][0])} at {place_of(wrong[image])}, "
                f"wanted classes from 0 to {classes - 1} or ignore_index={self._given.ignore_index}"
            )
        reading = {"ignore_index": VOID, "align_corners": align_corners}
        pairs = zip(logits.split(1), labels.flatten(1, -2).split(1), strict=True)
        matrices = torch.stack([self._ops.confusion(*pair, classes, **reading) for pair in pairs])
        counts: list[list[list[int]]] = counts_of(matrices).tolist()
        return counts

    def _fingerprint(self) -> str:
        """What tells the model from others."""
        config, model = self._config, self._model
        first = self._indices[0]
        about: dict[str, Any] = {
            **plain({name: getattr(config, name) for name in ("seed", "clip", "mean", "std", "autocast")}),
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


def _shapes(pair: tuple[Tensor, Tensor]) -> list[torch.Size]:
    return [part.shape for part in pair]
