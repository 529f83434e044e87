"""The tables: what can stand in a street."""

import math
from collections.abc import Callable

from heteroakd.data.samples import IGNORE_INDEX
from heteroakd.data.street.canvas import Colour, Label
from heteroakd.data.street.painter import Part, Point, Range, Thing

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


def ring(corners: int, radius: float, y: float, x: float = 0.0) -> tuple[Point, ...]:
    """A regular polygon that faces the camera, in metres."""
    turns = [2 * math.pi * (corner + 0.5 * (corners == 8)) / corners for corner in range(corners)]
    return tuple((x + radius * math.sin(turn), y + radius * math.cos(turn), 0) for turn in turns)


# Some share colours on purpose: brick with signs and cars, green render with leaves, grey cars with roads.
RED, BLUE, WHITE, BLACK = (196, 30, 36), (28, 84, 168), (240, 240, 238), (26, 28, 28)
LEAVES: dict[str, tuple[Colour, ...]] = {
    "leaves": ((74, 108, 50), (92, 124, 58), (58, 92, 54), (110, 128, 62), (84, 100, 66), (178, 118, 48)),
    "bark": ((92, 74, 58),),
}
HOUSE: dict[str, tuple[Colour, ...]] = {
    "wall": ((168, 96, 78), (146, 74, 62), (208, 196, 172), (226, 214, 192), (178, 178, 176), (142, 146, 150),
             (122, 150, 176), (126, 140, 108), (206, 176, 108)),
    "shop": ((190, 40, 40), (30, 90, 160), (230, 200, 60), (40, 120, 70), (240, 240, 240)),
}  # fmt: skip
CLOTHES = ((44, 52, 84), (30, 30, 34), (150, 40, 44), (196, 190, 176), (88, 104, 72), (120, 126, 132), (204, 160, 60))
PAINTS = ((92, 94, 98), (128, 130, 134), (190, 194, 198), (236, 236, 236), (28, 30, 34), (176, 60, 44), (36, 62, 120),
          (86, 130, 176), (60, 92, 64))  # fmt: skip


def _on_post(label: int, size: tuple[Range, Range, Range], height: float, half: float, *parts: Part) -> Thing:
    metal: dict[str, tuple[Colour, ...]] = {"metal": ((128, 132, 134), (96, 100, 102), (160, 160, 158), (124, 100, 76))}
    post = [Part("metal", front(x, 0, half, height), tone, label=Label.POLE) for x, tone in ((-half, 1.0), (0, 0.75))]
    return Thing(label, size, metal, (*post, *parts), 0.02, half)


SIGNS = tuple(
    _on_post(Label.TRAFFIC_SIGN, ((1.8, 2.3), (0.9, 1.1), (0, 0)), 2.4, 0.05, *(Part(*one) for one in parts))
    for parts in (
        ((RED, ring(14, 0.42, 2.4)), (WHITE, ring(14, 0.31, 2.4)), (BLACK, front(-0.13, 2.27, 0.13, 2.53))),
        ((RED, ring(14, 0.42, 2.4)), (WHITE, front(-0.28, 2.33, 0.28, 2.47))),
        ((RED, ring(3, 0.48, 2.4)), (WHITE, ring(3, 0.3, 2.4))),
        ((WHITE, ring(4, 0.44, 2.4)), ((240, 190, 30), ring(4, 0.32, 2.4))),
        ((BLUE, front(-0.36, 2.04, 0.36, 2.76)), (WHITE, ring(3, 0.26, 2.4))),
        (((132, 134, 136), ring(14, 0.42, 2.4)),),  # from behind
    )
)
TRAFFIC_LIGHTS = tuple(
    _on_post(
        Label.TRAFFIC_LIGHT, METRES, 3.3, 0.07, Part(BLACK, front(-0.19, 2.27, 0.19, 3.23)),
        *(Part(colour, ring(10, 0.12, y), 1 if y == lit else 0.3, glows=2 * (y == lit)) for colour, y in (
            ((255, 50, 40), 3.05), ((255, 190, 40), 2.75), ((60, 240, 130), 2.45))))
    for lit in (3.05, 2.45)
)  # fmt: skip
LAMP_POST = _on_post(
    Label.POLE, ((2, 2), (5.5, 8), (0, 0)), 1, 0.1, Part("metal", front(-1.5, 1, 0, 1.02)),
    Part((255, 226, 170), front(-1.7, 1, -1, 1.04), glows=1),
)  # fmt: skip
PEOPLE = tuple(
    Thing(Label.PERSON, ((1.7, 2.2), (0.85, 1.1), (0, 0)), {
        "top": CLOTHES, "legs": CLOTHES, "skin": ((232, 190, 160), (198, 146, 112), (140, 94, 68), (90, 60, 46))}, (
        *(Part("legs", ((s * 0.07 - 0.09, 0.92, 0), (s * 0.07 + 0.09, 0.92, 0), (s * foot + 0.07, 0, 0),
                        (s * foot - 0.07, 0, 0)), 0.9 + 0.1 * s) for s in (-1, 1)),
        Part("top", ((-broad, 1.46, 0), (broad, 1.46, 0), (1.2 * foot, 0.84, 0), (-1.2 * foot, 0.84, 0))),
        Part("skin", ring(10, 0.12, 1.6)), Part(BLACK, ring(10, 0.11, 1.68)),
    ), 0.05, 0.2) for broad, foot in ((0.26, 0.12), (0.2, 0.24)))  # fmt: skip
