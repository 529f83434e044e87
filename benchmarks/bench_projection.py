"""The projectors of both networks alone, with pytest-benchmark: ``pytest benchmarks/bench_projection.py``."""

import pytest

from .cases import PROJECTIONS
from .steps import MODES, make_step, providers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, provider", [(name, p) for name, case in PROJECTIONS.items() for p in providers(case)])
def bench_projection(name, provider, mode, compare):
    case = PROJECTIONS[name]
    compare(name, mode, case.elements, make_step(case, provider))
