"""Times of several steps side by side: interleaved rounds, medians, quartiles."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

# mode: [median, lower quartile, upper quartile] in seconds, and "rounds": their number
Times = dict[str, Any]


class Timed(Protocol):
    """What can be measured: a forward and a backward that belong together."""

    def forward(self) -> object: ...

    def backward(self) -> object: ...


def _both(step: Timed) -> tuple[float, float]:
    """Seconds of one forward and of its backward."""
    start = time.perf_counter()
    step.forward()
    middle = time.perf_counter()
    step.backward()
    return middle - start, time.perf_counter() - middle


def measure(
    steps: Mapping[str, Timed], seconds: float = 6.0, rounds: tuple[int, int] = (3, 15), minimum: float = 0.02
) -> dict[str, Times]:
    """Times of forward, backward and both, in seconds.

    Every step is warmed up, then they run in turns, so that a busy moment of the machine hits all. Steps shorter than
    ``minimum`` seconds are repeated within a round.

    Args:
        steps: by name.
        seconds: that all rounds together should take, within ``rounds`` (least and largest number).
    """
    repeats, expected = {}, 0.0
    for name, step in steps.items():
        _both(step)
        once = max(sum(_both(step)), 1e-7)
        repeats[name] = max(1, round(minimum / once))
        expected += repeats[name] * once
    count = min(max(int(seconds / expected), rounds[0]), rounds[1])
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            forward, backward = (sum(t) for t in zip(*(_both(step) for _ in range(repeats[name])), strict=True))
            samples[name].append((forward / repeats[name], backward / repeats[name]))
    return {
        name: {
            "fwd": quartiles([f for f, _ in values]),
            "bwd": quartiles([b for _, b in values]),
            "both": quartiles([f + b for f, b in values]),
            "rounds": count,
        }
        for name, values in samples.items()
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return [middle, low, high]


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    model, cores = platform.processor() or platform.machine(), os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    found = {
        "processor": model,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hetero-kernels": _version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _version() -> str:
    try:
        return metadata.version("hetero-kernels")
    except metadata.PackageNotFoundError:
        return "source tree"


def describe(found: Mapping[str, Any]) -> str:
    """A line for the head of a table."""
    gpu = f", {found['gpu']}" if "gpu" in found else ""
    return (
        f"{found['processor']} ({found['cores']} cores, {found['vectors']}){gpu}, threads: {found['threads']}, "
        f"{found['system']}, torch {found['torch']}, python {found['python']}, hetero-kernels {found['hetero-kernels']}"
    )
