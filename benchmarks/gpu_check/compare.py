"""Our results beside eager's and float64's: relative L2 within absolute bounds.

A bound gives way only where eager in the same dtype is itself beyond it, to twice eager's error; the record says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .case import Wrong
from .device import Device
from .problems import Inputs, Problem, Results, make_inputs, run

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TINY = 1e-20  # where both networks agree to 1e-30, "0" and "4e-127" are the same


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """NaN and infinity in places of their own count: NaN then."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / (expected.double().abs() + TINY).norm()) if expected.numel() else 0.0


def condition(problem: Problem, inputs: Inputs, exact: Results) -> dict[str, float]:
    """How much larger the pixels of a 0-dim loss or term are than their sum: l_n of hakd has both signs, and an error
    is one of the pixels'."""
    from hetero_kernels import reference

    if exact["loss"].dim() or problem.loss == "segmentation_loss":
        return {}
    options = {**problem.options, "reduction": "none"}
    per_pixel = replace(problem, options=options, wanted="none")
    maps = run(getattr(reference, problem.loss), per_pixel, inputs, torch.float64)
    found = {k: float(maps[k].abs().sum() / maps[k].sum().abs().clamp(min=TINY)) for k in ("loss", "hakd")}
    return {k: max(1.0, v) for k, v in found.items()}


def judge(
    ours: Results, eager: Results, exact: Results, conditions: dict[str, float] | None = None, least: float = 0.0
) -> dict[str, Any]:
    """Every result's errors, as numbers; raises :class:`Wrong` where one is beyond its dtype's bound, or beyond
    ``least`` where that is more."""
    rows: dict[str, dict[str, Any]] = {}
    wrong = []
    for name, expected in exact.items():
        actual, plain = ours[name], eager[name]
        if actual.shape != plain.shape or actual.dtype != plain.dtype:
            wrong.append(f"{name} is {actual.dtype} {list(actual.shape)}, eager's {plain.dtype} {list(plain.shape)}")
            continue
        worse = (conditions or {}).get(name, 1.0)
        error, of_eager = (relative_l2(x, expected) / worse for x in (actual, plain))
        bound = max(BOUNDS[plain.dtype], least)
        relaxed = error > bound and of_eager > bound
        allowed = 2 * of_eager if relaxed else bound
        rows[name] = {"error": error, "eager": of_eager, "bound": bound, "relaxed": relaxed, "condition": worse}
        if not error <= allowed:  # NaN is wrong
            wrong.append(f"{name}: {error:.2e}, allowed {allowed:.1e} (eager {of_eager:.1e})")
    if wrong:
        raise Wrong("; ".join(wrong), {"results": rows})
    worst = max((row["error"] / row["bound"] for row in rows.values()), default=0.0)
    relaxed_ones = [name for name, row in rows.items() if row["relaxed"]]
    detail = f"worst {worst:.2f} of its bound"
    if relaxed_ones:
        detail += f"; beyond it, as eager is: {', '.join(relaxed_ones)}"
    return {"detail": detail, "worst": worst, "results": rows}


def check(problem: Problem, backend: str, device: Device, seed: int = 0) -> dict[str, Any]:
    """One problem by a backend, by eager in its own dtypes and in float64, from the same rounded inputs."""
    from hetero_kernels import functional, reference

    inputs = make_inputs(problem, device.device, seed)
    plain = getattr(reference, problem.loss)
    exact = run(plain, problem, inputs, torch.float64)
    conditions = condition(problem, inputs, exact)
    eager = run(plain, problem, inputs)
    ours = run(getattr(functional, problem.loss), problem, inputs, backend=device.backend(backend))
    return judge(ours, eager, exact, conditions)
