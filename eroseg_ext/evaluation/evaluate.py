"""``evaluate(model, data)``: clean and adversarial scores of a model, per attack and in the worst case."""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count, groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eroseg_ext.attacks.apgd import NOT_OF_APGD, checked, noise_seed, strong_attack
from eroseg_ext.attacks.settings import METHODS
from eroseg_ext.data.reading import SegmentationFolder, evenly_spaced, one_class
from eroseg_ext.evaluation import sanity
from eroseg_ext.evaluation.metrics import MIOU_CLASSES, Counts, Floats, Scores, WorstCase, counts_of, scores, worst_case
from eroseg_ext.evaluation.result_cache import Journal, key_of
from eroseg_ext.evaluation.sanity import budget
from eroseg_ext.models.adapter import SETTINGS as OF_THE_MODEL
from eroseg_ext.models.adapter import Logits, Model, frozen, unwrapped
from eroseg_ext.ops import backend, reference
from eroseg_ext.utils.atomic_files import locked, write_json
from eroseg_ext.utils.validate import check_choice, check_integer, check_number, require

DEFAULT_ATTACKS = ("eroseg", "js:shrinking", "cospgd")
"""Of all methods and radii the three whose worst case was lowest on three trained networks, see ``bench/NOTES.md``."""
CLEAN = "clean"
_OF_THE_DATA_AND_MODEL = ("norm", "ignore_index", "clip", "backend", *OF_THE_MODEL)
"""Settings that all rows and the sanity checks share."""
_OF_THE_ATTACKS = ("steps", "restarts")
"""Settings that a row may have otherwise."""
_PROJECTIONS = 8
"""Random sums over the pixels, per class, that logits are compared by."""
_ALIKE = 1e-4
"""Logits are of one model if these sums differ by no more than this part of their root mean square."""


