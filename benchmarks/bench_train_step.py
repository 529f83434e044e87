"""A whole distillation step, and its loss alone, with pytest-benchmark: ``pytest benchmarks/bench_train_step.py``."""

import pytest

from .cases import TRAIN_STEPS
from .steps import fused_backends


@pytest.mark.parametrize("backend", ["reference", *fused_backends()])
@pytest.mark.parametrize("part", ["step", "loss"])
@pytest.mark.parametrize("name", TRAIN_STEPS)
def bench_train_step(name, part, backend, compare):
    from .distillation import Distillation  # needs the trainer's packages

    case = TRAIN_STEPS[name]
    pixels = case.batch * case.crop[0] * case.crop[1]
    compare(f"{name}, {part}", "both", pixels * case.num_classes, getattr(Distillation(case), part)(backend))
