"""Networks of volumes, as MONAI has them, and heads that give a pixel several labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eroseg_ext
from ecosystem.common import batch

pytestmark = pytest.mark.usefixtures("one_thread")


class UNet3d(nn.Module):
    """Two levels, instance normalisation and deep supervision, as networks of medical images have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.LeakyReLU())
        self.coarse = nn.Sequential(nn.Conv3d(8, 16, 3, 2, padding=1), nn.InstanceNorm3d(16), nn.LeakyReLU())
        self.up, self.head = nn.ConvTranspose3d(16, 8, 2, 2), nn.Conv3d(8, 3, 1)

    def forward(self, volumes: Tensor) -> Tensor:
        fine = self.fine(volumes)
        return 4 * self.head(fine + self.up(self.coarse(fine)))


@pytest.mark.works(
    "model", "networks of volumes, as MONAI's", "as it is: `attack(model, images[B, K, D, H, W], labels[B, D, H, W])`"
)
@pytest.mark.parametrize("method", ["eroseg", "pgd", "cospgd", "mce_bal"])
def test_a_network_of_volumes(method: str) -> None:
    model = UNet3d()
    images = torch.rand(2, 1, 8, 16, 12, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    adversarial = eroseg_ext.attack(model, images, labels, method=method, eps=0.05, steps=3)
    assert adversarial.shape == images.shape
    assert F.cross_entropy(model(adversarial), labels) > F.cross_entropy(model(images), labels)


@pytest.mark.works(
    "model",
    "heads that give a pixel several labels",
    "one label, `c`, at a time: `attack(model, images, labels[:, c], logits=lambda output: output[:, c : c + 1])`",
)
def test_several_labels_of_a_pixel() -> None:
    torch.manual_seed(0)
    model, (images, _) = nn.Conv2d(3, 4, 3, padding=1), batch()
    labels = (model(images) > 0).long()
    with pytest.raises(ValueError, match=r"a map for each class, wanted one class for each pixel, \[2, 64, 64\]"):
        eroseg_ext.attack(model, images, labels)
    adversarial = eroseg_ext.attack(model, images, labels[:, 2], logits=lambda output: output[:, 2:3], steps=3)
    wrong = ((model(adversarial) > 0) != labels.bool()).float().mean((0, 2, 3))
    assert wrong[2] > 0.01
