"""What the tests of the fused operations share: everything that computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch import Tensor

from eroseg_ext.ops import backend

if why_not := backend.why_not_fused(torch.device("cpu")):
    pytest.skip(why_not, allow_module_level=True)

import cuda_kernels

from eroseg_ext.ops import fused as ops


class OnDevice:
    """The fused operations on another device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        operation = getattr(ops, name)

        def moved(value: Any) -> Any:
            return value.to(self._device) if isinstance(value, Tensor) else value

        def call(*arguments: Any, **keywords: Any) -> Any:
            result = operation(*map(moved, arguments), **{key: moved(value) for key, value in keywords.items()})
            if name.endswith("_"):
                return arguments[0].copy_(result)
            return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

        return call


@pytest.fixture(params=[*DEVICES, "cuda kernels on the host"])
def fused(request: pytest.FixtureRequest) -> Any:
    """Whatever computes the operations, with the functions of ``ops.py``."""
    if request.param == "cpu":
        return ops
    if request.param == "cuda kernels on the host":
        if why_not := cuda_kernels.why_not():
            pytest.skip(why_not)
        return cuda_kernels
    device = torch.device(request.param)
    if why_not := backend.why_not_fused(device):
        pytest.skip(why_not)
    return OnDevice(device)
