"""Light and air of a scene, and the sky they make."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heteroakd.data.street.canvas import Camera, Colour, mix
from heteroakd.data.street.randomness import Randomness

Kind = Literal["sun", "overcast", "dusk", "night", "haze"]


@dataclass(frozen=True)
class Weather:
    """What falls on a scene: colours are 0..255, light is a factor per channel."""

    kind: Kind
    zenith: Colour
    """Colour of the sky overhead."""
    horizon: Colour
    """Colour of the sky at the horizon and of the haze."""
    light: tuple[float, float, float]
    """Factor on the colours of whatever the sun (or the sky) lights."""
    shadow: tuple[float, float, float]
    """Factor on the colours of whatever lies in shadow."""
    clouds: float
    """Share of the sky that clouds cover, in [0, 1]."""
    haze: float
    """Extinction by haze, in 1/m."""
    sun: tuple[float, float]
    """Displacement (x, z) of a shadow per metre of height."""
    sharpness: float
    """Strength of cast shadows, in [0, 1]."""
    wet: float
    """Strength of the mirror images in the road, in [0, 1]."""
    gain: float
    """Noise of the sensor, standard deviation in 0..1."""

    @property
    def lamps(self) -> bool:
        """Whether lamps and headlights are on."""
        return self.kind in ("dusk", "night")


def sample_weather(random: Randomness) -> Weather:
    """Light of a random hour: sun 42 %, overcast 20 %, dusk 13 %, night 13 %, haze 12 %."""
    draw = random.uniform(0, 1)
    side = random.uniform(0.5, 1.8) * (1 if random.chance(0.5) else -1)
    sun = (side, random.uniform(-0.7, 0.9))
    gain = random.uniform(0.008, 0.02)
    wet = random.uniform(0.15, 0.4)
    if draw < 0.42:
        zenith = random.pick([(84, 140, 214), (64, 118, 200), (110, 160, 220), (96, 138, 190)])
        horizon = random.pick([(196, 216, 236), (218, 222, 224), (176, 204, 234)])
        warm = random.uniform(0.0, 0.14)
        light = (1.08 + warm, 1.06, 1.04 - warm)
        return Weather(
            "sun", zenith, horizon, light, (0.50, 0.54, 0.64), random.uniform(0, 0.6),
            random.uniform(0.0005, 0.004), sun, random.uniform(0.75, 1.0), 0.0, gain,
        )  # fmt: skip
    if draw < 0.62:
        grey = random.uniform(150, 225)
        zenith, horizon = (
            (int(grey * 0.93), int(grey * 0.96), int(grey)),
            (int(grey), int(grey), int(grey * 0.99)),
        )
        level = random.uniform(0.72, 0.95)
        return Weather(
            "overcast", zenith, horizon,
            (level * 0.97, level, level * 1.03), (level * 0.72, level * 0.74, level * 0.78),
            random.uniform(0.5, 1.0), random.uniform(0.002, 0.008), sun, 0.35,
            wet if random.chance(0.5) else 0.0, gain,
        )  # fmt: skip
    if draw < 0.75:
        horizon = random.pick([(250, 176, 110), (244, 150, 122), (226, 178, 150)])
        return Weather(
            "dusk", random.pick([(92, 98, 150), (70, 84, 140), (120, 110, 150)]), horizon,
            (0.86, 0.66, 0.56), (0.46, 0.42, 0.52), random.uniform(0.1, 0.7), random.uniform(0.002, 0.008),
            (2.2 * sun[0], sun[1]), 0.6, wet if random.chance(0.3) else 0.0, gain * 1.4,
        )  # fmt: skip
    if draw < 0.88:
        return Weather(
            "night", random.pick([(10, 12, 26), (18, 20, 40), (24, 22, 34)]),
            random.pick([(40, 38, 56), (64, 52, 48), (34, 42, 66)]),
            (0.30, 0.31, 0.40), (0.22, 0.23, 0.32), random.uniform(0, 0.5), random.uniform(0.001, 0.005),
            sun, 0.3, wet if random.chance(0.4) else 0.0, gain * 2.0,
        )  # fmt: skip
    grey = random.uniform(170, 225)
    fog = (int(grey * 0.98), int(grey), int(grey * random.uniform(0.98, 1.06)))
    return Weather(
        "haze", fog, fog, (0.86, 0.87, 0.88), (0.66, 0.68, 0.7), 0.0,
        random.uniform(0.012, 0.035), sun, 0.3, wet if random.chance(0.3) else 0.0, gain,
    )  # fmt: skip


def _colour(colour: Colour) -> NDArray[np.float32]:
    return np.array(colour, np.float32)


def smooth_field(random: Randomness, rows: int, columns: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """A smooth random field with rows x columns cells, float32 [H, W], of standard deviation near 1."""
    coarse = Image.fromarray(random.normal(rows, columns))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC), np.float32)


def paint_sky(weather: Weather, camera: Camera, random: Randomness) -> NDArray[np.uint8]:
    """The sky with its gradient, clouds and sun, uint8 [H, W, 3]."""
    height, width = camera.height, camera.width
    rows = np.linspace(0, height - 1, height, dtype=np.float32)
    towards = np.clip(rows / max(camera.horizon, 1.0), 0, 1)[:, None, None] ** 1.4
    zenith, horizon = _colour(weather.zenith), _colour(weather.horizon)
    sky = np.broadcast_to((1 - towards) * zenith + towards * horizon, (height, width, 3)).copy()
    if weather.clouds > 0:
        size = (height, width)
        field = smooth_field(random, 6, 4, size) + 0.5 * smooth_field(random, 14, 9, size)
        field += 0.3 * smooth_field(random, 34, 20, size)
        cover = np.clip((field - 1.4 + 2.2 * weather.clouds) / 1.2, 0, 1)[..., None]
        lit = _colour(mix((250, 250, 250), weather.horizon, 0.35))
        if weather.kind == "night":
            lit = _colour(weather.horizon) * 1.1
        elif weather.kind == "overcast":
            lit = _colour(weather.horizon) * 0.86
        underside = 1 - 0.12 * np.clip(smooth_field(random, 10, 8, size), 0, 1)[..., None]
        sky += cover * (lit * underside - sky) * (0.9 - 0.5 * towards)
    if weather.kind in ("sun", "dusk") and random.chance(0.5):
        column = camera.centre - np.sign(weather.sun[0]) * random.uniform(0.1, 0.5) * width
        row = random.uniform(-0.1, 0.8) * camera.horizon
        distance = np.hypot(np.arange(width)[None] - column, rows[:, None] - row) / width
        glow = np.exp(-distance / 0.09)[..., None].astype(np.float32)
        sky += glow * (_colour((255, 250, 225)) - sky)
    return np.clip(sky, 0, 255).astype(np.uint8)
