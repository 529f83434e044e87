"""Random draws of one scene, all from one numpy generator."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Randomness:
    """Scalars and arrays from a generator, identified by the integers of its key."""

    def __init__(self, *key: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.generator.random()

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.generator.random() < probability

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + int((high - low + 1) * self.generator.random())

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(len(options) * self.generator.random())]

    def normal(self, *shape: int) -> NDArray[np.float32]:
        """Standard normal numbers."""
        return self.generator.standard_normal(shape, dtype=np.float32)
