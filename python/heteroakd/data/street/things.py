"""What can stand in a street: the tables of street.yaml, and what has to be computed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from heteroakd.data.samples import IGNORE_INDEX
from heteroakd.data.street.canvas import Colour, Label
from heteroakd.data.street.painter import Part, Point, Range, Thing

TABLES: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "street.yaml").read_text(encoding="utf-8"))
Outline = tuple[tuple[float, float], ...]
METRES = ((2.0, 2.0), (1.0, 1.0), (0.0, 0.0))
"""The size of a thing whose points are in metres."""


def front(x0: float, y0: float, x1: float, y1: float) -> tuple[Point, ...]:
    """A rectangle that faces the camera."""
    return (x0, y0, 0), (x1, y0, 0), (x1, y1, 0), (x0, y1, 0)


def wall(y0: float, y1: float) -> tuple[Point, ...]:
    """A rectangle along the street."""
    return (-1, y0, 0), (-1, y0, 1), (-1, y1, 1), (-1, y1, 0)


def flat(x0: float, x1: float, z0: float, z1: float) -> tuple[Point, ...]:
    """A rectangle on the ground."""
    return (x0, 0, z0), (x0, 0, z1), (x1, 0, z1), (x1, 0, z0)


def ring(corners: int, radius: float, y: float) -> tuple[Point, ...]:
    """A regular polygon that faces the camera, in metres."""
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    return tuple((radius * math.sin(turn), y + radius * math.cos(turn), 0) for turn in turns)


BLACK, RED, WHITE = (26, 28, 28), (196, 30, 36), (240, 240, 238)
SHAPES: dict[str, Callable[..., tuple[Point, ...]]] = {
    "front": front, "wall": wall, "ring": ring, "points": lambda *points: points
}  # fmt: skip


def palettes(*names: str) -> dict[str, tuple[Colour, ...]]:
    """Palettes of the tables, in this order."""
    return {name: TABLES["palettes"][name] for name in names}


def _part(entry: dict[str, Any]) -> Part:
    (shape,) = SHAPES.keys() & entry.keys()
    others = {name: value for name, value in entry.items() if name != shape}
    if "label" in others:
        others["label"] = _label(others["label"])
    return Part(points=SHAPES[shape](*entry[shape]), **others)


def _thing(entry: dict[str, Any]) -> Thing:
    parts = tuple(map(_part, entry["parts"]))
    own = {"label": _label(entry["label"]), "palettes": palettes(*entry["palettes"]), "parts": parts}
    return Thing(**{**entry, **own})


def _label(name: str) -> int:
    return Label[name.upper().replace(" ", "_")]


def _building(lowest: float, highest: float, shop: bool) -> Thing:
    """A house of some storeys, its ground floor, 3 m high, perhaps a shop."""
    low = 3.0 / lowest * shop
    parts = [Part("wall", front(-1, 0, 1, 1)), Part("glass", front(-0.9, low, 0.9, 1), cells=(3, 3.2, 0.45, 0.5)),
             Part("wall", wall(0, 1)), Part("glass", wall(low, 0.97), glows=0.35, cells=(2.6, 3.1, 0.6, 0.55)),
             Part("wall", wall(0.95, 1), 0.8)]  # fmt: skip
    parts += [Part("glass", wall(0.3 * low, 0.8 * low), glows=0.6), Part("shop", wall(0.8 * low, low), glows=0.4),
              Part("shop", front(-1.12, low, -1, 1.3 * low), 0.9, 0.5)] * shop  # fmt: skip
    return Thing(Label.BUILDING, ((8, 14), (lowest, highest), (0, 0)), palettes("wall", "shop"), tuple(parts), 0.05)


BUILDINGS = tuple(_building(*kind) for kind in ((6, 11, False), (7, 14, False), (9, 15, True), (14, 26, True)))
BONNET = Thing(
    IGNORE_INDEX, METRES, {"paint": ((30, 32, 36), (70, 74, 82), (120, 24, 28), (150, 154, 160))},
    (Part("paint", tuple((math.cos(turn / 8), math.sin(turn / 8) ** 0.2, 0) for turn in range(26))),), 0.02, 0,
)  # fmt: skip


def _vehicle(size: tuple[Range, Range, Range], belt: float, profile: Outline, glass: Outline) -> tuple[Thing, ...]:
    """From behind, from the front, and crossing; outlines are (share of the length from the rear, of the height)."""
    wheels = [tuple((s + 0.08 * math.cos(a), 0.2 + 0.22 * math.sin(a)) for a in range(7)) for s in (0.18, 0.82)]
    outlines: list[tuple[str | Colour, Outline]] = [("paint", profile), ("glass", glass), *((BLACK, w) for w in wheels)]
    pane = ((-0.9, belt, 0), (0.9, belt, 0), (0.76, 0.96, 0.1), (-0.76, 0.96, 0.1))
    end = (
        *(Part(BLACK, front(x, 0, x + 0.3, 0.3)) for x in (-0.94, 0.64)),
        Part("paint", tuple((1.06 * x, 1.03 * y, z) for x, y, z in pane)), Part("glass", pane),
        Part("paint", front(-1, 0.19, 1, belt), 1.06), Part("paint", front(-1, 0.19, 1, 0.28), 0.5),
        Part((236, 232, 214), front(-0.26, 0.3, 0.26, 0.38)),
    )  # fmt: skip

    def view(seen: tuple[Range, Range, Range], place: Callable[[float, float], Point], *parts: Part) -> Thing:
        sides = (Part(colour, tuple(place(s, y) for s, y in line)) for colour, line in outlines)
        return Thing(Label.VEHICLE, seen, palettes("paint"), (*sides, *parts), 0.025)

    rear, ahead = ([Part(lamp, front(x, 0.4, x + 0.29, 0.52), glows=1) for x in (-0.97, 0.68)] for lamp in (RED, WHITE))
    return (
        view(size, lambda s, y: (-1, y, s), *end, *rear),
        view(size, lambda s, y: (-1, y, 1 - s), *end, *ahead),
        view((size[2], size[1], (0, 0)), lambda s, y: (2 * s - 1, y, 0)),
    )


VEHICLES = tuple(_vehicle(**kind) for kind in TABLES["vehicles"])
THINGS: dict[str, tuple[Thing, ...]] = {
    **{name: tuple(map(_thing, entries)) for name, entries in TABLES["things"].items()},
    "buildings": BUILDINGS,
    "parked": tuple(views[0] for views in VEHICLES[:2]),
}
"""All but vehicles on the road, by name."""
