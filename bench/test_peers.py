"""Peers side by side: ms per step, peak memory, and what mIoU and pixel accuracy each leaves a trained network."""

from typing import Any

import pytest
import torch

from bench.cases import Unavailable
from bench.conftest import Record
from bench.measure import Timing, peak_memory, time_calls
from bench.models import Trained, trained
from bench.peers import PEERS, Budget
from bench.results import Figure
from eroseg_ext.cli import demo

STEPS = 10


@pytest.fixture(scope="module")
def networks(profile: str, pytestconfig: pytest.Config) -> dict[str, Trained]:
    """Trained networks by device, trained when first asked for."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("eroseg-bench")

    class Networks(dict[str, Trained]):
        def __missing__(self, kind: str) -> Trained:
            self[kind] = trained(profile, torch.device(kind), folder)
            return self[kind]

    return Networks()


def _figure(network: Trained, images: torch.Tensor, scores: dict[str, Any], **given: object) -> Figure:
    size = f"{images.shape[-2]}x{images.shape[-1]}"
    case = f"light net, {len(images)} images {size}, eps 2/255, {STEPS} steps"
    logits_bytes = 4 * len(network.task.classes) * images[:, 0].numel()
    return Figure(suite="peers", case=case, extra=scores | {"logits_bytes": logits_bytes}, **given)  # type: ignore[typeddict-item]


@pytest.mark.parametrize("peer", PEERS)
def test_peer(
    record: Record, networks: dict[str, Trained], device: torch.device, peer: str, seconds: float, profile: str
) -> None:
    network = networks[device.type]
    images, labels = network.task.test_images.to(device), network.task.test_labels.to(device)
    budget = Budget(steps=STEPS, ignore_index=network.task.ignore_index, classes=len(network.task.classes))
    attack = PEERS[peer]

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return attack(network.model, images, labels, budget)

    try:
        adversarial = run()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert (adversarial - images).abs().max() <= budget.eps + 1e-6
    scores = demo.evaluate(network.model, adversarial, labels, network.task)
    whole = time_calls([run], device, seconds=5 * seconds)
    network.model.zero_grad(set_to_none=True)
    peak = peak_memory(run, device)
    network.model.zero_grad(set_to_none=True)
    timing = Timing(tuple(value / STEPS for value in whole.seconds))
    figure = _figure(
        network,
        images,
        scores | {"peak_bytes": peak, "unattacked": demo.evaluate(network.model, images, labels, network.task)},
        implementation=peer,
        device=device.type,
        ms=timing.to_json(),
    )
    record(figure, timing)
