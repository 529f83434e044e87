"""Buildings: facades along the street with windows, shop fronts, gables and roofs."""

from heteroakd.data.street.canvas import NEAR, Colour, mix, shade
from heteroakd.data.street.classes import Label
from heteroakd.data.street.stage import Stage

# Some share the colours of signs and cars (brick), of the sky (glass) and of leaves (green render) on
# purpose.
_WALLS: tuple[Colour, ...] = (
    (168, 96, 78), (146, 74, 62), (190, 132, 104), (208, 196, 172), (226, 214, 192), (196, 176, 140),
    (178, 178, 176), (142, 146, 150), (112, 110, 112), (222, 222, 222), (156, 176, 196), (122, 150, 176),
    (150, 164, 122), (126, 140, 108), (206, 176, 108), (172, 142, 152),
)  # fmt: skip
_SHOPS: tuple[Colour, ...] = (
    (190, 40, 40), (30, 90, 160), (230, 200, 60), (40, 120, 70),
    (240, 240, 240), (40, 40, 44), (220, 120, 40),
)  # fmt: skip
_LIT: tuple[Colour, ...] = ((255, 214, 140), (255, 232, 180), (232, 224, 190), (255, 190, 110))


class Building:
    """Look and measures of one building on one side of the street; lengths in metres."""

    def __init__(self, stage: Stage, side: int, x: float, near: float, far: float) -> None:
        random = stage.random
        self.side = side
        """-1 for the left side of the street, 1 for the right."""
        self.x = x
        """Position of the facade."""
        self.near, self.far = near, far
        self.floor_height = random.uniform(2.8, 3.6)
        self.floors = random.integer(2, 4) if random.chance(0.6) else random.integer(4, 8)
        self.height = self.floors * self.floor_height + random.uniform(0.4, 1.4)
        self.width = random.uniform(8, 14)
        self.wall = shade(random.pick(_WALLS), random.uniform(0.85, 1.12))
        self.gable = self.floors <= 4 and random.chance(0.4)
        self.shop = random.chance(0.45)


def paint_building(stage: Stage, building: Building) -> None:
    """Paint a building: roof, the wall that faces the camera, and the facade along the street."""
    canvas, random = stage.canvas, stage.random
    b = building
    wall = canvas.surface(Label.BUILDING, (b.near + b.far) / 2, grain=random.uniform(0.03, 0.08))
    end = canvas.surface(Label.BUILDING, b.near, grain=random.uniform(0.03, 0.08))
    facade = stage.face(b.wall, (-b.side, 0))
    across = b.x + b.side * b.width
    end_colour = shade(stage.face(b.wall, (0, -1)), 0.92)
    roof = mix(random.pick([(120, 66, 54), (84, 80, 82), (104, 92, 84)]), b.wall, 0.15)
    if b.gable:
        ridge = b.height + random.uniform(2, 3.5)
        middle = (b.x + across) / 2
        canvas.solid(
            [(b.x, b.height, b.near), (b.x, b.height, b.far),
             (middle, ridge, b.far), (middle, ridge, b.near)],
            stage.face(roof, (-b.side, 0)), wall,
        )  # fmt: skip
        canvas.solid([(b.x, b.height, b.near), (across, b.height, b.near), (middle, ridge, b.near)], end_colour, end)
    canvas.solid(
        [(b.x, 0, b.near), (across, 0, b.near), (across, b.height, b.near), (b.x, b.height, b.near)],
        end_colour,
        end,
    )
    if b.near < 45:
        _end_windows(stage, b, across, end_colour, end)
    canvas.solid([(b.x, 0, b.near), (b.x, 0, b.far), (b.x, b.height, b.far), (b.x, b.height, b.near)], facade, wall)
    _facade_windows(stage, b, facade, wall)
    if not b.gable:
        cornice = shade(facade, random.pick([0.75, 1.15]))
        low, high = b.height - 0.4, b.height + 0.15
        canvas.solid([(b.x, low, b.near), (b.x, low, b.far), (b.x, high, b.far), (b.x, high, b.near)], cornice, wall)


def _window_colour(stage: Stage) -> Colour:
    reflected = mix((46, 54, 64), stage.weather.horizon, stage.random.uniform(0.0, 0.55))
    return shade(reflected, stage.random.uniform(0.7, 1.1))


