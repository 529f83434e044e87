"""Nsight Compute, one launch of each main kernel: how near it is to the card's limits, and what it waits for."""

from __future__ import annotations

import csv
import functools
import io
import re
from typing import Any

from . import tools
from .case import Case, Data, DidNotRun
from .device import Device

BACKENDS = ("cuda", "triton")
SECONDS = 45.0
KERNELS = "hakd|segmentation|weight_gradients|project|finish|scores"
SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "InstructionStats")
LOCAL = ("smsp__inst_executed_op_local_ld.sum", "smsp__inst_executed_op_local_st.sum")
# Columns of the report by ncu's names of the metrics.
SHOWN = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "lts__t_sector_hit_rate.pct": "L2 hits",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "sm__maximum_warps_per_active_cycle_pct": "of possible",
    "launch__registers_per_thread": "registers",
    "sm__inst_executed.avg.per_cycle_active": "IPC",
    "smsp__inst_executed.sum": "instructions",
    LOCAL[0]: "local loads",
    LOCAL[1]: "local stores",
    "stalls": "cycles of an instruction that warps wait, by cause",
}
STALL = re.compile(r"issue_stalled_(\w+?)_per_issue_active\.ratio$")


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0


def parse(output: str) -> list[dict[str, Any]]:
    """Of the raw page, a row for each launch: "kernel", every metric with its unit, and the longest "stalls"."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    head, *rows = csv.reader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"'))))
    units = dict(zip(head, rows.pop(0), strict=False)) if rows and not rows[0][0] else {}
    launches = []
    for row in rows:
        found = dict(zip(head, row, strict=False))
        named = {m[1]: value for name, value in found.items() if (m := STALL.search(name))}
        stalls = {cause: _number(value) for cause, value in named.items() if cause != "selected"}
        longest = sorted(stalls, key=lambda cause: -stalls[cause])[:3]
        launches.append({
            "kernel": found.get("Kernel Name", "?").split("(")[0],
            **{name: f"{value} {units.get(name, '')}".strip() for name, value in found.items() if "__" in name},
            "stalls": ", ".join(f"{cause} {stalls[cause]:.1f}" for cause in longest),
        })  # fmt: skip
    return launches


def profile(backend: str, device: Device) -> Data:
    target = tools.python("shown", backend, "full")
    log = tools.folder() / "ncu.csv"
    program = tools.watcher("ncu", target, device.kind != "cpu", SECONDS, log)
    chosen = [part for section in SECTIONS for part in ("--section", section)]
    command = [program, "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none",
               "--kernel-name", f"regex:{KERNELS}", *chosen]  # fmt: skip
    done = tools.run([*command, "--metrics", ",".join(LOCAL), *target], SECONDS, log)
    if not parse(done.output) and "metric" in done.output.lower() and done.status is not None:
        done = tools.run([*command, *target], SECONDS, log)  # a version that does not know these
    launches = parse(done.output)
    if not launches:
        reason = done.refusal() or (f"cut after {SECONDS:.0f} s" if done.status is None else done.tail(1))
        raise DidNotRun(f"{reason} (ncu.csv)")
    return {"detail": f"{len(launches)} launches", "backend": backend, "launches": launches}


def cases() -> list[Case]:
    return [Case(f"ncu/{backend}", functools.partial(profile, backend), backend, rehearse=backend == "cuda",
                 limit=2 * SECONDS) for backend in BACKENDS]  # fmt: skip