class SegmentationData(Protocol):
    """What is evaluated on: ``data[i]`` is an image float32 ``[K, H, W]`` and its labels, integers ``[H, W]``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What :func:`evaluate` takes as keywords. Lengths in the image are in pixel values of ``clip``'s range.

    Raises ValueError or TypeError with one sentence if a value is not allowed.
    """

    attacks: Sequence[str] | Mapping[str, Mapping[str, Any]] = DEFAULT_ATTACKS
    """methods, such as ``"js"``, with ``"js:shrinking"`` for the shrinking radii; or by name of the row what it passes
    to :func:`eroseg_ext.strong_attack`"""
    eps: float | Sequence[float] = 8 / 255
    """radius of the ball, or several; each has a worst case of its own"""
    steps: int = 100
    """gradients per attack and restart"""
    restarts: int = 1
    norm: str = "linf"
    ignore_index: int = 255
    """label of void pixels, which never count"""
    seed: int = 0
    """of the random starts; an image's noise depends on the seed, the image's number and the restart alone"""
    batch_size: int = 8
    """images attacked at once; those of one batch that differ in size are attacked one after the other"""
    images: int | None = None
    """evaluate on so many evenly spaced images; None: all"""
    clip: tuple[float, float] = (0.0, 1.0)
    """range of pixel values"""
    mean: Sequence[float] | None = None
    """with std: the model is given (image - mean) / std, per channel, while eps and clip stay in pixel values"""
    std: Sequence[float] | None = None
    autocast: torch.dtype | None = None
    """run the model under torch.autocast with this dtype, also to count its right pixels"""
    output: str = "logits"
    """what the model returns: ``logits``, ``probabilities`` (of a softmax) or scores of a ``sigmoid``"""
    output_key: int | str | None = None
    """which entry of the model's output are the logits, where it returns several: a number or a name"""
    logits: Callable[[Any], Tensor] | None = None
    """instead of ``output_key``: a callable from the model's output to the logits"""
    align_corners: bool = False
    """of the bilinear upsampling of logits that are smaller than the labels"""
    backend: str = "auto"
    """of the attacks: ``fused``, ``reference`` or ``auto``"""
    miou_classes: str = "labelled"
    """classes that mIoU is the mean of: ``labelled``, those that some label has; or ``labelled_or_predicted``, where a
    class that is predicted and that no label has counts as 0, as in mmsegmentation and torchmetrics"""
    model_description: Mapping[str, Any] = field(default_factory=dict)
    """what else tells the model from others, such as its name and arguments, as JSON can hold it: kept results are of a
    model with the same description"""
    sanity: int = 4
    """run the sanity checks on so many images; 0 leaves them out"""
    progress: bool = False
    """show a bar on stderr"""

    def __post_init__(self) -> None:
        if isinstance(self.attacks, str):
            raise TypeError(f"attacks is the string {self.attacks!r}, wanted a list of methods such as ['eroseg']")
        rows = self.rows
        require(len(rows) > 0, "attacks", self.attacks, "at least one method")
        require(CLEAN not in rows, "attacks", self.attacks, f"names of rows other than {CLEAN!r}")
        try:
            json.dumps(self.model_description, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model_description is not what JSON can hold: {error}") from error
        budgets = self.budgets
        require(len(budgets) > 0 and len(set(budgets)) == len(budgets), "eps", self.eps, "one or several numbers")
        # Twice the radius and its square have to be float32.
        for eps in budgets:
            check_number("eps", eps, 0, 1e18)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seed", self.seed, 0, 2**63 - 1)
        check_integer("sanity", self.sanity, 0)
        check_choice("miou_classes", self.miou_classes, MIOU_CLASSES)
        if self.images is not None:
            check_integer("images", self.images, 1)
        for eps in budgets:
            for name, row in rows.items():
                if not isinstance(row, Mapping):
                    raise TypeError(f"attacks[{name!r}] is a {type(row).__name__}, wanted a dict of settings")
                for setting in row:
                    if setting in (*NOT_OF_APGD, *_OF_THE_DATA_AND_MODEL, "eps", "model_mode", "progress"):
                        raise ValueError(f"attacks[{name!r}] sets {setting}, which is not a row's to set")
                attack = checked(**self.attack_keywords(name, eps))
                passes = attack.steps * attack.restarts
                require(
                    passes <= 10**6, "steps x restarts", passes, "at most 1000000, as numbers of each step are kept"
                )

    @property
    def budgets(self) -> tuple[float, ...]:
        """The values of eps, in the order given."""
        return tuple(self.eps) if isinstance(self.eps, Sequence) else (self.eps,)

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Settings of its own by row: name of the attack, and at least its method."""
        if isinstance(self.attacks, Mapping):
            return {name: row for name, row in self.attacks.items()}
        return {entry: _row(entry) for entry in self.attacks}

    def attack_keywords(self, row: str, eps: float) -> dict[str, Any]:
        """What :func:`eroseg_ext.strong_attack` is called with for a row at a budget."""
        shared = {name: getattr(self, name) for name in (*_OF_THE_DATA_AND_MODEL, *_OF_THE_ATTACKS)}
        return {**shared, "eps": eps, **self.rows[row]}


def _row(entry: str) -> dict[str, str]:
    """What ``method`` or ``method:radii`` passes to the attack."""
    method, colon, radii = entry.partition(":")
    check_choice("attacks", method, METHODS)
    return {"method": method, "radii": radii} if colon else {"method": method}


@dataclass(frozen=True)
class AttackRow:
    """One attack at one budget."""

    attack: str
    eps: float
    scores: Scores
    without_gradient: tuple[str, ...] = ()
    """names of the images whose gradient was 0 everywhere in the attack's first step: their scores are noise's"""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. Scores are in percent."""

    clean: Scores
    rows: tuple[AttackRow, ...]
    """by budget, and within it by attack"""
    worst: dict[float, WorstCase]
    """by eps, over the clean images and the attacks of that eps; ``chosen_...`` number these, clean as 0"""
    sanity: tuple[sanity.Check, ...]
    seconds: dict[str, float]
    """per image and budget, by row name; of interrupted runs too"""
    settings: dict[str, Any]
    environment: dict[str, Any]
    images: tuple[str, ...]
    """names of the images, or their numbers"""

    def as_json(self) -> dict[str, Any]:
        """Plain values; everything but the times, so that an interrupted evaluation ends like any other."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "images": list(self.images),
            "failed_checks": list(self.failed_checks),
            "clean": {**asdict(self.clean), "checks_passed": self._passed(of_clean=True)},
            "rows": [
                {
                    "attack": row.attack,
                    "eps": row.eps,
                    **asdict(row.scores),
                    "checks_passed": self._passed(),
                    "without_gradient": list(row.without_gradient),
                }
                for row in self.rows
            ],
            "worst": [
                {"eps": eps, **asdict(worst), "checks_passed": self._passed()} for eps, worst in self.worst.items()
            ],
            "sanity": [asdict(check) for check in self.sanity],
        }

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """Names of the sanity checks that failed; the figures are no measure of robustness then."""
        return tuple(check.name for check in self.sanity if not check.passed)

    def _passed(self, of_clean: bool = False) -> bool | None:
        """Whether all checks passed that figures rest on, the clean or the attacks'; None where no check was run."""
        if not self.sanity:
            return None
        return not (set(self.failed_checks) & sanity.OF_CLEAN if of_clean else self.failed_checks)

    def markdown(self) -> str:
        """A table of one row per attack, one column per eps, and below it the worst case with its bound.

        Lines whose figures cannot be believed say so, and a sentence below the table why.
        """
        budgets = list(self.worst)
        norm, size = self.settings["norm"], self.settings["size"]
        resized = f", at {size[0]}x{size[1]}" if size else ""
        head = [f"attack{resized}", *(f"eps {budget(eps, norm)}" for eps in budgets), "s per image"]
        lines = [head, ["---"] * len(head)]
        mark = " (checks failed)" if self._passed() is False else ""
        of_clean = mark if self._passed(of_clean=True) is False else ""
        lines.append([f"none{of_clean}", *([_triple(self.clean)] * len(budgets)), f"{self.seconds[CLEAN]:.2f}"])
        failed = ", ".join(self.failed_checks)
        notes = [f"checks failed: {failed}; these figures are no measure of robustness"] if mark else []
        for name in dict.fromkeys(row.attack for row in self.rows):
            found = {row.eps: row for row in self.rows if row.attack == name}
            without = list(dict.fromkeys(image for row in found.values() for image in row.without_gradient))
            said = f" (no gradient on {len(without)} of {len(self.images)} images)" if without else ""
            triples = (_triple(found[eps].scores) for eps in budgets)
            lines.append([f"`{name}`{mark}{said}", *triples, f"{self.seconds[name]:.2f}"])
            if without:
                more = f" and {len(without) - 8} more" if len(without) > 8 else ""
                notes.append(f"`{name}` finds a gradient of 0 everywhere on {', '.join(without[:8])}{more}")
        lines.append([f"**worst case**{mark}", *(f"**{_triple(self.worst[eps])}**" for eps in budgets), ""])
        bounds = (f"{self.worst[eps].miou_bound:.2f}" for eps in budgets)
        lines.append([f"lower bound of its mIoU{mark}", *bounds, ""])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([table, *notes])


def _triple(found: Scores | WorstCase) -> str:
    return f"{found.miou:.2f} / {found.macc:.2f} / {found.aacc:.2f}"


def evaluate(
    model: Model, data: str | Path | SegmentationData, *, out: str | Path | None = None, **settings: Any
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
        data: folder with ``images/`` and ``labels/``, or anything with ``len`` whose items are an image ``[K, H, W]``,
            pixel values within ``clip``, and its labels ``[H, W]``: classes, or ``ignore_index`` for void; such as
            :class:`eroseg_ext.data.NamedDataset`, with ``ignore_index=eroseg_ext.data.VOID``.
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
    source = SegmentationFolder(data) if isinstance(data, (str, Path)) else data
    if not hasattr(source, "__getitem__"):
        raise TypeError(
            f"data is a {type(source).__name__}, wanted a folder, or a data set that data[i] gives items of"
        )
    if len(source) == 0:
        raise ValueError("data has no image, wanted at least one")
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "evaluation.json").is_dir():
            raise ValueError(f"out {folder} cannot be used, its evaluation.json is a folder")
    path = None if folder is None else folder / "results.jsonl"
    alone = nullcontext() if folder is None else locked(folder)
    with alone, Journal(path) as journal, frozen(unwrapped(model), "eval"), torch.random.fork_rng():
        result = _Evaluator(config, unwrapped(model), source, journal).run()
        if folder is not None:
            write_json(folder / "evaluation.json", result.as_json())
    return result


class _Evaluator:
    """One call of :func:`evaluate`."""

    def __init__(self, config: EvaluationSettings, model: Model, data: SegmentationData, journal: Journal) -> None:
        self._config = config
        self._model = model
        self._data = data
        self._journal = journal
        self._logits = Logits.under(model, config)
        channels = len(self._load(0)[0])
        if config.mean is not None and len(config.mean) not in (1, channels):
            raise ValueError(f"mean has {len(config.mean)} numbers, wanted {channels}, one per channel of images")
        kept = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        self._device = kept[0].device if kept else _item(data, 0)[0].device
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
        self._digests = {index: _digest(data, index) for index in chosen}
        self._model_digest = self._describe_model()

    def run(self) -> Evaluation:
        config = self._config
        plan: list[tuple[str, float]] = [(CLEAN, 0.0)]
        plan += [(row, eps) for eps in config.budgets for row in config.rows]
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
                    raise ValueError(f"data has no pixel with a label other than ignore_index={config.ignore_index}")
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
                    tuple(_name(self._data, number) for number in without[name, eps]),
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
            images=tuple(_name(self._data, index) for index in self._indices),
        )

    def _warn_of_one_class(self, counts: Counts) -> None:
        """Such as of a mask of 0 and 255 with ignore_index 255: whatever the model answers, its mIoU looks fine."""
        classes, void = np.flatnonzero(counts[..., 1].sum(0)).tolist(), self._config.ignore_index
        if len(classes) == 1:
            beside = any((self._load(index)[1] == void).any() for index in self._indices)
            told = one_class(classes + [void] * beside, {void})
            warnings.warn(f"in data {told}, which says nothing about the others", UserWarning, stacklevel=4)

    def _plain_settings(self) -> dict[str, Any]:
        config = self._config
        others = ("seed", "batch_size", "sanity", "miou_classes", "model_description")
        names = (*_OF_THE_ATTACKS, *_OF_THE_DATA_AND_MODEL, *others)
        plain = {name: _plain(getattr(config, name)) for name in names}
        rows = {name: {key: _plain(value) for key, value in row.items()} for name, row in config.rows.items()}
        size = self._data.size if isinstance(self._data, SegmentationFolder) else None
        return {"attacks": rows, "eps": list(config.budgets), "size": _plain(size), **plain}

    def _unit(self, name: str, eps: float, batch: list[int]) -> list[dict[str, Any]]:
        """Counts of a batch's images under one attack: from the journal, or made now and put there.

        A batch of which anything is missing is made as a whole, as it would have been without an interruption.
        """
        config = self._config
        keywords = {} if name == CLEAN else config.attack_keywords(name, eps)
        # With every default as it is now: another version may have others.
        resolved = {} if name == CLEAN else {**vars(checked(**keywords)), "radii": keywords.get("radii", "fixed")}
        about = {"attack": {key: _plain(value) for key, value in resolved.items()}}
        keys = [self._key(about, [index]) for index in batch]
        if not all(key in self._journal for key in keys):
            start = time.perf_counter()
            # For models that draw random numbers: this batch gets the same ones, whatever was computed before it.
            torch.manual_seed(noise_seed(config.seed, batch[0], 0))
            images = [self._load(index) for index in batch]
            counts: list[Tensor] = []
            without: list[int] = []
            for part in _same_size_runs(images):
                pixels = torch.stack([images[i][0] for i in part]).to(self._device)
                labels = torch.stack([images[i][1] for i in part]).to(self._device)
                if name != CLEAN:
                    numbers = [batch[i] for i in part]
                    pixels, info = strong_attack(
                        self._model, pixels, labels, seed=config.seed, indices=numbers, return_info=True, **keywords
                    )
                    flags = info.without_gradient.tolist()
                    without += [number for number, flag in zip(numbers, flags, strict=True) if flag]
                counts += self._count(pixels, labels, [batch[i] for i in part])
            sparse = [_sparse(part) for part in torch.stack(counts).cpu().numpy()]
            under = name if name == CLEAN else f"{name}, eps {budget(eps, config.norm)}"
            took = round((time.perf_counter() - start) / len(batch), 4)
            for key, index, found in zip(keys, batch, sparse, strict=True):
                if key not in self._journal:
                    value = {"classes": len(counts[0]), "counts": found, "seconds": took}
                    self._journal.put(key, f"{under}, image {index}", value | {"without_gradient": index in without})
        return [self._journal[key] for key in keys]

    def _key(self, what: dict[str, Any], images: list[int]) -> str:
        """Of everything that a result on these images depends on."""
        shared = {name: _plain(getattr(self._config, name)) for name in ("seed", *_OF_THE_DATA_AND_MODEL)}
        about = {
            "model": self._model_digest,
            "images": [[index, self._digests[index]] for index in images],
            **{name: self._environment[name] for name in ("eroseg_ext", "torch", "device", "fused")},
        }
        return key_of({**shared, **about, **what})

    def _load(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = _item(self._data, index)
        if image.dim() != 3 or labels.shape != image.shape[1:]:
            raise ValueError(
                f"{_name(self._data, index)} is an image {list(image.shape)} with labels {list(labels.shape)}, wanted "
                "[K, H, W] and [H, W]"
            )
        return image.float(), labels.long()

    def _answer(self, pixels: Tensor, number: int) -> Tensor:
        """The model's logits of images of one size, of which ``number`` is the first."""
        height, width = pixels.shape[-2:]
        try:
            with torch.no_grad():
                return self._logits(pixels, (height, width))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"the model fails on {_name(self._data, number)} of {height}x{width} pixels, where another size may be "
                f"wanted (--size): {error}"
            ) from error

    def _count(self, pixels: Tensor, labels: Tensor, numbers: list[int]) -> list[Tensor]:
        """Counts ``[C, 3]`` of each image, on the device."""
        logits = self._answer(pixels, numbers[0])
        broken = ~logits.isfinite().flatten(1).all(1)
        if broken.any():
            name = _name(self._data, numbers[int(broken.int().argmax())])
            raise ValueError(f"the model's logits of {name} are NaN or infinite")
        classes = max(logits.shape[1], 2)
        wrong = (labels != self._config.ignore_index) & ((labels < 0) | (labels >= classes))
        if wrong.any():
            image, row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{_name(self._data, numbers[image])} has the label {int(labels[image, row, column])} at row {row}, "
                f"column {column}, wanted classes from 0 to {classes - 1} or ignore_index={self._config.ignore_index}"
            )
        void = self._config.ignore_index
        rows = [slice(i, i + 1) for i in range(len(labels))]
        return [counts_of(self._ops.confusion(logits[i], labels[i], classes, ignore_index=void)) for i in rows]

    def _describe_model(self) -> str:
        """What tells the model apart: a hash of its weights, description and logits.

        The logits' last bits may vary from run to run. So those of each model are kept in the journal, and if the ones
        found now are near enough, those that are kept take their place in the hash.
        """
        config, model = self._config, self._model
        about: dict[str, Any] = {
            **{name: _plain(getattr(config, name)) for name in ("seed", "clip", "mean", "std", "autocast")},
            **self._environment,
            "image": self._digests[self._indices[0]],
            "description": config.model_description,
        }
        if isinstance(model, nn.Module):
            digest = hashlib.sha256()
            digest.update(re.sub("0x[0-9a-f]+", "", f"{type(model).__qualname__} {model}").encode())
            for name, value in model.state_dict().items():
                if isinstance(value, Tensor):
                    digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                    digest.update(_bytes(value))
            about["weights"] = digest.hexdigest()
        logits = self._projected_logits()
        for number in count():
            key = key_of({"logits of": about, "number": number})
            if key not in self._journal:
                self._journal.put(key, "the model's logits", logits.tolist())
            kept = np.array(self._journal[key])
            if _alike(logits, kept):
                break
        return key_of({"model": about, "logits": kept.tolist()})

    def _projected_logits(self) -> Floats:
        """Clean logits of three images in few numbers: sums with random signs over the pixels ``[3, C, _PROJECTIONS]``.

        Such a sum changes if the logits change anywhere. The images are the first one, its mirror image, and noise,
        each alone and by one thread, so that only the machine can change a bit.
        """
        image, _ = self._load(self._indices[0])
        generator = torch.Generator().manual_seed(0)
        shape = (image[0].numel(), _PROJECTIONS)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.float32) * 2 - 1
        low, high = self._config.clip
        noise = low + (high - low) * torch.rand(image.shape, generator=generator, dtype=torch.float32)
        found = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for pixels in (image, image.flip(-1), noise):
                torch.manual_seed(self._config.seed)
                logits = self._answer(pixels[None].to(self._device), self._indices[0])[0]
                # What is not finite is told when the images are evaluated.
                flat = logits.float().cpu().flatten(1).nan_to_num(posinf=1.0, neginf=-1.0)
                found.append(flat @ signs / max(len(signs), 1) ** 0.5)
        finally:
            torch.set_num_threads(threads)
        return torch.stack(found).double().numpy()

    def _sanity(self) -> list[sanity.Check]:
        config = self._config
        if config.sanity == 0:
            return []
        numbers = [self._indices[i] for i in evenly_spaced(len(self._indices), config.sanity)]
        key = self._key({"sanity": list(config.budgets)}, numbers)
        if key not in self._journal:
            loaded = [self._load(number) for number in numbers]
            loaded = [pair for pair in loaded if pair[0].shape == loaded[0][0].shape]
            images, labels = (torch.stack(part).to(self._device) for part in zip(*loaded, strict=True))
            shared = {name: getattr(config, name) for name in _OF_THE_DATA_AND_MODEL}
            torch.manual_seed(config.seed)
            checks = sanity.check(self._model, images, labels, eps=max(config.budgets), **shared)
            self._journal.put(key, "sanity checks", [asdict(check) for check in checks])
        return [sanity.Check(**check) for check in self._journal[key]]


