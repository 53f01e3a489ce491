"""Drawn street scenes with label maps, for a demonstration and for tests without data.

Images are float32 [3, H, W] in [0, 1], labels int64 [H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

IGNORE_INDEX = 255
"""Label of the void pixels of the generated scenes."""

SCENE_CLASSES = ("sky", "building", "road", "pavement", "tree", "car", "person", "sign")
"""Class names of the generated scenes, in order of index."""

SCENE_PALETTE = (
    (112, 168, 220),
    (146, 108, 92),
    (118, 84, 140),
    (230, 150, 200),
    (92, 150, 60),
    (28, 48, 160),
    (214, 40, 60),
    (240, 204, 40),
)
"""One RGB colour per class of the generated scenes, 0 to 255."""


class Scenes(NamedTuple):
    """What ``generated_scenes`` returns."""

    images: Tensor
    """float32 [N, 3, H, W] in [0, 1]."""
    labels: Tensor
    """int64 [N, H, W]; void pixels hold ``IGNORE_INDEX``."""
    classes: tuple[str, ...]
    """Class names in order of index."""
    palette: tuple[tuple[int, int, int], ...]
    """One RGB colour per class."""


def generated_scenes(count: int, size: tuple[int, int] = (144, 192), seed: int = 0) -> Scenes:
    """Draws street scenes: a road between facades in perspective, with trees, cars, people and signs.

    Every scene has its own light (from noon to dusk and fog), geometry, textures and sensor noise. Pixels that hold
    more than one class, those on the outline of an object, are void: about 4 % of all.

    Args:
        count: number of scenes, at least 0.
        size: (height, width), both at least 16.
        seed: scene i depends on (seed, i) alone, so that a longer series begins with the shorter one.

    Raises:
        ValueError: count or size out of range.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    if len(size) != 2 or min(size) < 16:
        raise ValueError(f"size must be (height, width), both at least 16, got {size}")
    height, width = size
    images = torch.empty(count, 3, height, width, dtype=torch.float32)
    labels = torch.empty(count, height, width, dtype=torch.int64)
    for index in range(count):
        pixels, classes = _Street(size, np.random.default_rng([seed, index])).render()
        images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
        labels[index] = torch.from_numpy(classes)
    return Scenes(images, labels, SCENE_CLASSES, SCENE_PALETTE)


_SKY, _BUILDING, _ROAD, _PAVEMENT, _TREE, _CAR, _PERSON, _SIGN = range(len(SCENE_CLASSES))
_SUPERSAMPLING = 3
_FAR = 90.0
_GRAIN = np.array([0.01, 0.06, 0.06, 0.07, 0.25, 0.03, 0.08, 0.02], np.float32)
"""Relative amplitude of the texture of each class."""

_FloatArray = npt.NDArray[np.float32]
_Colour = tuple[float, float, float]
_Point = tuple[float, float]
_Corner = tuple[float, float, float]

_FACADES = (
    (0.62, 0.34, 0.27),
    (0.80, 0.74, 0.62),
    (0.55, 0.55, 0.56),
    (0.84, 0.82, 0.79),
    (0.76, 0.60, 0.36),
    (0.42, 0.47, 0.55),
    (0.50, 0.38, 0.33),
)
_LEAVES = ((0.22, 0.40, 0.14), (0.34, 0.47, 0.16), (0.16, 0.33, 0.19), (0.60, 0.44, 0.15), (0.42, 0.36, 0.20))
_PAINTS = (
    (0.75, 0.10, 0.10),
    (0.12, 0.20, 0.50),
    (0.85, 0.85, 0.86),
    (0.10, 0.10, 0.11),
    (0.55, 0.57, 0.60),
    (0.10, 0.38, 0.28),
    (0.85, 0.62, 0.12),
)
_SKINS = ((0.88, 0.70, 0.58), (0.62, 0.43, 0.32), (0.40, 0.27, 0.20))


