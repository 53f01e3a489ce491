"""Which implementation runs, and why another does not."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from eroseg_ext.ops import backend, reference


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), "8.0;9.0", True),
        ((8, 9), "8.0;9.0", True),
        ((8, 0), "8.6 9.0", False),
        ((10, 0), "8.0;9.0", False),
        ((10, 0), "8.0;9.0+PTX", True),
        ((7, 5), "8.0;9.0+PTX", False),
        ((9, 0), "8.0; 9.0", True),
        ((9, 0), "9.0;", True),
        ((9, 0), "Ampere;Hopper", True),
        ((9, 0), "9.0a", True),
        ((9, 1), "9.0a", False),
        ((10, 0), "9.0a+PTX", False),
        ((10, 3), "10.0f", True),
        ((10, 0), "10.3f", False),
        ((12, 0), "10.0f+PTX", False),
        ((12, 1), "8.0;12.0+PTX", True),
    ],
)
def test_which_devices_a_build_runs_on(capability: tuple[int, int], architectures: str, runs: bool) -> None:
    assert backend._runs_on(capability, architectures) is runs


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, versions: tuple[int, int] | None) -> str | None:
    """The reason there is no fused CUDA beside a CUDA build of torch, with a module built for 13.0 or with none."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if versions is None:
        monkeypatch.setitem(sys.modules, "eroseg_ext._cuda", None)
    else:
        module = ModuleType("eroseg_ext._cuda")
        module.versions = lambda: versions  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "eroseg_ext._cuda", module)
    return backend._load_cuda()


@pytest.mark.skipif(backend.why_not_fused(torch.device("cpu")) is not None, reason="nothing is compiled")
def test_reasons_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no usable nvcc was found" in str(pretend_cuda(monkeypatch, None))
    assert pretend_cuda(monkeypatch, (13000, 0)) == "there is no CUDA driver"
    assert pretend_cuda(monkeypatch, (13000, 12090)) == (
        "the kernels are built with CUDA 13.0, the driver takes up to 12.9"
    )
    if not torch.cuda.is_available():
        assert pretend_cuda(monkeypatch, (13000, 13010)) == "torch finds no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delitem(sys.modules, "eroseg_ext._cuda")
    built = importlib.util.find_spec("eroseg_ext._cuda") is not None
    assert ("are there" if built else "are not built either") in str(backend._load_cuda())


def test_auto_takes_the_reference_where_nothing_fused_runs() -> None:
    assert backend.select(torch.device("meta")) is reference
    assert backend.select(torch.device("cpu"), "auto", "radius=2") is reference
    with pytest.raises(RuntimeError, match="backend is 'fused', but there are no fused kernels for meta tensors"):
        backend.select(torch.device("meta"), "fused")
