"""What the suites share: pytest-benchmark times a step, the group puts the providers of a case side by side.

``pytest benchmarks/bench_pixel_losses.py -k "tiny and both"``. pytest-benchmark runs one test after the other; the
numbers of docs/performance.md come from ``benchmarks.run``, which interleaves the providers of a case.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from .steps import Step
from .timing import machine

SECONDS = 0.2  # short steps get as many rounds as fit
Compare = Callable[[str, str, int, Step], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=2, help="threads of torch")
    parser.addoption("--rounds", type=int, default=5, help="least rounds of every benchmark")


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Compare:
    """Times one mode of a step: ``compare(group, mode, elements, step)``."""
    torch.set_num_threads(request.config.getoption("--threads"))
    torch._dynamo.reset()

    def run(group: str, mode: str, elements: int, step: Step) -> None:
        benchmark.group = f"{group}, {mode}"
        benchmark.extra_info.update(machine(), elements=elements)
        step()
        start = time.perf_counter()
        step()
        short = min(int(SECONDS / (time.perf_counter() - start)), 200)
        target = {"fwd": step.forward, "bwd": step.backward, "both": step}[mode]
        prepare = step.forward if mode == "bwd" else step.release
        rounds = max(request.config.getoption("--rounds"), short)
        benchmark.pedantic(target, setup=prepare, rounds=rounds, warmup_rounds=1)

    return run
