"""The user's model: any output to logits, held during an attack, found by name; and a small network."""

from eroseg_ext.models.semantic import semantic
from eroseg_ext.models.small_deeplab import SmallDeepLab

__all__ = ["SmallDeepLab", "semantic"]
