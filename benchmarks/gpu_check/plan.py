"""Which stages there are, in which order, and how the time is divided.

Stages of a wave run side by side, waves follow each other, what tells most comes first. A wave may take its share and
whatever the waves before it left over, never what those after it need: the report is complete by the deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEADLINE = 400.0  # seconds that the shares below add up to
REPORT = 5.0  # of these for the end


@dataclass(frozen=True)
class Stage:
    """Cases of ``source`` ("module:function") in so many ``workers``. ``share``: seconds of DEADLINE. ``interpreted``:
    rehearsed in Triton's interpreter. ``niceness``: how far its processes stand back behind others'."""

    name: str
    source: str
    workers: int
    share: float
    interpreted: bool = False
    niceness: int = 0


def _stage(name: str, module: str, workers: int, share: float, interpreted: bool = False, niceness: int = 0) -> Stage:
    return Stage(name, f"benchmarks.gpu_check.{module}", workers, share, interpreted, niceness)


WAVES: tuple[tuple[Stage, ...], ...] = (
    (_stage("machine", "machine:cases", 1, 20),),
    (  # the next wave waits for the build, so that it goes first where cores are few
        _stage("build", "build:cases", 1, 170),
        _stage("triton", "suite:triton_cases", 12, 170, interpreted=True, niceness=10),
    ),
    (
        _stage("cuda", "suite:cuda_cases", 5, 75),
        _stage("sanitizer", "sanitizer:cases", 6, 75),
        _stage("predicted", "predicted:cases", 2, 75),
    ),
    (_stage("times", "times:cases", 1, 50, interpreted=True),),
    (_stage("ncu", "ncu:cases", 1, 35),),
    (_stage("tilings", "tilings:cases", 1, 20, interpreted=True),),
    (_stage("compiled", "times:compiled_cases", 1, 25),),
)  # fmt: skip


def share(wave: Sequence[Stage]) -> float:
    return max((stage.share for stage in wave), default=0.0)


def limit(position: int, waves: Sequence[Sequence[Stage]], deadline: float, spent: float) -> float:
    """Seconds for ``waves[position]``, begun ``spent`` seconds after the start: all but what the later ones need."""
    scale = deadline / (REPORT + sum(map(share, waves)))
    later = scale * (REPORT + sum(share(wave) for wave in waves[position + 1 :]))
    return deadline - spent - later
