"""Data sets of every form: what an item may be, and what ``evaluate`` and ``train`` make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, VOID
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from eroseg_ext import attack, evaluate, train
from eroseg_ext.data.palettes import Palette
from eroseg_ext.data.sources import Reading, Source

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = torch.randint(0, 256, (3, 3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, CLASSES, (3, 12, 16), generator=torch.Generator().manual_seed(1))
LABELS[:, :2] = VOID
Form = Callable[[Tensor, Tensor], Any]


def picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def grey(labels: Tensor) -> Image.Image:
    return Image.fromarray(labels.byte().numpy())


FORMS: dict[str, Form] = {
    "uint8 tensors": lambda x, y: (x, y),
    "floats": lambda x, y: (x / 255, y),
    "three entries": lambda x, y: (x, y, "name.png"),
    "a list": lambda x, y: [x, y.int()],
    "PIL images": lambda x, y: (picture(x), grey(y)),
    "a grey label map in RGB": lambda x, y: (picture(x), grey(y).convert("RGB")),
    "arrays, channels last": lambda x, y: (x.permute(1, 2, 0).numpy(), y.numpy()),
    "arrays, channels first": lambda x, y: (x.numpy(), y.numpy().astype(np.uint8)),
    "float64": lambda x, y: (x.double().numpy() / 255, y.double()),
    "16 bits": lambda x, y: ((x.to(torch.int32) * 257).numpy().astype(np.uint16), y),
    "labels [1, H, W]": lambda x, y: (x, y[None]),
    "labels [H, W, 1]": lambda x, y: (x, y[..., None].numpy()),
    "a dict": lambda x, y: {"image": x, "mask": y, "id": 7},
    "columns": lambda x, y: {"image": picture(x), "annotation": grey(y), "scene_category": 3},
    "a class beside the map": lambda x, y: {"image": picture(x), "label": 4, "segmentation_mask": grey(y)},
    "a processor's": lambda x, y: {"pixel_values": x / 255, "labels": y},
}


@pytest.mark.parametrize("form", FORMS)
def test_items_of_every_form(form: str) -> None:
    data = Source([FORMS[form](*pair) for pair in zip(PIXELS, LABELS, strict=True)])
    for index in range(3):
        image, labels = data.read(index)
        wanted = PIXELS[index] if image.dtype == torch.uint8 else PIXELS[index] / 255
        assert torch.allclose(image, wanted.to(image.dtype), atol=1e-6)
        assert torch.equal(labels, LABELS[index])


def test_masks_of_bool() -> None:
    for mask in (LABELS[0] > 1, (LABELS[0] > 1).numpy(), Image.fromarray((LABELS[0] > 1).numpy())):
        assert torch.equal(Source([(PIXELS[0], mask)]).read(0)[1], (LABELS[0] > 1).long())


class Shuffled(Dataset[Any]):
    """A data set that is no list."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return PIXELS[index], LABELS[index]


@pytest.mark.parametrize(
    "data",
    [
        Shuffled(),
        DataLoader(Shuffled(), batch_size=2, shuffle=True),
        DataLoader(TensorDataset(PIXELS, LABELS), batch_size=2, drop_last=True),
        (PIXELS, LABELS),
        (PIXELS.numpy(), LABELS.numpy()),
    ],
    ids=["data set", "shuffling loader", "loader", "tensors", "arrays"],
)
def test_every_kind_of_data_set_gives_the_same_scores(pixelwise: nn.Module, data: Any) -> None:
    before = torch.get_rng_state()
    found = evaluate(pixelwise, data, steps=2, attacks=["pgd"], sanity=0, eps=8 / 255)
    assert torch.equal(before, torch.get_rng_state())
    plain = evaluate(
        pixelwise, list(zip(PIXELS / 255, LABELS, strict=True)), steps=2, attacks=["pgd"], sanity=0, eps=8 / 255
    )
    assert (found.clean, found.rows) == (plain.clean, plain.rows)


