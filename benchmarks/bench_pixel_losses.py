"""The losses on logits, with pytest-benchmark: ``pytest benchmarks/bench_pixel_losses.py``."""

import pytest

from .cases import PIXEL_LOSSES, VARIANTS
from .steps import MODES, fused_backends, make_step, providers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, provider", [(name, p) for name, case in PIXEL_LOSSES.items() for p in providers(case)])
def bench_pixel_losses(name, provider, mode, compare):
    case = PIXEL_LOSSES[name]
    compare(name, mode, case.elements, make_step(case, provider))


@pytest.mark.parametrize("provider", fused_backends())
@pytest.mark.parametrize("group, label", [(group, v.label) for group, variants in VARIANTS.items() for v in variants])
def bench_variants(group, label, provider, compare):
    (case,) = (v.case for v in VARIANTS[group] if v.label == label)
    compare(group, "both", case.elements, make_step(case, provider))
