"""What runs over several seeds say of methods: mean, spread, paired differences with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import NamedTuple

STANDARD_ERRORS = 2.0  # a smaller difference is not claimed


class Difference(NamedTuple):
    """A method minus another one over the seeds that both have."""

    mean: float | None
    """Mean difference; None without a common seed."""
    standard_error: float | None
    """Of the mean; None for fewer than two common seeds."""
    seeds: int
    """Number of common seeds."""

    @property
    def verdict(self) -> str:
        """ "better" or "worse" from two standard errors on, else "no claim"."""
        if self.mean is None or self.standard_error is None or self.mean == 0:
            return "no claim"
        if abs(self.mean) < STANDARD_ERRORS * self.standard_error:
            return "no claim"
        return "better" if self.mean > 0 else "worse"


def paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> Difference:
    """Of two methods' results by seed: the same seed means the same student at the start and the same batches."""
    differences = [value - others[seed] for seed, value in values.items() if seed in others]
    if not differences:
        return Difference(None, None, 0)
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Difference(fmean(differences), error, len(differences))


def mean_and_spread(values: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation over the seeds; None where there are too few values."""
    found = list(values.values())
    return (fmean(found) if found else None), (stdev(found) if len(found) > 1 else None)
