"""What tells a model from others, so that results that were kept are never taken for another model's."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eroseg_ext.evaluation.metrics import Floats
from eroseg_ext.evaluation.result_cache import ResultCache, key_of

_PROJECTIONS = 8
"""Random sums over the pixels, per class, that logits are compared by."""
_ALIKE = 1e-4
"""Logits are of one model if these sums differ by no more than this part of their root mean square."""


def fingerprint(about: dict[str, Any], logits: Floats, cache: ResultCache) -> str:
    """A hash of what describes a model, as plain values, and of its logits as :func:`projected_logits` has them.

    The logits' last bits may vary from run to run. So those of each model are kept in the cache, and if the ones found
    now are near enough, those that are kept take their place in the hash.
    """
    for number in count():
        key = key_of({"logits of": about, "number": number})
        if key not in cache:
            cache.put(key, "the model's logits", logits.tolist())
        kept = np.array(cache[key])
        if logits.shape == kept.shape:
            size = np.sqrt(np.square(kept).mean((1, 2), keepdims=True))
            if (np.abs(logits - kept) <= _ALIKE * size).all():
                break
    return key_of({"model": about, "logits": kept.tolist()})


def digest_of_weights(model: nn.Module) -> str:
    """A hash of a module's class, ``repr`` and state dict."""
    digest = hashlib.sha256()
    digest.update(re.sub("0x[0-9a-f]+", "", f"{type(model).__qualname__} {model}").encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(bytes_of(value))
    return digest.hexdigest()


def projected_logits(answer: Callable[[Tensor], Tensor], image: Tensor, clip: tuple[float, float], seed: int) -> Floats:
    """Clean logits of three images in few numbers: sums with random signs over the pixels ``[3, C, _PROJECTIONS]``.

    Such a sum changes if the logits change anywhere. The images are the first one, its mirror image, and noise, each
    alone and by one thread, so that only the machine can change a bit.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = clip
    noise = low + (high - low) * torch.rand(image.shape, generator=generator, dtype=torch.float32).to(image.device)
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for pixels in (image, image.flip(-1), noise):
            torch.manual_seed(seed)
            logits = answer(pixels[None])[0]
            # Values that are not finite are reported when the images are evaluated.
            found.append(logits.float().cpu().flatten(1).nan_to_num(posinf=1.0, neginf=-1.0))
    finally:
        torch.set_num_threads(threads)
    shape = (found[0].shape[1], _PROJECTIONS)
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.float32) * 2 - 1
    return torch.stack([flat @ signs / math.sqrt(max(len(signs), 1)) for flat in found]).double().numpy()


def bytes_of(value: Tensor) -> bytes:
    """A tensor's content."""
    if hasattr(value, "full_tensor"):  # a DTensor, of which each process has a part
        value = value.full_tensor()
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
