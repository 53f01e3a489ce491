"""The small network: shapes, sizes, arguments, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

from eroseg_ext.models.small_deeplab import DEMO_WIDTH, FULL_WIDTH, SmallDeepLab


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", [(32, 48), (45, 61), (9, 17)])
@pytest.mark.parametrize("classes", [1, 5])
def test_logits_have_the_images_size(classes: int, size: tuple[int, int]) -> None:
    model = SmallDeepLab(classes, width=8).eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, classes, *size)


def test_number_of_parameters() -> None:
    assert parameters(SmallDeepLab(11, FULL_WIDTH)) == pytest.approx(1.06e6, rel=0.02)
    assert parameters(SmallDeepLab(11, DEMO_WIDTH)) == pytest.approx(0.15e6, rel=0.05)


def test_output_stride_is_4() -> None:
    model = SmallDeepLab(3, width=8).eval()
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2:]))
    model(torch.rand(1, 3, 64, 96))
    assert seen == [(16, 24)]


def test_batch_of_one_in_training_mode() -> None:
    SmallDeepLab(4, width=8).train()(torch.rand(1, 3, 32, 32))


def test_bfloat16_autocast_and_channels_last_agree_with_float32() -> None:
    torch.manual_seed(0)
    model = SmallDeepLab(5, width=8).eval()
    images = torch.rand(2, 3, 48, 64)
    expected = model(images)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images.contiguous(memory_format=torch.channels_last))
    # 3 decimal digits of bfloat16 through a dozen layers; seen: 1.2 % of the range.
    assert (got.float() - expected).abs().max() < 0.05 * (expected.max() - expected.min())


def test_learns_where_the_bright_half_is() -> None:
    torch.manual_seed(0)
    model = SmallDeepLab(2, width=8)
    labels = torch.zeros(4, 32, 32, dtype=torch.int64)
    labels[0, :16], labels[1, 16:], labels[2, :, :16], labels[3, :, 16:] = 1, 1, 1, 1
    images = 0.25 + 0.5 * labels[:, None].expand(-1, 3, -1, -1).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize(("arguments", "named"), [((0,), "classes"), ((3, 10), "width"), ((3, 0), "width")])
def test_bad_arguments_are_named(arguments: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must be .* got {arguments[-1]}$"):
        SmallDeepLab(*arguments)
