"""What stands where: a random street, painted from far to near."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from heteroakd.data.street.buildings import Building, paint_building, paint_skyline
from heteroakd.data.street.canvas import NEAR, Camera, Canvas, Colour
from heteroakd.data.street.classes import Label
from heteroakd.data.street.furniture import (
    paint_box,
    paint_fence,
    paint_lamp_post,
    paint_sign,
    paint_traffic_light,
    paint_utility_pole,
)
from heteroakd.data.street.ground import Street, paint_ground, sample_street
from heteroakd.data.street.people import paint_person
from heteroakd.data.street.plants import paint_bush, paint_hedge, paint_tree
from heteroakd.data.street.randomness import Randomness
from heteroakd.data.street.shading import develop
from heteroakd.data.street.stage import Stage
from heteroakd.data.street.vehicles import paint_vehicle_across, paint_vehicle_along, sample_body
from heteroakd.data.street.weather import paint_sky, sample_weather

Thing = tuple[float, Callable[[], None]]
"""Distance in metres and what paints it."""


def render_scene(random: Randomness, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A random scene of `size` (H, W): picture, uint8 [H, W, 3], and labels, uint8 [H, W] in {0..11, 255}."""
    height, width = size
    camera = Camera(
        height, width,
        focal=random.uniform(0.75, 1.0) * max(width, 1.2 * height),
        horizon=random.uniform(0.36, 0.52) * height,
        centre=random.uniform(0.38, 0.62) * width,
        eye=random.uniform(1.3, 1.8),
        roll=math.radians(random.uniform(-1.5, 1.5)),
    )  # fmt: skip
    weather = sample_weather(random)
    stage = Stage(Canvas(camera, Label.SKY), weather, random)
    stage.canvas.paint_background(paint_sky(weather, camera, random))
    street = sample_street(stage)
    if random.chance(0.85):
        paint_skyline(stage, street.end * random.uniform(1.0, 1.6))
    paint_ground(stage, street)
    _paint_frontage(stage, street)
    things = _street_life(stage, street)
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint()
    if random.chance(0.75):
        _paint_bonnet(stage)
    return develop(stage)


def _in_crossing(street: Street, near: float, far: float) -> bool:
    return street.crossing is not None and far > street.crossing[0] - 1 and near < street.crossing[1] + 1


def _paint_frontage(stage: Stage, street: Street) -> None:
    """Buildings, gaps with trees, and gardens with fences behind both sidewalks, from far to near."""
    random = stage.random
    plots: list[Thing] = []
    for side in (-1, 1):
        edge = street.left - street.walk_left if side < 0 else street.right + street.walk_right
        dense = random.uniform(0.45, 0.95)
        z = NEAR - random.uniform(0, 8)
        while z < street.end:
            near, far = max(z, NEAR), z + random.uniform(7, 18)
            if street.crossing and _in_crossing(street, near, far):
                if near >= street.crossing[0] - 4:  # too little room in front of the crossing: go on behind it
                    z = street.crossing[1] + 1.0
                    continue
                far = street.crossing[0]
            if far - near > 2:
                plots += _plot(stage, side, edge, near, far, built=random.chance(dense))
            z = far + (random.uniform(0.5, 4) if random.chance(0.3) else 0.0)
    for _, paint in sorted(plots, key=lambda plot: -plot[0]):
        paint()


def _plot(stage: Stage, side: int, edge: float, near: float, far: float, built: bool) -> list[Thing]:
    random = stage.random
    things: list[Thing] = []
    if built:
        garden = random.uniform(2, 5) if random.chance(0.3) else 0.0
        building = Building(stage, side, edge + side * (garden + 0.05), near, far)
        things.append((far, lambda: paint_building(stage, building)))
        if not garden:
            return things
    else:
        for _ in range(random.integer(1, 3)):
            x, z = edge + side * random.uniform(2.5, 10), random.uniform(near, far)
            if z > 4:
                things.append((z, partial(paint_tree, stage, x, z)))
    start = max(near, 2.0)
    boundary = random.uniform(0, 1)
    x = edge + side * 0.1
    # In front of what stands on the plot: just nearer than the plot's nearest thing.
    front = min((distance for distance, _ in things), default=near) - 0.01
    if boundary < 0.5:
        things.append((front, lambda: paint_fence(stage, x, start, far)))
    elif boundary < 0.8:
        things.append((front, lambda: paint_hedge(stage, x, start, far)))
    return things


def _street_life(stage: Stage, street: Street) -> list[Thing]:
    """Everything that stands or moves between the frontages."""
    things: list[Thing] = []
    things += _traffic(stage, street)
    things += _sidewalk_things(stage, street)
    return things


