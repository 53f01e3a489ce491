"""Images and label maps: one way to read them, the data sets that are known, and drawn scenes."""

from eroseg_ext.data.palettes import VOID
from eroseg_ext.data.sources import NamedDataset, SegmentationFolder

__all__ = ["VOID", "NamedDataset", "SegmentationFolder"]
