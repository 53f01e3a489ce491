"""Drawn street scenes with label maps, for the demo and for tests without data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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

# fmt: off
SCENE_PALETTE = (
    (112, 168, 220), (146, 108, 92), (118, 84, 140), (230, 150, 200),
    (92, 150, 60), (28, 48, 160), (214, 40, 60), (240, 204, 40),
)
# fmt: on
"""One RGB colour per class of the generated scenes, 0 to 255."""


class Scenes(NamedTuple):
    """What ``generated_scenes`` returns."""

    images: Tensor
    """float32 [N, 3, H, W] in [0, 1]."""
    labels: Tensor
    """int64 [N, H, W]; void pixels hold ``IGNORE_INDEX``."""
    classes: tuple[str, ...] = SCENE_CLASSES
    palette: tuple[tuple[int, int, int], ...] = SCENE_PALETTE


def generated_scenes(count: int, size: tuple[int, int] = (144, 192), seed: int = 0) -> Scenes:
    """Draws street scenes: a road between facades in perspective, with trees, cars, people and signs.

    Every scene has its own light, geometry, textures and sensor noise. Pixels that hold more than one class, those on
    the outline of an object, are void: about 4 % of all. Scene i depends on (seed, i) alone, so that a longer series
    begins with the shorter one.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    if len(size) != 2 or min(size) < 16:
        raise ValueError(f"size must be (height, width), both at least 16, got {size}")
    scenes = Scenes(torch.empty(count, 3, *size, dtype=torch.float32), torch.empty(count, *size, dtype=torch.int64))
    for index in range(count):
        pixels, classes = _Street(size, np.random.default_rng([seed, index])).render()
        scenes.images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
        scenes.labels[index] = torch.from_numpy(classes)
    return scenes


_Corners = list[tuple[float, float, float]]
_Floats = npt.NDArray[np.float32]
_Thing = tuple[float, float, Callable[[float, float], None]]
"""Depth, place across the street, and what draws it there."""

_SKY, _BUILDING, _ROAD, _PAVEMENT, _TREE, _CAR, _PERSON, _SIGN = range(len(SCENE_CLASSES))
_SUPERSAMPLING = 3
_FAR = 90.0
_GRAIN = np.array([0.01, 0.06, 0.06, 0.07, 0.25, 0.03, 0.08, 0.02], np.float32)
"""Relative amplitude of the texture of each class."""

# fmt: off
_FACADES = np.array(
    ((0.62, 0.34, 0.27), (0.80, 0.74, 0.62), (0.55, 0.55, 0.56), (0.76, 0.60, 0.36), (0.42, 0.47, 0.55)), np.float32)
_LEAVES = np.array(((0.22, 0.40, 0.14), (0.34, 0.47, 0.16), (0.16, 0.33, 0.19), (0.60, 0.44, 0.15)), np.float32)
_PAINTS = np.array(
    ((0.75, 0.10, 0.10), (0.12, 0.20, 0.50), (0.85, 0.85, 0.86), (0.10, 0.10, 0.11), (0.85, 0.62, 0.12)), np.float32)
_SLABS = np.array(((0.56, 0.53, 0.50), (0.50, 0.46, 0.42), (0.62, 0.60, 0.58), (0.55, 0.42, 0.36)), np.float32)
_SKINS = np.array(((0.88, 0.70, 0.58), (0.62, 0.43, 0.32), (0.40, 0.27, 0.20)), np.float32)
_GLASS, _BLACK, _WHITE, _RED, _BLUE, _YELLOW = np.array(
    ((0.15, 0.19, 0.24), (0.05, 0.05, 0.05), (0.9, 0.9, 0.87), (0.8, 0.1, 0.1), (0.1, 0.28, 0.68), (0.95, 0.82, 0.5)),
    np.float32)
