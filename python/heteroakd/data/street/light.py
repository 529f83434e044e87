"""Light and air of a scene: its weather, the sky, and the photograph that is made of a painted canvas."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from heteroakd.data.street.canvas import FAR, Array, Camera, Canvas, Colour, Label, Randomness, shade

Light = tuple[float, float, float]


class Weather(NamedTuple):
    """What falls on a scene."""

    name: str
    zenith: Colour
    horizon: Colour
    """Colours of the sky, the latter of the haze too."""
    light: Light
    """Factor on the colours of what the sun lights."""
    shadow: Light
    """The same for what lies in shadow."""
    clouds: float
    """Share of the sky that clouds cover, at most."""
    haze: float
    """Extinction by haze, in 1/m, at most."""
    sharpness: float
    """Strength of cast shadows, in [0, 1]."""
    wet: float
    """Strength of the mirror images in a wet road, at most; on half of them."""
    lamps: float = 0.0
    """Strength of lamps, headlights and lit windows; 0 by day."""
    gain: float = 0.014
    """Noise of the sensor, standard deviation in 0..1."""
    sun: tuple[float, float] = (0.0, 0.0)
    """Displacement (x, z) of a shadow per metre of height; drawn for every scene."""


WEATHERS = (
    Weather("sun", (84, 140, 214), (196, 216, 236), (1.12, 1.06, 0.98), (0.5, 0.54, 0.64), 0.6, 0.004, 0.9, 0.0),
    Weather("sun", (64, 118, 200), (218, 222, 224), (1.06, 1.06, 1.04), (0.5, 0.54, 0.64), 0.4, 0.003, 1.0, 0.0),
    Weather("overcast", (176, 182, 190), (190, 190, 188), (0.82, 0.84, 0.87), (0.61, 0.63, 0.66), 1, 0.008, 0.35, 0.4),
    Weather("dusk", (84, 92, 146), (246, 166, 122), (0.86, 0.66, 0.56), (0.46, 0.42, 0.52), 0.7, 0.008, 0.6, 0.3, 0.3),
    Weather("night", (16, 18, 34), (46, 45, 56), (0.3, 0.31, 0.4), (0.22, 0.23, 0.32), 0.5, 0.005, 0.3, 0.4, 1, 0.028),
    Weather("haze", (192, 196, 200), (192, 196, 200), (0.86, 0.87, 0.88), (0.66, 0.68, 0.7), 0.0, 0.035, 0.3, 0.3),
)


def sample_weather(random: Randomness) -> Weather:
    """The weather of a random hour."""
    weather = random.pick(WEATHERS)
    level, side = random.uniform(0.88, 1.12), random.uniform(0.5, 1.8) * random.pick((-1, 1))
    zenith, horizon = shade(weather.zenith, level), shade(weather.horizon, level)
    return weather._replace(
        zenith=zenith, horizon=horizon, clouds=random.uniform(0.2, 1) * weather.clouds,
        haze=random.uniform(0.2, 1) * weather.haze, wet=max(0.0, random.uniform(-1, 1)) * weather.wet,
        sun=(side, random.uniform(-0.7, 0.9)),
    )  # fmt: skip


def _smooth(random: Randomness, rows: int, columns: int, size: tuple[int, int]) -> Array:
    """A smooth random field with rows x columns cells, float32 [H, W], of standard deviation near 1."""
    coarse = Image.fromarray(random.normal(rows, columns))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC), np.float32)


def _array(values: tuple[float, ...]) -> Array:
    return np.array(values, np.float32)


def paint_sky(weather: Weather, camera: Camera, random: Randomness) -> NDArray[np.uint8]:
    """The sky with its gradient and clouds, uint8 [H, W, 3]."""
    size = (camera.height, camera.width)
    towards = np.clip(np.arange(camera.height, dtype=np.float32) / camera.horizon, 0, 1)[:, None, None] ** 1.4
    sky = np.broadcast_to((1 - towards) * _array(weather.zenith) + towards * _array(weather.horizon), (*size, 3))
    field = _smooth(random, 6, 4, size) + 0.5 * _smooth(random, 14, 9, size) + 0.3 * _smooth(random, 34, 20, size)
    cover = np.clip((field - 1.4 + 2.2 * weather.clouds) / 1.2, 0, 1)[..., None] * (weather.clouds > 0)
    lit = (0.65 - 0.6 * weather.lamps) * _array((250, 250, 250)) + 0.35 * _array(weather.horizon)
    return np.clip(sky + cover * (lit - sky) * (0.9 - 0.5 * towards), 0, 255).astype(np.uint8)


def _blur(picture: Array, radius: float) -> Array:
    """A picture in 0..1 after a Gaussian blur, float32 [H, W, 3]."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / np.float32(255)


