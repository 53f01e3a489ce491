"""``graph=True``: the model from CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_common import Batch, MakeNet, name_of, run, run_info
from torch import Tensor, nn

SETTINGS: list[dict[str, Any]] = [
    {},
    {"method": "segpgd"},
    {"norm": "l2", "eps": 0.5, "restarts": 2, "keep": "best"},
    {"micro_batch": 2},
    {"early_stop": True},
    {"autocast": torch.bfloat16},
]


@pytest.fixture
def on_cuda(batch: Batch) -> Batch:
    if batch[0].device.type != "cuda":
        pytest.skip("CUDA graphs want a GPU")
    return batch


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_graph_changes_nothing(make_net: MakeNet, on_cuda: Batch, backend: str, settings: dict[str, Any]) -> None:
    net = make_net(stride=2)
    eager, eager_info = run_info(net, on_cuda, backend=backend, steps=6, **settings)
    graphed, info = run_info(net, on_cuda, backend=backend, steps=6, graph=True, **settings)
    assert torch.equal(eager, graphed)
    assert torch.equal(eager_info.stats, info.stats)


def test_a_model_that_cannot_be_captured_is_named(make_net: MakeNet, on_cuda: Batch) -> None:
    net = make_net()

    def reads_on_the_host(images: Tensor) -> Tensor:
        return net(images) * float(images.mean() > -1)

    with pytest.raises(RuntimeError, match="graph is True, but the model cannot be captured in a CUDA graph"):
        run(reads_on_the_host, on_cuda, graph=True)
    assert run(net, on_cuda).isfinite().all()


def test_a_graph_of_images_on_the_cpu_is_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="graph is True and images is on cpu"):
        run(net.cpu(), (torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)), graph=True)
