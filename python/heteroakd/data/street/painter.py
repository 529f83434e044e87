"""A thing is a table of polygons in a unit box; here is the one painter of them all."""

import math
from collections.abc import Callable
from typing import NamedTuple

from heteroakd.data.samples import IGNORE_INDEX
from heteroakd.data.street.canvas import NEAR, Canvas, Colour, Randomness, Surface, shade
from heteroakd.data.street.light import Weather

Point = tuple[float, float, float]
"""x from -1 (towards the middle of the street) to 1 in half widths, y from 0 in heights, z from 0 in depths."""
Range = tuple[float, float]
LIT: tuple[Colour, ...] = ((255, 214, 140), (255, 232, 180), (232, 224, 190), (255, 190, 110))


class Part(NamedTuple):
    """A polygon of a thing; `colour` may name a palette of the thing, from which all its parts take the same one."""

    colour: str | Colour
    points: tuple[Point, ...]
    tone: float = 1.0
    """Factor on the colour."""
    chance: float = 1.0
    glows: float = 0.0
    """Probability, of each cell, to shine where lamps are on; from 2 on by day, too."""
    label: int = -1
    """Where it is not the thing's."""
    cells: tuple[float, float, float, float] | None = None
    """Instead of the polygon, of four points, rows of such in it: a cell's length and height in metres, and the share
    of both that is filled."""
    blobs: int = 0
    """Instead of the polygon so many discs within its bounds, from the dark inside to the lit outside."""


class Thing(NamedTuple):
    """What can be painted; `size` are ranges of width, height and depth in metres."""

    label: int
    size: tuple[Range, Range, Range]
    palettes: dict[str, tuple[Colour, ...]]
    parts: tuple[Part, ...]
    grain: float = 0.04
    shadow: float = 1.0
    """Half width of its shadow, in half widths; 0 for none."""