def _same_size_runs(images: list[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Numbers of consecutive images of one size: what can be a batch."""
    return [list(run) for _, run in groupby(range(len(images)), key=lambda i: images[i][0].shape)]


def _sparse(counts: Counts) -> list[list[int]]:
    """``[class, right, labels, predicted]`` of the classes that occur."""
    return [[index, *row] for index, row in enumerate(counts.tolist()) if any(row)]


def _dense(sparse: list[list[int]], classes: int) -> Counts:
    counts = np.zeros((classes, 3), np.int64)
    for index, *row in sparse:
        counts[index] = row
    return counts


def _alike(logits: Floats, kept: Floats) -> bool:
    """Whether projected logits are one model's."""
    if logits.shape != kept.shape:
        return False
    size = np.sqrt(np.square(kept).mean((1, 2), keepdims=True))
    return bool((np.abs(logits - kept) <= _ALIKE * size).all())


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return list(value) if isinstance(value, (list, tuple)) else value


def _name(data: SegmentationData, index: int) -> str:
    return str(data.images[index].name) if isinstance(data, SegmentationFolder) else f"image {index}"


def _item(data: SegmentationData, index: int) -> tuple[Tensor, Tensor]:
    """An image and its labels; what else the item holds is left out."""
    item: Any = data[index]
    parts = item if isinstance(item, (tuple, list)) else ()
    if len(parts) < 2 or not all(isinstance(part, Tensor) for part in parts[:2]):
        held = f" of {', '.join(type(part).__name__ for part in parts)}" if parts else ""
        raise TypeError(
            f"data[{index}] is a {type(item).__name__}{held}, wanted tensors: an image [K, H, W], its labels [H, W]"
        )
    return parts[0], parts[1]


def _bytes(value: Tensor) -> bytes:
    if hasattr(value, "full_tensor"):  # a DTensor, of which each process has a part
        value = value.full_tensor()
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(data: SegmentationData, index: int) -> str:
    """A hash of an image and its labels; of a folder's files as they are, since decoding takes longer."""
    digest = hashlib.sha256()
    if isinstance(data, SegmentationFolder):
        digest.update(data.reading.encode())
        for path in (data.images[index], data.labels[index]):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    else:
        for part in _item(data, index):
            digest.update(f"{part.dtype} {list(part.shape)}".encode())
            digest.update(_bytes(part))
    return digest.hexdigest()[:16]
