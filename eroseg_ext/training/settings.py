"""The settings of a training run: one frozen dataclass, checked in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.data.datasets import MOST_CLASSES
from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.sources import Reading, SegmentationData
from eroseg_ext.models.normalisation import take_statistics
from eroseg_ext.utils.atomic_files import plain
from eroseg_ext.utils.validate import check_choice, check_integer, check_number, check_sequence, check_size, require

NO_ATTACK = "none"
NOT_OF_THE_RESULT = frozenset(("data", "out", "val", "init", "device", "threads", "workers", "cache", "val_every"))
NOT_OF_THE_RESULT |= {
    "val_attack_steps",
    "val_images",
    "checkpoint_every",
    "log_every",
    "resume",
    "compare_reference",
    "timeout",
    "progress",
}
"""Settings that a resumed run may change: they do not say what is computed, only where, and what is told of it."""
_CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "attack": (*METHODS, NO_ATTACK),
    "amp": ("none", "bf16"),
}
_COUNTS = ("batch_size", "accumulate", "val_every", "log_every", "val_images", "checkpoint_every")
# Beyond these, memory ends or a library fails before anything is told.
_INTEGERS: dict[str, tuple[int, int | None]] = dict.fromkeys(_COUNTS, (1, None)) | {
    "epochs": (1, 10**6),
    "attack_steps": (1, 10**4),
    "val_attack_steps": (0, 10**4),
    "compare_reference": (0, 1000),
    "replays": (1, 100),
    "seed": (0, 2**63 - 1),
    "threads": (1, 1024),
    "workers": (0, 256),
    "classes": (1, MOST_CLASSES),
}
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "step_size", "front_loss", "eps", "warmup_epochs", "poly_power")
_NUMBERS = dict.fromkeys((*_NOT_NEGATIVE, "auxiliary_weight"), (0, math.inf)) | {"timeout": (1, 1e7)}
_NUMBERS |= dict.fromkeys(("adv_fraction", "ema", "loss_balance"), (0, 1))


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Reading):
    """What :func:`eroseg_ext.train` takes as keywords; the options of ``eroseg train`` have the same names.

    eps and step_size are in pixel values of images in [0, 1]; sizes are (height, width).

    Raises ValueError or TypeError with one sentence if a value is not allowed.
    """

    data: Path | SegmentationData
    """folder with ``images/NAME.*`` and ``labels/NAME.png``, or of a data set as its publisher packs it; in Python also
    any data set, as :func:`eroseg_ext.evaluate` takes it"""
    out: Path
    """folder for checkpoints, weights, log and curves, made if missing"""
    val: Path | SegmentationData | None = None
    """folder to validate on, in the form of ``data``; a publisher's folder holds both, so give it twice"""
    classes: int | None = None
    """number of classes of ``dataset="folder"``; default: one more than the largest label of ``data`` and ``val``,
    found by reading them all"""

    model: str = "small"
    """``small`` (1.06 M parameters), ``tiny`` (0.15 M), ``package.module:callable`` or ``file.py:callable`` of what
    returns an nn.Module, a folder that transformers or segmentation_models_pytorch saved a model to, or the name of one
    of theirs or torchvision's models; for a module given to ``train``, the name of its class"""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """keywords for it; ``classes``, ``num_classes`` or ``num_labels``, if it takes one of them, is added"""
    init: Path | None = None
    """weights to start from: any file with a state dict, or a checkpoint, whose average is taken where it has one"""

    crop: tuple[int, int] | None = None
    """size of the random crops to train on; default: ``size``, else the size of the first image"""
    scale: tuple[float, float] = (0.6, 1.67)
    """range of the random scale, drawn log-uniformly; (1, 1) switches it off"""
    flip: bool = True
    """mirror every second image"""

    epochs: int = 60
    """passes over the images"""
    batch_size: int = 8
    """images per update, over all processes together"""
    accumulate: int = 1
    """a process's part of the batch goes through the model in so many pieces"""
    optimizer: str = "adamw"
    """``adamw`` or ``sgd`` (momentum 0.9)"""
    learning_rate: float | None = None
    """peak; default 3e-3 for adamw, 1e-2 for sgd"""
    weight_decay: float | None = None
    """default 1e-2 for adamw, 1e-4 for sgd"""
    warmup_epochs: float = 1.0
    """the learning rate rises linearly over these"""
    poly_power: float = 0.9
    """the learning rate is multiplied by (1 - step / steps) to this power"""
    class_weights: str | tuple[float, ...] = "none"
    """``none``, ``median-frequency`` (Eigen and Fergus, ICCV 2015), or one number per class"""
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None
    """instead of the cross-entropy: what ``package.module:callable`` or ``file.py:callable`` names, in Python also the
    callable, or a class that makes one: of logits [B, C, H, W] float32 and labels [B, H, W] int64, with -1 for void,
    it gives the mean over these images, a scalar"""
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    """keywords for it, such as ``{"ignore_index": -1}``"""
    loss_balance: float = 0.0
    """exponent from 0 (off) to 1 of a pixel's weight in the loss by how rare its class is in the image; an image counts
    as much as without it"""
    auxiliary_weight: float = 0.0
    """the loss of auxiliary heads, which are the other logits in the model's output, counts so much; 0 leaves them out,
    and their parameters as they are"""
    lr_mult: Mapping[str, float] = field(default_factory=dict)
    """factor of the learning rate by a part of the parameter's name, such as ``{"backbone": 0.1}``; of several that fit
    the longest counts"""
    ema: float = 0.0
    """decay per update of the exponential moving average of the weights, which is then validated and saved; 0: none"""

    attack: str = "eroseg"
    """``eroseg``, ``pgd``, ``segpgd``, ``cospgd``, ``mce``, ``mce_bal``, ``js``, ``tsallis`` or ``none``"""
    adv_fraction: float = 0.5
    """part of each batch that is attacked: 0.5 as SegPGD-AT, 1.0 as PIR-AT"""
    replays: int = 1
    """updates with each batch; above 1 the attack takes no steps: the gradient of an update with respect to its images
    makes the perturbation of the next, and the first is noise (free adversarial training, Shafahi et al., NeurIPS
    2019)"""
    eps: float = 4 / 255
    """radius of the l_inf ball, or of another one where ``attack_options`` give ``norm``"""
    attack_steps: int = 3
    """steps of the attack on each batch"""
    step_size: float | None = None
    """of the attack; default: the larger of eps / 4 and 1.5 eps / attack_steps, so that few steps cross the ball too;
    eps with replays"""
    attack_mode: str = "eval"
    """mode of the model during the attack: ``eval``, ``train`` or ``keep``"""
    attack_options: Mapping[str, Any] = field(default_factory=dict)
    """further keywords of :func:`eroseg_ext.attack`, such as ``{"radius": 0}`` or ``{"preset": "progressive"}``; with
    ``attack="eroseg"`` and no preset ``balance`` is 1 unless they say otherwise: all classes are attacked alike"""
    front_loss: float | None = None
    """the loss of a pixel counts 1 + front_loss times where the network is undecided about it, falling to 1 where it is
    sure, over the image's mean; default 4 with ``attack="eroseg"`` and no ``loss`` of one's own, else 0"""
    backend: str = "auto"
    """of the attack and the front loss: ``fused``, ``reference`` or ``auto``"""
    mean: tuple[float, ...] | Any | None = None
    """with std: the model is given (image - mean) / std, per channel; or in Python alone, an object that has both, such
    as an image processor of transformers or a transform of torchvision"""
    std: tuple[float, ...] | None = None
    """with mean"""
    output: str = "logits"
    """what the model returns: ``logits``, ``probabilities`` (of a softmax) or scores of a ``sigmoid``"""
    output_key: int | str | None = None
    """which entry of the model's output are the logits, where it returns several: a number or a name"""
    align_corners: bool = False
    """of the bilinear upsampling of logits that are smaller than the labels"""
    see_through: bool = True
    """do without a model's last upsampling of its logits, and take those before it"""
    amp: str = "none"
    """``bf16``: the model runs under bfloat16 autocast, in training and in the attack; weights stay float32"""

    seed: int = 0
    """of the weights, the order and augmentation of the images, and the random starts"""
    device: str | None = None
    """default: the process's GPU if there is one, else cpu"""
    threads: int | None = None
    """CPU threads of each process; default: torch's number"""
    workers: int | None = None
    """processes that read and augment images, per training process; default 4 with a GPU, else 0"""
    cache: bool = False
    """keep decoded images in memory (per worker)"""

    val_every: int = 5
    """epochs between validations; there is one at the end in any case"""
    val_attack_steps: int = 10
    """steps of the eroseg attack in validation, of eps / 4; 0 validates on clean images only"""
    val_images: int | None = None
    """validate on so many evenly spaced images; default: all"""
    checkpoint_every: int | None = None
    """updates between checkpoints; default: an epoch's"""
    log_every: int = 10
    """updates between lines of the log"""
    resume: bool = False
    """continue the run in ``out``; where there is none, start it"""
    compare_reference: int = 0
    """time so many updates with each backend, each from the same state on the same batch, before training"""
    timeout: float = 600.0
    """seconds after which processes give up waiting for each other"""
    progress: bool = False
    """show a tqdm bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in dataclasses.fields(self):
            name, value = entry.name, getattr(self, entry.name)
            if value is None and entry.default is None:
                continue
            if name in ("data", "val") and not isinstance(value, (str, Path)):
                require(hasattr(value, "__len__"), name, value, "a path or a data set")
            elif name in ("data", "out", "val", "init"):
                require(isinstance(value, (str, Path)), name, value, "a path")
                object.__setattr__(self, name, Path(value))
            elif name in _CHOICES:
                check_choice(name, value, _CHOICES[name])
            elif name in _INTEGERS:
                check_integer(name, value, *_INTEGERS[name])
            elif name in _NUMBERS:
                check_number(name, value, *_NUMBERS[name])
            elif isinstance(entry.default, bool):
                require(isinstance(value, bool), name, value, "True or False")
            elif name == "crop":
                check_size(name, value)
        require(self.ema < 1, "ema", self.ema, "a decay below 1, such as 0.999")
        low, high = self.scale if len(self.scale) == 2 else (0, 0)
        wanted = "a pair (low, high) with 0.01 <= low <= high <= 100"
        require(0.01 <= low <= high <= 100, "scale", self.scale, wanted)
        weights = self.class_weights
        if isinstance(weights, str):
            check_choice("class_weights", weights, ("none", "median-frequency"))
        else:
            check_sequence("class_weights", weights, one_per="class")
            require(min(weights) >= 0, "class_weights", weights, "numbers >= 0")
            require(max(weights) > 0, "class_weights", weights, "at least one number > 0")
        compared = self.compare_reference
        require(compared == 0 or self.attack != NO_ATTACK, "compare_reference", compared, "0, since attack is 'none'")
        if self.loss is None:
            require(not self.loss_args, "loss_args", self.loss_args, "none without loss")
        else:
            named = isinstance(self.loss, str) and ":" in self.loss
            require(named or callable(self.loss), "loss", self.loss, "package.module:callable or file.py:callable")
            require(not self.front_loss, "front_loss", self.front_loss, "0 with a loss of one's own")
            require(self.class_weights == "none", "class_weights", self.class_weights, "none with a loss of one's own")
            require(self.loss_balance == 0, "loss_balance", self.loss_balance, "0 with a loss of one's own")
        if self.loss_balance > 0:
            require(self.class_weights == "none", "class_weights", self.class_weights, "none beside loss_balance")
        if self.replays > 1:
            require(self.attack in ("eroseg", "pgd"), "attack", self.attack, "eroseg or pgd with replays")
            wanted = "norm and random_start alone with replays, whose gradient is the loss's"
            require(
                self.attack_options.keys() <= {"norm", "random_start"}, "attack_options", self.attack_options, wanted
            )
        for name, factor in self.lr_mult.items():
            check_number(f"lr_mult[{name!r}]", factor, 0, math.inf)
        self.attack_settings()
        take_statistics(self)
        if self.mean is not None:
            require(len(self.mean) in (1, 3), "mean", self.mean, "one number, or one for each of red, green and blue")

    def attack_settings(self) -> AttackSettings | None:
        """The settings of the attack in training, None without one; raises if ``attack_options`` are not allowed."""
        reading = {name: getattr(self, name) for name in ("output", "output_key", "align_corners", "see_through")}
        if self.attack == NO_ATTACK:
            AttackSettings.create(norm=self.norm, mean=self.mean, std=self.std, **reading)  # for validation
            return None
        of_the_training = ("method", "eps", "steps", "step_size", "mean", "std", "autocast", "backend", "model_mode")
        for name in (*of_the_training, *reading):
            require(name not in self.attack_options, "attack_options", name, "it as a setting of the training")
        fixed = ("ignore_index", "progress", "targeted", "clip", "graph", "logits", "images_are_normalized")
        for name in (*fixed, "window", "stride"):
            require(name not in self.attack_options, "attack_options", name, "none of what training fixes")
        options = dict(self.attack_options)
        preset = options.pop("preset", None)
        if self.attack == "eroseg" and preset is None:
            options = {"balance": 1.0, **options}
        return AttackSettings.create(
            preset,
            method=self.attack,
            eps=self.eps,
            steps=self.attack_steps,
            step_size=self._usual_step_size if self.step_size is None else self.step_size,
            ignore_index=VOID,
            backend=self.backend,
            model_mode=self.attack_mode,
            mean=self.mean,
            std=self.std,
            autocast=self.autocast,
            **reading,
            **options,
        )

    @property
    def _usual_step_size(self) -> float:
        return self.eps * (1 if self.replays > 1 else max(1 / 4, 1.5 / self.attack_steps))

    @property
    def norm(self) -> str:
        """of ``eps``: ``linf``, or what ``attack_options`` say"""
        return str(self.attack_options.get("norm", "linf"))

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that ``amp`` names."""
        return torch.bfloat16 if self.amp == "bf16" else None

    @property
    def front_loss_in_force(self) -> float:
        """The factor that ``front_loss`` gives or leaves to the attack."""
        if self.front_loss is not None:
            return self.front_loss
        return 4.0 if self.attack == "eroseg" and self.loss is None else 0.0

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate in force."""
        return self.learning_rate if self.learning_rate is not None else {"adamw": 3e-3, "sgd": 1e-2}[self.optimizer]

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        return self.weight_decay if self.weight_decay is not None else {"adamw": 1e-2, "sgd": 1e-4}[self.optimizer]

    def plain(self) -> dict[str, Any]:
        """All settings as values that JSON can hold."""
        own = ("data", "val", "loss")
        objects = {name: value for name in own if not isinstance(value := getattr(self, name), (str, Path, type(None)))}
        names = {name: getattr(value, "__qualname__", type(value).__name__) for name, value in objects.items()}
        found: dict[str, Any] = plain(vars(self) | names)
        return found
