"""Vegetation: trees, hedges and grass."""

import math

from heteroakd.data.street.canvas import Colour, shade
from heteroakd.data.street.classes import Label
from heteroakd.data.street.stage import Stage

_LEAVES: tuple[Colour, ...] = (
    (74, 108, 50), (92, 124, 58), (58, 92, 54), (110, 128, 62), (84, 100, 66),
    (178, 118, 48), (164, 78, 44), (190, 158, 66),
)  # fmt: skip
_BARK: tuple[Colour, ...] = ((92, 74, 58), (112, 100, 88), (74, 62, 54))


def paint_tree(stage: Stage, x: float, z: float) -> None:
    """Paint a tree whose trunk stands at (x, z), in metres."""
    canvas, random = stage.canvas, stage.random
    surface = canvas.surface(Label.VEGETATION, z, grain=0.16)
    bark = canvas.surface(Label.VEGETATION, z, grain=0.08)
    leaves = random.pick(_LEAVES[:5] if random.chance(0.8) else _LEAVES[5:])
    trunk, radius = random.uniform(1.8, 3.0), random.uniform(1.3, 2.6)
    squeeze = random.uniform(0.8, 1.5)
    centre = trunk + radius * squeeze * 0.7
    half = random.uniform(0.1, 0.2)
    colour = random.pick(_BARK)
    canvas.solid(
        [(x - half, 0, z), (x + half, 0, z), (x + 0.6 * half, centre, z), (x - 0.6 * half, centre, z)],
        colour,
        bark,
    )
    canvas.solid(
        [(x + 0.3 * half, 0, z), (x + half, 0, z), (x + 0.6 * half, centre, z), (x + 0.2 * half, centre, z)],
        shade(colour, 0.8), bark,
    )  # fmt: skip
    stage.cast(x, z, half, trunk)
    across, along = (side * centre for side in stage.weather.sun)
    disc = [
        (x + across + radius * math.cos(turn), z + along + radius * math.sin(turn))
        for turn in (math.pi / 4 * step for step in range(8))
    ]
    if stage.weather.kind == "sun" and min(corner[1] for corner in disc) > 2:
        canvas.shadow(disc, 0.85 * stage.weather.sharpness)
    sun_side = -1 if stage.weather.sun[0] > 0 else 1
    blobs = 26 if z < 25 else 14
    for step in range(blobs):
        # From the dark inside to the lit outside: later blobs lie higher and towards the sun.
        progress = step / blobs
        turn, reach = random.uniform(0, 2 * math.pi), radius * math.sqrt(random.uniform(0, 1)) * 0.85
        dx = reach * math.cos(turn)
        dy = reach * math.sin(turn) * squeeze + (progress - 0.5) * 0.35 * radius
        lit = 0.62 + 0.5 * progress + 0.13 * (dx * sun_side + dy) / radius * stage.weather.sharpness
        size = radius * random.uniform(0.2, 0.42) * (1.15 - 0.4 * progress)
        canvas.disc(
            x + dx, centre + dy, z, (size, size * random.uniform(0.75, 1.05)),
            shade(leaves, lit * random.uniform(0.9, 1.1)), surface,
        )  # fmt: skip


def paint_hedge(stage: Stage, x: float, near: float, far: float) -> None:
    """Paint a hedge along the street at x from `near` to `far`, in metres."""
    canvas, random = stage.canvas, stage.random
    surface = canvas.surface(Label.VEGETATION, (near + far) / 2, grain=0.14)
    leaves, height = random.pick(_LEAVES[:5]), random.uniform(0.7, 1.8)
    inner = x + 0.5 * math.copysign(1, x)
    canvas.solid(
        [(x, 0, near), (inner, 0, near), (inner, height, near), (x, height, near)],
        shade(leaves, 0.75),
        surface,
    )
    canvas.solid([(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)], shade(leaves, 0.85), surface)
    z = far
    while z > near:
        size = random.uniform(0.25, 0.5)
        canvas.disc(
            x + random.uniform(-0.1, 0.4) * math.copysign(1, x), height * random.uniform(0.35, 1.0), z,
            (size, size * 0.6), shade(leaves, random.uniform(0.75, 1.2)), surface,
        )  # fmt: skip
        z -= random.uniform(0.3, 0.9) * max(1.0, z / 12)


def paint_bush(stage: Stage, x: float, z: float) -> None:
    """Paint a bush at (x, z), in metres."""
    canvas, random = stage.canvas, stage.random
    surface = canvas.surface(Label.VEGETATION, z, grain=0.15)
    leaves, size = random.pick(_LEAVES), random.uniform(0.5, 1.1)
    stage.cast(x, z, 0.7 * size, size)
    for step in range(10):
        blob = size * random.uniform(0.25, 0.45)
        canvas.disc(
            x + random.uniform(-0.7, 0.7) * size, size * random.uniform(0.25, 0.95), z, (blob, 0.8 * blob),
            shade(leaves, 0.7 + 0.05 * step), surface,
        )  # fmt: skip
