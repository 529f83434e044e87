"""A random street of two to four lanes: what stands where, its sky and light, and the photograph of it."""

from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from heteroakd.data.street import things as t
from heteroakd.data.street.canvas import FAR, NEAR, Array, Camera, Canvas, Label
from heteroakd.data.street.painter import Painter, Part, Point, Range, Thing, Weather

WEATHERS = [Weather(**entry) for entry in t.TABLES["weathers"]]
IN_SHADOW = (0.5, 0.53, 0.62)  # factor on the light where the sun does not reach


class Row(NamedTuple):
    """Things along both sides of the street: how far out from the curb, or from the other edge of the sidewalk, from
    where to where and at which steps, in metres; the chance of each. What is long is as deep as its step."""

    things: tuple[Thing, ...]
    out: Range
    behind: bool
    start: Range
    end: float
    step: Range
    chance: float = 1.0
    long: bool = False


FRONTAGE, LIFE = (
    [Row(**{**entry, "things": t.THINGS[entry["things"]]}) for entry in t.TABLES[rows]] for rows in ("frontage", "life")
)
Placed = tuple[float, float, Thing, Point]
"""Distance of its nearest point, x of its middle, what, and its width, height and depth."""


def render_scene(key: tuple[int, int, int], size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The scene of a key and `size` (H, W): picture, uint8 [H, W, 3], and labels, uint8 [H, W] in {0..11, 255}."""
    random, noise, (height, width) = Random(repr(key)), np.random.default_rng(key), size
    focal, horizon = random.uniform(0.75, 1.0) * max(width, 1.2 * height), random.uniform(0.36, 0.52) * height
    centre, eye, roll = random.uniform(0.38, 0.62) * width, random.uniform(1.3, 1.8), random.uniform(-0.026, 0.026)
    camera, weather = Camera(height, width, focal, horizon, centre, eye, roll), random.choice(WEATHERS)
    air = {name: random.uniform(0.2, 1) * getattr(weather, name) for name in ("clouds", "haze")}
    sun = (random.uniform(0.5, 1.8) * random.choice((-1, 1)), random.uniform(-0.7, 0.9))
    weather = weather._replace(**air, wet=max(0.0, random.uniform(-1, 1)) * weather.wet, sun=sun)
    painter = Painter(Canvas(camera, _sky(weather, camera, noise)), weather, random)
    for group in Street(random).groups():
        for z, x, thing, extent in sorted(group, key=lambda placed: -placed[0] - placed[3][2] / 2):
            painter.paint(thing, x, z, extent)
    if random.random() < 0.75:  # the own car's, seen in every such picture and labelled in none
        top = eye - NEAR * (random.uniform(0.91, 0.97) * height - horizon) / focal
        painter.paint(t.BONNET, 0.0, NEAR, (random.uniform(1.1, 1.6) * NEAR * width / focal, top, 0.0))
    return _develop(painter.canvas, weather, random, noise)


class Street:
    """A street straight ahead; the camera, at x = 0, drives in one of its lanes on the right. In metres."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.lane = random.uniform(3.0, 3.7)
        self.own, self.other = random.choice(((1, 1), (1, 1), (2, 1), (2, 2), (1, 2)))
        self.curb = self.lane * random.choice((0.5, self.own - 0.5)) + random.uniform(-0.35, 0.35)
        parking = random.uniform(2.0, 2.4) * (random.random() < 0.6)
        self.left, self.right = self.curb - (self.own + self.other) * self.lane - parking, self.curb + parking
        self.near, self.end = random.uniform(9, 26) if random.random() < 0.5 else 1e3, random.uniform(55, 120)
        self.far = self.near + random.uniform(7, 11)
        """Where a crossing begins and ends, and where the street does."""
        self.sides = ((-1, self.left, random.uniform(1.6, 4.2)), (1, self.right, random.uniform(1.6, 4.2)))
        """-1 or 1, x of the curb and width of the sidewalk."""
        self.rows = (FRONTAGE, LIFE if parking else LIFE[:-1])

    def groups(self) -> list[list[Placed]]:
        """What is painted one after the other: the street's end, the ground, the frontages, all before them."""
        random, near = self.random, self.near
        skyline = [self.placed(t.THINGS["skyline"][0], self.end * (0.12 * step - 1.6), self.end) for step in range(27)]
        frontage, life = ([one for row in rows for one in self.row(row)] for rows in self.rows)
        for step in range(self.own + self.other):
            for z in self.along(random.uniform(4, 14), 60, (12, 40)):
                views = random.choice((*t.VEHICLES, *t.VEHICLES[:1] * 5))
                life.append(self.placed(views[step >= self.own], self.curb - self.lane * (step + 0.5), z))
        if near < 1e3:
            at = [(t.THINGS["traffic lights"], x, near - 1) for x in (self.right + 0.4, self.left - 0.4)]
            at += [(t.THINGS["people"], random.uniform(self.left, self.right), near - 2) for _ in range(2)]
            at += [(tuple(views[2] for views in t.VEHICLES), random.uniform(self.left + 2, self.right - 2), near + 2.5)]
            life += [self.placed(random.choice(kinds), x, z) for kinds, x, z in at if random.random() < 0.6]
        return [skyline, [(0.0, 0.0, self.ground(), (2.0, 1.0, 1.0))], frontage, life]

    def along(self, start: float, end: float, step: Range) -> list[float]:
        """Distances in irregular steps, none of them in the crossing."""
        found = [start]
        while found[-1] < min(end, self.end):
            found.append(found[-1] + self.random.uniform(*step))
        return [z for z in found[:-1] if not self.near - step[0] < z < self.far]

    def placed(self, thing: Thing, x: float, z: float, depth: float | None = None) -> Placed:
        """A thing of a random size."""
        width, height, deep = (self.random.uniform(*span) for span in thing.size)
        return z, x, thing, (width, height, deep if depth is None else depth)

    def row(self, row: Row) -> list[Placed]:
        """Things along both sides."""
        found = []
        for side, curb, walk in self.sides:
            for z in self.along(self.random.uniform(*row.start), row.end, row.step):
                if self.random.random() < row.chance:
                    near, depth = max(z, NEAR), z + row.step[0] - max(z, NEAR) if row.long else None
                    placed = self.placed(self.random.choice(row.things), 0.0, near, depth)
                    out = self.random.uniform(*row.out) + row.behind * walk
                    out = max(out, walk) + placed[3][0] / 2 if row.long else out  # what is long begins there
                    found.append((near, curb + side * out, *placed[2:]))
        return found

    def ground(self) -> Thing:
        """All that is flat, from the verge to the markings."""
        random, (left, right), (near, far) = self.random, (self.left, self.right), (self.near, self.far)
        verge, label = random.choice((("paving", Label.SIDEWALK), ("grass", Label.VEGETATION)))
        parts = [Part(verge, t.flat(-400, 400, NEAR, FAR), 0.92, label=label)]
        for side, curb, walk in self.sides:
            for width, tone in ((walk, 1.0), (0.16, 1.16)):
                parts.append(Part("paving", t.flat(curb, curb + side * width, NEAR, FAR), tone, label=Label.SIDEWALK))
        parts.append(Part("asphalt", t.flat(left, right, NEAR, FAR)))
        for _ in range(5):  # patches, and seams that could be taken for markings
            x, z, width = random.uniform(left, right - 0.5), random.uniform(3, 30), random.choice((0.1, 0.5, 1.5))
            parts.append(Part("asphalt", t.flat(x, x + width, z, z + 1 / width + 2), random.uniform(0.72, 1.25)))
        parts += [Part("asphalt", t.flat(-200, 200, near, far))] * (near < 1e3)
        dash = (random.uniform(5, 9), 9.0, random.uniform(0.35, 0.55), 1.0)
        for start, stop in ((NEAR, min(near - 4, 0.8 * self.end)), (far + 4, 0.8 * self.end)):
            for step in range(self.own + self.other + 1) if stop > start else ():
                x, solid = self.curb - self.lane * step, random.random() < 0.4
                line, cells = t.flat(x - 0.09, x + 0.09, start, stop), None if solid else dash
                parts.append(Part("white", line, label=Label.LANE_MARKING, cells=cells))
        for z in (near - 3.4, far + 0.6) if near < 1e3 else ():  # zebras
            x0, x1 = left + 0.3, right - 0.3
            stripes = ((x0, 0, z), (x1, 0, z), (x1, 0, z + 2.8), (x0, 0, z + 2.8))
            parts.append(Part("white", stripes, label=Label.LANE_MARKING, cells=(1.05, 9.0, 0.48, 1.0)))
        palettes = t.palettes("asphalt", "white", "paving", "grass")
        return Thing(Label.ROAD, t.METRES, palettes, tuple(parts), 0.06, 0)


def _smooth(noise: np.random.Generator, rows: int, columns: int, size: tuple[int, int]) -> Array:
    """A smooth random field with rows x columns cells, float32 [H, W], of standard deviation near 1."""
    coarse = Image.fromarray(noise.standard_normal((rows, columns), np.float32))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC), np.float32)


