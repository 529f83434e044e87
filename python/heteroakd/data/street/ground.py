"""The ground: verge, sidewalks, road, lane markings, crossings and what lies on the asphalt."""

from dataclasses import dataclass

from heteroakd.data.street.canvas import NEAR, Colour, shade
from heteroakd.data.street.classes import Label
from heteroakd.data.street.stage import Stage

_ASPHALT: tuple[Colour, ...] = ((96, 96, 98), (112, 110, 108), (82, 84, 90), (126, 122, 118), (104, 100, 104))
_PAVING: tuple[Colour, ...] = (
    (150, 146, 140),
    (168, 160, 150),
    (132, 130, 130),
    (158, 136, 122),
    (120, 118, 120),
)
_GRASS: tuple[Colour, ...] = ((96, 122, 62), (116, 130, 70), (130, 126, 76))


@dataclass(frozen=True)
class Street:
    """Measures of a street that runs straight away from the camera at x = 0; all in metres."""

    lane: float
    """Width of a lane."""
    left: float
    """x of the left curb; the lanes lie between it and `right`, parking strips included."""
    right: float
    """x of the right curb."""
    dividers: tuple[tuple[float, bool], ...]
    """x of the lines between the lanes, and whether they are solid."""
    parking: float
    """Width of the parking strip at either curb, 0 for none."""
    walk_left: float
    """Width of the left sidewalk."""
    walk_right: float
    """Width of the right sidewalk."""
    end: float
    """Distance at which the street ends."""
    crossing: tuple[float, float] | None
    """Near and far edge of a crossing street."""


def sample_street(stage: Stage) -> Street:
    """A street of two to four lanes; the camera drives in one of the lanes on the right."""
    random = stage.random
    lane = random.uniform(3.0, 3.7)
    own, other = random.pick(((1, 1), (1, 1), (2, 1), (2, 2), (1, 2)))
    parking = random.uniform(2.0, 2.4) if random.chance(0.6) else 0.0
    offset = random.uniform(-0.35, 0.35)
    in_second = own == 2 and random.chance(0.5)
    right_of_me = lane * (1.5 if in_second else 0.5)
    right = right_of_me + parking + offset
    left = right - parking - (own + other) * lane - parking
    middle = right - parking - own * lane
    dividers = [(middle, random.chance(0.5))]
    dividers += [(right - parking - lane * step, False) for step in range(1, own)]
    dividers += [(middle - lane * step, False) for step in range(1, other)]
    crossing = None
    if random.chance(0.5):
        near = random.uniform(9, 26)
        crossing = (near, near + random.uniform(7, 11))
    return Street(
        lane, left, right, tuple(dividers), parking, random.uniform(1.6, 4.2), random.uniform(1.6, 4.2),
        random.uniform(55, 120), crossing,
    )  # fmt: skip


def paint_ground(stage: Stage, street: Street) -> None:
    """Paint everything flat, from the verge to the markings."""
    canvas, random = stage.canvas, stage.random
    s = street
    far = 2.0 * s.end
    paved = random.chance(0.55)
    if paved:
        verge = canvas.surface(Label.SIDEWALK, 30, grain=0.05, ground=True)
        verge_colour = shade(random.pick(_PAVING), 0.92)
    else:
        verge = canvas.surface(Label.VEGETATION, 30, grain=0.12, ground=True)
        verge_colour = random.pick(_GRASS)
    walk = canvas.surface(Label.SIDEWALK, 30, grain=0.05, ground=True)
    road = canvas.surface(Label.ROAD, 30, grain=0.06, ground=True)
    line = canvas.surface(Label.LANE_MARKING, 30, grain=0.08, ground=True)

    def flat(x0: float, x1: float, z0: float, z1: float, colour: Colour, surface: int) -> None:
        canvas.solid([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], colour, surface)

    asphalt, paving = random.pick(_ASPHALT), random.pick(_PAVING)
    flat(-400, 400, NEAR, far, verge_colour, verge)
    flat(s.left - s.walk_left, s.left, NEAR, far, paving, walk)
    flat(s.right, s.right + s.walk_right, NEAR, far, shade(paving, random.uniform(0.94, 1.06)), walk)
    flat(s.left, s.right, NEAR, far, asphalt, road)
    curb = shade(paving, 1.16)
    flat(s.left - 0.16, s.left, NEAR, far, curb, walk)
    flat(s.right, s.right + 0.16, NEAR, far, curb, walk)
    if s.parking:
        tone = shade(asphalt, random.uniform(0.86, 1.1))
        flat(s.left, s.left + s.parking, NEAR, far, tone, road)
        flat(s.right - s.parking, s.right, NEAR, far, tone, road)
    _wear(stage, s, asphalt, road)
    white = shade((228, 226, 216), random.uniform(0.78, 1.08))
    _lines(stage, s, white, line)
    if s.crossing:
        _crossing(stage, s, asphalt, white, road, line)


