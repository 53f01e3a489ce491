"""Adversarial attacks on semantic segmentation, fused: ``eroseg_ext.attack(model, images, labels)``."""

from eroseg_ext.apgd import strong_attack
from eroseg_ext.attack import AttackInfo, StepInfo, attack
from eroseg_ext.evaluation import Evaluation, EvaluationSettings, evaluate
from eroseg_ext.first_calls import settle_first_calls
from eroseg_ext.objects import JSD, PGD, CosPGD, EroSeg, MaskedCE, SegPGD, Tsallis
from eroseg_ext.settings import AttackSettings
from eroseg_ext.training import train

__version__ = "0.1.0"

settle_first_calls()

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
    "SegPGD",
    "StepInfo",
    "Tsallis",
    "__version__",
    "attack",
    "evaluate",
    "strong_attack",
    "train",
]