def test_of_a_loader_the_samplers_images_are_read() -> None:
    data = Source(DataLoader(Shuffled(), sampler=SubsetRandomSampler([2, 1])))
    assert len(data) == 2
    assert torch.equal(data.read(0)[0], PIXELS[1])


def test_pairs_of_files(tmp_path: Path) -> None:
    picture(PIXELS[0]).save(tmp_path / "x.png")
    grey(LABELS[0]).save(tmp_path / "y.png")
    data = Source([(tmp_path / "x.png", tmp_path / "y.png")])
    assert data.name(0) == "x.png"
    assert torch.equal(data.read(0)[0], PIXELS[0])
    assert torch.equal(data.read(0)[1], LABELS[0])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([PIXELS[0]], r"data\[0\] is a Tensor, wanted an image and its labels"),
        ([(PIXELS[0], 3)], r"data\[0\] is a tuple of Tensor, int, wanted an image and its labels"),
        ([{"image": PIXELS[0], "class": 3}], r"data\[0\] is a dict with image: Tensor, class: int, wanted"),
        ({"train": Shuffled()}, r"data is a dict with 'train', wanted one split of it"),
        (Stream(), "data is a Stream, wanted a folder, or a data set"),
        (DataLoader(Stream()), "data is a DataLoader, wanted a folder, or a data set"),
        (
            [(PIXELS[:2], LABELS[:2])],
            r"label map of data\[0\] is 16x12x2 pixels but its volume data\[0\] is 16x12x3",
        ),
        (
            [(PIXELS[0], LABELS[:2])],
            r"label map of data\[0\] cannot be read as a label map: its shape is \[2, 12, 16\]",
        ),
        ([(PIXELS[0].int(), LABELS[0])], r"data\[0\] cannot be read as an image: it is torch.int32, wanted uint8, or"),
        ([(PIXELS[0], LABELS[0] / 255)], r"it has floats from 0 to 1, wanted whole numbers: a transform such as ToT"),
    ],
)
def test_what_is_no_image_with_labels_is_named(pixelwise: nn.Module, data: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        evaluate(pixelwise, data, steps=1, sanity=0)


def test_class_maps_and_sizes_apply_to_items(pixelwise: nn.Module) -> None:
    """The trimaps of the Oxford pets: 1 to 3."""
    data = [(picture(x), grey(y.clamp(max=2) + 1)) for x, y in zip(PIXELS, LABELS, strict=True)]
    found = evaluate(pixelwise, data, steps=1, attacks=["pgd"], sanity=0, reduce_zero_label=True, size=(8, 8))
    assert found.settings["size"] == [8, 8]
    plain = [(x, y.clamp(max=2)) for x, y in zip(PIXELS, LABELS, strict=True)]
    wanted = evaluate(pixelwise, plain, steps=1, attacks=["pgd"], sanity=0, size=(8, 8))
    assert found.clean == wanted.clean
    ids = [(x, torch.full((12, 16), 8)) for x in PIXELS]
    with pytest.warns(UserWarning, match="the labels are 1 alone"):
        evaluate(pixelwise, ids, steps=1, attacks=["pgd"], sanity=0, dataset="cityscapes")


def test_colours_of_items() -> None:
    colours = torch.tensor([[64, 0, 128], [0, 0, 0], [128, 64, 128]], dtype=torch.uint8)
    labels = torch.randint(0, 3, (12, 16))
    coloured = colours[labels]
    wanted = torch.tensor([8, -1, 3])[labels]
    reading = Reading(palette="camvid")
    for held in (coloured, coloured.permute(2, 0, 1), coloured.numpy(), Image.fromarray(coloured.numpy())):
        assert torch.equal(reading.source([(PIXELS[0], held)], "val").read(0)[1], wanted)
    with pytest.raises(ValueError, match=r"it has 3 colours, which must be turned into class indices: palette says"):
        Source([(PIXELS[0], coloured)]).read(0)
    assert len(Palette.of("camvid")) == 11


def test_training_on_a_data_set(tmp_path: Path) -> None:
    lines: list[str] = []
    settings: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 2,
        "attack_steps": 1,
        "val_attack_steps": 1,
        "say": lines.append,
    }
    summary = train("tiny", data=Shuffled(), val=[*zip(PIXELS / 255, LABELS, strict=True)], out=tmp_path, **settings)
    assert summary["classes"] == CLASSES
    assert summary["settings"]["data"] == "Shuffled"
    with pytest.raises(ValueError, match=r"data\[\d\] has values from 0 to 255, wanted \[0, 1\], or uint8"):
        train(
            "tiny", data=[(x.float(), y) for x, y in zip(PIXELS, LABELS, strict=True)], out=tmp_path / "b", **settings
        )
    wide = [(torch.cat([x, x[:1]]), y) for x, y in zip(PIXELS, LABELS, strict=True)]
    with pytest.raises(ValueError, match=r"data\[\d\] has 4 channels, wanted 3"):
        train("tiny", data=wide, out=tmp_path / "c", **settings)


