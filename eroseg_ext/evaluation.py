"""``evaluate(model, data)``: clean and adversarial scores of a model, per attack and in the worst case."""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eroseg_ext import backend, reference, sanity
from eroseg_ext.apgd import NOT_OF_APGD, checked, noise_seed, strong_attack
from eroseg_ext.checks import check_choice, check_integer, check_number, require
from eroseg_ext.data import SegmentationFolder, evenly_spaced, one_class
from eroseg_ext.files import locked, write_json
from eroseg_ext.journal import Journal, key_of
from eroseg_ext.metrics import Counts, Scores, WorstCase, counts_of, scores, worst_case
from eroseg_ext.model import Logits, Model, frozen, unwrapped
from eroseg_ext.sanity import budget
from eroseg_ext.settings import METHODS

DEFAULT_ATTACKS = ("eroseg", "js:shrinking", "cospgd")
"""Of all methods and radii the three whose worst case was lowest on three trained networks, see ``bench/NOTES.md``."""
CLEAN = "clean"
_OF_THE_DATA_AND_MODEL = ("norm", "ignore_index", "clip", "mean", "std", "autocast", "backend")
"""Settings that all rows and the sanity checks share."""
_OF_THE_ATTACKS = ("steps", "restarts")
"""Settings that a row may have otherwise."""


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
    backend: str = "auto"
    """of the attacks: ``fused``, ``reference`` or ``auto``"""
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
        budgets = self.budgets
        require(len(budgets) > 0 and len(set(budgets)) == len(budgets), "eps", self.eps, "one or several numbers")
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seed", self.seed, 0)
        check_integer("sanity", self.sanity, 0)
        if self.images is not None:
            check_integer("images", self.images, 1)
        for eps in budgets:
            check_number("eps", eps, 0, float("inf"))
            for name, row in rows.items():
                if not isinstance(row, Mapping):
                    raise TypeError(f"attacks[{name!r}] is a {type(row).__name__}, wanted a dict of settings")
                for setting in row:
                    if setting in (*NOT_OF_APGD, *_OF_THE_DATA_AND_MODEL, "eps", "model_mode", "progress"):
                        raise ValueError(f"attacks[{name!r}] sets {setting}, which is not a row's to set")
                checked(**self.attack_keywords(name, eps))

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
            "clean": asdict(self.clean),
            "rows": [{"attack": row.attack, "eps": row.eps, **asdict(row.scores)} for row in self.rows],
            "worst": [{"eps": eps, **asdict(worst)} for eps, worst in self.worst.items()],
            "sanity": [asdict(check) for check in self.sanity],
        }

    def markdown(self) -> str:
        """A table of one row per attack, one column per eps, and below it the worst case with its bound."""
        budgets = list(self.worst)
        norm, size = self.settings["norm"], self.settings["size"]
        resized = f", at {size[0]}x{size[1]}" if size else ""
        head = [f"attack{resized}", *(f"eps {budget(eps, norm)}" for eps in budgets), "s per image"]
        lines = [head, ["---"] * len(head)]
        lines.append(["none", *([_triple(self.clean)] * len(budgets)), f"{self.seconds[CLEAN]:.2f}"])
        for name in dict.fromkeys(row.attack for row in self.rows):
            found = {row.eps: row.scores for row in self.rows if row.attack == name}
            lines.append([f"`{name}`", *(_triple(found[eps]) for eps in budgets), f"{self.seconds[name]:.2f}"])
        lines.append(["**worst case**", *(f"**{_triple(self.worst[eps])}**" for eps in budgets), ""])
        lines.append(["lower bound of its mIoU", *(f"{self.worst[eps].miou_bound:.2f}" for eps in budgets), ""])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _triple(found: Scores | WorstCase) -> str:
    return f"{found.miou:.2f} / {found.macc:.2f} / {found.aacc:.2f}"


