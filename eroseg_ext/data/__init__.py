"""Images and label maps: one way to read them, the data sets that are known, and drawn scenes."""

from eroseg_ext.data.datasets import VOID, NamedDataset
from eroseg_ext.data.reading import SegmentationFolder

__all__ = ["VOID", "NamedDataset", "SegmentationFolder"]
