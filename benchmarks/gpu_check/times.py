"""Times of forward and backward, by events, medians: calls as they are, and replayed from a CUDA graph.

Inputs rotate over more bytes than the second-level cache holds. Memory is the peak beyond the inputs.
"""

from __future__ import annotations

import functools
import math
from statistics import median, quantiles
from typing import Any

import torch

from .case import Case, Data, DidNotRun
from .device import MIB, Device, out_of_memory
from .paper import SIZES, least_bytes, make_set, make_step, sized

BACKENDS = ("cuda", "triton")
SECONDS = 0.2  # of one kind of measurement
MOST_SETS = 16
COMPILED = ("hakd K=19", "CE + KD K=19", "whole loss, R101 -> R18, K=19")


def rotation(moved: int, device: Device) -> int:
    """How many sets of inputs: twice and a half the second-level cache's bytes, or two at least."""
    cache = device.facts().get("L2_cache_size") or 64 * MIB
    return max(2, min(MOST_SETS, math.ceil(2.5 * cache / max(moved, 1)) + 1))


def spread(values: list[float]) -> list[float]:
    """Median, lower and upper quartile."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return [median(values), low, high]


def repeats_for(works: list, device: Device) -> int:
    least, most = device.repeats
    once = median(device.times(works, min(3, least))[0]) / 1e3
    return max(least, min(most, int(SECONDS / max(once, 1e-6))))


def measure(name: str, dtype: str, provider: str, device: Device) -> Data:
    what = sized(name, dtype, device)
    given = [make_set(what, device)]
    moved = least_bytes(what, given[0])
    given += [make_set(what, device, seed) for seed in range(1, rotation(moved, device))]
    steps = [make_step(what, one, provider, device) for one in given]
    row: dict[str, Any] = {"case": name, "dtype": dtype, "provider": provider, "bytes": moved, "sets": len(given)}
    try:
        for step in steps:
            step()
        repeats = repeats_for(steps, device)
        plain, row["host us"] = device.times(steps, repeats)
        row["ms"], row["repeats"] = spread(plain), repeats
        row["MiB"] = device.peak(steps[0]) / MIB
        if provider in BACKENDS:
            row |= _replayed(steps, device)
    except Exception as problem:
        if out_of_memory(problem):
            raise DidNotRun("out of memory") from None
        raise
    shown = row["graph ms"] if "graph ms" in row else row["ms"]
    row["detail"] = f"{row['ms'][0]:.3f} ms, replayed {shown[0]:.3f} ms, {row['host us']:.0f} us of the host"
    return row


def _replayed(steps: list, device: Device) -> dict[str, Any]:
    """All sets in one graph; milliseconds of one."""

    def everything() -> list[torch.Tensor]:
        return [x for step in steps for x in step().values()]

    replay, results = device.capture(everything)
    replay()
    times, _ = device.times([replay], repeats_for([replay], device))
    assert all(x.isfinite().all() for x in results), "a replayed graph's results are not finite"
    return {"graph ms": [t / len(steps) for t in spread(times)]}


def compiled(name: str, device: Device) -> Data:
    torch._dynamo.reset()
    if device.kind == "cpu":
        raise DidNotRun("needs a GPU")
    return measure(name, "float32", "compile", device)


def cases() -> list[Case]:
    """Ours in both dtypes; eager, which computes in float32 whatever comes in, in one."""
    found = []
    for dtype in ("float32", "bfloat16"):
        for name in SIZES:
            providers = (*BACKENDS, "reference") if dtype == "float32" else BACKENDS
            for provider in providers:
                found.append(Case(
                    f"times/{name}, {dtype}, {provider}", functools.partial(measure, name, dtype, provider),
                    provider if provider in BACKENDS else None,
                    rehearse=provider != "triton" or name == "CE K=19", limit=30,
                ))  # fmt: skip
    return found


def compiled_cases() -> list[Case]:
    return [Case(f"times/{name}, float32, compile", functools.partial(compiled, name), limit=60) for name in COMPILED]
