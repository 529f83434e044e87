"""A thing is a table of polygons in a unit box; here is the one painter of them all."""

import math
from collections.abc import Iterator
from itertools import product
from random import Random
from typing import NamedTuple

from heteroakd.data.street.canvas import Canvas, Colour, Surface, shade

Point = tuple[float, float, float]
"""x from -1 (towards the middle of the street) to 1 in half widths, y from 0 in heights, z from 0 in depths."""
Range = tuple[float, float]
EIGHTHS = tuple(math.pi / 4 * corner for corner in range(8))
LIT: tuple[Colour, ...] = ((255, 214, 140), (255, 232, 180), (232, 224, 190), (255, 190, 110))


class Part(NamedTuple):
    """A polygon of a thing; `colour` may name a palette of the thing, from which all its parts take the same one.

    `glows` is the probability, of each cell, to shine where lamps are on, from 2 on by day, too; `label` is the thing's
    where it is negative. Instead of the polygon, of four points, `cells` are rows of such in it, by a cell's length and
    height in metres and the share of both that is filled, and `blobs` so many octagons, dark inside, lit outside.
    """

    colour: str | Colour
    points: tuple[Point, ...]
    tone: float = 1.0
    chance: float = 1.0
    glows: float = 0.0
    label: int = -1
    cells: tuple[float, float, float, float] | None = None
    blobs: int = 0


class Thing(NamedTuple):
    """What can be painted; `size` are ranges of width, height and depth in metres, `shadow` half the width of its
    shadow in half widths."""

    label: int
    size: tuple[Range, Range, Range]
    palettes: dict[str, tuple[Colour, ...]]
    parts: tuple[Part, ...]
    grain: float = 0.04
    shadow: float = 1.0


class Weather(NamedTuple):
    """What falls on a scene: the sky's colours, the latter the haze's too; factors on colours in the sun; the share of
    the sky under clouds; extinction by haze, in 1/m; strengths of mirror images in a wet road, of cast shadows and of
    lamps; displacement (x, z) of a shadow per metre of height."""

    zenith: Colour
    horizon: Colour
    light: tuple[float, float, float]
    clouds: float
    haze: float
    wet: float
    sharpness: float
    lamps: float = 0.0
    sun: tuple[float, float] = (1.0, 0.0)


class Painter(NamedTuple):
    """Paints on a canvas under a weather."""

    canvas: Canvas
    weather: Weather
    random: Random

    def paint(self, thing: Thing, x: float, z: float, size: Point) -> None:
        """Paint a thing of a width, height and depth, its middle at x, its nearest point at z."""
        (width, height, depth), side, random, weather = size, 1 if x >= 0 else -1, self.random, self.weather
        tones = {name: shade(random.choice(p), random.uniform(0.85, 1.15)) for name, p in thing.palettes.items()}
        tones["glass"] = shade(weather.horizon, random.uniform(0.2, 0.6))
        if thing.shadow and weather.sharpness > 0.3 and z < 40:
            self._cast(thing.shadow * width / 2, min(height, 12.0), x, z, z + depth)
        for part in [part for part in thing.parts if random.random() < part.chance]:
            points = [(x + side * a * width / 2, b * height, z + c * depth) for a, b, c in part.points]
            flat, along = not any(b for _, b, _ in part.points), part.points[0][0] == part.points[1][0]
            # Walls that face the sun are lighter than others.
            towards_sun = 0.0 if flat else (side * weather.sun[0] if along else weather.sun[1])
            tone = part.tone * (1 + 0.3 * weather.sharpness * towards_sun / math.hypot(*weather.sun))
            colour = tones[part.colour] if isinstance(part.colour, str) else part.colour
            label = thing.label if part.label < 0 else part.label
            glows = part.glows if weather.lamps or part.glows >= 2 else 0.0
            for outline, factor in self._outlines(part, points):
                shines = random.random() < glows
                fill = random.choice(LIT) if shines and part.cells else shade(colour, tone * factor)
                surface = self.canvas.surface(Surface(label, z + depth / 2, thing.grain, float(shines), flat))
                self.canvas.polygon([self.canvas.camera.project(*point) for point in outline], fill, surface)

    def _cast(self, half: float, height: float, x: float, near: float, far: float) -> None:
        """The shadow of a box: of its foot and three walls."""
        dx, dz = (way * height for way in self.weather.sun)
        foot = [(x - half, far), (x - half, near), (x + half, near), (x + half, far)]
        self.canvas.shadow(foot, 1.0)
        for (x0, z0), (x1, z1) in zip(foot, foot[1:], strict=False):
            self.canvas.shadow([(x0, z0), (x1, z1), (x1 + dx, z1 + dz), (x0 + dx, z0 + dz)], self.weather.sharpness)

    def _outlines(self, part: Part, points: list[Point]) -> Iterator[tuple[list[Point], float]]:
        """The polygons of a part, and the factor of each on the colour."""
        random, (x, y, z), (xt, yt, _) = self.random, points[0], points[2]
        if not (part.blobs or part.cells):
            yield points, 1.0
        for number in range(part.blobs if z < 20 else part.blobs // 2):
            lit, turn, reach = number / part.blobs, random.uniform(0, 2 * math.pi), random.uniform(0, 0.75) ** 0.5
            radius = random.uniform(0.1, 0.2) * min(yt - y, abs(xt - x))
            across = (x + xt + reach * math.cos(turn) * (xt - x)) / 2
            up = (y + yt + (reach * math.sin(turn) + 0.3 * (lit - 0.5)) * (yt - y)) / 2
            corners = [(radius * math.cos(turn + a), 0.9 * radius * math.sin(turn + a)) for a in EIGHTHS]
            yield [(across + a, up + b, z) for a, b in corners], (0.65 + 0.5 * lit) * random.uniform(0.9, 1.1)
        if part.cells:
            length, height, filled, filled_up = part.cells
            most = 40 if not (y or yt) else 7 if z < 20 else 3  # far away, more could not be told apart
            columns = min(most, max(1, round(math.dist(points[0], points[1]) / length)))
            rows = max(1, round(math.dist(points[0], points[3]) / height))
            (xs, ys, zs), (xu, yu, zu) = ([b - a for a, b in zip(points[0], points[n], strict=True)] for n in (1, 3))
            for row, column in product(range(rows), range(columns)):
                s0, s1 = ((column + 0.5 + half * filled) / columns for half in (-0.5, 0.5))
                t0, t1 = ((row + 0.5 + half * filled_up) / rows for half in (-0.5, 0.5))
                corners = [(s0, t0), (s1, t0), (s1, t1), (s0, t1)]
                cell = [(x + s * xs + t * xu, y + s * ys + t * yu, z + s * zs + t * zu) for s, t in corners]
                yield cell, random.uniform(0.85, 1.15)
