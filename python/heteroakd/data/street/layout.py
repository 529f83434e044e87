"""What stands where: a random street of two to four lanes, painted from far to near."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from heteroakd.data.street import things as t
from heteroakd.data.street.canvas import NEAR, Camera, Canvas, Label, Randomness
from heteroakd.data.street.light import develop, paint_sky, sample_weather
from heteroakd.data.street.painter import Painter, Part, Point, Range, Thing

Placed = tuple[float, float, Thing, Point]
"""Distance of its nearest point, x of its middle, what, and its width, height and depth; in metres."""
GROUND = {
    "asphalt": ((96, 96, 98), (112, 110, 108), (82, 84, 90), (126, 122, 118)), "white": ((228, 226, 216),),
    "paving": ((150, 146, 140), (168, 160, 150), (132, 130, 130), (158, 136, 122), (120, 118, 120)),
    "grass": ((96, 122, 62), (116, 130, 70), (130, 126, 76)),
}  # fmt: skip


def render_scene(random: Randomness, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A random scene of `size` (H, W): picture, uint8 [H, W, 3], and labels, uint8 [H, W] in {0..11, 255}."""
    (height, width), roll = size, math.radians(random.uniform(-1.5, 1.5))
    focal, horizon = random.uniform(0.75, 1.0) * max(width, 1.2 * height), random.uniform(0.36, 0.52) * height
    camera = Camera(height, width, focal, horizon, random.uniform(0.38, 0.62) * width, random.uniform(1.3, 1.8), roll)
    weather = sample_weather(random)
    painter = Painter(Canvas(camera, paint_sky(weather, camera, random)), weather, random)
    street = Street(random)
    things: list[list[Placed]] = [
        street.skyline(),
        [(0, 0, street.ground(), (2, 1, 1))],
        street.frontage(),
        street.life(),
    ]
    for group in things:
        for z, x, thing, extent in sorted(group, key=lambda placed: -placed[0] - placed[3][2] / 2):
            painter.paint(thing, x, z, extent)
    if random.chance(0.75):
        painter.paint_bonnet()
    return develop(painter.canvas, weather, random)


