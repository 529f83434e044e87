"""HeteroAKDLoss at the paper's pairs, with pytest-benchmark: ``pytest benchmarks/bench_whole_loss.py``."""

import pytest

from .cases import WHOLE_LOSSES
from .steps import MODES, make_step, providers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, provider", [(name, p) for name, case in WHOLE_LOSSES.items() for p in providers(case)])
def bench_whole_loss(name, provider, mode, compare):
    case = WHOLE_LOSSES[name]
    compare(name, mode, case.elements, make_step(case, provider))
