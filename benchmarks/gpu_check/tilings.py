"""Every tiling of the Triton kernels' tables: the same results, and how long each takes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

from . import compare
from .case import LIMITS, Case, Data
from .device import Device
from .paper import make_set, make_step, sized
from .problems import Problem
from .times import repeats_for, rotation

TUNED = ("hakd K=19", "CE + KD K=19", "projected K=19, stride 8", "hakd K=150", "projected K=150")
MOST = 4  # alternatives of an entry, the table's own among them
ROUNDING = 3e-6  # of sums in another order


def offered(problem: Problem, device: Device) -> tuple[Any, ...]:
    """The table's entry, then the alternatives."""
    from hetero_kernels.triton import tuning

    kind = tuning.family(device.device)
    if problem.loss != "projected_hakd_loss":
        return tuning.tilings(problem.classes, kind)
    pixels = problem.batch * problem.grids[0][0] * problem.grids[0][1]
    return tuning.feature_tilings(problem.classes, pixels, 4, device.device, kind)


@contextmanager
def chosen(problem: Problem, choice: Any) -> Iterator[None]:
    """Runs the problem's operator with that tiling."""
    from hetero_kernels.triton import pixel_losses, projected_losses

    module = projected_losses if problem.loss == "projected_hakd_loss" else pixel_losses
    function = getattr(module, problem.loss)
    with mock.patch.object(module, problem.loss, functools.partial(function.__wrapped__, choice)):
        yield


def _problem(name: str, device: Device) -> Problem:
    what = sized(name, "float32", device)
    assert isinstance(what, Problem)
    return what


def agree(name: str, index: int, device: Device) -> Data:
    """A tiling's results beside the table's; compiles it for the times."""
    problem = _problem(name, device)
    choices = offered(problem, device)
    if index >= len(choices):
        return {"detail": "the table has fewer"}
    given = make_set(problem, device)
    step = make_step(problem, given, "triton", device)
    expected = step()
    with chosen(problem, choices[index]):
        actual = step()
    exact = {k: v.double() for k, v in expected.items()}
    return {**compare.judge(actual, expected, exact, least=ROUNDING), "tiling": str(choices[index])}


def time_all(name: str, device: Device) -> Data:
    """Milliseconds of forward and backward by tiling."""
    problem = _problem(name, device)
    given = [make_set(problem, device)]
    moved = sum(x.numel() * x.element_size() for x in given[0].leaves.values())
    given += [make_set(problem, device, seed) for seed in range(1, rotation(moved, device))]
    steps = [make_step(problem, one, "triton", device) for one in given]
    rows: list[dict[str, Any]] = []
    for choice in offered(problem, device)[:MOST]:
        with chosen(problem, choice):
            try:
                steps[0]()
                milliseconds = median(device.times(steps, repeats_for(steps, device))[0])
            except Exception as problem_of_it:  # too much shared memory, say: the next may do
                rows.append({"tiling": str(choice), "ms": None, "why": f"{problem_of_it}"[:200]})
                if not device.healthy():
                    raise
                continue
        rows.append({"tiling": str(choice), "ms": milliseconds})
    found = [row for row in rows if row["ms"] is not None]
    if not found or rows[0]["ms"] is None:
        raise RuntimeError(f"the table's tiling does not run: {rows[0].get('why')}")
    fastest = min(found, key=lambda row: row["ms"])
    detail = f"the fastest takes {fastest['ms'] / rows[0]['ms']:.2f} of the table's: {fastest['tiling']}"
    return {"detail": detail, "case": name, "rows": rows}


def agreement() -> list[Case]:
    return [
        Case(f"triton/tiling {i} of {name}", functools.partial(agree, name, i), "triton",
             rehearse=name == "CE + KD K=19" and i == 1, limit=LIMITS["triton"])
        for name in TUNED
        for i in range(1, MOST)
    ]  # fmt: skip


def cases() -> list[Case]:
    return [Case(f"tilings/{name}", functools.partial(time_all, name), "triton", rehearse=name == "projected K=150")
            for name in TUNED]  # fmt: skip
