"""How long the warps of a scheduler take for a loop whose instructions wait for each other. **Predicted**.

A scheduler issues an instruction a cycle, in order within a warp, from the next of its warps that can go on. A warp
waits for the cycles that the compiler put behind an instruction, which are the latencies of all that takes a fixed
number of them (4 for most arithmetic, more for tensor cores), for scoreboards that memory and special functions
release, and for the unit that the next instruction needs.

A loop's instructions all run, once a round, in the order of memory, those of options that a call does not have, too.
Not seen: caches (one latency for all of global memory), bank conflicts, barriers, waiting for asynchronous copies and
for warp groups' products, fetching instructions, a loop's surroundings.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

from .cards import Card
from .sass import NO_SCOREBOARD, Instruction

SCHEDULERS = 4  # of a multiprocessor
OPERANDS_READ = 10  # cycles, by a unit that has a queue
SPECIAL = frozenset({"MUFU", "I2F", "F2I", "F2F", "I2FP", "POPC", "FLO"})
# Generic accesses would be to shared memory that the compiler no longer knows for such, as what is global it does know;
# no kernel has any (test_compiled_pixel_losses.py).
SHARED = frozenset({"LDS", "STS", "LDSM", "SHFL", "ATOMS", "LDL", "STL", "LD", "ST"})
GLOBAL = frozenset({"LDG", "STG", "LDGSTS", "RED", "ATOMG"})
FLOAT = frozenset({"FFMA", "FADD", "FMUL", "IMAD", "HFMA2"})
TENSOR = frozenset({"HMMA", "IMMA"})
OTHER = frozenset({"BRA", "BSSY", "BSYNC", "EXIT", "NOP", "CALL", "RET", "WARPSYNC", "BAR", "DEPBAR", "LDGDEPBAR",
                   "LDC", "S2R", "R2UR", "HGMMA", "WARPGROUP", "YIELD"})  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """What executes an instruction of a warp: cycles until it takes the scheduler's next, and until it releases a
    scoreboard with the result; whether instructions queue for it, or warps wait."""

    name: str
    interval: int
    latency: int = 30
    queue: bool = False


@dataclass(frozen=True)
class Round:
    """``cycles``: in which each of the ``warps`` of a scheduler goes through a loop once."""

    cycles: float
    instructions: int  # of a warp
    warps: int

    @property
    def ipc(self) -> float:
        return self.instructions * self.warps / self.cycles


def unit(kind: str, card: Card) -> Unit:
    """Of an opcode."""
    if kind in SPECIAL:
        return Unit("special functions", 8, 22, queue=True)  # 16 lanes of a multiprocessor
    if kind in SHARED or kind in GLOBAL:  # one warp a cycle, of a multiprocessor
        return Unit("memory", SCHEDULERS, 500 if kind in GLOBAL else 30, queue=True)
    if kind in FLOAT:
        return Unit("float32", 128 // card.float32_lanes)
    if kind in TENSOR:  # m16n8k8 of tf32, m16n8k16 of halves
        return Unit("tensor cores", SCHEDULERS * 16 * 8 * 8 // card.tensor_multiplications)
    if kind in OTHER or kind.startswith("U"):
        return Unit("other", 0)
    return Unit("integers", 2)  # comparisons, selections and minima, too: 64 lanes of a multiprocessor


def cycles(loop: Sequence[Instruction], warps: int, card: Card, rounds: int) -> int:
    """Until every one of a scheduler's ``warps`` has been through the loop ``rounds`` times."""
    steps = [(i, unit(i.kind, card)) for i in loop]
    issued, ready = [0] * warps, [0] * warps  # a warp's instructions so far; the cycle for the next
    released = [[0] * (NO_SCOREBOARD + 1) for _ in range(warps)]
    free: dict[str, int] = collections.defaultdict(int)
    now, last = 0, warps - 1
    while True:
        candidates: list[tuple[int, int]] = []  # when a warp can go on, and its place in turn
        for turn in range(1, warps + 1):
            warp = (last + turn) % warps
            if issued[warp] < rounds * len(steps):
                instruction, by = steps[issued[warp] % len(steps)]
                at = max([now, ready[warp], *(released[warp][s] for s in instruction.waits)])
                candidates.append((at if by.queue else max(at, free[by.name]), turn))
        if not candidates:
            return max(ready)
        now, turn = min(candidates)
        last = (last + turn) % warps
        instruction, by = steps[issued[last] % len(steps)]
        begun = max(now, free[by.name])
        free[by.name] = begun + by.interval
        for scoreboard, after in ((instruction.result, by.latency), (instruction.operands_read, OPERANDS_READ)):
            released[last][scoreboard] = max(released[last][scoreboard], begun + after)
        issued[last] += 1
        ready[last] = now + max(instruction.stall, 1)
        now += 1


def simulate(loops: Sequence[Sequence[Instruction]], warps: int, card: Card) -> Round:
    """Of loops that have been running for some rounds, with ``warps`` on a multiprocessor."""
    first, later, mine = 2, 6, max(1, warps // SCHEDULERS)
    took = sum(cycles(loop, mine, card, later) - cycles(loop, mine, card, first) for loop in loops)
    return Round(took / (later - first), sum(map(len, loops)), mine)
