"""The images that a model is evaluated on: a folder's or any data set's, with their names and digests."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from torch import Tensor

from eroseg_ext.data.reading import SegmentationFolder
from eroseg_ext.evaluation.fingerprint import bytes_of


class SegmentationData(Protocol):
    """What is evaluated on: ``data[i]`` is an image float32 ``[K, H, W]`` and its labels, integers ``[H, W]``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


def name_of(data: SegmentationData, index: int) -> str:
    return str(data.images[index].name) if isinstance(data, SegmentationFolder) else f"image {index}"


def item_of(data: SegmentationData, index: int) -> tuple[Tensor, Tensor]:
    """An image and its labels; what else the item holds is left out."""
    item: Any = data[index]
    parts = item if isinstance(item, (tuple, list)) else ()
    if len(parts) < 2 or not all(isinstance(part, Tensor) for part in parts[:2]):
        held = f" of {', '.join(type(part).__name__ for part in parts)}" if parts else ""
        raise TypeError(
            f"data[{index}] is a {type(item).__name__}{held}, wanted tensors: an image [K, H, W], its labels [H, W]"
        )
    return parts[0], parts[1]


def digest_of(data: SegmentationData, index: int) -> str:
    """A hash of an image and its labels; of a folder's files as they are, since decoding takes longer."""
    digest = hashlib.sha256()
    if isinstance(data, SegmentationFolder):
        digest.update(data.reading.encode())
        for path in (data.images[index], data.labels[index]):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    else:
        for part in item_of(data, index):
            digest.update(f"{part.dtype} {list(part.shape)}".encode())
            digest.update(bytes_of(part))
    return digest.hexdigest()[:16]
