"""Images and label maps from a folder, and drawn scenes."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from eroseg_ext.data.palettes import VOID, Palette
from eroseg_ext.data.reading import evenly_spaced
from eroseg_ext.data.scenes import IGNORE_INDEX, SCENE_CLASSES, generated_scenes
from eroseg_ext.data.sources import SegmentationFolder


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


def pair(root: Path, image: str, label: str, labels: object = 0) -> SegmentationFolder:
    """A folder to which a grey image of 24x32 pixels and a label map were added."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    Image.new("L", (32, 24)).save(root / "images" / image)
    Image.fromarray(np.full((24, 32), labels, np.uint8)).save(root / "labels" / label)
    return SegmentationFolder(root)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("a.png", "a_L.png"),
        ("a.png", "a_P.png"),
        ("a.jpg", "a_mask.png"),
        ("a.tif", "a.tif"),
        ("a.JPG", "a.PNG"),
        ("x_leftImg8bit.png", "x_gtFine_labelIds.png"),
        ("x_leftImg8bit.png", "x_leftImg8bit.png"),
    ],
)
def test_label_maps_under_their_publishers_names(tmp_path: Path, image: str, label: str) -> None:
    assert pair(tmp_path, image, label, 1)[0][1].unique().tolist() == [1]


def test_of_several_label_maps_the_plainest_name_is_taken(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", "a_mask.png", 1)
    pair(tmp_path, "a.png", "a.tif", 2)
    assert [path.name for path in SegmentationFolder(tmp_path).labels] == ["a.tif"]
    pair(tmp_path, "a.png", "a.png", 3)
    assert [path.name for path in SegmentationFolder(tmp_path).labels] == ["a.png"]


def test_a_missing_label_map_tells_what_was_tried_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"labels/cat7\.png is missing.*_L, _P, _mask.*; nearest there: .*cat-7"
    ):
        pair(tmp_path, "cat7.png", "cat-7.png")


