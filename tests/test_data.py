"""Images and label maps from a folder, and drawn scenes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eroseg_ext.data import SegmentationFolder
from eroseg_ext.scenes import IGNORE_INDEX, SCENE_CLASSES, generated_scenes


def write(root: Path, name: str, image: np.ndarray, labels: np.ndarray, suffix: str = ".png") -> None:
    for part, pixels, ending in (("images", image, suffix), ("labels", labels, ".png")):
        (root / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / part / f"{name}{ending}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("b", "a"):
        write(tmp_path, name, rng.integers(0, 256, (12, 20, 3), np.uint8), rng.integers(0, 5, (12, 20), np.uint8))
    return tmp_path


def test_folder_gives_images_and_labels_in_order_of_name(folder: Path) -> None:
    data = SegmentationFolder(folder)
    assert len(data) == 2
    assert [path.stem for path in data.images] == ["a", "b"]
    image, labels = data[0]
    assert (image.shape, image.dtype, labels.shape, labels.dtype) == ((3, 12, 20), torch.float32, (12, 20), torch.int64)
    wanted = np.asarray(Image.open(folder / "images" / "a.png"))
    assert torch.equal((image * 255).round().byte().permute(1, 2, 0), torch.from_numpy(wanted.copy()))
    assert torch.equal(labels, torch.from_numpy(np.asarray(Image.open(folder / "labels" / "a.png")).astype(np.int64)))
    assert len(list(data)) == 2


def test_resizing_averages_images_and_picks_labels(tmp_path: Path) -> None:
    # Columns of alternating black and white: averaged they are grey, picked they would stay black or white.
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    labels = np.where(np.arange(32)[:, None] < 16, 3, 7).astype(np.uint8).repeat(32, 1)
    write(tmp_path, "x", stripes, labels)
    image, resized = SegmentationFolder(tmp_path, size=(8, 4))[0]
    assert image.shape == (3, 8, 4)
    assert (image - 0.5).abs().max() < 0.05
    assert resized.unique().tolist() == [3, 7]
    assert resized[:4].eq(3).all()
    assert resized[4:].eq(7).all()


def test_palette_16_bit_and_jpeg_files(tmp_path: Path) -> None:
    classes = np.arange(64, dtype=np.uint8).reshape(8, 8)
    write(tmp_path, "palette", np.zeros((8, 8, 3), np.uint8), classes, ".jpg")
    coloured = Image.fromarray(classes)
    coloured.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    coloured.save(tmp_path / "labels" / "palette.png")
    write(tmp_path, "wide", np.zeros((8, 8), np.uint8), classes.astype(np.uint16) * 300)
    data = SegmentationFolder(tmp_path)
    assert torch.equal(data[0][1], torch.from_numpy(classes.astype(np.int64)))
    assert data[1][1].max() == 63 * 300
    assert data[1][0].shape == (3, 8, 8)


def test_load_stacks_what_is_asked_for(folder: Path) -> None:
    data = SegmentationFolder(folder, size=(6, 10))
    images, labels = data.load()
    assert (images.shape, labels.shape) == ((2, 3, 6, 10), (2, 6, 10))
    assert torch.equal(data.load([1])[0][0], images[1])


def test_load_refuses_mixed_sizes(folder: Path) -> None:
    write(folder, "c", np.zeros((5, 5, 3), np.uint8), np.zeros((5, 5), np.uint8))
    with pytest.raises(ValueError, match="images of 2 sizes"):
        SegmentationFolder(folder).load()


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere must hold the folders images/ and labels/"):
        SegmentationFolder(tmp_path / "nowhere")
    (folder / "labels" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png has no label map: .*labels/b\.png is missing"):
        SegmentationFolder(folder)
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no image"):
        SegmentationFolder(folder)


def test_bad_files_are_named(folder: Path) -> None:
    (folder / "images" / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"images/a\.png cannot be read as an image"):
        SegmentationFolder(folder)[0]
    whole = (folder / "images" / "b.png").read_bytes()
    (folder / "images" / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"images/b\.png cannot be read as an image"):
        SegmentationFolder(folder)[1]


def test_label_maps_that_do_not_fit_are_named(folder: Path) -> None:
    Image.fromarray(np.zeros((12, 21), np.uint8)).save(folder / "labels" / "a.png")
    with pytest.raises(ValueError, match=r"labels/a\.png is 21x12 pixels but its image .*a\.png is 20x12"):
        SegmentationFolder(folder)[0]
    Image.fromarray(np.zeros((12, 20, 3), np.uint8)).save(folder / "labels" / "a.png")
    with pytest.raises(ValueError, match=r"labels/a\.png must be a grey or palette PNG .* its mode is RGB"):
        SegmentationFolder(folder)[0]


def test_bad_size_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^size must be \(height, width\)"):
        SegmentationFolder(folder, size=(0, 4))


def test_scenes_are_what_they_say() -> None:
    scenes = generated_scenes(6, (96, 128), seed=5)
    assert (scenes.images.shape, scenes.images.dtype) == ((6, 3, 96, 128), torch.float32)
    assert (scenes.labels.shape, scenes.labels.dtype) == ((6, 96, 128), torch.int64)
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1
    assert scenes.images.std() > 0.1
    assert scenes.classes == SCENE_CLASSES
    assert len(scenes.palette) == len(SCENE_CLASSES)
    assert set(scenes.labels.unique().tolist()) == {*range(len(SCENE_CLASSES)), IGNORE_INDEX}
    assert 0.01 < (scenes.labels == IGNORE_INDEX).float().mean() < 0.08


def test_scenes_depend_on_the_seed_alone() -> None:
    scenes = generated_scenes(3, (32, 48), seed=1)
    again = generated_scenes(2, (32, 48), seed=1)
    assert torch.equal(scenes.images[:2], again.images)
    assert torch.equal(scenes.labels[:2], again.labels)
    assert not torch.equal(generated_scenes(1, (32, 48), seed=2).images, again.images[:1])


@pytest.mark.parametrize("size", [(16, 16), (17, 90), (90, 17)])
def test_scenes_of_any_shape(size: tuple[int, int]) -> None:
    assert generated_scenes(2, size, seed=0).labels.shape == (2, *size)


def test_no_scenes() -> None:
    assert generated_scenes(0).images.shape == (0, 3, 144, 192)


@pytest.mark.parametrize(("arguments", "named"), [((-1,), "count"), ((1, (8, 100)), "size")])
def test_bad_scene_arguments_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must be "):
        generated_scenes(*arguments)
