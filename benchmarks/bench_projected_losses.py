"""The losses on projected features, with pytest-benchmark: ``pytest benchmarks/bench_projected_losses.py``."""

import pytest

from .cases import PROJECTED_LOSSES
from .steps import MODES, make_step, providers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name, provider", [(name, p) for name, case in PROJECTED_LOSSES.items() for p in providers(case)]
)
def bench_projected_losses(name, provider, mode, compare):
    case = PROJECTED_LOSSES[name]
    compare(name, mode, case.elements, make_step(case, provider))