TREE = Thing(Label.VEGETATION, ((2.8, 5.2), (4.5, 7.5), (0, 0)), LEAVES, (
    Part("bark", front(-0.07, 0, 0.07, 0.6)), Part("leaves", front(-1, 0.38, 1, 1), blobs=22)), 0.16, 0.6)  # fmt: skip
BORDERS = (
    Thing(Label.VEGETATION, ((0.8, 1.2), (0.7, 1.8), (0, 0)), LEAVES, (
        Part("leaves", front(-1, 0, 1, 1), 0.75), Part("leaves", wall(0, 1), cells=(0.7, 0.4, 1, 1))), 0.14),
    *(Thing(Label.FENCE, ((0.1, 0.1), (0.7, 1.8), (0, 0)), {"wood": wood}, (
        Part("wood", wall(0, 0.93), 0.7, cells=(pitch, 9, gap, 1)), Part("wood", wall(filled, 1))))
      for pitch, gap, filled, wood in ((0.45, 0.7, 0.8, ((136, 106, 78), (168, 140, 108), (96, 82, 70))),
                                       (2, 0.95, 0.1, ((176, 176, 170), (92, 112, 84), (150, 92, 76))))),
)  # fmt: skip


def _building(lowest: float, highest: float, shop: bool) -> Thing:
    low = 3.0 / lowest * shop
    parts = [Part("wall", front(-1, 0, 1, 1)), Part("glass", front(-0.9, low, 0.9, 1), cells=(3, 3.2, 0.45, 0.5)),
             Part("wall", wall(0, 1)), Part("glass", wall(low, 0.97), glows=0.35, cells=(2.6, 3.1, 0.6, 0.55)),
             Part("wall", wall(0.95, 1), 0.8)]  # fmt: skip
    parts += [Part("glass", wall(0.3 * low, 0.8 * low), glows=0.6), Part("shop", wall(0.8 * low, low), glows=0.4),
              Part("shop", front(-1.12, low, -1, 1.3 * low), 0.9, 0.5)] * shop  # fmt: skip
    return Thing(Label.BUILDING, ((8, 14), (lowest, highest), (0, 0)), HOUSE, tuple(parts), 0.05)


BUILDINGS = tuple(_building(*kind) for kind in ((6, 11, False), (7, 14, False), (9, 15, True), (14, 26, True)))
SKYLINE = Thing(Label.BUILDING, ((6, 18), (5, 17), (0, 0)), HOUSE, (Part("wall", front(-1, 0, 1, 1), 0.85),
                Part("wall", front(-1, 0.05, 1, 1), 0.65, cells=(99, 3.2, 1, 0.4))), shadow=0)  # fmt: skip
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
        return Thing(Label.VEHICLE, seen, {"paint": PAINTS}, (*sides, *parts), 0.025)

    rear, ahead = ([Part(lamp, front(x, 0.4, x + 0.29, 0.52), glows=1) for x in (-0.97, 0.68)] for lamp in (RED, WHITE))
    return (
        view(size, lambda s, y: (-1, y, s), *end, *rear),
        view(size, lambda s, y: (-1, y, 1 - s), *end, *ahead),
        view((size[2], size[1], (0, 0)), lambda s, y: (2 * s - 1, y, 0)),
    )


VEHICLES = (
    _vehicle(((1.7, 1.9), (1.4, 1.54), (3.9, 4.7)), 0.62,
             ((0, 0.2), (0, 0.6), (0.1, 0.66), (0.2, 0.97), (0.52, 1), (0.7, 0.66), (0.97, 0.54), (1, 0.4), (1, 0.2)),
             ((0.15, 0.66), (0.24, 0.92), (0.5, 0.93), (0.65, 0.66))),
    _vehicle(((1.9, 2.0), (2.1, 2.3), (4.9, 5.4)), 0.5,
             ((0, 0.16), (0, 0.95), (0.04, 1), (0.72, 1), (0.84, 0.6), (0.99, 0.5), (1, 0.16)),
             ((0.6, 0.57), (0.6, 0.89), (0.71, 0.89), (0.8, 0.57))),
    _vehicle(((2.45, 2.55), (3, 3.2), (10, 11)), 0.45,
             ((0, 0.13), (0, 0.97), (0.02, 1), (0.98, 1), (1, 0.94), (1, 0.13)),
             ((0.03, 0.44), (0.03, 0.8), (0.97, 0.8), (0.97, 0.44))),
)  # fmt: skip
