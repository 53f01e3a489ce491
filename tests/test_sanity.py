"""Each sanity check finds the defect that it is for, and a healthy model passes them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eroseg_ext.cli.demo import DemoSettings, load_data, train
from eroseg_ext.data.scenes import generated_scenes
from eroseg_ext.evaluation import sanity

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 2 / 255
Trained = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A network trained for some seconds on drawn scenes, with three scenes that it has not seen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = train(load_data(DemoSettings(quick=True, size=(32, 48))), 100, 0, torch.device("cpu"))
    scenes = generated_scenes(3, (32, 48), seed=99)
    torch.set_num_threads(threads)
    return model, scenes.images, scenes.labels


def found(model: nn.Module, trained: Trained, **settings: object) -> dict[str, sanity.Check]:
    _, images, labels = trained
    return {check.name: check for check in sanity.check(model, images, labels, eps=EPS, **settings)}


def failed(checks: dict[str, sanity.Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


class Wrapped(nn.Module):
    """A network with something done to its input or output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class Probabilities(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).softmax(1)


class Stochastic(Wrapped):
    """A defence by noise."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 0.05 * torch.randn_like(images))


class Quantised(Wrapped):
    """A defence by rounding: it hardly changes an image, and has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images * 32).round() / 32)


class Masked(Wrapped):
    """The left half of the input has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        half = images.shape[-1] // 2
        return self.model(torch.cat([images[..., :half].detach(), images[..., half:]], -1))


class Detached(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.detach())


class Misleading(Wrapped):
    """Its answers are the network's and its gradients noise, as shattered ones are."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images.detach())
        generator = torch.Generator().manual_seed(0)
        way = torch.randn(images.shape[1:], generator=generator)
        nothing = (images - images.detach()) * way
        return logits + nothing.sum(1, keepdim=True) * torch.randn(logits.shape[1:], generator=generator)


class Saturated(Wrapped):
    """Very sure of itself: the gradient of cross-entropy vanishes, that of the log-odds does not."""

    def forward(self, images: Tensor) -> Tensor:
        return 1000 * self.model(images)


class Broken(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) + 0 * (images[:, :1] - images[:, :1].detach()).sqrt()


def test_a_healthy_model_passes(trained: Trained) -> None:
    checks = found(trained[0], trained)
    assert failed(checks) == set(), checks
    assert list(checks) == [
        "deterministic",
        "logits",
        "gradients",
        "eps 0",
        "falls with eps",
        "falls with steps",
        "large eps",
        "beats noise",
    ]
    assert all("\n" not in check.verdict for check in checks.values())
    assert "clean one" in checks["eps 0"].verdict


def test_being_sure_is_no_defect(trained: Trained) -> None:
    assert failed(found(Saturated(trained[0]), trained)) == set()


def test_probabilities(trained: Trained) -> None:
    checks = found(Probabilities(trained[0]), trained)
    assert not checks["logits"].passed
    assert "remove the softmax" in checks["logits"].verdict
    assert checks["deterministic"].passed


def test_a_sigmoid(trained: Trained) -> None:
    class Sigmoid(Wrapped):
        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).sigmoid()

    checks = found(Sigmoid(trained[0]), trained)
    assert not checks["logits"].passed
    assert "remove the sigmoid, or set output='sigmoid'" in checks["logits"].verdict
    assert found(Sigmoid(trained[0]), trained, output="sigmoid")["logits"].passed


def test_stochastic_model(trained: Trained) -> None:
    checks = found(Stochastic(trained[0]), trained)
    assert not checks["deterministic"].passed
    assert "the model is stochastic" in checks["deterministic"].verdict
    assert checks["logits"].passed


@pytest.mark.parametrize("defence", [Quantised, Masked])
def test_masked_gradients(trained: Trained, defence: type[Wrapped]) -> None:
    checks = found(defence(trained[0]), trained)
    assert not checks["gradients"].passed
    assert "gradients are masked" in checks["gradients"].verdict
    share = float(checks["gradients"].verdict.split(" %")[0])
    assert share == pytest.approx(100 if defence is Quantised else 50, abs=3)
    assert checks["deterministic"].passed
    assert checks["logits"].passed


def test_masked_gradients_leave_a_large_budget_without_effect(trained: Trained) -> None:
    assert {"gradients", "large eps", "beats noise"} <= failed(found(Quantised(trained[0]), trained))


def test_no_gradient_at_all(trained: Trained) -> None:
    checks = found(Detached(trained[0]), trained)
    assert "no gradient reaches the attack" in checks["gradients"].verdict
    # The attack itself refuses, and that is told where its figures would be.
    assert "could not be checked" in checks["falls with eps"].verdict
    assert {"gradients", "falls with eps", "falls with steps", "large eps", "beats noise"} <= failed(checks)


def test_misleading_gradients(trained: Trained) -> None:
    checks = found(Misleading(trained[0]), trained)
    assert {"large eps", "beats noise"} <= failed(checks)
    assert "no better than chance" in checks["beats noise"].verdict
    assert checks["gradients"].passed


def test_nan_gradients(trained: Trained) -> None:
    checks = found(Broken(trained[0]), trained)
    assert not checks["gradients"].passed
    assert "NaN or infinite" in checks["gradients"].verdict


def test_an_attack_that_worsens_with_its_budget_is_found(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sanity.strong_attack

    def lazy(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int, **settings: object) -> Tensor:
        """Gives up at larger budgets and at more steps."""
        if eps > EPS or steps > 10:
            return images
        return real(model, images, labels, eps=eps, steps=steps, **settings)

    monkeypatch.setattr(sanity, "strong_attack", lazy)
    checks = found(trained[0], trained)
    assert failed(checks) == {"falls with eps", "falls with steps", "large eps"}
    assert "accuracy rises by" in checks["falls with eps"].verdict


def test_an_attack_that_changes_images_at_eps_0_is_found(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sanity.strong_attack

    def wide(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, **settings: object) -> Tensor:
        return real(model, images, labels, eps=eps + 1 / 255, **settings)

    monkeypatch.setattr(sanity, "strong_attack", wide)
    checks = found(trained[0], trained)
    assert failed(checks) == {"eps 0"}
    assert "wanted the clean one" in checks["eps 0"].verdict


def test_l2(trained: Trained) -> None:
    _, images, labels = trained
    checks = sanity.check(trained[0], images, labels, eps=1.0, norm="l2")
    assert [check.name for check in checks if not check.passed] == [], checks


class Scaled(Wrapped):
    """Takes pixel values from 0 to 255."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images / 255)


def test_budgets_are_parts_of_the_range_of_pixel_values(trained: Trained) -> None:
    model, images, labels = trained
    checks = {c.name: c for c in sanity.check(Scaled(model), 255 * images, labels, eps=2, clip=(0, 255))}
    assert failed(checks) == set(), checks
    assert "eps 64 leaves" in checks["large eps"].verdict


def test_budgets_stay_below_the_range_of_pixel_values(trained: Trained) -> None:
    _, images, labels = trained
    checks = {c.name: c for c in sanity.check(nn.Conv2d(3, 8, 1), images, labels, eps=0.4)}
    assert not any("could not be checked" in check.verdict for check in checks.values()), checks


def test_the_model_is_left_as_it_was(trained: Trained) -> None:
    model = trained[0]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found(model, trained)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