def test_predictions_are_brought_to_the_labels_own_size(pixelwise: nn.Module) -> None:
    """As transformers and mmsegmentation evaluate: of images at another size than their label maps."""
    big = LABELS.repeat_interleave(2, 1).repeat_interleave(3, 2)
    data = [*zip(PIXELS, big, strict=True)]
    settings: dict[str, Any] = {"steps": 2, "attacks": ["pgd"], "sanity": 2, "eps": 8 / 255}
    with pytest.raises(ValueError, match=r"label map of data\[0\] is 48x24 pixels but its image data\[0\] is 16x12"):
        evaluate(pixelwise, data, **settings)
    found = evaluate(pixelwise, data, own_label_size=True, **settings)
    device = next(pixelwise.buffers()).device
    images, labels = (PIXELS / 255).to(device), big.to(device)
    logits = nn.functional.interpolate(pixelwise(images), (24, 48), mode="bilinear").cpu()
    valid = big != VOID
    accuracy = 100 * float((logits.argmax(1) == big)[valid].double().mean())
    assert found.clean.aacc == pytest.approx(accuracy)
    assert found.rows[0].scores.aacc < found.clean.aacc
    assert all("could not be checked" not in check.verdict for check in found.sanity)
    resized = evaluate(pixelwise, data, own_label_size=True, size=(6, 10), **settings)
    assert resized.clean.aacc != found.clean.aacc
    adversarial = attack(pixelwise, images, labels, own_label_size=True, steps=2)
    assert adversarial.shape == PIXELS.shape
    with pytest.raises(ValueError, match=r"labels has shape \[3, 24, 48\], wanted \[3, 12, 16\]"):
        attack(pixelwise, images, labels)


class Upsamples(nn.Module):
    """Ends in an upsampling to the images' size, which attacks do without where the labels have that size too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits = self.inner(nn.functional.avg_pool2d(images, 4))
        return nn.functional.interpolate(logits, images.shape[-2:], mode="bilinear")


def test_what_a_model_upsamples_to_the_images_size_is_interpolated_from_there(pixelwise: nn.Module) -> None:
    model = Upsamples(pixelwise)
    labels = LABELS[:, :7, :11].contiguous()
    found = evaluate(
        model, [*zip(PIXELS, labels, strict=True)], own_label_size=True, steps=1, attacks=["pgd"], sanity=0
    )
    images = (PIXELS / 255).to(next(pixelwise.buffers()).device)
    wanted = nn.functional.interpolate(model(images), labels.shape[-2:], mode="bilinear").cpu().argmax(1)
    assert found.clean.aacc == pytest.approx(100 * float((wanted == labels)[labels != VOID].double().mean()))