def _array(values: tuple[float, ...]) -> Array:
    return np.array(values, np.float32)


def _sky(weather: Weather, camera: Camera, noise: np.random.Generator) -> NDArray[np.uint8]:
    """The sky with its gradient and clouds, uint8 [H, W, 3]."""
    size = (camera.height, camera.width)
    towards = np.clip(np.arange(camera.height, dtype=np.float32) / camera.horizon, 0, 1)[:, None, None] ** 1.4
    sky = (1 - towards) * _array(weather.zenith) + towards * _array(weather.horizon)
    field = _smooth(noise, 6, 4, size) + 0.5 * _smooth(noise, 14, 9, size) + 0.3 * _smooth(noise, 34, 20, size)
    cover = np.clip((field - 1.4 + 2.2 * weather.clouds) / 1.2, 0, 1)[..., None] * (weather.clouds > 0)
    lit = (0.65 - 0.6 * weather.lamps) * 250 + 0.35 * _array(weather.horizon)
    return np.clip(sky + cover * (lit - sky) * (0.9 - 0.5 * towards), 0, 255).astype(np.uint8)


def _develop(
    canvas: Canvas, weather: Weather, random: Random, noise: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The photograph and its labels: texture, shadow, light, wet road, haze, lamps, exposure and noise."""
    painted, surfaces, shadows = canvas.developed()
    columns = [np.array(column, np.float32) for column in zip(*canvas.surfaces, strict=True)]
    label, depth, grain, emission, ground = (column[surfaces] for column in columns)
    (height, width), shining, (x, z) = surfaces.shape, emission[..., None], canvas.camera.ground()
    depth = np.where(ground > 0, z, depth)
    sky = (depth >= FAR)[..., None]
    texture = 0.6 * noise.standard_normal((height, width), np.float32)
    # On the ground it lies in the plane, too: one cell of the tile is 25 cm wide and 50 cm long.
    mottle = noise.standard_normal((64, 64), np.float32)[(2 * z).astype(int) % 64, np.floor(4 * x).astype(int) % 64]
    texture += 0.6 * ground * np.clip(12 / np.maximum(z, 1), 0, 1) * mottle
    light = _array(weather.light) * (1 - (ground * shadows)[..., None] * (1 - _array(IN_SHADOW)))
    if weather.lamps:  # the own headlights: a cone on the ground
        cone = 0.55 * ground * np.exp(-((z - 9) ** 2) / 120 - x**2 / (3.0 + 0.06 * z**2))
        light = light + (weather.lamps * (0.06 + cone))[..., None] * _array((1.0, 0.93, 0.78))
    picture = painted * (1 + grain * texture)[..., None] * light.astype(np.float32)
    picture = np.where(sky, painted, picture * (1 - shining) + painted * shining)
    if weather.wet:  # the ground mirrors what stands above the horizon
        rows = 2 * canvas.camera.horizon - np.arange(height) + 1.6 * noise.standard_normal(height)
        mirrored = picture[np.clip(rows.astype(np.int32), 0, height - 1)]
        picture += (ground * (label != Label.VEGETATION) * np.float32(weather.wet))[..., None] * (mirrored - picture)
    clear = np.maximum(np.exp(-weather.haze * np.minimum(depth, 150.0))[..., None], 0.75 * shining)
    picture = np.where(sky, picture, clear * picture + (1 - clear) * _array(weather.horizon) / 255)
    if weather.lamps:
        glow = Image.fromarray((painted * shining * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(width / 48))
        picture = picture + np.asarray(glow, np.float32) * np.float32(1.1 / 255)
    balance = _array(tuple(random.uniform(0.95, 1.05) for _ in range(3)))
    picture = ((picture * balance - 0.45) * random.uniform(0.88, 1.12) + 0.45) * random.uniform(0.9, 1.1)
    sensor = noise.standard_normal((height, width, 3), np.float32)
    picture = picture + 0.014 * (1 + weather.lamps) * random.uniform(0.6, 1.4) * sensor
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), label.astype(np.uint8)
