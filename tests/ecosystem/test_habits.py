"""What models do that others do not, from reports on public trackers: each works, or is told in one sentence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eroseg_ext
from ecosystem.common import batch, check_attacks
from eroseg_ext.models import semantic

pytestmark = pytest.mark.usefixtures("one_thread")

AS_IT_IS = "as it is: `attack(model, images, labels)`"


class Net(nn.Module):
    """A backbone and a head, which the models below arrange otherwise."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


@pytest.mark.works("model", "networks of one input channel, or of many", "as it is, with images `[B, K, H, W]`")
@pytest.mark.parametrize("channels", [1, 6])
def test_channels(channels: int) -> None:
    images, labels = batch()
    check_attacks(Net(channels), images.mean(1, keepdim=True).repeat(1, channels, 1, 1), labels)


class MultiplesOf32(Net):
    def forward(self, images: Tensor) -> Tensor:
        size = tuple(images.shape[-2:])
        if size[0] % 32 or size[1] % 32:
            raise RuntimeError(f"Wrong input shape {size}, expected sides divisible by 32")
        return F.interpolate(super().forward(F.avg_pool2d(images, 4)), scale_factor=2.0)


@pytest.mark.works(
    "model", "models that want multiples of 32", "`attack(semantic(model, multiple_of=32), ...)` pads and cuts off"
)
def test_multiples_of_32() -> None:
    images, labels = batch((50, 70))
    check_attacks(semantic(MultiplesOf32(), multiple_of=32), images, labels)
    model = MultiplesOf32().eval()
    padded = F.pad(images, (0, 26, 0, 14))
    with torch.no_grad():
        wanted = F.interpolate(model(padded), (64, 96), mode="bilinear")[..., :50, :70]
        assert torch.equal(semantic(model, multiple_of=32)(images), wanted)
    with pytest.raises(RuntimeError, match="expected sides divisible by 32"):
        eroseg_ext.attack(model, images, labels)


class Larger(Net):
    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(super().forward(images), scale_factor=2.0, mode="bilinear")


@pytest.mark.works("model", "logits larger than the labels", f"{AS_IT_IS}; they are sampled down")
def test_logits_that_are_larger_than_the_labels() -> None:
    check_attacks(Larger())


class InPlace(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.relu(images.sub_(0.5).div_(0.25), inplace=True))


@pytest.mark.works("model", "a first layer that works in place", AS_IT_IS)
def test_a_first_layer_in_place() -> None:
    images, labels = batch()
    before = images.clone()
    check_attacks(InPlace(), images, labels)
    assert torch.equal(images, before)


class Reentrant(Net):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(checkpoint(self.backbone, images, use_reentrant=True))


@pytest.mark.works("model", "activation checkpointing, also reentrant", AS_IT_IS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints() -> None:
    check_attacks(Reentrant())


class FrozenBackbone(Net):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(images)
        return self.head(features)


@pytest.mark.works(
    "model",
    "a backbone under `torch.no_grad`",
    "`attack(semantic(model, through_no_grad=True), ...)`; without it, an error names it",
)
def test_a_backbone_without_gradients() -> None:
    check_attacks(semantic(FrozenBackbone(), through_no_grad=True))
    with pytest.raises(ValueError, match=r"torch.no_grad, eroseg_ext\.models\.semantic"):
        eroseg_ext.attack(FrozenBackbone(), *batch(), steps=1)


class Named(Net):
    def forward(self, *, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"segmentation": super().forward(pixel_values), "features": pixel_values}


@pytest.mark.works(
    "model", "`pixel_values` as the only argument, and an output by key", '`attack(semantic(model), output_key="...")`'
)
def test_an_argument_and_an_output_by_name() -> None:
    check_attacks(semantic(Named()), output_key="segmentation")


@pytest.mark.works("model", "`torch.compile`d models", AS_IT_IS)
def test_a_compiled_model() -> None:
    check_attacks(torch.compile(Net(), backend="aot_eager"))


@pytest.mark.works("model", "weights in bfloat16", AS_IT_IS)
def test_half_precision() -> None:
    check_attacks(Net().bfloat16())
