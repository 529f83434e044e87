"""Times of several providers side by side: interleaved rounds, medians, spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per step."""

    median: float
    low: float  # quartiles of the rounds
    high: float


def measure(steps: dict[str, Callable[[], object]], rounds: int = 7, minimum: float = 0.02) -> dict[str, Timing]:
    """Warms every step up, then runs them in turns, so that a busy moment of the machine hits all. Steps shorter
    than ``minimum`` seconds are repeated within a round."""
    repeats = {}
    for name, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        repeats[name] = max(1, round(minimum / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    result = {}
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        result[name] = Timing(statistics.median(values), low, high)
    return result


def machine() -> str:
    """Processor, threads and versions, for the head of a table."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]} ({len(names)} cores)" if names else model
    return (
        f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}), python {platform.python_version()}"
    )
