"""``python -m benchmarks.bench_pixel_losses``: time and memory of the pixel losses, forward and backward."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from . import memory, timing
from .cases import PIXEL_LOSSES, PROVIDERS, make_step

MIB = 2**20


def run(cases: Sequence[str], rounds: int, threads: int, with_memory: bool) -> list[dict]:
    """One row per case: milliseconds of each provider, the fused backend's ratios, peak memory in bytes."""
    torch.set_num_threads(threads)
    rows = []
    for name in cases:
        case = PIXEL_LOSSES[name]
        torch._dynamo.reset()
        times = timing.measure({p: make_step(case, p) for p in PROVIDERS}, rounds)
        fused = times["cpu"].median
        row = {
            "case": name,
            "elements": case.elements,
            "milliseconds": {p: [1e3 * t.median, 1e3 * t.low, 1e3 * t.high] for p, t in times.items()},
            "ns_per_element": 1e9 * fused / case.elements,
            "times_reference": times["reference"].median / fused,
            "times_compile": times["compile"].median / fused,
        }
        if with_memory:
            row["memory"] = {p: memory.measure_fresh(name, p, threads) for p in ("reference", "cpu")}
        rows.append(row)
    return rows


def _ms(values: list[float]) -> str:
    median, low, high = values
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    head = ["case", "reference ms", "compile ms", "cpu ms (quartiles)", "ns/element", "x reference", "x compile"]
    with_memory = "memory" in rows[0]
    if with_memory:
        head += ["reference MiB (resident)", "cpu MiB (resident)", "share (resident)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        ms = row["milliseconds"]
        cells = [
            row["case"], f"{ms['reference'][0]:.3g}", f"{ms['compile'][0]:.3g}", _ms(ms["cpu"]),
            f"{row['ns_per_element']:.2f}", f"{row['times_reference']:.1f}", f"{row['times_compile']:.1f}",
        ]  # fmt: skip
        if with_memory:
            eager, ours = row["memory"]["reference"], row["memory"]["cpu"]
            cells += [f"{m['allocator'] / MIB:.1f} ({m['resident'] / MIB:.1f})" for m in (eager, ours)]
            shares = (ours[k] / max(eager[k], 1) for k in ("allocator", "resident"))
            cells.append("{:.1%} ({:.1%})".format(*shares))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=PIXEL_LOSSES, default=list(PIXEL_LOSSES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--json", help="also write the rows there")
    arguments = parser.parse_args(argv)
    rows = run(arguments.cases, arguments.rounds, arguments.threads, arguments.memory)
    print(f"Forward and backward, float32, one run side by side, medians of {arguments.rounds} interleaved rounds.")
    print(timing.machine() + "\n")
    print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": timing.machine(), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