def test_two_images_with_one_label_map_are_named(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", "a.png")
    with pytest.raises(ValueError, match=r"images/a\.jpg and .*images/a\.png have one label map, .*labels/a\.png"):
        pair(tmp_path, "a.jpg", "a.png")


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    pair(tmp_path, "a.jpg", "a.png")
    for path in ("images/._a.jpg", "labels/._a.png", "images/.b.png"):
        (tmp_path / path).write_bytes(b"Mac OS X")
    assert [path.name for path in SegmentationFolder(tmp_path).images] == ["a.jpg"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_read_as_viewers_show_them(tmp_path: Path, orientation: int) -> None:
    data = pair(tmp_path, "a.jpg", "a.png")
    stored = np.zeros((24, 32), np.uint8)
    stored[:12, :16], stored[12:, :16], stored[:12, 16:] = 80, 160, 240
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("a.jpg", "a.png"):
        Image.fromarray(stored).save(tmp_path / "images" / name, exif=exif, quality=95)
    (tmp_path / "images" / "a.png").rename(tmp_path / "labels" / "a.png")
    with Image.open(tmp_path / "images" / "a.jpg") as image:
        shown = np.asarray(ImageOps.exif_transpose(image)).copy()
    pixels, labels = data[0]
    assert (pixels[0] * 255 - torch.from_numpy(shown)).abs().max() < 1e-4
    assert (pixels[0] * 255 - labels).abs().max() < 8


def test_a_label_map_of_the_stored_picture_is_one(tmp_path: Path) -> None:
    data = pair(tmp_path, "a.png", "a.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (32, 24)).save(tmp_path / "images" / "a.png", exif=exif)
    assert data[0][0].shape == (3, 24, 32)


def test_damaged_exif_data_leave_the_picture_as_it_is(tmp_path: Path) -> None:
    data = pair(tmp_path, "a.png", "a.png")
    Image.new("L", (32, 24), 255).save(tmp_path / "images" / "a.png", exif=b"Exif\0\0nonsense")
    assert data[0][0].unique().tolist() == [1]


RAMP = np.linspace(0, 1, 24 * 32).reshape(24, 32)
GREY = Image.fromarray((RAMP * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", Image.fromarray((RAMP * 65535).astype(np.uint16))),
        ("a.tif", Image.fromarray((RAMP * 65535).astype(np.uint16))),
        ("a.tif", Image.fromarray(RAMP.astype(np.float32))),
        ("a.ppm", Image.fromarray((RAMP * 65535).astype(np.int32))),
        ("a.png", GREY),
        ("a.png", GREY.convert("P")),
        ("a.png", Image.merge("LA", (GREY, GREY))),
        ("a.png", Image.merge("RGBA", (GREY,) * 4)),
        ("a.tif", Image.merge("RGB", (GREY,) * 3).convert("CMYK")),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "float", "16-bit PGM", "L", "P", "LA", "RGBA", "CMYK"],
)
def test_images_of_every_kind_keep_their_range(tmp_path: Path, name: str, image: Image.Image) -> None:
    """Alpha is dropped: what it hides is read as it is stored."""
    data = pair(tmp_path, name, "a.png")
    image.save(tmp_path / "images" / name)
    assert (data[0][0] - torch.from_numpy(RAMP)).abs().max() < 0.005


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((RAMP * 300).astype(np.float32), r"its floats go from 0 to 300, wanted \[0, 1\]"),
        (np.full((24, 32), np.nan, np.float32), "its floats go from nan to nan"),
        ((RAMP * 1e6).astype(np.int32), "it has 32-bit integers, wanted 8 or 16 bits"),
    ],
)
def test_images_whose_range_is_unknown_are_refused(tmp_path: Path, values: np.ndarray, sentence: str) -> None:
    data = pair(tmp_path, "a.tif", "a.png")
    Image.fromarray(values).save(tmp_path / "images" / "a.tif")
    with pytest.raises(ValueError, match=rf"images/a\.tif cannot be read as an image: {sentence}"):
        data[0]


def test_label_maps_of_1_bit(tmp_path: Path) -> None:
    data = pair(tmp_path, "a.png", "a.png")
    Image.fromarray(RAMP > 0.5).save(tmp_path / "labels" / "a.png")
    assert torch.equal(data[0][1], torch.from_numpy(RAMP > 0.5).long())


def test_label_maps_of_colours_tell_how_many(tmp_path: Path) -> None:
    data = pair(tmp_path, "a.png", "a.png")
    colours = np.array([[128, 128, 128], [128, 0, 0], [0, 0, 0]], np.uint8)
    Image.fromarray(colours[np.arange(768).reshape(24, 32) % 3]).save(tmp_path / "labels" / "a.png")
    with pytest.raises(
        ValueError,
        match=r"labels/a\.png .*: wanted class indices, but it has 3 colours, which must be turned into class indices",
    ):
        data[0]


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize(
    "error", [Image.DecompressionBombError("too big"), NotImplementedError(), struct.error("short")]
)
def test_whatever_a_decoder_raises_names_the_file(
    tmp_path: Path, part: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pair(tmp_path, "a.bmp", "a.png")
    right = Image.open

    def broken(path: Path) -> Image.Image:
        if path.parent.name == part:
            raise error
        return right(path)

    monkeypatch.setattr(Image, "open", broken)
    told = str(error) or type(error).__name__
    with pytest.raises(ValueError, match=rf"{part}/a\.\w+ cannot be read as an? [a-z ]+: {told}$"):
        data[0]


def test_an_image_too_large_for_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path, "a.png", "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"/a\.png cannot be read as .*: Image size \(768 pixels\)"):
        SegmentationFolder(tmp_path, (8, 8))[0]


@pytest.mark.parametrize("part", ["images", "labels"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, part: str) -> None:
    data = pair(tmp_path, "a.png", "a.png")
    (tmp_path / part / "a.png").unlink()
    os.mkfifo(tmp_path / part / "a.png")
    with pytest.raises(ValueError, match=rf"{part}/a\.png cannot be read as an? [a-z ]+: it is no regular file"):
        data[0]
    with pytest.raises(ValueError, match=rf"{part}/a\.png is no regular file"):
        SegmentationFolder(tmp_path)


def test_images_are_chosen_evenly() -> None:
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 5) == evenly_spaced(3, None) == [0, 1, 2]


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


def test_bad_size_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^size is \(0, 4\), wanted \(height, width\), both at least 1"):
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


VALUES = np.arange(24 * 32).reshape(24, 32) % 7
COLOURS = np.array([[(37 * i) % 256, 255 - i, 90] for i in range(7)], np.uint8)


def label_map(mode: str) -> Image.Image:
    grey_map = Image.fromarray(VALUES.astype(np.uint8))
    if mode == "palette":
        grey_map.putpalette(COLOURS.tobytes())
        return grey_map
    if mode == "16 bits":
        return Image.fromarray(VALUES.astype(np.uint16))
    if mode == "16 bits, big-endian":
        return Image.fromarray(VALUES.astype(">u2"))
    if mode == "float":
        return Image.fromarray(VALUES.astype(np.float32))
    return grey_map.convert(mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("a.png", mode) for mode in ("L", "LA", "RGB", "RGBA", "palette", "16 bits")),
        *(("a.tif", mode) for mode in ("L", "I", "float", "RGB", "palette", "16 bits", "16 bits, big-endian")),
        *(("a.bmp", mode) for mode in ("L", "RGB", "palette")),
        *(("a.gif", "L"), ("a.PNG", "L"), ("a_manual1.gif", "L"), ("a_labelIds.TIFF", "16 bits")),
    ],
)
def test_label_maps_of_every_kind_keep_their_values(tmp_path: Path, name: str, mode: str) -> None:
    data = pair(tmp_path, "a.jpg", "a.png")
    (tmp_path / "labels" / "a.png").unlink()
    label_map(mode).save(tmp_path / "labels" / name)
    data = SegmentationFolder(tmp_path)
    assert torch.equal(data[0][1], torch.from_numpy(VALUES))


