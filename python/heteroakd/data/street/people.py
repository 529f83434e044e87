"""People on the sidewalk and on crossings."""

from heteroakd.data.street.canvas import Colour, Point, shade
from heteroakd.data.street.classes import Label
from heteroakd.data.street.stage import Stage

_SKIN: tuple[Colour, ...] = ((232, 190, 160), (198, 146, 112), (140, 94, 68), (90, 60, 46))
_HAIR: tuple[Colour, ...] = ((40, 30, 26), (96, 66, 40), (180, 150, 100), (120, 120, 122))
_CLOTHES: tuple[Colour, ...] = (
    (44, 52, 84), (30, 30, 34), (150, 40, 44), (196, 190, 176), (88, 104, 72), (120, 126, 132),
    (204, 160, 60), (70, 120, 150), (222, 222, 224), (110, 76, 60),
)  # fmt: skip


def paint_person(stage: Stage, x: float, z: float) -> None:
    """Paint a person who stands or walks at (x, z), in metres."""
    canvas, random = stage.canvas, stage.random
    surface = canvas.surface(Label.PERSON, z, grain=0.05)
    size = random.uniform(1.5, 1.9) / 1.75 if random.chance(0.88) else random.uniform(1.0, 1.3) / 1.75
    top, trousers = random.pick(_CLOTHES), random.pick(_CLOTHES)
    skin = random.pick(_SKIN)
    stride = random.uniform(0.02, 0.3)
    turned = random.chance(0.5)  # seen from the side
    broad = 0.16 if turned else 0.23
    facing = 1 if random.chance(0.5) else -1
    stage.cast(x, z, 0.22, 1.7 * size)
    canvas.shadow([(x - 0.3, z - 0.12), (x + 0.3, z - 0.12), (x + 0.3, z + 0.12), (x - 0.3, z + 0.12)], 0.8)

    def fill(points: list[Point], colour: Colour) -> None:
        canvas.polygon([canvas.camera.project(x + facing * size * a, size * y, z) for a, y in points], colour, surface)

    foot = stride if turned else 0.12
    for side, tone in ((-1, 0.8), (1, 1.0)):
        hip = 0.03 if turned else 0.09
        waist, ankle = side * hip, side * foot
        leg = [(waist - 0.09, 0.92), (waist + 0.09, 0.92), (ankle + 0.06, 0.04), (ankle - 0.07, 0.04)]
        fill(leg, shade(trousers, tone))
        fill(
            [
                (side * foot - 0.08, 0.0),
                (side * foot + 0.13, 0.0),
                (side * foot + 0.06, 0.1),
                (side * foot - 0.08, 0.1),
            ],
            (34, 30, 30),
        )
    if random.chance(0.25):  # a coat or a skirt
        fill([(-broad, 1.1), (broad, 1.1), (broad + 0.06, 0.55), (-broad - 0.06, 0.55)], shade(top, 0.92))
    swing = stride * 0.9
    fill(
        [
            (-broad - 0.02, 1.42),
            (-broad + 0.1, 1.42),
            (-swing - broad * 0.3, 0.82),
            (-swing - broad * 0.3 - 0.1, 0.84),
        ],
        shade(top, 0.78),
    )
    fill([(-broad, 1.46), (broad, 1.46), (broad * 0.85, 0.88), (-broad * 0.85, 0.88)], top)
    fill(
        [
            (broad - 0.1, 1.42),
            (broad + 0.03, 1.42),
            (swing + broad * 0.3 + 0.1, 0.84),
            (swing + broad * 0.3, 0.82),
        ],
        shade(top, 0.9),
    )
    if random.chance(0.3):  # a bag
        fill([(-0.32, 1.35), (-0.12, 1.4), (-0.12, 0.95), (-0.3, 0.98)], shade(random.pick(_CLOTHES), 0.8))
    canvas.disc(x, 1.62 * size, z, (0.105 * size, 0.135 * size), skin, surface)
    canvas.disc(x - facing * 0.02 * size, 1.69 * size, z, (0.11 * size, 0.085 * size), random.pick(_HAIR), surface)
