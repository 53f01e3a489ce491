"""Adversarial attacks on semantic segmentation, fused: ``eroseg_ext.attack(model, images, labels)``."""

from importlib import import_module
from typing import TYPE_CHECKING

from eroseg_ext.attacks.apgd import strong_attack
from eroseg_ext.attacks.classes import JSD, PGD, CosPGD, EroSeg, MaskedCE, SegPGD, Tsallis
from eroseg_ext.attacks.pgd import attack
from eroseg_ext.attacks.result import AttackInfo, NotFiniteError, StepInfo
from eroseg_ext.attacks.settings import AttackSettings

if TYPE_CHECKING:
    from eroseg_ext.evaluation.adversarial import save_adversarial
    from eroseg_ext.evaluation.evaluate import evaluate
    from eroseg_ext.evaluation.result import Evaluation
    from eroseg_ext.evaluation.settings import EvaluationSettings
    from eroseg_ext.training import TrainingStopped, TrainSettings, train

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "PGD",
    "AttackInfo",
    "AttackSettings",
    "CosPGD",
    "EroSeg",
    "Evaluation",
    "EvaluationSettings",
    "MaskedCE",
    "NotFiniteError",
    "SegPGD",
    "StepInfo",
    "TrainSettings",
    "TrainingStopped",
    "Tsallis",
    "__version__",
    "attack",
    "evaluate",
    "save_adversarial",
    "strong_attack",
    "train",
]

# Imported at their first use: they need Pillow and matplotlib, which an attack does not.
_LATER = dict.fromkeys(("TrainSettings", "TrainingStopped", "train"), "eroseg_ext.training") | {
    "Evaluation": "eroseg_ext.evaluation.result",
    "EvaluationSettings": "eroseg_ext.evaluation.settings",
    "evaluate": "eroseg_ext.evaluation.evaluate",
    "save_adversarial": "eroseg_ext.evaluation.adversarial",
    "data": "eroseg_ext.data",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LATER[name])
    value = globals()[name] = module if name == "data" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