def test_a_gif_of_colours_is_none(tmp_path: Path) -> None:
    pair(tmp_path, "a.jpg", "a.png")
    (tmp_path / "labels" / "a.png").unlink()
    red = np.zeros((24, 32, 3), np.uint8)
    red[:, :9, 0] = 255
    Image.fromarray(red).save(tmp_path / "labels" / "a.gif")
    with pytest.raises(ValueError, match="it has 2 colours, which must be turned into class indices"):
        SegmentationFolder(tmp_path)[0]


def test_a_gif_of_black_and_white_is_a_mask(tmp_path: Path) -> None:
    pair(tmp_path, "a.jpg", "a.png")
    (tmp_path / "labels" / "a.png").unlink()
    for image in (Image.fromarray(VALUES > 3), Image.fromarray(np.where(VALUES > 3, 255, 0).astype(np.uint8))):
        image.save(tmp_path / "labels" / "a_mask.gif")
        assert torch.equal(SegmentationFolder(tmp_path)[0][1], torch.from_numpy(VALUES > 3).long())


LINES = {
    "label_colors.txt": [f"{r} {g} {b}\tClass_{i}" for i, (r, g, b) in enumerate(COLOURS)],
    "class_dict.csv": ["name,r,g,b", *(f"class {i},{r},{g},{b}" for i, (r, g, b) in enumerate(COLOURS))],
    "labelmap.txt": ["# label:color_rgb:parts:actions", *(f"c:{r},{g},{b}::" for r, g, b in COLOURS)],
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("mode", ["palette", "RGB"])
def test_label_maps_of_colours_by_a_palette_file(tmp_path: Path, name: str, mode: str) -> None:
    pair(tmp_path, "a.jpg", "a.png")
    coloured = label_map("palette")
    (coloured if mode == "palette" else coloured.convert("RGB")).save(tmp_path / "labels" / "a.png")
    palette = tmp_path / name
    palette.write_text("\n".join(LINES[name]))
    assert torch.equal(SegmentationFolder(tmp_path, palette=palette)[0][1], torch.from_numpy(VALUES))
    small = SegmentationFolder(tmp_path, (12, 16), palette=palette)[0][1]
    assert torch.equal(small, SegmentationFolder(tmp_path, palette=palette)[0][1][1::2, 1::2])
    palette.write_text("\n".join([*LINES[name][:-1], "5 5 5 void"]))
    with pytest.raises(
        ValueError,
        match=rf"labels/a\.png .*: its colour \(222, 249, 90\) at row 0, column 6 is not in the palette .*{name}",
    ):
        SegmentationFolder(tmp_path, palette=palette)[0]


def test_void_in_a_palette_file_is_no_class(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("0 0 0 Void\n128 0 0 building\n1 1 1 ignore_me\n\n128 64 128 road\n")
    assert Palette.of(tmp_path / "p.txt").classes == {0: VOID, 0x800000: 0, 0x010101: VOID, 0x804080: 1}
    for text, sentence in (
        ("x\n", "has no colour"),
        ("1 2 3\n1 2 3\n", "line '1 2 3'"),
        ("1 2 300\n", "line '1 2 300'"),
    ):
        (tmp_path / "p.txt").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            Palette.of(tmp_path / "p.txt")


def test_the_palettes_that_are_known() -> None:
    with pytest.raises(ValueError, match="palette is 'kitti', wanted camvid, voc, or a text file"):
        Palette.of("kitti")
    camvid, voc = Palette.of("camvid"), Palette.of("voc")
    assert (len(camvid), len(camvid.classes), len(voc), len(voc.classes)) == (11, 32, 21, 22)
    published = {
        (128, 128, 128): 0,
        (192, 0, 128): 1,
        (128, 0, 192): 3,
        (0, 0, 192): 4,
        (192, 64, 128): 8,
        (0, 0, 0): VOID,
    }
    for colour, label in published.items():
        assert camvid.classes_of(torch.tensor(colour).view(3, 1, 1)).item() == label
    known = {(0, 0, 0): 0, (128, 0, 0): 1, (192, 128, 128): 15, (0, 64, 128): 20, (224, 224, 192): VOID}
    for colour, label in known.items():
        assert voc.classes_of(torch.tensor(colour).view(3, 1, 1)).item() == label
