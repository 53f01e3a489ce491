"""Free adversarial training: several updates with each batch, each of which makes the next one's perturbation."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_common import CLASSES, SMALL, dropout_net, furthest_apart, plain_net, seeded, weights

from eroseg_ext import train
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.training.network import Network
from eroseg_ext.training.replays import Perturbed

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 6 / 255


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from folders import write_folder

    return write_folder(tmp_path_factory.mktemp("data"), 12)


def run(data: Path, out: Path, **settings: Any) -> dict[str, Tensor]:
    usual = {**SMALL, "eps": EPS, "epochs": 2, "replays": 3, "adv_fraction": 1.0, "model": seeded(plain_net)}
    train(data=data, out=out, say=lambda _: None, **{**usual, **settings})
    return weights(out)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Of each forward pass of an update the images, and, but for a batch's last, their gradient."""
    seen: list[list[Tensor]] = []
    forward = Network.forward

    def seeing(network: Network, images: Tensor, heads: bool = False) -> Any:
        if heads and len(images) > 1:
            seen.append([images.detach().clone()])
            if images.requires_grad:
                images.register_post_accumulate_grad_hook(lambda leaf, kept=seen[-1]: kept.append(leaf.grad.clone()))
        return forward(network, images, heads)

    monkeypatch.setattr(Network, "forward", seeing)
    return seen


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_update_is_on_the_images_that_the_gradient_of_the_one_before_leads_to(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    seen = watched(monkeypatch)
    eps = EPS if norm == "linf" else 1.0
    run(data, tmp_path, epochs=1, eps=eps, step_size=eps / 2, attack_options={"norm": norm}, scale=(1, 1), flip=False)
    assert len(seen) == 3 * 3
    for batch in range(3):
        steps = seen[3 * batch : 3 * batch + 3]
        assert [len(step) for step in steps] == [2, 2, 1]
        for (images, gradient), (moved, *_) in pairwise(steps):
            if norm == "linf":
                distance = (moved - images).abs()
                inside = (images - 0.5).abs() < 0.5 - eps
                assert distance.max() <= eps / 2 + 1e-6
                assert ((moved - images) * gradient.sign() >= -1e-7)[inside].all()
                assert (distance > 0.49 * eps)[inside].float().mean() > 0.4
            else:
                length = (moved - images).flatten(1).norm(dim=1)
                assert (length <= eps / 2 + 1e-5).all()
                assert (((moved - images) * gradient).flatten(1).sum(1) > 0).all()


def test_the_perturbation_starts_as_noise_and_stays_in_the_ball() -> None:
    clean = torch.rand(4, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    config = AttackSettings(eps=EPS, step_size=EPS)
    from_clean = dataclasses.replace(config, random_start=False)
    assert torch.equal(Perturbed(clean, torch.arange(4), from_clean, torch.Generator()).images, clean)
    perturbed = Perturbed(clean, torch.tensor([1, 3]), config, torch.Generator().manual_seed(1))
    for _ in range(4):
        images = perturbed.images.requires_grad_()
        assert torch.equal(images[[0, 2]], clean[[0, 2]])
        assert 0.9 * EPS < (images - clean).abs().max() <= EPS + 1e-6
        assert images.amin() >= 0
        assert images.amax() <= 1
        (images * torch.randn(images.shape)).sum().backward()
        perturbed.move()


def test_the_loss_falls_under_attack_too(data: Path, tmp_path: Path) -> None:
    free, clean = (seeded(plain_net) for _ in range(2))
    scores = [
        train(model, data=data, val=data, out=tmp_path / name, say=lambda _: None, **SMALL, **settings)["validation"]
        for model, name, settings in (
            (free, "free", {"epochs": 20, "replays": 3, "adv_fraction": 1.0}),
            (clean, "clean", {"epochs": 20, "attack": "none"}),
        )
    ]
    assert scores[0]["adversarial_accuracy"] > scores[1]["adversarial_accuracy"] + 2


def test_pieces_of_a_batch_are_as_the_whole_and_a_fraction_is_perturbed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    for pieces in (1, 2):
        run(data, tmp_path / str(pieces), accumulate=pieces, optimizer="sgd", epochs=1, adv_fraction=0.5)
    assert furthest_apart(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-6
    # In 255ths, as they were read.
    untouched = [((images * 255).round() - images * 255).abs().amax((1, 2, 3)) < 1e-3 for images, *_ in seen]
    assert [part.tolist() for part in untouched[:9]] == [[True, False, True, False]] * 9


def test_the_backends_are_compared_by_the_whole_update(data: Path, tmp_path: Path) -> None:
    told: list[str] = []
    settings = {**SMALL, "eps": EPS, "epochs": 1, "replays": 2, "model": "training_common:plain_net"}
    train(data=data, out=tmp_path, say=told.append, compare_reference=1, **settings)
    (compared,) = (line for line in told if "fused against reference" in line)
    assert "whole update" in compared
    assert "attack" not in compared


def test_an_interrupted_run_ends_as_one_that_was_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eroseg_ext.training.update import Updater

    whole = run(data, tmp_path / "whole", model=seeded(dropout_net), checkpoint_every=1)
    call = Updater.__call__

    def interrupted(updater: Updater, update: int, *arguments: Any) -> Tensor:
        if update == 4:
            raise KeyboardInterrupt
        return call(updater, update, *arguments)

    monkeypatch.setattr(Updater, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "part", model=seeded(dropout_net), checkpoint_every=1)
    monkeypatch.setattr(Updater, "__call__", call)
    resumed = run(data, tmp_path / "part", model=seeded(dropout_net), checkpoint_every=1, resume=True)
    assert furthest_apart(whole, resumed) == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attack": "cospgd"}, "attack is 'cospgd', wanted eroseg or pgd with replays"),
        ({"attack": "none"}, "attack is 'none', wanted eroseg or pgd with replays"),
        ({"replays": 0}, "replays is 0"),
        (
            {"attack_options": {"balance": 0.5}},
            "attack_options is {'balance': 0.5}, wanted norm and random_start alone",
        ),
        ({"loss_balance": 2.0}, "loss_balance is 2.0"),
        (
            {"loss_balance": 0.5, "class_weights": "median-frequency"},
            "class_weights is 'median-frequency', wanted none",
        ),
        ({"loss_balance": 0.5, "loss": "a:b"}, "loss_balance is 0.5, wanted 0 with a loss of one's own"),
    ],
)
def test_what_does_not_go_together(data: Path, tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace(".", r"\.")):
        run(data, tmp_path, **settings)


def test_a_model_whose_gradient_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain_net(CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            # The gradient of sqrt is infinite at 0, which black pixels are.
            return self.net(images) + 0 * (images - images.amin()).sqrt().sum(1, keepdim=True)

    with pytest.raises(RuntimeError, match="training stopped at update 1 of 6: the loss is nan"):
        run(data, tmp_path, model=Breaks())