class Painter(NamedTuple):
    """Paints on a canvas under a weather."""

    canvas: Canvas
    weather: Weather
    random: Randomness

    def paint(self, thing: Thing, x: float, z: float, size: Point) -> None:
        """Paint a thing of a width, height and depth, its middle at x, its nearest point at z."""
        (width, height, depth), side, sun = size, 1 if x >= 0 else -1, self.weather.sun
        random = self.random
        tones = {name: shade(random.pick(p), random.uniform(0.85, 1.15)) for name, p in thing.palettes.items()}
        tones["glass"] = shade(self.weather.horizon, random.uniform(0.2, 0.6))
        surfaces: dict[tuple[int, bool, bool], int] = {}
        if thing.shadow and self.weather.sharpness > 0.3 and z < 40:
            half, dx, dz = thing.shadow * width / 2, *(way * min(height, 12.0) for way in sun)
            left, right, back = x - half, x + half, z + depth
            for (x0, z0), (x1, z1) in (((left, z), (right, z)), ((left, z), (left, back)), ((right, z), (right, back))):
                corners = [(x0, z0), (x1, z1), (x1 + dx, z1 + dz), (x0 + dx, z0 + dz)]
                self.canvas.shadow(corners, self.weather.sharpness)
            self.canvas.shadow([(left, z - 0.1), (right, z - 0.1), (right, back), (left, back)], 1.0)
        for part in thing.parts:
            if random.chance(part.chance):
                points = [(x + side * a * width / 2, b * height, z + c * depth) for a, b, c in part.points]
                flat, along = not any(b for _, b, _ in part.points), part.points[0][0] == part.points[1][0]
                # Walls that face the sun are lighter than others.
                towards_sun = 0.0 if flat else (side * sun[0] if along else sun[1]) / math.hypot(*sun)
                tone = part.tone * (1 + 0.3 * self.weather.sharpness * towards_sun)
                colour = shade(tones[part.colour] if isinstance(part.colour, str) else part.colour, tone)
                label = thing.label if part.label < 0 else part.label

                def surface(shines: bool, label: int = label, flat: bool = flat) -> int:
                    if (label, shines, flat) not in surfaces:
                        made = Surface(label, z + depth / 2, thing.grain, float(shines), flat)
                        surfaces[label, shines, flat] = self.canvas.surface(made)
                    return surfaces[label, shines, flat]

                fill = self._discs if part.blobs else self._cells if part.cells else self._polygon
                fill(part, points, colour, surface)

    def _glows(self, part: Part) -> float:
        return part.glows if self.weather.lamps or part.glows >= 2 else 0.0

    def _polygon(self, part: Part, points: list[Point], colour: Colour, surface: Callable[[bool], int]) -> None:
        shines = bool(part.glows) and self.random.chance(self._glows(part))
        self.canvas.polygon([self.canvas.camera.project(*point) for point in points], colour, surface(shines))

    def _discs(self, part: Part, points: list[Point], colour: Colour, surface: Callable[[bool], int]) -> None:
        random, (x0, y0, z), (x1, y1, _) = self.random, points[0], points[2]
        for number in range(part.blobs if z < 20 else part.blobs // 2):
            lit, turn, reach = number / part.blobs, random.uniform(0, 2 * math.pi), random.uniform(0, 0.75) ** 0.5
            a, b = reach * math.cos(turn), reach * math.sin(turn) + 0.3 * (lit - 0.5)
            middle = self.canvas.camera.project((x0 + x1 + a * (x1 - x0)) / 2, (y0 + y1 + b * (y1 - y0)) / 2, z)
            size = self.canvas.camera.focal / max(z, NEAR) * random.uniform(0.1, 0.2) * min(y1 - y0, abs(x1 - x0))
            tone = shade(colour, (0.65 + 0.5 * lit) * random.uniform(0.9, 1.1))
            self.canvas.disc(middle, size, 0.9 * size, tone, surface(False))

    def _cells(self, part: Part, points: list[Point], colour: Colour, surface: Callable[[bool], int]) -> None:
        random, project, glows = self.random, self.canvas.camera.project, self._glows(part)
        (x, y, z), *others = points
        (xs, ys, zs), (xt, yt, zt) = ([b - a for a, b in zip(points[0], other, strict=True)] for other in others[::2])
        length, height, filled, filled_up = part.cells or (1, 1, 1, 1)
        columns = max(1, round(math.dist(points[0], points[1]) / length))
        rows = max(1, round(math.dist(points[0], points[3]) / height))
        columns = min(columns, 40 if not (y or yt) else 7 if z < 20 else 3)  # far away, more could not be told apart
        for cell in range(rows * columns):
            s0, t0 = (cell % columns + 0.5 - filled / 2) / columns, (cell // columns + 0.5 - filled_up / 2) / rows
            s1, t1 = s0 + filled / columns, t0 + filled_up / rows
            shines = bool(glows) and random.chance(glows)
            tone = random.pick(LIT) if shines else shade(colour, random.uniform(0.85, 1.15))
            corners = [
                project(x + s * xs + t * xt, y + s * ys + t * yt, z + s * zs + t * zt)
                for s, t in ((s0, t0), (s1, t0), (s1, t1), (s0, t1))
            ]
            self.canvas.polygon(corners, tone, surface(shines))

    def paint_bonnet(self) -> None:
        """Paint the own car's bonnet, which is seen in every such picture and labelled in none."""
        width, height = self.canvas.camera.width, self.canvas.camera.height
        colour = self.random.pick(((30, 32, 36), (70, 74, 82), (120, 24, 28), (150, 154, 160)))
        half, rise = self.random.uniform(0.55, 0.8) * width, self.random.uniform(0.03, 0.09) * height
        surface = self.canvas.surface(Surface(IGNORE_INDEX, NEAR, 0.02))
        self.canvas.disc((self.random.uniform(0.45, 0.55) * width, height), half, rise, colour, surface)