_LIGHTS = (
    # Sky at the zenith and at the horizon, the light's own colour, fog, clouds, brightness of the shaded side.
    ((0.22, 0.45, 0.90), (0.72, 0.84, 0.95), (1.00, 0.98, 0.93), 0.006, 0.4, 0.60),  # clear
    ((0.70, 0.72, 0.76), (0.82, 0.83, 0.85), (0.92, 0.95, 1.00), 0.010, 1.0, 0.90),  # overcast
    ((0.35, 0.42, 0.68), (0.98, 0.74, 0.50), (1.00, 0.86, 0.70), 0.012, 0.5, 0.60),  # low sun
    ((0.70, 0.74, 0.78), (0.80, 0.82, 0.84), (0.95, 0.97, 1.00), 0.025, 0.4, 0.90),  # mist
)
# fmt: on


def _flat(x0: float, x1: float, z0: float, z1: float) -> _Corners:
    """A rectangle on the ground."""
    return [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)]


def _upright(
    x0: float, x1: float, y0: float, y1: float, z0: float, z1: float | None = None, narrower: float = 0.0
) -> _Corners:
    """A rectangle above the ground from (x0, z0) to (x1, z1 or z0), its top narrower by so many metres on each side."""
    z1 = z0 if z1 is None else z1
    return [(x0, y0, z0), (x1, y0, z1), (x1 - narrower, y1, z1), (x0 + narrower, y1, z0)]


def _round(x: float, y: float, z: float, radius: float) -> _Corners:
    """A disc that faces the camera."""
    turns = (math.pi * turn / 10 for turn in range(20))
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn), z) for turn in turns]