def develop(canvas: Canvas, weather: Weather, random: Randomness) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The photograph, uint8 [H, W, 3], and its labels, uint8 [H, W], of a painted scene: texture, shadow, light, wet
    road, haze, lamps, exposure and noise."""
    painted, surfaces, shadows = canvas.developed()
    columns = [np.array(column, np.float32) for column in zip(*canvas.surfaces, strict=True)]
    label, depth, grain, emission, ground = (column[surfaces] for column in columns)
    (height, width), flat, shining = surfaces.shape, ground > 0, emission[..., None]
    x, z = canvas.camera.ground()
    depth = np.where(flat, z, depth)
    sky = (depth >= FAR)[..., None]
    noise = random.normal(height, width) * 0.6 + _smooth(random, height // 4, width // 4, (height, width)) * 0.7
    # On the ground the texture lies in the plane: one cell of the tile is 25 cm wide and 50 cm long.
    mottle = random.normal(64, 64)[(2 * z).astype(np.int32) % 64, np.floor(4 * x).astype(np.int32) % 64]
    noise = np.where(flat, 0.45 * noise + 0.6 * np.clip(12 / np.maximum(z, 1), 0, 1) * mottle, noise)
    light: Array = _array(weather.light) + (ground * shadows)[..., None] * (
        _array(weather.shadow) - _array(weather.light)
    )
    if weather.lamps:  # the own headlights: a cone on the ground, a little on the rest
        cone = 0.55 * np.exp(-((z - 9) ** 2) / 120 - x**2 / (3.0 + 0.06 * z**2))
        beam = weather.lamps * np.where(flat, cone, 0.12 * np.exp(-(x**2) / 60.0))
        light = (light + beam[..., None] * _array((1.0, 0.93, 0.78))).astype(np.float32)
    picture = painted * (1 + grain * noise)[..., None] * light
    picture = np.where(sky, painted, picture * (1 - shining) + painted * shining)
    if weather.wet:  # the ground mirrors what stands above the horizon
        rows = 2 * canvas.camera.horizon - np.arange(height) + 1.6 * random.normal(height)
        mirrored = picture[np.clip(rows.astype(np.int32), 0, height - 1)]
        picture += (ground * (label != Label.VEGETATION) * np.float32(weather.wet))[..., None] * (mirrored - picture)
    clear = np.exp(-weather.haze * np.minimum(depth, 150.0))[..., None]
    clear = np.where(sky, 1.0, np.maximum(clear, 0.75 * shining))
    picture = clear * picture + (1 - clear) * _array(weather.horizon) / 255
    if weather.lamps:
        picture = picture + 1.1 * _blur(painted * shining, width / 48)
    balance = _array(tuple(random.uniform(0.95, 1.05) for _ in range(3)))
    picture = ((picture * balance - 0.45) * random.uniform(0.88, 1.12) + 0.45) * random.uniform(0.9, 1.1)
    if random.chance(0.3):
        picture = _blur(picture, random.uniform(0.3, 0.6) * width / 192)
    picture = picture + np.float32(weather.gain * random.uniform(0.6, 1.4)) * random.normal(height, width, 3)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), label.astype(np.uint8)
