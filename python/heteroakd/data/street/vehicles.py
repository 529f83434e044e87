"""Vehicles: cars, vans and buses, seen from behind, from the front and from the side."""

import math
from collections.abc import Callable
from typing import NamedTuple

from heteroakd.data.street.canvas import Colour, mix, shade
from heteroakd.data.street.classes import Label
from heteroakd.data.street.stage import Stage

# Asphalt grey, brick red, leaf green and sky blue are among them on purpose.
_PAINTS: tuple[Colour, ...] = (
    (92, 94, 98), (128, 130, 134), (190, 194, 198), (236, 236, 236), (28, 30, 34), (150, 34, 34),
    (176, 60, 44), (36, 62, 120), (86, 130, 176), (60, 92, 64), (196, 168, 60), (110, 90, 74),
)  # fmt: skip
_TYRE: Colour = (24, 24, 26)
_TAIL: Colour = (190, 24, 24)
_HEAD: Colour = (255, 248, 224)


class Body(NamedTuple):
    """Measures of a vehicle, in metres; outlines are (share of the length from the rear, height)."""

    length: float
    width: float
    height: float
    belt: float
    """Height of the lower edge of the windows."""
    profile: tuple[tuple[float, float], ...]
    glass: tuple[tuple[float, float], ...]


_HATCHBACK = Body(
    4.1, 1.76, 1.48, 0.92,
    ((0, 0.3), (0, 0.85), (0.03, 0.98), (0.12, 1.44), (0.5, 1.48),
     (0.7, 0.98), (0.97, 0.8), (1, 0.6), (1, 0.3)),
    ((0.1, 0.96), (0.16, 1.36), (0.49, 1.38), (0.64, 0.98)),
)  # fmt: skip
_SALOON = Body(
    4.6, 1.82, 1.44, 0.92,
    ((0, 0.3), (0, 0.86), (0.15, 0.96), (0.28, 1.4), (0.54, 1.44),
     (0.72, 0.96), (0.97, 0.78), (1, 0.55), (1, 0.3)),
    ((0.21, 0.97), (0.3, 1.33), (0.53, 1.35), (0.67, 0.97)),
)  # fmt: skip
_VAN = Body(
    5.2, 1.95, 2.2, 1.2,
    ((0, 0.35), (0, 2.1), (0.04, 2.2), (0.72, 2.2), (0.84, 1.3), (0.99, 1.1), (1, 0.35)),
    ((0.6, 1.25), (0.6, 1.95), (0.71, 1.95), (0.8, 1.25)),
)  # fmt: skip
_BUS = Body(
    10.5, 2.5, 3.1, 1.3,
    ((0, 0.4), (0, 3.0), (0.02, 3.1), (0.98, 3.1), (1, 2.9), (1, 0.4)),
    ((0.03, 1.35), (0.03, 2.5), (0.97, 2.5), (0.97, 1.35)),
)  # fmt: skip


def sample_body(stage: Stage) -> Body:
    """A random kind of vehicle, to be placed before it is painted."""
    draw = stage.random.uniform(0, 1)
    return _HATCHBACK if draw < 0.42 else _SALOON if draw < 0.8 else _VAN if draw < 0.93 else _BUS


class _Vehicle:
    """One vehicle with its surfaces and colours."""

    def __init__(self, stage: Stage, z: float, body: Body) -> None:
        random = stage.random
        self.body = body
        self.surface = stage.canvas.surface(Label.VEHICLE, z, grain=0.025)
        self.lamp = stage.canvas.surface(Label.VEHICLE, z, emission=1.0 if stage.weather.lamps else 0.0)
        self.paint = shade(random.pick(_PAINTS), random.uniform(0.85, 1.15))
        self.glass = mix((34, 40, 48), stage.weather.horizon, random.uniform(0.05, 0.45))


def paint_vehicle_along(stage: Stage, body: Body, x: float, z: float, oncoming: bool) -> None:
    """Paint a vehicle parallel to the street: centre line at x, nearer end at z, in metres."""
    v = _Vehicle(stage, z, body)
    canvas = stage.canvas
    half = body.width / 2
    canvas.shadow(
        [(x - half, z - 0.1), (x + half, z - 0.1), (x + half, z + body.length), (x - half, z + body.length)],
        1.0,
    )
    stage.cast(x, z, half, 0.85 * body.height, body.length)

    def share(s: float) -> float:  # the outline runs from the rear to the front
        return z + (1 - s if oncoming else s) * body.length

    side = 0.0 if abs(x) < half else -math.copysign(half, x)
    if side:
        _side(stage, v, x + side, share, (math.copysign(1, side), 0))
    _end(stage, v, x, share, oncoming)