def _traffic(stage: Stage, street: Street) -> list[Thing]:
    random, s = stage.random, street
    things: list[Thing] = []

    def place(x: float, z: float, oncoming: bool) -> float:
        body = sample_body(stage)
        if z < 3.0 or _in_crossing(s, z, z + body.length):
            return body.length
        things.append((z, lambda: paint_vehicle_along(stage, body, x, z, oncoming)))
        return body.length

    if s.parking:
        for side in (-1, 1):
            x = s.left + s.parking / 2 if side < 0 else s.right - s.parking / 2
            crowd, z = random.uniform(0.2, 0.85), random.uniform(2.5, 8)
            while z < 50:
                z += (place(x, z, side < 0) if random.chance(crowd) else 5.0) + random.uniform(0.6, 1.6)
    middle = s.dividers[0][0]
    lanes = [(x, False) for x in _lane_centres(middle, s.right - s.parking, s.lane)]
    lanes += [(x, True) for x in _lane_centres(s.left + s.parking, middle, s.lane)]
    for x, oncoming in lanes:
        busy, z = random.uniform(0.1, 0.6), random.uniform(6, 20)
        while z < 70:
            if random.chance(busy):
                z += place(x + random.uniform(-0.25, 0.25), z, oncoming)
            z += random.uniform(5, 22)
    if s.crossing and random.chance(0.5):
        body = sample_body(stage)
        # Between the frontages, where no building can stand in front of it.
        first, last = s.left - s.walk_left, s.right + s.walk_right - body.length
        z, x = s.crossing[0] + random.uniform(1.2, 4), random.uniform(first, max(first, last))
        rightwards = random.chance(0.5)
        things.append((z, lambda: paint_vehicle_across(stage, body, x, z, rightwards)))
    return things


def _lane_centres(left: float, right: float, lane: float) -> list[float]:
    count = max(1, round((right - left) / lane))
    return [left + (step + 0.5) * (right - left) / count for step in range(count)]


def _sidewalk_things(stage: Stage, street: Street) -> list[Thing]:
    random, s = stage.random, street
    things: list[Thing] = []

    def add(painter: Callable[[Stage, float, float], None], x: float, z: float) -> None:
        things.append((z, lambda: painter(stage, x, z)))

    for side in (-1, 1):
        curb, width = (s.left, s.walk_left) if side < 0 else (s.right, s.walk_right)
        kerb = curb + side * 0.35
        pole = paint_utility_pole if random.chance(0.25) else paint_lamp_post
        spacing, z = random.uniform(12, 24), random.uniform(5, 16)
        while z < 55:
            if not _in_crossing(s, z, z):
                add(pole, kerb, z)
            z += spacing
        if random.chance(0.4):  # an avenue of trees
            spacing, z = random.uniform(7, 12), random.uniform(6, 14)
            while z < 60:
                if not _in_crossing(s, z - 2, z + 2):
                    add(paint_tree, curb + side * 0.9, z)
                z += spacing
        for _ in range(random.integer(0, 3)):
            z = random.uniform(6, 28)
            if not _in_crossing(s, z, z):
                add(paint_sign, kerb + side * random.uniform(0, 0.4), z)
        people = random.integer(0, 5)
        while people > 0:
            x, z = curb + side * random.uniform(0.5, max(0.8, width - 0.3)), random.uniform(5, 32)
            for _ in range(min(people, random.pick((1, 1, 2, 3)))):
                add(paint_person, x, z)
                x += random.uniform(0.45, 0.7)
                people -= 1
        for painter, probability in ((paint_bush, 0.25), (paint_box, 0.35)):
            z = random.uniform(5, 20)
            if random.chance(probability) and not _in_crossing(s, z, z):
                add(painter, curb + side * (width - 0.4), z)
        if random.chance(0.12):
            start = random.uniform(4, 12)
            stop = start + random.uniform(6, 14)
            if not _in_crossing(s, start, stop):
                things.append((start, partial(paint_fence, stage, kerb, start, stop)))
    if s.crossing:
        if random.chance(0.75):
            z = s.crossing[0] - 1.0
            add(paint_traffic_light, s.right + 0.4, z)
            if random.chance(0.7):
                add(paint_traffic_light, s.left - 0.4, z + random.uniform(0, 0.5))
        for _ in range(random.integer(0, 3)):
            add(paint_person, random.uniform(s.left, s.right), s.crossing[0] - random.uniform(1.0, 3.0))
    return things


def _paint_bonnet(stage: Stage) -> None:
    """The bonnet of the own car at the lower edge: seen in every such picture and labelled in none (255)."""
    canvas, random = stage.canvas, stage.random
    camera = canvas.camera
    surface = canvas.surface(Label.IGNORED, NEAR, grain=0.02)
    colour: Colour = random.pick(((30, 32, 36), (70, 74, 82), (120, 24, 28), (150, 154, 160)))
    rise = random.uniform(0.03, 0.09) * camera.height
    half = random.uniform(0.55, 0.8) * camera.width
    middle = (camera.width / 2 + random.uniform(-0.05, 0.05) * camera.width, float(camera.height))
    canvas.ellipse(middle, (half, rise), colour, surface)
    lit = tuple(min(255, channel + 40) for channel in colour)
    canvas.ellipse((middle[0], middle[1] + 0.25 * rise), (0.8 * half, rise), (lit[0], lit[1], lit[2]), surface)