def _wear(stage: Stage, s: Street, asphalt: Colour, road: int) -> None:
    """Patches, cracks and manholes: changes of colour on the road that are road."""
    canvas, random = stage.canvas, stage.random
    for _ in range(random.integer(2, 6)):
        x, z = random.uniform(s.left, s.right), random.uniform(3, 30)
        width, length = random.uniform(0.5, 2.2), random.uniform(1, 6)
        x = min(x, s.right - width)
        tone = shade(asphalt, random.uniform(0.72, 1.22))
        canvas.solid([(x, 0, z), (x + width, 0, z), (x + width, 0, z + length), (x, 0, z + length)], tone, road)
    for _ in range(random.integer(0, 2)):
        x, z = random.uniform(s.left + 0.5, s.right - 0.5), random.uniform(4, 16)
        scale = canvas.camera.focal / z
        flatness = canvas.camera.eye / z
        canvas.ellipse(canvas.camera.project(x, 0, z), (0.36 * scale, 0.36 * scale * flatness), (62, 58, 56), road)
    if random.chance(0.4):  # a seam that could be taken for a lane marking
        x = random.uniform(s.left + 0.5, s.right - 0.5)
        canvas.solid([(x, 0, NEAR), (x + 0.1, 0, NEAR), (x + 0.1, 0, s.end), (x, 0, s.end)], shade(asphalt, 1.25), road)


def _lines(stage: Stage, s: Street, white: Colour, line: int) -> None:
    canvas, random = stage.canvas, stage.random
    half = random.uniform(0.07, 0.11)

    def mark(x: float, z0: float, z1: float, half_width: float) -> None:
        if s.crossing and z1 > s.crossing[0] - 4 and z0 < s.crossing[1] + 4:
            return
        left, right = x - half_width, x + half_width
        canvas.solid([(left, 0, z0), (right, 0, z0), (right, 0, z1), (left, 0, z1)], white, line)

    dash, gap = random.uniform(2, 4), random.uniform(2.5, 5)
    phase = random.uniform(0, dash + gap)
    for x, solid in s.dividers:
        z = NEAR if solid else NEAR - phase
        step, length = (2.0, 2.0) if solid else (dash + gap, dash)
        while z < 0.75 * s.end:
            if z + length > NEAR:
                mark(x, max(z, NEAR), z + length, half)
            z += step
    if random.chance(0.5):
        for x in (s.left + s.parking + 0.15, s.right - s.parking - 0.15):
            z = NEAR
            while z < 0.75 * s.end:
                mark(x, z, z + 2.0, half)
                z += 2.0
    if random.chance(0.3):  # an arrow in the own lane
        z, x = random.uniform(5, 12), 0.0
        if not s.crossing or z + 4 < s.crossing[0] - 4:
            mark(x, z, z + 2.2, 0.12)
            canvas.solid([(x - 0.5, 0, z + 2.2), (x + 0.5, 0, z + 2.2), (x, 0, z + 3.6)], white, line)


def _crossing(stage: Stage, s: Street, asphalt: Colour, white: Colour, road: int, line: int) -> None:
    canvas, random = stage.canvas, stage.random
    assert s.crossing is not None
    near, far = s.crossing
    canvas.solid([(-200, 0, near), (200, 0, near), (200, 0, far), (-200, 0, far)], asphalt, road)
    inner_left, inner_right = s.left + 0.3, s.right - 0.3
    for z, probability in ((near - 3.4, 0.8), (far + 0.6, 0.6)):
        if not random.chance(probability):
            continue
        x = inner_left
        while x + 0.5 < inner_right:  # zebra
            canvas.solid([(x, 0, z), (x + 0.5, 0, z), (x + 0.5, 0, z + 2.8), (x, 0, z + 2.8)], white, line)
            x += 1.05
    stop = near - 4.2
    middle = s.dividers[0][0]
    edges = [
        (middle, 0, stop),
        (s.right - s.parking, 0, stop),
        (s.right - s.parking, 0, stop + 0.4),
        (middle, 0, stop + 0.4),
    ]
    canvas.solid([(x, y, z) for x, y, z in edges], white, line)
