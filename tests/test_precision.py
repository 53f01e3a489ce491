"""Devices without float64, which a CPU stands in for on which no operation may give a float64 tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import VOID
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eroseg_ext
from eroseg_ext.utils.precision import has_float64

pytestmark = pytest.mark.usefixtures("one_thread")


class NoFloat64(TorchDispatchMode):
    """Raises as MPS does; a Python number, which is a tensor of one element here, may have any precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64 and leaf.numel() > 1:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({func})")
        return result


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What is known of the devices is found out anew, before and after."""
    has_float64.cache_clear()
    yield
    has_float64.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (eroseg_ext.attack, {"method": "pgd"}),
        (eroseg_ext.attack, {"restarts": 2, "keep": "best", "early_stop": True}),
        (eroseg_ext.attack, {"norm": "l2", "eps": 2.0}),
        (eroseg_ext.attack, {"targeted": True, "threshold": "exact"}),
        (eroseg_ext.strong_attack, {"steps": 6}),
    ],
    ids=["pgd", "eroseg", "l2", "targeted", "strong"],
)
def test_attacks_do_without_float64(net: nn.Module, batch: Any, attack: Any, settings: dict[str, Any]) -> None:
    images, labels = (value.cpu() for value in batch)
    given = {"steps": 3, "ignore_index": VOID, "backend": "reference", "random_start": False} | settings
    wanted = attack(net.cpu(), images, labels, **given)
    has_float64.cache_clear()
    with NoFloat64():
        found = attack(net, images, labels, **given)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
