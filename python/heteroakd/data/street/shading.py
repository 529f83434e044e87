"""From a painted canvas to a photograph: texture, shadow, light, haze, wet road, lamps and sensor noise."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from heteroakd.data.street.canvas import FAR, Canvas
from heteroakd.data.street.classes import Label
from heteroakd.data.street.stage import Stage
from heteroakd.data.street.weather import Weather, smooth_field

Array = NDArray[np.float32]


def _texture(stage: Stage, surfaces: NDArray[np.uint8], x: Array, z: Array, labels: NDArray[np.int64]) -> Array:
    """Factor on the colours, float32 [H, W], that gives every surface its texture."""
    canvas, random = stage.canvas, stage.random
    height, width = surfaces.shape
    grain = np.array(canvas.grains, np.float32)[surfaces]
    ground = np.asarray(canvas.grounds)[surfaces]
    noise = random.normal(height, width) * 0.6 + smooth_field(random, height // 4, width // 4, (height, width)) * 0.7
    # On the ground the texture lies in the plane: one cell of the tile is 25 cm wide and 50 cm long.
    tile = random.normal(64, 64)
    mottle = tile[(2 * z).astype(np.int64) % 64, np.floor(4 * x).astype(np.int64) % 64]
    fade = np.clip(12 / np.maximum(z, 1), 0, 1)
    noise = np.where(ground, 0.45 * noise + 0.6 * fade * mottle, noise)
    factor = 1 + grain * noise
    slabs = (labels == Label.SIDEWALK) & ground & (z < 16)
    size = random.uniform(0.6, 1.2)
    joint = (np.mod(x, size) < 0.07 * size + 0.004 * z) | (np.mod(z, size) < 0.1 * size)
    return np.where(slabs & joint, factor * 0.88, factor).astype(np.float32)


def _lamp_light(stage: Stage, x: Array, z: Array, ground: NDArray[np.bool_]) -> Array:
    """Light, float32 [H, W], of the own headlights: a cone on the ground, a little on the rest."""
    ahead = np.exp(-((z - 9) ** 2) / 120) * np.exp(-(x**2) / (3.0 + 0.06 * z**2))
    return np.where(ground, 0.55 * ahead, 0.12 * np.exp(-(x**2) / 60.0)).astype(np.float32)


def _mirror(weather: Weather, picture: Array, ground: NDArray[np.bool_], horizon: float, random_rows: Array) -> Array:
    """The picture with a wet ground that mirrors what stands above the horizon."""
    height = picture.shape[0]
    rows = np.arange(height)
    source = np.clip((2 * horizon - rows + 2 * random_rows).astype(np.int64), 0, height - 1)
    reflected = picture[source]
    share = np.where(ground, weather.wet, 0.0)[..., None].astype(np.float32)
    return picture + share * (reflected - picture)


def _blur(picture: Array, radius: float) -> Array:
    """A picture in 0..1 after a Gaussian blur, float32 [H, W, 3]."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / np.float32(255)


def develop(stage: Stage) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The finished picture, uint8 [H, W, 3], and its labels, uint8 [H, W], of a painted scene."""
    canvas: Canvas = stage.canvas
    weather, random, camera = stage.weather, stage.random, canvas.camera
    surfaces = canvas.surfaces()
    labels = np.asarray(canvas.labels)[surfaces]
    ground = np.asarray(canvas.grounds)[surfaces]
    emission = np.array(canvas.emissions, np.float32)[surfaces][..., None]
    x, z = camera.ground()
    depth = np.where(ground, z, np.array(canvas.depths, np.float32)[surfaces])
    sky = (depth >= FAR)[..., None]

    painted = canvas.colours()
    textured = painted * _texture(stage, surfaces, x, z, labels)[..., None]
    shadow = np.where(ground, canvas.shadows(), 0.0)[..., None].astype(np.float32)
    light = np.array(weather.light, np.float32) * (1 - shadow) + np.array(weather.shadow, np.float32) * shadow
    if weather.lamps:
        warm = np.array((1.0, 0.93, 0.78), np.float32) * (1.0 if weather.kind == "night" else 0.3)
        light = light + _lamp_light(stage, x, z, ground)[..., None] * warm
    picture = textured * light
    picture = np.where(sky, painted, picture * (1 - emission) + painted * emission)
    if weather.wet:
        wobble = random.normal(camera.height) * 0.8
        picture = _mirror(weather, picture, ground & (labels != Label.VEGETATION), camera.horizon, wobble)
    clear = np.exp(-weather.haze * np.minimum(depth, 150.0))[..., None].astype(np.float32)
    clear = np.where(sky, 1.0, np.maximum(clear, 0.75 * emission))
    picture = clear * picture + (1 - clear) * np.array(weather.horizon, np.float32) / 255
    if weather.lamps:
        picture = picture + 1.1 * _blur(painted * emission, camera.width / 48)
    return _expose(stage, picture.astype(np.float32)), labels.astype(np.uint8)


def _expose(stage: Stage, picture: Array) -> NDArray[np.uint8]:
    """Exposure, white balance, vignette, lens blur and noise."""
    random = stage.random
    height, width = picture.shape[:2]
    balance = np.array([random.uniform(0.95, 1.05) for _ in range(3)], np.float32)
    contrast = random.uniform(0.88, 1.12)
    picture = ((picture * balance - 0.45) * contrast + 0.45) * random.uniform(0.9, 1.1)
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None]
    picture = picture * (1 - random.uniform(0.03, 0.14) * (rows**2 + columns**2))[..., None]
    if random.chance(0.3):
        picture = _blur(picture, random.uniform(0.3, 0.6) * width / 192)
    picture = picture + stage.weather.gain * random.normal(height, width, 3)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