def _facade_windows(stage: Stage, b: Building, facade: Colour, wall: int) -> None:
    canvas, random = stage.canvas, stage.random
    lit = canvas.surface(Label.BUILDING, (b.near + b.far) / 2, emission=1.0)
    lit_share = {"night": 0.4, "dusk": 0.25}.get(stage.weather.kind, 0.0)
    pitch = random.uniform(2.2, 3.6) * (1 if b.near < 35 else 1.6)
    glass_width, glass_height = random.uniform(0.4, 0.75), random.uniform(0.45, 0.7)
    x = b.x - 0.01 * b.side
    first = max(b.near, NEAR)
    plain = _window_colour(stage)
    most = 9 if b.near < 20 else 5 if b.near < 45 else 3  # far away, more could not be told apart
    columns = max(1, min(most, int((b.far - first) / pitch)))
    pitch = (b.far - first) / columns
    balconies = random.chance(0.25)
    start = 0
    if b.shop:
        start = 1
        _shop_front(stage, b, first, x, wall, lit)
    for floor in range(start, b.floors):
        low = floor * b.floor_height + 0.2 * b.floor_height
        high = low + glass_height * b.floor_height
        for column in range(columns):
            z0 = first + (column + (1 - glass_width) / 2) * pitch
            z1 = z0 + glass_width * pitch
            on = random.chance(lit_share)
            colour = random.pick(_LIT) if on else shade(plain, random.uniform(0.85, 1.15))
            corners = [(x, low, z0), (x, low, z1), (x, high, z1), (x, high, z0)]
            canvas.solid(corners, colour, lit if on else wall)
            if z0 < 14:  # a sill, where it can be seen
                canvas.solid(
                    [(x, low - 0.15, z0), (x, low - 0.15, z1), (x, low, z1), (x, low, z0)],
                    shade(facade, 1.18),
                    wall,
                )
        if balconies and floor > 0:
            out = x - 0.7 * b.side
            canvas.solid(
                [(out, low - 0.2, first), (out, low - 0.2, b.far),
                 (out, low + 0.6, b.far), (out, low + 0.6, first)],
                shade(facade, 0.8), wall,
            )  # fmt: skip


def _shop_front(stage: Stage, b: Building, first: float, x: float, wall: int, lit: int) -> None:
    canvas, random = stage.canvas, stage.random
    glass = _window_colour(stage)
    canvas.solid([(x, 0.4, first), (x, 0.4, b.far), (x, 2.5, b.far), (x, 2.5, first)], glass, wall)
    surface = lit if stage.weather.lamps and random.chance(0.6) else wall
    board = random.pick(_SHOPS)
    canvas.solid([(x, 2.5, first), (x, 2.5, b.far), (x, 3.1, b.far), (x, 3.1, first)], board, surface)
    if first > 4 and random.chance(0.5):  # a board that sticks out like a traffic sign, and is none
        z, out, level = first + 0.5, x - 1.0 * b.side, random.uniform(3.3, 4.2)
        sign = random.pick(_SHOPS)
        canvas.solid([(x, level, z), (out, level, z), (out, level + 0.9, z), (x, level + 0.9, z)], sign, surface)
    if random.chance(0.4):  # awning
        out = x - 1.2 * b.side
        canvas.solid(
            [(x, 2.9, first), (x, 2.9, b.far), (out, 2.4, b.far), (out, 2.4, first)],
            random.pick(_SHOPS),
            wall,
        )


def _end_windows(stage: Stage, b: Building, across: float, colour: Colour, end: int) -> None:
    canvas, random = stage.canvas, stage.random
    if random.chance(0.35):
        return
    glass = _window_colour(stage)
    left, right = min(b.x, across), max(b.x, across)
    columns = random.integer(2, 4)
    pitch = (right - left) / columns
    for floor in range(b.floors):
        low = floor * b.floor_height + 0.25 * b.floor_height
        high = low + 0.5 * b.floor_height
        for column in range(columns):
            x0 = left + (column + 0.28) * pitch
            x1 = x0 + 0.44 * pitch
            corners = [(x0, low, b.near), (x1, low, b.near), (x1, high, b.near), (x0, high, b.near)]
            canvas.solid(corners, shade(glass, random.uniform(0.85, 1.15)), end)


def paint_skyline(stage: Stage, distance: float) -> None:
    """Paint the blocks and tree tops that close the street in the distance, in metres."""
    canvas, random = stage.canvas, stage.random
    houses = canvas.surface(Label.BUILDING, distance)
    trees = canvas.surface(Label.VEGETATION, distance, grain=0.12)
    x = -1.6 * distance
    leaves = random.pick([(70, 96, 58), (86, 104, 62), (60, 84, 60)])
    while x < 1.6 * distance:
        width = random.uniform(0.06, 0.2) * distance
        height = random.uniform(5, 17)
        if random.chance(0.6):
            colour = shade(random.pick(_WALLS), random.uniform(0.7, 0.95))
            canvas.solid(
                [(x, 0, distance), (x + width, 0, distance),
                 (x + width, height, distance), (x, height, distance)],
                colour, houses,
            )  # fmt: skip
            dark = shade(colour, 0.75)
            for row in range(int(height / 3.2)):
                low, high = 3.2 * row + 1.0, 3.2 * row + 2.2
                corners = [(x, low), (x + width, low), (x + width, high), (x, high)]
                canvas.solid([(a, b, distance) for a, b in corners], dark, houses)
        else:
            for _ in range(5):
                canvas.disc(
                    x + random.uniform(0, width), random.uniform(0.2, 0.7) * height, distance,
                    (0.3 * width, 0.35 * height), shade(leaves, random.uniform(0.8, 1.15)), trees,
                )  # fmt: skip
        x += width * random.uniform(0.6, 1.15)