class Street:
    """A street straight ahead; the camera, at x = 0, drives in one of its lanes on the right. In metres."""

    def __init__(self, random: Randomness) -> None:
        self.random = random
        lane, (own, other) = random.uniform(3.0, 3.7), random.pick(((1, 1), (1, 1), (2, 1), (2, 2), (1, 2)))
        self.parking = random.uniform(2.0, 2.4) if random.chance(0.6) else 0.0
        curb = lane * random.pick((0.5, own - 0.5)) + random.uniform(-0.35, 0.35)
        self.middle, self.left = curb - own * lane, curb - (own + other) * lane - self.parking
        self.right, self.end = curb + self.parking, random.uniform(55, 120)
        self.lines = [(curb - lane * step, random.chance(0.4)) for step in range(1, own + other)]
        self.lanes = [(curb - lane * (step + 0.5), step >= own) for step in range(own + other)]
        near = random.uniform(9, 26) if random.chance(0.5) else 1e3
        self.crossing = (near, near + random.uniform(7, 11))
        self.sides = ((-1, self.left, random.uniform(1.6, 4.2)), (1, self.right, random.uniform(1.6, 4.2)))
        """-1 or 1, x of the curb and width of the sidewalk."""

    def along(self, start: float, end: float, step: tuple[float, float]) -> list[float]:
        """Distances in irregular steps, none of them in the crossing."""
        found = []
        while start < end:
            found += [start] if not self.crossing[0] - 1 < start < self.crossing[1] + 1 else []
            start += self.random.uniform(*step)
        return found

    def placed(self, thing: Thing, x: float, z: float, depth: float | None = None) -> Placed:
        """A thing of a random size."""
        width, height, deep = (self.random.uniform(*span) for span in thing.size)
        return z, x, thing, (width, height, deep if depth is None else depth)

    def skyline(self) -> list[Placed]:
        """Blocks and tree tops that close the street."""
        places = [self.end * (0.12 * step - 1.6) for step in range(27)] if self.random.chance(0.85) else []
        width, height = (0.06, 0.22), (5, 17)
        return [(self.end, x, self.random.pick((t.SKYLINE[0], *t.SKYLINE)), (self.random.uniform(*width) * self.end,
                 self.random.uniform(*height), 0.0)) for x in places]  # fmt: skip

    def ground(self) -> Thing:
        """All that is flat, from the verge to the markings."""
        random, far, (left, right), (near, end) = self.random, 2 * self.end, (self.left, self.right), self.crossing
        verge, label = random.pick((("paving", Label.SIDEWALK), ("grass", Label.VEGETATION)))
        tone, slab = random.uniform(0.86, 1.1), random.uniform(1.0, 1.8)
        slabs = (slab, slab, 0.9, 0.93)
        parts = [Part(verge, t.flat(-400, 400, NEAR, far), 0.92, label=label)]
        for side, curb, walk in self.sides:
            for width, stop, shade, cells in ((walk, far, 1, None), (walk, 14, 1.06, slabs), (0.16, far, 1.16, None)):
                strip = t.flat(curb, curb + side * width, NEAR, stop)
                parts.append(Part("paving", strip, shade, label=Label.SIDEWALK, cells=cells))
        parts.append(Part("asphalt", t.flat(left, right, NEAR, far)))
        for side, curb, _ in self.sides:
            parts.append(Part("asphalt", t.flat(curb, curb - side * self.parking, NEAR, far), tone))
        for _ in range(5):  # patches, and seams that could be taken for markings
            x, z, width = random.uniform(left, right - 0.5), random.uniform(3, 30), random.pick((0.1, 0.5, 1.5))
            patch = t.flat(x, min(x + width, right), z, z + 1 / width + 2)
            parts.append(Part("asphalt", patch, random.uniform(0.72, 1.25)))
        parts += [Part("asphalt", t.flat(-200, 200, near, end))] * (near < 1e3)

        def marking(points: tuple[Point, ...], length: float = 0.0, filled: float = 1.0, chance: float = 1.0) -> None:
            cells = (length, 9.0, filled, 1.0) if length else None
            parts.append(Part("white", points, 1, chance, label=Label.LANE_MARKING, cells=cells))

        dash, edges = (random.uniform(5, 9), random.uniform(0.35, 0.55)), (left + self.parking, right - self.parking)
        lines = [*self.lines, *[(x, True) for x in edges if random.chance(0.5)]]
        for start, stop in ((NEAR, min(near - 4, 0.8 * self.end)), (end + 4, 0.8 * self.end)):
            if stop > start:
                for x, solid in lines:
                    marking(t.flat(x - 0.09, x + 0.09, start, stop), *(() if solid else dash))
        if near < 1e3:
            for z in (near - 3.4, end + 0.6):  # zebras
                (x0, x1), ahead = (left + 0.3, right - 0.3), z + 2.8
                marking(((x0, 0, z), (x1, 0, z), (x1, 0, ahead), (x0, 0, ahead)), 1.05, 0.48, 0.7)
            marking(t.flat(self.middle, right - self.parking, near - 4.2, near - 3.8))
        return Thing(Label.ROAD, t.METRES, GROUND, tuple(parts), 0.06, 0)

    def frontage(self) -> list[Placed]:
        """Buildings, gardens with fences or hedges, and gaps with trees, behind both sidewalks."""
        random, found = self.random, []
        for side, curb, walk in self.sides:
            edge, dense, z = curb + side * walk, random.uniform(0.45, 0.95), NEAR - random.uniform(0, 8)
            while z < self.end:
                near, depth = max(z, NEAR), random.uniform(7, 18)
                z = near + depth + random.uniform(0, 4) * random.chance(0.3)
                if near < self.crossing[1] + 1 and near + depth > self.crossing[0] - 1:
                    depth, z = self.crossing[0] - near, self.crossing[1] + 1  # up to the corner, and on behind it
                if depth < 3:
                    continue
                built, garden = random.chance(dense), random.uniform(2, 5) * random.chance(0.3)
                if built:
                    house = self.placed(random.pick(t.BUILDINGS), 0, near, depth)
                    found.append((near, edge + side * (garden + house[3][0] / 2), *house[2:]))
                else:
                    found += [self.placed(t.TREE, edge + side * random.uniform(2.5, 9), place)
                              for place in (max(near, 4) + 1, near + depth)]  # fmt: skip
                if (garden or not built) and random.chance(0.8):
                    found.append(self.placed(random.pick(t.BORDERS), edge + side * 0.1, max(near, 2), depth - 0.1))
        return found

    def life(self) -> list[Placed]:
        """Everything that stands or moves between the frontages."""
        random, found, near = self.random, [], self.crossing[0]
        tracks: list[tuple[float, bool, float, Range]] = [(x, oncoming, 0.35, (10, 26)) for x, oncoming in self.lanes]
        tracks += [(curb - side * self.parking / 2, side < 0, 0.5, (5.6, 6.5)) for side, curb, _ in self.sides]
        for x, oncoming, busy, step in tracks if self.parking else tracks[:-2]:
            busy *= random.uniform(0.3, 1.7)
            for z in self.along(random.uniform(4, 14), 60, step):
                views = random.pick((*t.VEHICLES, *t.VEHICLES[:2] * 3) if step[0] > 6 else t.VEHICLES[:3])
                vehicle = self.placed(views[oncoming], x + random.uniform(-0.2, 0.2), z)
                if random.chance(busy) and not z < near - 1 < z + vehicle[3][2]:
                    found.append(vehicle)
        for side, curb, walk in self.sides:
            rows: list[tuple[Thing, float, float, float, Range]] = [
                   (t.LAMP_POST if random.chance(0.7) else t.UTILITY_POLE, 0.35, random.uniform(5, 14), 55, (12, 24)),
                    (random.pick(t.SIGNS), random.uniform(0.35, 0.7), random.uniform(6, 16), 30, (6, 24)),
                    (t.TREE, 0.9, random.uniform(6, 14), 60 * random.chance(0.4), (7, 12)),
                    (t.BUSH, walk - 0.4, random.uniform(5, 60), 20, (99, 99)),
                    (t.CABINET, walk - 0.4, random.uniform(5, 50), 20, (99, 99))]  # fmt: skip
            found += [self.placed(thing, curb + side * out, z)
                      for thing, out, start, end, step in rows for z in self.along(start, end, step)]  # fmt: skip
            found += [self.placed(random.pick(t.PEOPLE), curb + side * random.uniform(0.5, max(0.8, walk - 0.3)), z)
                      for z in self.along(random.uniform(5, 20), 32, (0.1, 14))]  # fmt: skip
        if near < 1e3:
            at: list[tuple[Sequence[Thing], float, float]] = [
                (t.TRAFFIC_LIGHTS, x, near - 1) for x in (self.right + 0.4, self.left - 0.4)
            ]
            at += [(t.PEOPLE, random.uniform(self.left, self.right), near - 2) for _ in range(2)]
            at += [([views[2] for views in t.VEHICLES], random.uniform(self.left + 2, self.right - 2), near + 2.5)]
            found += [self.placed(random.pick(kinds), x, z) for kinds, x, z in at if random.chance(0.6)]
        return found
