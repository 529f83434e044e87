"""Street furniture: lamp posts, traffic signs, traffic lights, fences, and unlabelled boxes."""

import math

from heteroakd.data.street.canvas import Colour, shade
from heteroakd.data.street.classes import Label
from heteroakd.data.street.stage import Stage

_METAL: tuple[Colour, ...] = (
    (128, 132, 134),
    (96, 100, 102),
    (70, 84, 78),
    (160, 160, 158),
    (52, 52, 56),
    (124, 100, 76),
)


def _post(stage: Stage, x: float, z: float, height: float, half_width: float) -> Colour:
    """Paint an upright post and its shadow; returns its colour."""
    canvas = stage.canvas
    surface = canvas.surface(Label.POLE, z, grain=0.03)
    colour = shade(stage.random.pick(_METAL), stage.random.uniform(0.85, 1.15))
    w = half_width
    canvas.solid([(x - w, 0, z), (x + w, 0, z), (x + 0.8 * w, height, z), (x - 0.8 * w, height, z)], colour, surface)
    canvas.solid([(x, 0, z), (x + w, 0, z), (x + 0.8 * w, height, z), (x, height, z)], shade(colour, 0.75), surface)
    stage.cast(x, z, w, height)
    return colour


def paint_lamp_post(stage: Stage, x: float, z: float) -> None:
    """Paint a street lamp at (x, z), in metres, its arm over the road."""
    canvas, random = stage.canvas, stage.random
    height = random.uniform(5.5, 8.0)
    colour = _post(stage, x, z, height, random.uniform(0.07, 0.12))
    arm = canvas.surface(Label.POLE, z, grain=0.03)
    lamp = canvas.surface(Label.POLE, z, emission=1.0 if stage.weather.lamps else 0.0)
    reach = -math.copysign(random.uniform(0.9, 1.8), x)
    end = x + reach
    canvas.solid(
        [(x, height, z), (end, height + 0.25, z), (end, height + 0.37, z), (x, height + 0.14, z)],
        shade(colour, 0.9),
        arm,
    )
    left, right = sorted((end - 0.35 * math.copysign(1, reach), end + 0.3 * math.copysign(1, reach)))
    head = (255, 226, 170) if stage.weather.lamps else shade(colour, 1.25)
    canvas.solid(
        [
            (left, height + 0.16, z),
            (right, height + 0.16, z),
            (right, height + 0.36, z),
            (left, height + 0.36, z),
        ],
        head,
        lamp,
    )


def paint_utility_pole(stage: Stage, x: float, z: float) -> None:
    """Paint a wooden pole with a crossbar at (x, z), in metres."""
    height = stage.random.uniform(6.5, 9)
    _post(stage, x, z, height, stage.random.uniform(0.09, 0.14))
    surface = stage.canvas.surface(Label.POLE, z, grain=0.05)
    bar = height - 0.6
    stage.canvas.solid(
        [(x - 0.9, bar, z), (x + 0.9, bar, z), (x + 0.9, bar + 0.16, z), (x - 0.9, bar + 0.16, z)],
        (84, 72, 60),
        surface,
    )


def paint_sign(stage: Stage, x: float, z: float) -> None:
    """Paint a traffic sign on its post at (x, z), in metres: rarely seen from behind."""
    canvas, random = stage.canvas, stage.random
    level, radius = random.uniform(2.2, 2.8), random.uniform(0.36, 0.5)
    _post(stage, x, z, level + radius, 0.045)
    surface = canvas.surface(Label.TRAFFIC_SIGN, z, grain=0.02)

    def regular(corners: int, size: float, turn: float, colour: Colour) -> None:
        angles = (turn + 2 * math.pi * corner / corners for corner in range(corners))
        canvas.solid([(x + size * math.sin(a), level + size * math.cos(a), z) for a in angles], colour, surface)

    def board(half_width: float, low: float, high: float, colour: Colour) -> None:
        corners = [
            (x - half_width, low),
            (x + half_width, low),
            (x + half_width, high),
            (x - half_width, high),
        ]
        canvas.solid([(a, level + b, z) for a, b in corners], colour, surface)

    if random.chance(0.1):
        regular(24, radius, 0, (132, 134, 136))
        return
    shape = random.integer(0, 6)
    red, blue, white = (196, 30, 36), (28, 84, 168), (240, 240, 238)
    if shape == 0:  # limit
        regular(24, radius, 0, red)
        regular(24, 0.74 * radius, 0, white)
        board(0.3 * radius, -0.3 * radius, 0.3 * radius, (40, 40, 40))
    elif shape == 1:  # no entry
        regular(24, radius, 0, red)
        board(0.66 * radius, -0.16 * radius, 0.16 * radius, white)
    elif shape == 2:  # warning
        regular(3, 1.15 * radius, 0, red)
        regular(3, 0.72 * radius, 0, white)
    elif shape == 3:  # stop
        regular(8, 1.05 * radius, math.pi / 8, red)
        board(0.7 * radius, -0.18 * radius, 0.18 * radius, white)
    elif shape == 4:  # priority
        regular(4, 1.05 * radius, 0, white)
        regular(4, 0.75 * radius, 0, (240, 190, 30))
    elif shape == 5:  # direction
        regular(24, radius, 0, blue)
        board(0.14 * radius, -0.6 * radius, 0.5 * radius, white)
    else:  # parking or crossing
        board(0.85 * radius, -0.85 * radius, 0.85 * radius, blue)
        regular(3, 0.6 * radius, 0, white)