def _side(stage: Stage, v: _Vehicle, x: float, share: Callable[[float], float], normal: tuple[float, float]) -> None:
    canvas, body = stage.canvas, v.body
    paint = stage.face(v.paint, normal)
    canvas.solid([(x, y, share(s)) for s, y in body.profile], paint, v.surface)
    canvas.solid([(x, y, share(s)) for s, y in body.glass], v.glass, v.surface)
    radius = 0.33 if body.height < 2 else 0.42
    for s in (0.17, 0.82):
        rim = [(radius * math.cos(turn), radius * math.sin(turn)) for turn in (math.pi / 5 * i for i in range(10))]
        centre = share(s)
        canvas.solid([(x, radius + dy, centre + dz) for dz, dy in rim], _TYRE, v.surface)
        if centre < 18:
            hub = shade((150, 150, 154), 0.9)
            canvas.solid([(x, radius + 0.5 * dy, centre + 0.5 * dz) for dz, dy in rim], hub, v.surface)


def _end(stage: Stage, v: _Vehicle, x: float, share: Callable[[float], float], oncoming: bool) -> None:
    canvas, body, random = stage.canvas, v.body, stage.random
    z, half = share(1.0 if oncoming else 0.0), body.width / 2
    paint = stage.face(v.paint, (0, -1))

    def box(left: float, low: float, right: float, high: float, colour: Colour, surface: int) -> None:
        corners = [(x + left, low, z), (x + right, low, z), (x + right, high, z), (x + left, high, z)]
        canvas.solid(corners, colour, surface)

    for sign in (-1, 1):
        inner, outer = sorted((sign * (half - 0.3), sign * (half - 0.06)))
        box(inner, 0.0, outer, 0.45, _TYRE, v.surface)
    tall = body.height > 2
    if not tall:
        foot, top = (share(0.7), share(0.5)) if oncoming else (share(0.03), share(0.14))
        corners = [
            (-0.94, body.belt, foot),
            (0.94, body.belt, foot),
            (0.76, body.height, top),
            (-0.76, body.height, top),
        ]
        canvas.solid([(x + half * a, y, d) for a, y, d in corners], shade(paint, 1.06), v.surface)
        pane = [
            (-0.84, body.belt + 0.05, foot),
            (0.84, body.belt + 0.05, foot),
            (0.7, body.height - 0.08, top),
            (-0.7, body.height - 0.08, top),
        ]
        canvas.solid([(x + half * a, y, d) for a, y, d in pane], v.glass, v.surface)
        if oncoming:  # the bonnet rises towards the windscreen
            bonnet = [(-0.96, 0.8, z), (0.96, 0.8, z), (0.94, body.belt, foot), (-0.94, body.belt, foot)]
            canvas.solid([(x + half * a, y, d) for a, y, d in bonnet], shade(paint, 1.12), v.surface)
    upper = body.height if tall else (0.82 if oncoming else body.belt + 0.02)
    box(-half, 0.28, half, upper, paint, v.surface)
    if tall:
        box(-0.86 * half, body.belt + 0.1, 0.86 * half, body.height - 0.35, v.glass, v.surface)
    box(-half, 0.28, half, 0.42, shade(paint, 0.5), v.surface)
    if oncoming:
        box(-0.5 * half, 0.45, 0.5 * half, 0.62, (36, 36, 40), v.surface)
    lamp = _HEAD if oncoming else _TAIL
    for sign in (-1, 1):
        inner, outer = sorted((sign * 0.97 * half, sign * 0.68 * half))
        box(inner, 0.6, outer, 0.78, lamp, v.lamp)
    if random.chance(0.8):
        box(-0.26, 0.46, 0.26, 0.58, (236, 232, 214), v.surface)


def paint_vehicle_across(stage: Stage, body: Body, x: float, z: float, rightwards: bool) -> None:
    """Paint a vehicle that crosses the street: its left end at x, at distance z, in metres."""
    v = _Vehicle(stage, z, body)
    canvas = stage.canvas
    paint = stage.face(v.paint, (0, -1))
    canvas.shadow(
        [(x, z - 0.1), (x + body.length, z - 0.1), (x + body.length, z + body.width), (x, z + body.width)],
        1.0,
    )

    def place(s: float) -> float:  # the outline runs from the rear to the front
        return x + (s if rightwards else 1 - s) * body.length

    canvas.solid([(place(s), y, z) for s, y in body.profile], paint, v.surface)
    canvas.solid([(place(s), y, z) for s, y in body.glass], v.glass, v.surface)
    pillar = place(0.42)
    low, high = body.belt, body.height - 0.08
    corners = [(pillar, low), (pillar + 0.09, low), (pillar + 0.09, high), (pillar, high)]
    canvas.solid([(a, b, z) for a, b in corners], paint, v.surface)
    radius = 0.33 if body.height < 2 else 0.45
    for s in (0.18, 0.8):
        canvas.disc(place(s), radius, z, (radius, radius), _TYRE, v.surface)
        canvas.disc(place(s), radius, z, (0.5 * radius, 0.5 * radius), (140, 140, 144), v.surface)
    canvas.disc(place(0.985), 0.72, z, (0.09, 0.08), _HEAD, v.lamp)
    canvas.disc(place(0.012), 0.75, z, (0.06, 0.1), _TAIL, v.lamp)
