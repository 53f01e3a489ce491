"""Adversarial training of segmentation models: ``eroseg_ext.train(data=..., out=...)``."""

from eroseg_ext.training.loop import TrainingStopped, train
from eroseg_ext.training.settings import TrainSettings

__all__ = ["TrainSettings", "TrainingStopped", "train"]