@dataclass(frozen=True)
class _Light:
    """A scene's light: colours of the sky, the light's own colour, and how bright each side of the street is."""

    zenith: _Colour
    horizon: _Colour
    tint: _Colour
    fog: float
    clouds: float
    left: float
    right: float


class _Street:
    """One scene. World coordinates are metres: x to the right, y up from the ground, z into the picture.

    Everything is drawn from far to near at a multiple of the size, in the same shapes into a colour canvas and a label
    canvas; the colours are then averaged down, textured and exposed.
    """

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.size = size
        self.rng = rng
        self.height, self.width = (side * _SUPERSAMPLING for side in size)
        self.vanishing = (self.width * rng.uniform(0.3, 0.7), self.height * rng.uniform(0.42, 0.56))
        self.focal = max(self.height, self.width * 0.75) * rng.uniform(0.75, 1.1)
        self.eye = rng.uniform(1.5, 2.4)
        self.kerb = rng.uniform(3.4, 6.0)
        self.facades = {-1: self.kerb + rng.uniform(2.0, 4.5), 1: self.kerb + rng.uniform(2.0, 4.5)}
        self.light = _random_light(rng)
        self.colours = self._sky()
        self.labels = Image.new("L", self.colours.size, _SKY)
        # The second argument makes half-transparent colours (shadows, glass) blend with what lies below.
        self.paint = ImageDraw.Draw(self.colours, "RGBA")
        self.mark = ImageDraw.Draw(self.labels)

    def render(self) -> tuple[_FloatArray, npt.NDArray[np.int64]]:
        """Draws everything: image float32 [H, W, 3] in [0, 1] and labels int64 [H, W], void where a pixel holds
        more than one class."""
        self._hills()
        self._ground()
        for side in (-1, 1):
            self._houses(side)
        self._shade()
        # What stands between the facades hides them, never the other way round; so it comes after, sorted by depth.
        for z, draw in sorted(self._furniture(), key=lambda thing: -thing[0]):
            draw(z)
        height, width = self.size
        pixels = np.asarray(self.colours.resize((width, height), Image.Resampling.BOX), np.float32) / np.float32(255)
        parts = np.asarray(self.labels, np.int64).reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING)
        labels = parts[:, _SUPERSAMPLING // 2, :, _SUPERSAMPLING // 2]
        mixed = parts.min((1, 3)) != parts.max((1, 3))
        return self._expose(pixels, labels), np.where(mixed, IGNORE_INDEX, labels)

    # -- drawing primitives --------------------------------------------------------------------------------------

    def _at(self, x: float, y: float, z: float) -> _Point:
        scale = self.focal / z
        return self.vanishing[0] + scale * x, self.vanishing[1] + scale * (self.eye - y)

    def _ink(self, colour: _Colour, z: float, alpha: float = 1.0) -> tuple[int, int, int, int]:
        """The colour seen through the air between: mixed with the horizon's by distance."""
        air = 1 - np.exp(-self.light.fog * z)
        mixed = [min(max(c, 0.0), 1.0) * (1 - air) + h * air for c, h in zip(colour, self.light.horizon, strict=True)]
        red, green, blue = (int(255 * channel) for channel in mixed)
        return red, green, blue, int(255 * alpha)

    def _polygon(
        self,
        corners: Sequence[_Corner],
        colour: _Colour,
        label: int | None = None,
        alpha: float = 1.0,
    ) -> None:
        """Fills a polygon given in world coordinates; without a label it is a detail of what lies below."""
        points = [self._at(*corner) for corner in corners]
        self.paint.polygon(points, fill=self._ink(colour, min(corner[2] for corner in corners), alpha))
        if label is not None:
            self.mark.polygon(points, fill=label)

    def _ellipse(
        self, x: float, y: float, z: float, radii: _Point, colour: _Colour, label: int | None = None, alpha: float = 1.0
    ) -> None:
        """Fills an upright ellipse around a point in world coordinates, radii in metres."""
        (left, top), (right, bottom) = self._at(x - radii[0], y + radii[1], z), self._at(x + radii[0], y - radii[1], z)
        self.paint.ellipse((left, top, right, bottom), fill=self._ink(colour, z, alpha))
        if label is not None:
            self.mark.ellipse((left, top, right, bottom), fill=label)

    def _upright(
        self,
        x: _Point,
        y: _Point,
        z: float,
        colour: _Colour,
        label: int | None = None,
        alpha: float = 1.0,
        narrower: float = 0.0,
    ) -> None:
        """Fills a rectangle that faces the camera, its top narrower by so many metres on either side."""
        (left, right), (low, high) = x, y
        corners = [(left, low, z), (right, low, z), (right - narrower, high, z), (left + narrower, high, z)]
        self._polygon(corners, colour, label, alpha)

    def _flat(self, x: _Point, z: _Point, colour: _Colour, label: int | None = None, alpha: float = 1.0) -> None:
        """Fills a rectangle on the ground."""
        (left, right), (near, far) = x, z
        self._polygon([(left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)], colour, label, alpha)

    def _choose(self, colours: Sequence[_Colour], spread: float = 0.06) -> _Colour:
        """One of the colours, a little off."""
        red, green, blue = np.clip(self.rng.normal(colours[int(self.rng.integers(len(colours)))], spread), 0.03, 0.97)
        return float(red), float(green), float(blue)

    # -- the scene, from far to near -----------------------------------------------------------------------------

    def _sky(self) -> Image.Image:
        rows = np.linspace(0, 1, self.size[0], dtype=np.float32)[:, None, None]
        low = np.clip(rows * self.height / self.vanishing[1], 0, 1) ** 1.5
        sky = np.asarray(self.light.zenith) * (1 - low) + np.asarray(self.light.horizon) * low
        clouds = _noise(self.rng, self.size, cells=3, octaves=5, stretch=0.5)
        cover = np.clip((clouds - 0.6 + 0.9 * self.light.clouds) * 1.2, 0, 0.85)[..., None]
        white = 0.35 * np.asarray(self.light.horizon) + 0.65
        sky = np.clip(sky * (1 - cover) + white * cover, 0, 1)
        # Smooth enough to be painted at the final size.
        return Image.fromarray((sky * 255).astype(np.uint8)).resize((self.width, self.height))

    def _hills(self) -> None:
        """Wooded hills where the street ends."""
        columns = np.linspace(0, self.width, 60)
        relief = _noise(self.rng, (1, 60), cells=4, octaves=3)[0]
        top = self.vanishing[1] - self.height * (0.025 + 0.03 * np.clip(relief, -0.8, 2))
        points = [(0.0, self.vanishing[1] + 3), *zip(columns.tolist(), top.tolist(), strict=True)]
        points.append((float(self.width), self.vanishing[1] + 3))
        self.paint.polygon(points, fill=self._ink(self._choose(_LEAVES[:3]), 0.6 * _FAR))
        self.mark.polygon(points, fill=_TREE)

    def _ground(self) -> None:
        near = 0.9 * self.focal * self.eye / (self.height - self.vanishing[1])
        tone = self.rng.uniform(0.25, 0.45)
        asphalt = (tone, tone, tone * self.rng.uniform(0.98, 1.1))
        slabs = self._choose([(0.56, 0.53, 0.50), (0.50, 0.46, 0.42), (0.62, 0.60, 0.58), (0.55, 0.42, 0.36)], 0.03)
        reach = 4 * self.width * _FAR / self.focal
        self._flat((-reach, reach), (near, _FAR), slabs, _PAVEMENT)
        pitch = self.rng.uniform(0.8, 1.6)
        for z in np.arange(near, 25, pitch):
            self._flat((-reach, reach), (z, z + 0.05), _times(slabs, 0.8), alpha=0.5)
        self._flat((-self.kerb, self.kerb), (near, _FAR), asphalt, _ROAD)
        for side in (-1, 1):
            stone = (side * self.kerb, side * (self.kerb + 0.18))
            self._flat(stone, (near, _FAR), _times(slabs, 1.15), _PAVEMENT)
        paint = (0.86, 0.85, 0.80)
        for z in np.arange(near + self.rng.uniform(0, 4), 60, 6):
            self._flat((-0.08, 0.08), (z, z + 2.8), paint, alpha=0.9)
        if self.rng.random() < 0.35:
            z = self.rng.uniform(6, 16)
            for x in np.arange(-self.kerb + 0.3, self.kerb - 0.5, 0.95):
                self._flat((x, x + 0.5), (z, z + 2.6), paint, alpha=0.9)

    def _houses(self, side: int) -> None:
        """A row of houses on one side (-1 left, 1 right), some plots empty."""
        plots = []
        z = self.rng.uniform(1.0, 5.0)
        while z < 0.7 * _FAR:
            depth = self.rng.uniform(7, 17)
            if self.rng.random() > 0.14:
                plots.append((z, depth))
            z += depth
        for start, depth in reversed(plots):
            self._house(side, start, depth)

    def _house(self, side: int, z: float, depth: float) -> None:
        x = side * self.facades[side]
        wall = self._choose(_FACADES, 0.03)
        floors = int(self.rng.integers(2, 7))
        storey = self.rng.uniform(2.9, 3.6)
        high = floors * storey + self.rng.uniform(0.3, 1.2)
        lit = self.light.left if side < 0 else self.light.right
        far, back = z + depth, x + side * 25
        gable = [(x, 0, z), (back, 0, z), (back, high, z), (x, high, z)]
        front = [(x, 0, z), (x, 0, far), (x, high, far), (x, high, z)]
        cornice = [(x, high - 0.35, z), (x, high - 0.35, far), (x, high, far), (x, high, z)]
        self._polygon(gable, _times(wall, 0.72), _BUILDING)
        self._polygon(front, _times(wall, lit), _BUILDING)
        self._polygon(cornice, _times(wall, 0.75 * lit))
        glass = self._choose([(0.16, 0.20, 0.26), (0.30, 0.36, 0.42), (0.22, 0.20, 0.18)], 0.03)
        lamps = self.rng.random() < 0.3
        bays = max(2, int(depth / self.rng.uniform(2.2, 3.2)))
        bay = depth / bays
        wide, tall = bay * self.rng.uniform(0.38, 0.62), storey * self.rng.uniform(0.42, 0.6)
        for floor in range(floors):
            low = floor * storey + 0.25 * storey
            for index in range(bays):
                near = z + index * bay + (bay - wide) / 2
                lamp = lamps and self.rng.random() < 0.3
                pane = (0.95, 0.82, 0.50) if lamp else _times(glass, self.rng.uniform(0.8, 1.3))
                # The ground floor has doors: down to the pavement, every third bay.
                sill = 0.0 if floor == 0 and index % 3 == 1 else low
                window = [(x, sill, near), (x, sill, near + wide), (x, low + tall, near + wide), (x, low + tall, near)]
                self._polygon(window, pane)

    def _shade(self) -> None:
        """The darker side's houses throw their shadow on the ground."""
        side = -1 if self.light.left < self.light.right else 1
        strength = abs(self.light.left - self.light.right)
        edge = side * self.facades[side]
        reach = edge - side * self.rng.uniform(1.5, 8)
        for z in np.arange(2.0, 60.0, 9.0):
            slip = self.rng.uniform(-1.0, 1.0)
            self._flat(
                (min(edge, reach + slip), max(edge, reach + slip)),
                (z, z + 9.0),
                (0.05, 0.06, 0.12),
                alpha=min(0.5, strength),
            )

    def _furniture(self) -> list[tuple[float, Callable[[float], None]]]:
        """Trees, signs, cars and people as (depth, function that draws it there)."""
        rng = self.rng
        things: list[tuple[float, Callable[[float], None]]] = []
        for side in (-1, 1):
            if rng.random() < 0.65:
                for z in np.arange(rng.uniform(5, 10), 55, rng.uniform(7, 14)):
                    x = side * (self.kerb + rng.uniform(0.6, 1.2))
                    things.append((float(z + rng.uniform(-1, 1)), partial(self._tree, x)))
            for _ in range(rng.integers(0, 4)):
                things.append((rng.uniform(4.5, 20), partial(self._sign, side * (self.kerb + 0.4))))
            for _ in range(rng.integers(0, 6)):
                x = side * (self.kerb + rng.uniform(0.5, self.facades[side] - self.kerb - 0.3))
                things.append((rng.uniform(3.5, 16), partial(self._person, x)))
            z = rng.uniform(5, 16)
            while rng.random() < 0.7 and z < 50:
                things.append((z, partial(self._car, side * (self.kerb - 1.05))))
                z += rng.uniform(5.5, 12)
        for lane in (-1, 1):
            if self.kerb > 4.2 and rng.random() < 0.45:
                things.append((rng.uniform(7, 30), partial(self._car, lane * self.kerb * 0.33)))
        if rng.random() < 0.4:
            things.append((rng.uniform(4, 12), partial(self._person, rng.uniform(-1, 1) * (self.kerb - 1))))
        return things

    def _tree(self, x: float, z: float) -> None:
        rng = self.rng
        crown, spread = rng.uniform(3.2, 5.2), rng.uniform(1.1, 2.0)
        leaf = self._choose(_LEAVES, 0.03)
        self._ellipse(x, 0.0, z, (1.1 * spread, 0.12), (0.04, 0.05, 0.05), alpha=0.35)
        self._upright((x - 0.16, x + 0.16), (0, crown), z, (0.30, 0.22, 0.16), _TREE, narrower=0.05)
        bright = -1 if self.light.left > self.light.right else 1
        for layer in np.linspace(0, 1, 22):
            angle, reach = rng.uniform(0, 2 * np.pi), spread * np.sqrt(rng.random()) * 0.8
            dx, dy = reach * np.cos(angle), reach * np.sin(angle) * 0.9
            # Later blobs lie on top: they move to where the light comes from and get brighter.
            shade = 0.62 + 0.55 * layer + rng.uniform(-0.06, 0.06)
            radius = spread * rng.uniform(0.26, 0.48) * (1.1 - 0.35 * layer)
            dx, dy = dx + 0.25 * spread * layer * bright, dy + 0.3 * spread * layer
            self._ellipse(x + dx, crown + dy, z, (radius, 0.9 * radius), _times(leaf, shade), _TREE)

    def _sign(self, x: float, z: float) -> None:
        rng = self.rng
        high = rng.uniform(2.2, 2.9)
        self._upright((x - 0.06, x + 0.06), (0, high), z, (0.45, 0.46, 0.48), _SIGN)
        kind = rng.integers(3)
        if kind == 0:
            self._ellipse(x, high, z, (0.42, 0.42), (0.78, 0.08, 0.10), _SIGN)
            self._ellipse(x, high, z, (0.28, 0.28), (0.92, 0.92, 0.90))
        elif kind == 1:
            self._upright((x - 0.38, x + 0.38), (high - 0.4, high + 0.4), z, (0.10, 0.28, 0.68), _SIGN)
            self._upright((x - 0.10, x + 0.10), (high - 0.25, high + 0.25), z, (0.92, 0.93, 0.95))
        else:
            self._polygon(
                [(x - 0.5, high - 0.4, z), (x + 0.5, high - 0.4, z), (x, high + 0.5, z)], (0.80, 0.10, 0.10), _SIGN
            )
            self._polygon(
                [(x - 0.28, high - 0.27, z), (x + 0.28, high - 0.27, z), (x, high + 0.24, z)], (0.95, 0.85, 0.30)
            )

    def _person(self, x: float, z: float) -> None:
        rng = self.rng
        tall, stride = rng.uniform(1.55, 1.9), rng.uniform(0.02, 0.2)
        hip, shoulder = 0.5 * tall, 0.83 * tall
        coat, trousers = self._choose(_PAINTS + _FACADES), self._choose([(0.14, 0.15, 0.22), (0.30, 0.28, 0.26)])
        skin = _SKINS[rng.integers(len(_SKINS))]
        self._ellipse(x, 0.0, z, (0.45, 0.05), (0.03, 0.03, 0.05), alpha=0.4)
        for way in (-1, 1):
            foot = x + way * stride
            leg = [(foot - 0.09, 0, z), (foot + 0.09, 0, z), (x + 0.17, hip, z), (x - 0.17, hip, z)]
            self._polygon(leg, trousers, _PERSON)
            hand = x + way * (0.28 + 0.5 * stride)
            arm = [(hand - 0.05, hip, z), (hand + 0.05, hip, z), (x + way * 0.18, shoulder, z), (x, shoulder, z)]
            self._polygon(arm, _times(coat, 0.8), _PERSON)
        self._upright((x - 0.2, x + 0.2), (hip - 0.08, shoulder), z, coat, _PERSON, narrower=-0.03)
        self._ellipse(x, 0.92 * tall, z, (0.11, 0.14), skin, _PERSON)
        self._ellipse(x, 0.96 * tall, z, (0.115, 0.09), self._choose([(0.12, 0.09, 0.07), (0.45, 0.33, 0.18)], 0.03))

    def _car(self, x: float, z: float) -> None:
        rng = self.rng
        half, high, length = 0.88, rng.uniform(1.38, 1.75), rng.uniform(3.8, 4.6)
        belt = 0.58 * high
        body = self._choose(_PAINTS, 0.04)
        lit = self.light.left if x > 0 else self.light.right
        flank = _times(body, lit)
        glass, tyre = (0.13, 0.16, 0.20), (0.05, 0.05, 0.05)
        far = z + length
        self._flat((x - half - 0.15, x + half + 0.15), (z - 0.2, far), (0.02, 0.02, 0.04), alpha=0.6)
        # Only the flank that looks towards the middle of the picture can be seen.
        edge = x - half if x > 0 else x + half
        inner = edge + (0.12 if x > 0 else -0.12)
        self._polygon([(edge, 0.28, z), (edge, 0.28, far), (edge, belt, far), (edge, belt, z)], flank, _CAR)
        cabin = [(edge, belt, z + 0.1), (edge, belt, far - 1.0), (inner, high, far - 1.7), (inner, high, z + 0.55)]
        self._polygon(cabin, flank, _CAR)
        pane = [(edge, belt + 0.04, z + 0.4), (edge, belt + 0.04, far - 1.2), (inner, high - 0.1, far - 1.8)]
        self._polygon([*pane, (inner, high - 0.1, z + 0.75)], glass)
        for axle in (z + 0.75, far - 0.8):
            wheel = [
                (edge, 0.31 + 0.31 * np.sin(turn), axle + 0.31 * np.cos(turn))
                for turn in np.linspace(0, 2 * np.pi, 12, endpoint=False)
            ]
            self._polygon(wheel, tyre, _CAR)
        for way in (-1, 1):
            self._upright((x + way * (half - 0.12) - 0.11, x + way * (half - 0.12) + 0.11), (0, 0.4), z, tyre, _CAR)
        roof = [(x - half + 0.12, high, z + 0.55), (x + half - 0.12, high, z + 0.55)]
        self._polygon([*roof, (x + half - 0.12, high, far - 1.7), (x - half + 0.12, high, far - 1.7)], body, _CAR)
        self._upright((x - half, x + half), (0.28, belt), z, body, _CAR)
        self._upright((x - half, x + half), (belt, high), z, body, _CAR, narrower=0.16)
        self._upright((x - half + 0.1, x + half - 0.1), (belt + 0.05, high - 0.1), z, glass, narrower=0.12)
        lamp = (0.80, 0.06, 0.05) if x > 0 else (0.98, 0.95, 0.80)
        for way in (-1, 1):
            centre = x + way * (half - 0.17)
            self._upright((centre - 0.13, centre + 0.13), (belt - 0.22, belt - 0.06), z, lamp)
        self._upright((x - 0.26, x + 0.26), (0.42, 0.54), z, (0.88, 0.88, 0.82))
        self._upright((x - half, x + half), (0.28, 0.38), z, (0.10, 0.10, 0.11))

    # -- the camera ----------------------------------------------------------------------------------------------

    def _expose(self, pixels: _FloatArray, labels: npt.NDArray[np.int64]) -> _FloatArray:
        """Grain of each class, drifting light, lens and sensor."""
        rng = self.rng
        grain = _noise(rng, self.size, cells=max(self.size) // 2, octaves=1)
        drift = 1 + 0.12 * _noise(rng, self.size, cells=2, octaves=2)
        rows, columns = np.meshgrid(np.linspace(-1, 1, self.size[0]), np.linspace(-1, 1, self.size[1]), indexing="ij")
        lens = 1 - rng.uniform(0.05, 0.22) * (rows**2 + columns**2) / 2
        gain = rng.uniform(0.9, 1.25) * drift * lens * (1 + _GRAIN[labels] * grain)
        exposed = np.clip(pixels * np.asarray(self.light.tint) * gain[..., None], 0, 1) ** rng.uniform(0.85, 1.15)
        exposed += rng.normal(0, rng.uniform(0.008, 0.03), exposed.shape)
        return np.clip(exposed, 0, 1).astype(np.float32)


def _random_light(rng: np.random.Generator) -> _Light:
    """Clear day, overcast, low sun or mist."""
    lit, shaded = rng.uniform(0.95, 1.2), rng.uniform(0.5, 0.75)
    if rng.random() < 0.5:
        lit, shaded = shaded, lit
    kind = rng.choice(["clear", "overcast", "low sun", "mist"], p=[0.42, 0.22, 0.22, 0.14])
    if kind == "clear":
        blue = rng.uniform(0.75, 0.95)
        return _Light(
            (0.22, 0.45, blue), (0.72, 0.84, 0.95), (1.0, 0.98, 0.93), 0.006, rng.uniform(0, 0.7), lit, shaded
        )
    if kind == "overcast":
        grey = rng.uniform(0.6, 0.85)
        flat = rng.uniform(0.75, 0.9)
        return _Light((grey,) * 3, (grey + 0.1,) * 3, (0.92, 0.95, 1.0), 0.010, 1.0, flat, flat + 0.05)
    if kind == "low sun":
        return _Light(
            (0.35, 0.42, 0.68), (0.98, 0.74, 0.50), (1.0, 0.86, 0.70), 0.012, rng.uniform(0.2, 0.8), lit, shaded
        )
    return _Light((0.70, 0.74, 0.78), (0.80, 0.82, 0.84), (0.95, 0.97, 1.0), 0.025, 0.4, 0.85, 0.8)


def _times(colour: _Colour, factor: float) -> _Colour:
    """The colour, brighter or darker."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: int, octaves: int, stretch: float = 1.0
) -> _FloatArray:
    """Smooth random field of that shape, about zero mean and unit variance.

    Args:
        rng: where the numbers come from.
        shape: (height, width).
        cells: blobs along the width in the coarsest octave; every further octave has twice as many at half the height.
        octaves: how many.
        stretch: width of a blob over its height, inverted: 0.5 makes blobs twice as wide as high.
    """
    height, width = shape
    field = np.zeros(shape, np.float32)
    power = 0.0
    for octave in range(octaves):
        columns = max(2, int(cells * stretch) << octave)
        rows = max(2, (cells << octave) * height // width)
        coarse = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
        field += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * 0.5**octave
        power += 0.25**octave
    return np.asarray(field / np.sqrt(power), np.float32)