def evaluate(
    model: Model, data: str | Path | SegmentationData, *, out: str | Path | None = None, **settings: Any
) -> Evaluation:
    """Scores of a segmentation model on clean images, under each attack, and in the worst case over the attacks.

    >>> result = eroseg_ext.evaluate(model, "camvid/val", eps=[2 / 255, 4 / 255], ignore_index=11, out="evaluation")
    >>> print(result.markdown())

    Every attack is :func:`eroseg_ext.strong_attack` with another method's gradient. With ``out`` each finished batch is
    on the disk at once, in ``out/results.jsonl``: an evaluation that was interrupted, even killed, goes on where it was
    when it is called again, and gives the same result as one that was not. Results are found again by a hash of the
    model's weights and of its answer to one image, of the images and labels, and of the attack's settings, so a changed
    setting never mixes with others, and a further attack or eps computes only what is new.

    Args:
        model: nn.Module or any differentiable callable, as :func:`eroseg_ext.attack` takes it; run in eval mode and
            left as it was.
        data: folder with ``images/`` and ``labels/``, or anything with ``len`` whose items are an image ``[K, H, W]``,
            pixel values within ``clip``, and its labels ``[H, W]``: classes, or ``ignore_index`` for void; such as
            :class:`eroseg_ext.datasets.NamedDataset`, with ``ignore_index=eroseg_ext.datasets.VOID``.
        out: folder for ``results.jsonl`` and ``evaluation.json``, made if missing; None keeps nothing.
        **settings: the fields of :class:`EvaluationSettings`.

    Returns:
        Scores in percent: mIoU and mAcc over the classes that some label has, aAcc over all valid pixels. The worst
        case chooses for each image the clean image or one of the attacks: exactly for aAcc and mAcc, by greedy search
        for mIoU, with a lower bound of what any choice could reach.

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
        self._logits = Logits(model, mean=config.mean, std=config.std, autocast=config.autocast)
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
        self._digests = [[_digest(data, index) for index in batch] for batch in self._batches]
        self._model_digest = self._describe_model()

    def run(self) -> Evaluation:
        config = self._config
        plan: list[tuple[str, float]] = [(CLEAN, 0.0)]
        plan += [(row, eps) for eps in config.budgets for row in config.rows]
        counts: dict[tuple[str, float], Counts] = {}
        seconds = dict.fromkeys((CLEAN, *config.rows), 0.0)
        with tqdm(total=len(plan) * len(self._indices), unit="image", disable=not config.progress) as bar:
            checks: list[sanity.Check] = []
            for name, eps in plan:
                bar.set_description(name if name == CLEAN else f"{name} {budget(eps, config.norm)}")
                parts = []
                for number in range(len(self._batches)):
                    found = self._unit(name, eps, number)
                    seconds[name] += found["seconds"]
                    parts.append(_dense(found["counts"], found["classes"]))
                    bar.update(len(self._batches[number]))
                counts[name, eps] = np.concatenate(parts)
                if not counts[name, eps].any():
                    raise ValueError(f"data has no pixel with a label other than ignore_index={config.ignore_index}")
                if name == CLEAN:
                    self._warn_of_one_class(counts[name, eps])
                    checks = self._sanity()
        worst = {}
        for eps in config.budgets:
            worst[eps] = worst_case(np.stack([counts[CLEAN, 0.0], *(counts[row, eps] for row in config.rows)]))
        return Evaluation(
            clean=scores(counts[CLEAN, 0.0]),
            rows=tuple(AttackRow(name, eps, scores(counts[name, eps])) for name, eps in plan[1:]),
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
        names = (*_OF_THE_ATTACKS, *_OF_THE_DATA_AND_MODEL, "seed", "batch_size", "sanity")
        plain = {name: _plain(getattr(config, name)) for name in names}
        rows = {name: {key: _plain(value) for key, value in row.items()} for name, row in config.rows.items()}
        size = self._data.size if isinstance(self._data, SegmentationFolder) else None
        return {"attacks": rows, "eps": list(config.budgets), "size": _plain(size), **plain}

    def _unit(self, name: str, eps: float, number: int) -> dict[str, Any]:
        """Counts of one batch under one attack: from the journal, or made now and put there."""
        config, batch = self._config, self._batches[number]
        keywords = {} if name == CLEAN else config.attack_keywords(name, eps)
        # With every default as it is now: another version may have others.
        resolved = {} if name == CLEAN else {**asdict(checked(**keywords)), "radii": keywords.get("radii", "fixed")}
        key = self._key({"attack": {key: _plain(value) for key, value in resolved.items()}}, batch, number)
        if key not in self._journal:
            start = time.perf_counter()
            # For models that draw random numbers: this batch gets the same ones, whatever was computed before it.
            torch.manual_seed(noise_seed(config.seed, batch[0], 0))
            images = [self._load(index) for index in batch]
            counts: list[Tensor] = []
            for part in _same_size_runs(images):
                pixels = torch.stack([images[i][0] for i in part]).to(self._device)
                labels = torch.stack([images[i][1] for i in part]).to(self._device)
                if name != CLEAN:
                    numbers = [batch[i] for i in part]
                    pixels = strong_attack(self._model, pixels, labels, seed=config.seed, indices=numbers, **keywords)
                counts += self._count(pixels, labels, [batch[i] for i in part])
            sparse = [_sparse(part) for part in torch.stack(counts).cpu().numpy()]
            under = name if name == CLEAN else f"{name}, eps {budget(eps, config.norm)}"
            took = round(time.perf_counter() - start, 3)
            what = f"{under}, images {batch[0]} to {batch[-1]}"
            self._journal.put(key, what, {"classes": len(counts[0]), "counts": sparse, "seconds": took})
        return dict(self._journal[key])

    def _key(self, what: dict[str, Any], batch: list[int], number: int) -> str:
        """Everything that counts depend on; the batch too, since a sum's last bits may depend on its neighbours."""
        shared = {name: _plain(getattr(self._config, name)) for name in ("seed", *_OF_THE_DATA_AND_MODEL)}
        about = {
            "model": self._model_digest,
            "images": self._digests[number],
            "numbers": batch,
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
        """A hash of the weights, of the modules' own description, and of the answer to the first image.

        Weights and description leave out what a module only keeps as an attribute. The answer is rounded, so that its
        last bits, which may vary from run to run, do not matter.
        """
        digest = hashlib.sha256()
        torch.manual_seed(self._config.seed)
        image, _ = self._load(self._indices[0])
        logits = self._answer(image[None].to(self._device), self._indices[0]).double()
        digest.update(f"{logits.shape[1]} {logits.abs().mean():.2e} {logits.std():.2e}".encode())
        if isinstance(self._model, nn.Module):
            digest.update(re.sub("0x[0-9a-f]+", "", f"{type(self._model).__qualname__} {self._model}").encode())
            for name, value in self._model.state_dict().items():
                if isinstance(value, Tensor):
                    digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                    digest.update(_bytes(value))
        else:
            digest.update(_bytes(logits))
        return digest.hexdigest()[:32]

    def _sanity(self) -> list[sanity.Check]:
        config = self._config
        if config.sanity == 0:
            return []
        numbers = [self._indices[i] for i in evenly_spaced(len(self._indices), config.sanity)]
        digests = [_digest(self._data, number) for number in numbers]
        key = self._key({"sanity": [digests, list(config.budgets)]}, numbers, 0)
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


def _dense(images: list[list[list[int]]], classes: int) -> Counts:
    counts = np.zeros((len(images), classes, 3), np.int64)
    for number, rows in enumerate(images):
        for index, *row in rows:
            counts[number, index] = row
    return counts


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
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
