"""What every painter of a scene is handed."""

from dataclasses import dataclass

from heteroakd.data.street.canvas import NEAR, Canvas, Colour, shade
from heteroakd.data.street.randomness import Randomness
from heteroakd.data.street.weather import Weather


@dataclass(frozen=True)
class Stage:
    """The canvas, the weather and the source of randomness of one scene."""

    canvas: Canvas
    weather: Weather
    random: Randomness

    def face(self, colour: Colour, normal: tuple[float, float]) -> Colour:
        """A colour on a wall with the given normal (x, z): lighter if it faces the sun, darker otherwise."""
        across, along = self.weather.sun
        length = max((across**2 + along**2) ** 0.5, 1e-6)
        towards_sun = -(normal[0] * across + normal[1] * along) / length
        return shade(colour, 1 + 0.3 * self.weather.sharpness * towards_sun)

    def cast(self, x: float, z: float, half_width: float, height: float, depth: float = 0.0) -> None:
        """Cast the shadow of an upright object that stands at (x, z), `depth` deep; in metres."""
        across, along = self.weather.sun
        reach = min(height, 12.0)
        dx, dz = across * reach, along * reach
        strength = self.weather.sharpness
        left, right = x - half_width, x + half_width
        self.canvas.shadow([(left, z), (right, z), (right + dx, z + dz), (left + dx, z + dz)], strength)
        if depth > 0:
            back = z + depth
            self.canvas.shadow([(left, z), (left, back), (left + dx, back + dz), (left + dx, z + dz)], strength)
            self.canvas.shadow([(right, z), (right, back), (right + dx, back + dz), (right + dx, z + dz)], strength)
            self.canvas.shadow([(left, max(z, NEAR)), (right, max(z, NEAR)), (right, back), (left, back)], strength)
