"""A pinhole camera and the canvas on which a scene is painted from far to near."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SUPERSAMPLING = 3  # odd, so that every pixel has a central sample: colours are averaged, labels are that sample
NEAR = 1.2  # nearest distance at which anything is painted, in metres
FAR = 250.0  # distance of the sky, in metres

Colour = tuple[int, int, int]
Point = tuple[float, float]


def shade(colour: Colour, factor: float) -> Colour:
    """A colour made darker (factor in 0..1) or lighter, within 0..255."""
    red, green, blue = colour
    return min(255, int(factor * red)), min(255, int(factor * green)), min(255, int(factor * blue))


def mix(first: Sequence[float], second: Sequence[float], share: float) -> Colour:
    """`first` with a share in [0, 1] of `second`."""
    red, green, blue = (int((1 - share) * a + share * b) for a, b in zip(first, second, strict=True))
    return red, green, blue


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along +z; x points right and y up, in metres, the ground is y = 0."""

    height: int
    width: int
    """Size of the picture in pixels."""
    focal: float
    """Focal length in pixels."""
    horizon: float
    """Row of the horizon at the vanishing point, in pixels."""
    centre: float
    """Column of the vanishing point, in pixels."""
    eye: float
    """Height of the camera above the ground, in metres."""
    roll: float
    """Rotation of the picture around the vanishing point, in radians."""

    @cached_property
    def _rotation(self) -> tuple[float, float]:
        return math.cos(self.roll), math.sin(self.roll)

    def project(self, x: float, y: float, z: float) -> Point:
        """Column and row, in pixels, of a point of the world with z > 0."""
        right = self.focal * x / z
        down = self.focal * (self.eye - y) / z
        cosine, sine = self._rotation
        return self.centre + cosine * right - sine * down, self.horizon + sine * right + cosine * down

    def ground(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """x and z, float32 [H, W] in metres, of the ground at every pixel; z is FAR above the horizon."""
        columns = np.arange(self.width, dtype=np.float32)[None] + 0.5 - self.centre
        rows = np.arange(self.height, dtype=np.float32)[:, None] + 0.5 - self.horizon
        cosine, sine = self._rotation
        right, down = cosine * columns + sine * rows, cosine * rows - sine * columns
        z = np.minimum(self.focal * self.eye / np.maximum(down, 1e-3), FAR).astype(np.float32)
        return right * z / self.focal, z


class Canvas:
    """Colours and surfaces of a scene, painted at SUPERSAMPLING times the resolution of the picture.

    A surface stands for one object (or one material of it) and carries what the label and the shading need to
    know; surface 0 is the sky. Shadows on the ground are painted apart, so that the shading can apply them to
    the ground only.
    """

    MAX_SURFACES = 256
    CROWDED = 224  # from here on objects share surfaces, so that no scene is too full to be painted

    def __init__(self, camera: Camera, sky_label: int) -> None:
        self.camera = camera
        # CMYK is Pillow's plain four-channel mode: three channels of colour and the surface, painted by one
        # call.
        size = (camera.width * SUPERSAMPLING, camera.height * SUPERSAMPLING)
        self._picture = Image.new("CMYK", size)
        self._draw = ImageDraw.Draw(self._picture)
        self._shadow = Image.new("L", size)
        self._shadow_draw = ImageDraw.Draw(self._shadow)
        self.labels: list[int] = []
        self.depths: list[float] = []
        self.grains: list[float] = []
        self.emissions: list[float] = []
        self.grounds: list[bool] = []
        self.surface(sky_label, FAR)

    def surface(
        self, label: int, depth: float, *, grain: float = 0.04, emission: float = 0.0, ground: bool = False
    ) -> int:
        """A surface with this label, distance in metres, strength of texture and strength of its own light in
        [0, 1].

        It is a new one, or, on a crowded canvas, the nearest in depth that has the same label, light and
        flag. Raises RuntimeError beyond MAX_SURFACES.
        """
        if len(self.labels) >= self.CROWDED:
            kind = (label, emission, ground)
            kinds = zip(self.labels, self.emissions, self.grounds, strict=True)
            alike = [index for index, other in enumerate(kinds) if other == kind]
            if alike:
                return min(alike, key=lambda index: abs(self.depths[index] - depth))
        if len(self.labels) == self.MAX_SURFACES:
            raise RuntimeError(f"a scene has at most {self.MAX_SURFACES} surfaces")
        self.labels.append(label)
        self.depths.append(depth)
        self.grains.append(grain)
        self.emissions.append(emission)
        self.grounds.append(ground)
        return len(self.labels) - 1

    def paint_background(self, colours: NDArray[np.uint8]) -> None:
        """Fill the canvas with a picture, uint8 [H, W, 3], as surface 0."""
        picture = np.zeros((*colours.shape[:2], 4), np.uint8)
        picture[..., :3] = colours
        self._picture.paste(Image.fromarray(picture, "CMYK").resize(self._picture.size, Image.Resampling.NEAREST))

    def polygon(self, points: Sequence[Point], colour: Colour, surface: int) -> None:
        """Fill a polygon of (column, row) points, in pixels of the picture."""
        scaled = [(SUPERSAMPLING * u, SUPERSAMPLING * v) for u, v in points]
        self._draw.polygon(scaled, fill=(*colour, surface))

    def ellipse(self, centre: Point, radii: Point, colour: Colour, surface: int) -> None:
        """Fill an axis-parallel ellipse; centre and radii are (column, row), in pixels of the picture."""
        (u, v), (across, down) = centre, radii
        box = (u - across, v - down, u + across, v + down)
        self._draw.ellipse([SUPERSAMPLING * edge for edge in box], fill=(*colour, surface))

    def solid(self, points: Sequence[tuple[float, float, float]], colour: Colour, surface: int) -> None:
        """Fill a polygon of world points (x, y, z), in metres."""
        project = self.camera.project
        self.polygon([project(x, y, z if z > NEAR else NEAR) for x, y, z in points], colour, surface)

    def disc(self, x: float, y: float, z: float, radii: Point, colour: Colour, surface: int) -> None:
        """Fill an ellipse that faces the camera; radii are (across, up), in metres."""
        scale = self.camera.focal / z
        self.ellipse(self.camera.project(x, y, z), (radii[0] * scale, radii[1] * scale), colour, surface)

    def shadow(self, points: Sequence[tuple[float, float]], strength: float = 1.0) -> None:
        """Darken a polygon of ground points (x, z), in metres."""
        if strength <= 0:
            return
        projected = [self.camera.project(x, 0.0, max(z, NEAR)) for x, z in points]
        self._shadow_draw.polygon(
            [(SUPERSAMPLING * u, SUPERSAMPLING * v) for u, v in projected], fill=int(255 * strength)
        )

    def colours(self) -> NDArray[np.float32]:
        """The picture so far, antialiased, float32 [H, W, 3] in 0..1."""
        return np.asarray(self._picture.reduce(SUPERSAMPLING), np.float32)[..., :3] / np.float32(255)

    def surfaces(self) -> NDArray[np.uint8]:
        """The surface at the centre of every pixel, uint8 [H, W]."""
        middle = SUPERSAMPLING // 2
        return np.asarray(self._picture)[middle::SUPERSAMPLING, middle::SUPERSAMPLING, 3]

    def shadows(self) -> NDArray[np.float32]:
        """Share of the sun's light that is taken away, float32 [H, W] in 0..1."""
        return np.asarray(self._shadow.reduce(SUPERSAMPLING), np.float32) / np.float32(255)
