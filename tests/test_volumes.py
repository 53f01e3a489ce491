"""Volumes: attacked slice by slice where pixels count alone, and with an erosion in three dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, VOID
from evaluation_common import QUICK
from torch import Tensor, nn

import eroseg_ext
from eroseg_ext.data.sources import Reading
from eroseg_ext.evaluation import sanity
from eroseg_ext.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (5, 10, 12)


class Net(nn.Module):
    """A small network of volumes; ``between`` is whether a slice's logits depend on other slices."""

    def __init__(self, between: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        depth = 3 if between else 1
        kernel, padding = (depth, 3, 3), (depth // 2, 1, 1)
        self.first, self.last = nn.Conv3d(2, 8, kernel, padding=padding), nn.Conv3d(8, CLASSES, kernel, padding=padding)

    def forward(self, volumes: Tensor) -> Tensor:
        return 4 * self.last(self.first(volumes).relu())


@pytest.fixture
def volumes(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (2, *SIZE), generator=generator)
    labels[:, :, 0] = VOID
    return torch.rand(2, 2, *SIZE, generator=generator).to(device), labels.to(device)


def run(model: Any, images: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    given = {"eps": 0.05, "steps": 3, "random_start": False, "ignore_index": VOID} | settings
    return eroseg_ext.attack(model, images, labels, **given)


@pytest.mark.parametrize("settings", [{"method": "pgd"}, {"method": "segpgd"}, {"method": "cospgd"}])
def test_methods_of_single_pixels_are_those_of_the_slices(
    volumes: tuple[Tensor, Tensor], device: torch.device, backend: str, settings: dict[str, Any]
) -> None:
    images, labels = volumes
    model = Net(between=False).to(device)
    found = run(model, images, labels, backend=backend, **settings)

    def of_images(slices: Tensor) -> Tensor:
        return model(slices.unsqueeze(2)).squeeze(2)

    slices = images.transpose(1, 2).flatten(0, 1)
    wanted = run(of_images, slices, labels.flatten(0, 1), backend=backend, **settings)
    wanted = wanted.unflatten(0, (2, SIZE[0])).transpose(1, 2)
    assert found.shape == images.shape
    assert (found - wanted).abs().gt(1e-6).float().mean() < 0.01  # signs of gradients that rounding makes 0


def test_erosion_over_slices() -> None:
    scores, valid = torch.rand(2, *SIZE), torch.rand(2, *SIZE) > 0.2
    cone = torch.tensor([0.05, 0.2])
    found = reference.erode(scores.flatten(1, 2), valid.flatten(1, 2), 2, cone, depth=SIZE[0]).view(2, *SIZE)
    at = torch.cartesian_prod(*(torch.arange(side) for side in SIZE))
    distance = (at[:, None] - at[None]).abs().amax(2)
    lent = scores.masked_fill(~valid, torch.inf).flatten(1)[:, None] + cone[:, None, None] * distance
    wanted = lent.masked_fill(distance > 2, torch.inf).amin(2).view(2, *SIZE)
    torch.testing.assert_close(found, wanted)


def test_the_erosion_of_an_attack_crosses_slices_and_not_their_borders() -> None:
    """The logits make one voxel sensitive; those whose weight it raises are its 26 neighbours."""
    logits = torch.zeros(1, 2, *SIZE)
    logits[:, 1] = 9.0
    logits[0, 1, 2, 0, 5] = 0.0
    labels = torch.ones(1, *SIZE, dtype=torch.long)
    flat = logits.flatten(2, 3), labels.flatten(1, 2), torch.ones(1)
    grads = [
        reference.erosion_grad(*flat, radius=radius, slope=0.5, depth=SIZE[0])[0].view(logits.shape)
        for radius in (0, 1)
    ]
    raised = (grads[1] - grads[0]).abs()[0, 0] > 1e-3 * grads[1].abs()[0, 0]
    wanted = torch.zeros(SIZE, dtype=torch.bool)
    wanted[1:4, 0:2, 4:7] = True
    wanted[2, 0, 5] = False
    assert torch.equal(raised, wanted)


def test_an_attack_treats_all_axes_alike(volumes: tuple[Tensor, Tensor], device: torch.device) -> None:
    """Of a model of single voxels; the l_2 step shows how much each weighs."""
    torch.manual_seed(0)
    model = nn.Conv3d(2, CLASSES, 1).to(device)
    nn.init.normal_(model.weight, std=4.0)
    images, labels = volumes
    given = {"norm": "l2", "eps": 2.0, "steps": 2, "slope": 0.2}
    found = run(model, images, labels, **given)
    turned = run(model, images.transpose(2, 4), labels.transpose(1, 3), **given).transpose(2, 4)
    torch.testing.assert_close(turned, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attack", [eroseg_ext.attack, eroseg_ext.strong_attack])
@pytest.mark.parametrize("radius", [0, 1])
def test_attacks_on_volumes(volumes: tuple[Tensor, Tensor], device: torch.device, attack: Any, radius: int) -> None:
    images, labels = volumes
    net = Net().to(device)

    def model(given: Tensor) -> dict[str, Tensor]:
        assert given.shape[1:] == images.shape[1:]
        return {"out": F.avg_pool3d(net(given), (1, 2, 2)), "other": given}

    def loss(given: Tensor) -> float:
        with torch.no_grad():
            logits = F.interpolate(model(given)["out"], size=SIZE, mode="trilinear")
        return float(F.cross_entropy(logits, labels, ignore_index=VOID))

    mask = torch.ones(2, 1, *SIZE, dtype=torch.bool, device=device)
    mask[:, :, 3:] = False
    given = {"eps": 0.05, "steps": 4, "ignore_index": VOID, "radius": radius, "mask": mask}
    found = attack(model, images, labels, **given)
    assert loss(found) > loss(images)
    assert float((found - images).abs().max()) <= 0.05 + 1e-6
    assert torch.equal(found[:, :, 3:], images[:, :, 3:])
    own, info = attack(net, images, return_info=True, eps=0.05, steps=2, radius=radius)
    assert own.shape == images.shape
    assert (info.correct < info.valid).all()


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (lambda x, y: (x, y[:, 0]), {}, r"labels has shape \[2, 10, 12\], wanted \[2, 5, 10, 12\]"),
        (lambda x, y: (x, y.flatten(1, 2)), {}, r"labels has shape \[2, 50, 12\], wanted \[2, 5, 10, 12\] to go with"),
        (lambda x, y: (x, y), {"within": "class"}, "within is 'class', wanted 'any' for volumes"),
        (
            lambda x, y: (x[:, :, 0], y),
            {},
            r"labels has shape \[2, 5, 10, 12\], a map for each class, .* of them, c",
        ),
    ],
)
def test_what_does_not_go_with_volumes(
    volumes: tuple[Tensor, Tensor], change: Any, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(Net(), *change(*volumes), **settings)


def test_the_fused_erosion_is_of_images(volumes: tuple[Tensor, Tensor], fused: str, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="the erosion of volumes is computed by the reference only"):
        run(Net().to(device), *volumes, backend=fused)
    run(Net().to(device), *volumes, backend=fused, radius=0)


FORMS: dict[str, Any] = {
    "a batch": lambda x, y: (x, y),
    "pairs": lambda x, y: list(zip(x, y, strict=True)),
    "dicts of MONAI": lambda x, y: [{"image": i, "label": k[None].float()} for i, k in zip(x, y, strict=True)],
    "arrays of 8 bits": lambda x, y: [((i * 255).byte().numpy(), k.numpy()) for i, k in zip(x, y, strict=True)],
}


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_of_volumes(volumes: tuple[Tensor, Tensor], device: torch.device, form: str, tmp_path: Any) -> None:
    images, labels = (part.cpu() for part in volumes)
    if form == "arrays of 8 bits":
        images = (images * 255).byte() / 255
    net = Net().to(device).eval()

    def model(given: Tensor) -> Tensor:
        return F.avg_pool3d(net(given), (1, 2, 2))

    rows = ["eroseg", "pgd"]
    result = eroseg_ext.evaluate(model, FORMS[form](images, labels), attacks=rows, out=tmp_path, **QUICK)
    for name, found in [("clean", result.clean), *((row.attack, row.scores) for row in result.rows)]:
        pixels = images.to(device)
        if name != "clean":
            given = {"method": name, "eps": QUICK["eps"], "steps": QUICK["steps"], "ignore_index": VOID}
            pixels = eroseg_ext.strong_attack(model, pixels, labels.to(device), **given)
        with torch.no_grad():
            predicted = F.interpolate(model(pixels), size=SIZE, mode="trilinear").argmax(1).cpu()
        valid = labels != VOID
        assert found.aacc == pytest.approx(100 * float((predicted == labels)[valid].double().mean()))
        for number in range(CLASSES):
            union = ((predicted == number) | (labels == number))[valid].sum()
            assert found.iou[number] == pytest.approx(
                100 * float(((predicted == number) & (labels == number))[valid].sum() / union)
            )
    assert result.rows[0].scores.aacc < result.clean.aacc


def test_evaluation_of_volumes_of_several_depths_and_an_interruption(
    volumes: tuple[Tensor, Tensor], device: torch.device, tmp_path: Any
) -> None:
    images, labels = (part.cpu() for part in volumes)
    data = [(images[0], labels[0]), (images[1, :, :3], labels[1, :3])]
    calls: list[int] = []
    net = Net().to(device)

    def model(given: Tensor) -> Tensor:
        calls.append(given.shape[2])
        return net(given)

    settings = {**QUICK, "attacks": ["pgd"], "out": tmp_path}
    first = eroseg_ext.evaluate(model, data, **settings)
    assert calls.count(3) > QUICK["steps"]
    calls.clear()
    again = eroseg_ext.evaluate(model, data, **settings)
    assert (again.clean, again.rows) == (first.clean, first.rows)
    assert calls == [5] * 3  # those of the fingerprint


def test_sanity_checks_on_volumes(volumes: tuple[Tensor, Tensor], device: torch.device) -> None:
    checks = {check.name: check for check in sanity.check(Net().to(device), *volumes, eps=8 / 255, ignore_index=VOID)}
    assert not any("could not be checked" in check.verdict for check in checks.values())
    for name in ("deterministic", "logits", "gradients", "eps 0", "falls with eps", "beats noise"):
        assert checks[name].passed, checks[name]


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (
            lambda x, y: (x, y[:3]),
            {},
            r"^the label map of data\[0\] is 12x10x3 pixels but its volume data\[0\] is 12x10x5$",
        ),
        (lambda x, y: (x, y[:3]), {"own_label_size": True}, r"^the label map of data\[0\] is 12x10x3 pixels but its"),
        (lambda x, y: (x, y[0]), {}, r"its shape is \[10, 12\], wanted one label map \[D, H, W\]$"),
        (
            lambda x, y: (x, torch.stack([y, y])),
            {},
            r"its shape is \[2, 5, 10, 12\], wanted one label map \[D, H, W\]$",
        ),
        (lambda x, y: (x, y), {"size": (8, 8)}, r"^size is \(8, 8\), wanted None for volumes, such as data\[0\]$"),
        (lambda x, y: (x, y), {"window": 8}, r"^window is 8, wanted None for volumes, images of shape"),
        (
            lambda x, y: (x, y),
            {"attacks": {"a": {"method": "eroseg", "within": "class"}}},
            "^within is 'class', wanted 'any' for volumes",
        ),
        (lambda x, y: (x, y.where(y != 1, 9)), {}, r"^image 0 has the label 9 at slice 0, row \d, column \d+, wanted"),
        (
            lambda x, y: (x, y.where(y != 1, -5)),
            {},
            r"^the label map of data\[0\] has the label -5 at slice 0, row \d, column \d+, wanted classes",
        ),
    ],
)
def test_what_the_evaluation_of_volumes_refuses(
    volumes: tuple[Tensor, Tensor], device: torch.device, change: Any, settings: dict[str, Any], sentence: str
) -> None:
    data = [change(*(part[0].cpu() for part in volumes))]
    with pytest.raises(ValueError, match=sentence):
        eroseg_ext.evaluate(Net().to(device), data, **QUICK | settings)


def test_training_takes_no_volumes(volumes: tuple[Tensor, Tensor], tmp_path: Any) -> None:
    images, labels = (part.cpu() for part in volumes)
    message = r"^data\[0\] is a volume of shape \[2, 5, 10, 12\], wanted an image \[K, H, W\]$"
    for data in (list(zip(images, labels, strict=True)), [(images[0], labels[0][None])]):
        for classes in (None, CLASSES):
            with pytest.raises(ValueError, match=message):
                eroseg_ext.train(Net(), data=data, out=tmp_path, classes=classes, batch_size=1)
    with pytest.raises(ValueError, match=message):
        Reading().source(list(zip(images, labels, strict=True)), "val").read(0)