class _Street:
    """One scene. World coordinates are metres: x to the right, y up from the ground, z into the picture.

    Everything is drawn from far to near at a multiple of the size, in the same shapes into a colour canvas and a label
    canvas; the colours are then averaged down, textured and exposed.
    """

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.height, self.width = (side * _SUPERSAMPLING for side in size)
        self.vanishing = (self.width * rng.uniform(0.3, 0.7), self.height * rng.uniform(0.42, 0.56))
        self.focal = max(self.height, self.width * 0.75) * rng.uniform(0.75, 1.1)
        self.eye = rng.uniform(1.5, 2.4)
        self.near = 0.9 * self.focal * self.eye / (self.height - self.vanishing[1])
        self.kerb, self.verge = rng.uniform(3.4, 6.0), rng.uniform(2.0, 4.5)
        self.zenith, self.horizon, self.tint, self.fog, self.clouds, shaded = _LIGHTS[rng.integers(len(_LIGHTS))]
        self.sunny = int(rng.choice((-1, 1)))
        self.lit = {self.sunny: rng.uniform(0.95, 1.15), -self.sunny: shaded}
        self.colours = self._sky()
        self.labels = Image.new("L", self.colours.size, _SKY)
        # The second argument makes half-transparent colours (shadows, markings) blend with what lies below.
        self.paint, self.mark = ImageDraw.Draw(self.colours, "RGBA"), ImageDraw.Draw(self.labels)

    def render(self) -> tuple[_Floats, npt.NDArray[np.int64]]:
        """Draws everything: image float32 [H, W, 3] in [0, 1] and labels int64 [H, W]."""
        self._ground()
        for side in (-1, 1):
            self._houses(side)
        # What stands between the facades hides them, never the other way round; so it comes after, sorted by depth.
        for z, x, draw in sorted(self._furniture(), key=lambda thing: -thing[0]):
            draw(x, z)
        height, width = self.size
        pixels = np.asarray(self.colours.resize((width, height), Image.Resampling.BOX), np.float32) / np.float32(255)
        parts = np.asarray(self.labels, np.int64).reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING)
        labels = parts[:, _SUPERSAMPLING // 2, :, _SUPERSAMPLING // 2]
        mixed = parts.min((1, 3)) != parts.max((1, 3))
        return self._expose(pixels, labels), np.where(mixed, IGNORE_INDEX, labels)

    def _fill(self, corners: _Corners, colour: _Floats, label: int | None = None, alpha: float = 1.0) -> None:
        """Fills a polygon, seen through the air between; without a label it is a detail of what lies below."""
        (middle, horizon), focal, eye = self.vanishing, self.focal, self.eye
        points = [(middle + focal * x / z, horizon + focal * (eye - y) / z) for x, y, z in corners]
        air = 1 - math.exp(-self.fog * min(z for _, _, z in corners))
        seen = 255 * (colour.clip(0, 1) * (1 - air) + np.asarray(self.horizon) * air)
        self.paint.polygon(points, fill=(*map(int, seen), int(255 * alpha)))
        if label is not None:
            self.mark.polygon(points, fill=label)

    def _choose(self, colours: _Floats) -> _Floats:
        """One of the colours, a little off."""
        return self.rng.normal(colours[self.rng.integers(len(colours))], 0.04).clip(0.03, 0.97)

    def _sky(self) -> Image.Image:
        rows = np.linspace(0, 1, self.size[0], dtype=np.float32)[:, None, None]
        low = np.clip(rows * self.height / self.vanishing[1], 0, 1) ** 1.5
        sky = np.asarray(self.zenith) * (1 - low) + np.asarray(self.horizon) * low
        cover = np.clip((_noise(self.rng, self.size, 3, 5) - 0.6 + 0.9 * self.clouds) * 1.2, 0, 0.85)[..., None]
        sky = np.clip(sky * (1 - cover) + (0.35 * np.asarray(self.horizon) + 0.65) * cover, 0, 1)
        return Image.fromarray((sky * 255).astype(np.uint8)).resize((self.width, self.height))

    def _ground(self) -> None:
        """Wooded hills where the street ends, pavement, road, its markings and the houses' shadow on it."""
        rng, near, kerb = self.rng, self.near, self.kerb
        wide = 4 * self.width * _FAR / self.focal
        tops = self.eye + 6 + 2 * _noise(rng, (1, 120), 8, 3)[0].clip(-1, 2)
        ridge = [(x, float(y), _FAR) for x, y in zip(np.linspace(-wide / 4, wide / 4, 120), tops, strict=True)]
        self._fill([(-wide, 0, _FAR), *ridge, (wide, 0, _FAR)], self._choose(_LEAVES[:3]), _TREE)
        self._fill(_flat(-wide, wide, near, _FAR), self._choose(_SLABS), _PAVEMENT)
        self._fill(_flat(-kerb - 0.18, kerb + 0.18, near, _FAR), self._choose(_SLABS), _PAVEMENT)
        self._fill(_flat(-kerb, kerb, near, _FAR), _WHITE * rng.uniform(0.28, 0.5), _ROAD)
        for z in np.arange(near + rng.uniform(0, 4), 60, 6):
            self._fill(_flat(-0.08, 0.08, z, z + 2.8), _WHITE, alpha=0.9)
        edge, crossing = -self.sunny * (kerb + self.verge), rng.uniform(6, 40)
        for x in np.arange(-kerb + 0.3, kerb - 0.5, 0.95):
            self._fill(_flat(x, x + 0.5, crossing, crossing + 2.6), _WHITE, alpha=0.9)
        shadow = _flat(edge, edge + self.sunny * rng.uniform(1.5, 8), near, 60)
        self._fill(shadow, _BLACK, alpha=self.lit[self.sunny] - self.lit[-self.sunny])

    def _houses(self, side: int) -> None:
        """A row of houses on one side (-1 left, 1 right), some plots empty."""
        ends = np.cumsum([self.rng.uniform(1.0, 5.0), *self.rng.uniform(7, 17, 6)]).tolist()
        for near, far in reversed([*itertools.pairwise(ends)]):
            if self.rng.random() > 0.14:
                self._house(side * (self.kerb + self.verge), near, far, self.lit[side])

    def _house(self, x: float, near: float, far: float, lit: float) -> None:
        rng, wall, lamps = self.rng, self._choose(_FACADES), self.rng.choice([0.0, 0.0, 0.3])
        floors, storey, bays = int(rng.integers(2, 7)), rng.uniform(2.9, 3.6), int((far - near) / rng.uniform(2.2, 3.2))
        high, bay = floors * storey + rng.uniform(0.3, 1.2), (far - near) / bays
        self._fill(_upright(x, x + math.copysign(25, x), 0, high, near), wall * 0.72, _BUILDING)
        self._fill(_upright(x, x, 0, high, near, far), wall * lit, _BUILDING)
        self._fill(_upright(x, x, high - 0.35, high, near, far), wall * (0.75 * lit))
        wide, tall = bay * rng.uniform(0.38, 0.62), storey * rng.uniform(0.42, 0.6)
        for floor, index in itertools.product(range(floors), range(bays)):
            pane = _YELLOW if rng.random() < lamps else _GLASS * rng.uniform(0.8, 1.5)
            sill, start = (floor + 0.25) * storey, near + index * bay + (bay - wide) / 2
            door = floor == 0 and index % 3 == 1
            self._fill(_upright(x, x, 0 if door else sill, sill + tall, start, start + wide), pane)

    def _furniture(self) -> list[_Thing]:
        """Trees, signs, cars and people."""
        rng, kerb, verge = self.rng, self.kerb, self.verge
        things: list[_Thing] = []
        for side in (-1, 1):
            avenue = np.arange(rng.uniform(5, 10), rng.choice([0, 55, 55]), rng.uniform(7, 14))
            things += [(z, side * (kerb + rng.uniform(0.6, 1.2)), self._tree) for z in avenue]
            things += [(z, side * (kerb + 0.4), self._sign) for z in rng.uniform(4.5, 20, rng.integers(0, 4))]
            walkers = rng.uniform(3.5, 16, rng.integers(0, 6))
            things += [(z, side * (kerb + rng.uniform(0.4, verge - 0.3)), self._person) for z in walkers]
            parked = rng.uniform(-1, 7) + np.cumsum(rng.uniform(5.5, 12, rng.integers(0, 5)))
            things += [(z, side * (kerb - 1.05), self._car) for z in parked]
        crossing = rng.uniform(5, 20, rng.integers(0, 2))
        return things + [(z, rng.uniform(1 - kerb, kerb - 1), self._person) for z in crossing]

    def _tree(self, x: float, z: float) -> None:
        rng, leaf = self.rng, self._choose(_LEAVES)
        crown, spread = rng.uniform(3.2, 5.2), rng.uniform(1.1, 2.0)
        self._fill(_upright(x - 0.14, x + 0.14, 0, crown, z), _SKINS[2] * 0.7, _TREE)
        # Later blobs lie on top: they move to where the light comes from and get brighter.
        for layer in np.linspace(0, 1, 22).tolist():
            angle, reach = rng.uniform(0, 2 * math.pi), 0.8 * spread * math.sqrt(rng.random())
            dx = reach * math.cos(angle) - 0.25 * spread * layer * self.sunny
            dy = 0.9 * reach * math.sin(angle) + 0.3 * spread * layer
            radius, shade = spread * rng.uniform(0.26, 0.48) * (1.1 - 0.35 * layer), rng.uniform(0.56, 0.68)
            self._fill(_round(x + dx, crown + dy, z, radius), leaf * (shade + 0.55 * layer), _TREE)

    def _sign(self, x: float, z: float) -> None:
        high, colour = self.rng.uniform(2.2, 2.9), _RED if self.rng.random() < 0.5 else _BLUE
        self._fill(_upright(x - 0.06, x + 0.06, 0, high, z), _WHITE * 0.5, _SIGN)
        self._fill(_round(x, high, z, 0.42), colour, _SIGN)
        self._fill(
            _round(x, high, z, 0.27) if colour is _RED else _upright(x - 0.1, x + 0.1, high - 0.25, high + 0.25, z),
            _WHITE,
        )

    def _person(self, x: float, z: float) -> None:
        tall, stride, coat = self.rng.uniform(1.55, 1.9), self.rng.uniform(0.02, 0.2), self._choose(_PAINTS)
        hip, shoulder = 0.5 * tall, 0.84 * tall
        for way in (-1, 1):
            foot, hand = x + way * stride, x + way * (0.26 + 0.4 * stride)
            leg = [(foot - 0.09, 0, z), (foot + 0.09, 0, z), (x + 0.17, hip, z), (x - 0.17, hip, z)]
            self._fill(leg, _GLASS, _PERSON)
            self._fill([(hand, hip, z), (x + way * 0.22, shoulder, z), (x, shoulder, z)], coat * 0.8, _PERSON)
        self._fill(_upright(x - 0.2, x + 0.2, hip - 0.08, shoulder, z), coat, _PERSON)
        self._fill(_round(x, 0.94 * tall, z, 0.12), _BLACK, _PERSON)
        self._fill(_round(x, 0.91 * tall, z, 0.11), self._choose(_SKINS), _PERSON)

    def _car(self, x: float, z: float) -> None:
        high, far, body = self.rng.uniform(1.38, 1.75), z + self.rng.uniform(3.8, 4.6), self._choose(_PAINTS)
        belt, left, right = 0.58 * high, x - 0.88, x + 0.88
        # Only the flank that looks towards the middle of the street can be seen.
        side = -1 if x > 0 else 1
        edge, inner, flank = x + side * 0.88, x + side * 0.76, body * self.lit[-side]
        self._fill(_flat(left - 0.15, right + 0.15, z - 0.2, far), _BLACK, alpha=0.6)
        self._fill(_upright(edge, edge, 0.28, belt, z, far), flank, _CAR)
        for inset, colour in ((0.0, flank), (0.1, _GLASS)):
            sill = [(edge, belt + inset, z + 0.1 + 3 * inset), (edge, belt + inset, far - 1.0 - 3 * inset)]
            roof = [(inner, high - inset, far - 1.7 - inset), (inner, high - inset, z + 0.55 + inset)]
            self._fill(sill + roof, colour, _CAR)
        for axle in (z + 0.75, far - 0.8):
            self._fill([(edge, 0.31 + dy, axle + dz) for dz, dy, _ in _round(0, 0, 0, 0.31)], _BLACK, _CAR)
        self._fill(_upright(left, right, 0.28, belt, z), body, _CAR)
        self._fill(_upright(left, right, belt, high, z, narrower=0.16), body, _CAR)
        self._fill(_upright(left + 0.1, right - 0.1, belt + 0.05, high - 0.1, z, narrower=0.14), _GLASS)
        for start in (left + 0.04, right - 0.3):
            self._fill(_upright(start, start + 0.22, 0, 0.28, z), _BLACK, _CAR)
            self._fill(_upright(start, start + 0.26, belt - 0.22, belt - 0.06, z), _RED if x > 0 else _WHITE)
        self._fill(_upright(x - 0.26, x + 0.26, 0.42, 0.54, z), _WHITE)

    def _expose(self, pixels: _Floats, labels: npt.NDArray[np.int64]) -> _Floats:
        """Grain of each class, drifting light, lens and sensor."""
        rng = self.rng
        rows, columns = np.meshgrid(np.linspace(-1, 1, self.size[0]), np.linspace(-1, 1, self.size[1]), indexing="ij")
        gain = rng.uniform(0.9, 1.25) * (1 - rng.uniform(0.05, 0.22) * (rows**2 + columns**2) / 2)
        gain = gain * (1 + 0.12 * _noise(rng, self.size, 2, 2))
        gain = gain * (1 + _GRAIN[labels] * _noise(rng, self.size, max(self.size) // 2, 1))
        exposed = np.clip(pixels * np.asarray(self.tint) * gain[..., None], 0, 1) ** rng.uniform(0.85, 1.15)
        exposed += rng.normal(0, rng.uniform(0.008, 0.03), exposed.shape)
        return np.clip(exposed, 0, 1).astype(np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: int, octaves: int) -> _Floats:
    """A smooth random field about zero with unit variance: ``cells`` blobs along the width, and finer octaves."""
    height, width = shape
    field = np.zeros(shape, np.float32)
    for octave in range(octaves):
        columns, rows = max(2, cells << octave), max(2, (cells << octave) * height // width)
        coarse = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
        field += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * 0.5**octave
    return np.asarray(field / np.sqrt(sum(0.25**octave for octave in range(octaves))), np.float32)