def paint_traffic_light(stage: Stage, x: float, z: float) -> None:
    """Paint a traffic light at (x, z), in metres, sometimes with a second head on an arm over the road."""
    canvas, random = stage.canvas, stage.random
    overhead = random.chance(0.4)
    height = random.uniform(5.2, 5.8) if overhead else random.uniform(2.9, 3.3)
    colour = _post(stage, x, z, height, 0.07)
    heads = [(x, 2.75)]
    if overhead:
        end = x - math.copysign(random.uniform(2.5, 4.0), x)
        arm = canvas.surface(Label.POLE, z)
        canvas.solid([(x, height - 0.2, z), (end, height - 0.1, z), (end, height, z), (x, height, z)], colour, arm)
        heads.append((end, height - 0.3))
    case = canvas.surface(Label.TRAFFIC_LIGHT, z, grain=0.02)
    lamp = canvas.surface(Label.TRAFFIC_LIGHT, z, emission=1.0)
    lit = random.integer(0, 2)
    for column, level in heads:
        half, low, high = 0.19, level - 0.48, level + 0.48
        canvas.solid(
            [(column - half, low, z), (column + half, low, z),
             (column + half, high, z), (column - half, high, z)],
            (26, 28, 28), case,
        )  # fmt: skip
        for row, (on, off) in enumerate(
            (((255, 50, 40), (60, 20, 20)), ((255, 190, 40), (64, 50, 20)), ((60, 240, 130), (20, 56, 34)))
        ):
            bright = row == lit
            canvas.disc(
                column,
                level + 0.3 * (1 - row),
                z,
                (0.12, 0.12),
                on if bright else off,
                lamp if bright else case,
            )


def paint_fence(stage: Stage, x: float, near: float, far: float) -> None:
    """Paint a fence, wall or guard rail along the street at x from `near` to `far`, in metres."""
    canvas, random = stage.canvas, stage.random
    surface = canvas.surface(Label.FENCE, (near + far) / 2, grain=0.05)
    kind = random.pick(("planks", "planks", "wall", "panels", "rail"))
    normal = (-math.copysign(1, x), 0)

    def strip(low: float, high: float, start: float, stop: float, colour: Colour) -> None:
        canvas.solid([(x, low, start), (x, low, stop), (x, high, stop), (x, high, start)], colour, surface)

    if kind == "rail":
        colour = stage.face((166, 170, 172), normal)
        z = far
        while z > near:
            strip(0, 0.7, z - 0.15, z, shade(colour, 0.6))
            z -= 2.0
        strip(0.42, 0.76, near, far, colour)
        strip(0.55, 0.61, near, far, shade(colour, 0.7))
        return
    height = random.uniform(0.9, 1.9)
    tones: tuple[Colour, ...] = (
        (136, 106, 78),
        (168, 140, 108),
        (96, 82, 70),
        (176, 176, 170),
        (92, 112, 84),
        (150, 92, 76),
    )
    colour = stage.face(random.pick(tones), normal)
    strip(0, height, near, far, colour)
    stage.canvas.shadow(
        [(x, near), (x, far), (x + stage.weather.sun[0] * height, far + stage.weather.sun[1] * height),
         (x + stage.weather.sun[0] * height, near + stage.weather.sun[1] * height)], stage.weather.sharpness,
    )  # fmt: skip
    pitch, gap, tone = {"planks": (0.45, 0.12, 0.68), "panels": (2.0, 0.16, 0.78), "wall": (9.0, 0.05, 0.9)}[kind]
    pitch *= max(1.0, near / 8)
    z = near + 0.5 * pitch
    while z < min(far, 30.0):
        strip(0, height, z, z + gap * (pitch / 0.45 if kind == "planks" else 1.0), shade(colour, tone))
        z += pitch
    strip(height - 0.09, height, near, far, shade(colour, 1.2))


def paint_box(stage: Stage, x: float, z: float) -> None:
    """Paint a bin or a cabinet at (x, z), in metres: something that the labels leave out (255)."""
    canvas, random = stage.canvas, stage.random
    surface = canvas.surface(Label.IGNORED, z)
    half, height = random.uniform(0.22, 0.45), random.uniform(0.8, 1.3)
    colour = random.pick(((56, 92, 66), (90, 92, 94), (52, 66, 104), (150, 120, 40)))
    stage.cast(x, z, half, height)
    canvas.solid([(x - half, 0, z), (x + half, 0, z), (x + half, height, z), (x - half, height, z)], colour, surface)
    canvas.solid(
        [(x - half, height - 0.15, z), (x + half, height - 0.15, z),
         (x + half, height, z), (x - half, height, z)],
        shade(colour, 0.7), surface,
    )  # fmt: skip
