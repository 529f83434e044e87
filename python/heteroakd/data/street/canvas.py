"""A pinhole camera, and the canvas on which a scene is painted from far to near."""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SUPERSAMPLING = 3  # odd, so that every pixel has a central sample: colours are averaged, labels are that sample
NEAR, FAR = 1.2, 250.0  # nearest distance at which anything is painted, and distance of the sky, in metres
Colour = tuple[int, int, int]
Array = NDArray[np.float32]
Label = IntEnum(
    "Label",
    "ROAD LANE_MARKING SIDEWALK BUILDING FENCE POLE TRAFFIC_LIGHT TRAFFIC_SIGN VEGETATION SKY PERSON VEHICLE",
    start=0,
)
"""Class indices as they stand in a label picture, besides IGNORE_INDEX."""
CLASSES: tuple[str, ...] = tuple(label.name.lower().replace("_", " ") for label in Label)
PALETTE: tuple[Colour, ...] = (
    (128, 64, 128), (255, 255, 255), (244, 35, 232), (90, 90, 90), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (70, 130, 180), (220, 20, 60), (0, 0, 142),
)  # fmt: skip


def shade(colour: Colour, factor: float) -> Colour:
    """A colour made darker (factor in 0..1) or lighter, within 0..255."""
    red, green, blue = colour
    return min(255, int(factor * red)), min(255, int(factor * green)), min(255, int(factor * blue))


class Camera(NamedTuple):
    """A pinhole camera that looks along +z; x points right and y up, in metres, the ground is y = 0. Sizes, focal
    length and the vanishing point (centre, horizon) are in pixels, the eye's height in metres, a small roll in
    radians."""

    height: int
    width: int
    focal: float
    horizon: float
    centre: float
    eye: float
    roll: float

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Column and row, in pixels, of a point of the world; what is nearer than NEAR is moved there."""
        scale = self.focal / (z if z > NEAR else NEAR)
        right, down = scale * x, scale * (self.eye - y)
        return self.centre + right - self.roll * down, self.horizon + self.roll * right + down

    def ground(self) -> tuple[Array, Array]:
        """x and z, float32 [H, W] in metres, of the ground at every pixel; z is FAR above the horizon."""
        columns = np.arange(self.width, dtype=np.float32)[None] + 0.5 - self.centre
        rows = np.arange(self.height, dtype=np.float32)[:, None] + 0.5 - self.horizon
        right, down = columns + self.roll * rows, rows - self.roll * columns
        z = np.minimum(self.focal * self.eye / np.maximum(down, 1e-3), FAR).astype(np.float32)
        return (right * z / self.focal).astype(np.float32), z


class Surface(NamedTuple):
    """One object, or one material of it, for label and light: strengths of its texture and of its own light."""

    label: int
    depth: float
    grain: float = 0.04
    emission: float = 0.0
    ground: bool = False


class Canvas:
    """Colours and surfaces of a scene at SUPERSAMPLING times the picture's resolution, over a sky, uint8 [H, W, 3],
    which is surface 0. Shadows are painted apart, so that they darken the ground only."""

    CROWDED = 224  # surfaces from which on objects share them: of the 256 that a channel holds some are left for new

    def __init__(self, camera: Camera, sky: NDArray[np.uint8]) -> None:
        self.camera = camera
        size = (camera.width * SUPERSAMPLING, camera.height * SUPERSAMPLING)
        # CMYK is Pillow's plain four-channel mode: three channels of colour and the surface, painted by one call.
        picture = Image.fromarray(np.dstack([sky, np.zeros(sky.shape[:2], np.uint8)]), "CMYK")
        self._picture, self._shadow = picture.resize(size, Image.Resampling.NEAREST), Image.new("L", size)
        self._draw, self._shadow_draw = ImageDraw.Draw(self._picture), ImageDraw.Draw(self._shadow)
        self.surfaces = {Surface(Label.SKY, FAR): 0}

    def surface(self, wanted: Surface) -> int:
        """The number of a surface or, on a crowded canvas, of the nearest in depth that is alike."""
        if wanted not in self.surfaces and len(self.surfaces) >= self.CROWDED:
            alike = [other for other in self.surfaces if other[::3] + other[4:] == wanted[::3] + wanted[4:]]
            wanted = min(alike, key=lambda other: abs(other.depth - wanted.depth), default=wanted)
        return self.surfaces.setdefault(wanted, len(self.surfaces))

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour, surface: int) -> None:
        """Fill a polygon of (column, row) points, in pixels of the picture."""
        self._draw.polygon([(SUPERSAMPLING * u, SUPERSAMPLING * v) for u, v in points], fill=(*colour, surface))

    def shadow(self, points: Sequence[tuple[float, float]], strength: float) -> None:
        """Darken a polygon of ground points (x, z), in metres."""
        projected = [self.camera.project(x, 0.0, z) for x, z in points]
        self._shadow_draw.polygon([(SUPERSAMPLING * u, SUPERSAMPLING * v) for u, v in projected], int(255 * strength))

    def developed(self) -> tuple[Array, NDArray[np.uint8], Array]:
        """Antialiased colours, float32 [H, W, 3] in 0..1; the surface at every pixel's centre, uint8 [H, W]; the share
        of the sun's light that shadows take, float32 [H, W] in 0..1."""
        middle, unit = SUPERSAMPLING // 2, np.float32(1 / 255)
        colours = np.asarray(self._picture.reduce(SUPERSAMPLING), np.float32)[..., :3] * unit
        surfaces = np.asarray(self._picture)[middle::SUPERSAMPLING, middle::SUPERSAMPLING, 3]
        return colours, surfaces, np.asarray(self._shadow.reduce(SUPERSAMPLING), np.float32) * unit
