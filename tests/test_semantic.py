"""Mask classification, fixed further inputs, and what a model computes without gradients, as logits per pixel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, VOID
from torch import Tensor, nn

import eroseg_ext
from eroseg_ext.models import semantic
from eroseg_ext.models.outputs import Reader

pytestmark = pytest.mark.usefixtures("one_thread")

QUERIES = 6


class Masks(nn.Module):
    """Six queries whose classes and masks both depend on the image."""

    def __init__(self, names: tuple[str, str] = ("class_queries_logits", "masks_queries_logits")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.masks = nn.Linear(3, QUERIES * (CLASSES + 1)), nn.Conv2d(3, QUERIES, 4, 4)
        self.names = names

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        classes = self.classes(images.mean((2, 3))).view(len(images), QUERIES, -1)
        return dict(zip(self.names, (4 * classes, 4 * self.masks(images)), strict=True))


def scores(output: Any) -> Tensor:
    classes, masks = (value.double() for value in output.values())
    return (classes.softmax(2)[:, :, :-1, None, None] * masks.sigmoid()[:, :, None]).sum(1)


@pytest.mark.parametrize(
    "names",
    [("class_queries_logits", "masks_queries_logits"), ("pred_logits", "pred_masks"), ("logits", "pred_masks")],
)
@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_masks_and_classes_become_logits(batch: tuple[Tensor, Tensor], names: tuple[str, str], kind: Any) -> None:
    model, images = Masks(names), batch[0].cpu()
    output = model(images)
    found = Reader()(kind(**output), len(images), (5, 6)).values
    torch.testing.assert_close(found, scores(output).log().float())
    torch.testing.assert_close(semantic(model, log=False)(images), scores(output).float())


def test_faint_masks_keep_their_gradient() -> None:
    classes = torch.randn(1, QUERIES, CLASSES + 1)
    masks = torch.full((1, QUERIES, 2, 2), -400.0).requires_grad_()
    found = Reader()({"pred_logits": classes, "pred_masks": masks}, 1, (2, 2)).values
    assert found.isfinite().all()
    found[0, 0].sum().backward()
    torch.testing.assert_close(masks.grad.sum(), torch.tensor(4.0))


def test_an_attack_recognises_masks(batch: tuple[Tensor, Tensor], device: torch.device) -> None:
    images, labels = batch
    model = Masks().to(device)

    def steps(model: Any, **settings: Any) -> tuple[Tensor, list[float]]:
        losses: list[float] = []

        def callback(step: eroseg_ext.StepInfo) -> None:
            losses.append(float(F.cross_entropy(step.logits, labels.long(), ignore_index=VOID)))

        given = {"method": "pgd", "eps": 0.1, "steps": 3, "random_start": False, "callback": callback, **settings}
        return eroseg_ext.attack(model, images, labels, **given), losses

    adversarial, losses = steps(model)
    assert losses == sorted(losses)
    for other, settings in (
        (semantic(model), {}),
        (model, {"logits": lambda output: scores(output).log()}),
    ):
        found, losses_of_other = steps(other, **settings)
        assert losses_of_other == pytest.approx(losses, rel=1e-5)
        assert (found == adversarial).float().mean() > 0.99


class Prompted(nn.Module):
    """A map for every pair of an image and a prompt, and images that are not its first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.features = nn.Embedding(9, 4), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, prompt: Tensor, pixel_values: Tensor, scale: float = 1.0) -> SimpleNamespace:
        assert len(prompt) == len(pixel_values)
        with torch.no_grad():
            features = self.features(pixel_values)
        maps = (features * self.embedding(prompt).mean(1)[:, :, None, None]).sum(1)
        return SimpleNamespace(logits=scale * maps)


def test_prompts_become_classes(batch: tuple[Tensor, Tensor], device: torch.device) -> None:
    images, labels = batch
    model, prompts = Prompted().to(device), torch.randint(9, (CLASSES, 5))
    wrapped = semantic(model, prompt=prompts, scale=3.0)
    found = wrapped(images)
    for image in range(len(images)):
        for c in range(CLASSES):
            alone = model(prompts[c : c + 1].to(device), images[image : image + 1], 3.0).logits[0]
            torch.testing.assert_close(found[image, c], alone)
    assert semantic(model, prompt=prompts[:1])(images).shape[:2] == (len(images), 1)
    with pytest.raises(ValueError, match=r"torch.no_grad, eroseg_ext.models.semantic\(model, through_no_grad=True\)"):
        eroseg_ext.attack(wrapped, images, labels, steps=1)
    adversarial = eroseg_ext.attack(semantic(model, through_no_grad=True, prompt=prompts), images, labels, steps=1)
    assert (adversarial != images).any()


def test_through_no_grad_ends_with_the_model(batch: tuple[Tensor, Tensor]) -> None:
    wrapped = semantic(Prompted(), through_no_grad=True, prompt=torch.zeros(1, 1, dtype=torch.long))
    images = batch[0].cpu()
    assert wrapped(images.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not torch.is_grad_enabled()
        assert not wrapped(images).requires_grad
        assert not torch.is_grad_enabled()


class EnablesGradients(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            return 2 * images


def test_through_no_grad_leaves_gradients_off_where_the_model_enables_them() -> None:
    wrapped = semantic(EnablesGradients(), through_no_grad=True)
    with torch.no_grad():
        wrapped(torch.rand(1, 3, 2, 2, requires_grad=True))
        assert not torch.is_grad_enabled()


def test_what_is_no_model_or_no_inputs() -> None:
    with pytest.raises(TypeError, match=r"model is a function, wanted an nn\.Module"):
        semantic(lambda images: images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inputs have \{'one': 2, 'two': 3\} rows, wanted the same number"):
        semantic(Prompted(), one=torch.zeros(2, 1), two=torch.zeros(3, 1))
