"""report.md: what a reader wants to know in two minutes, the verdict first."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from . import tables
from .device import REHEARSAL
from .records import DID_NOT_RUN, FAILED, PASSED, Record
from .tables import Found, markdown

REHEARSED = "A rehearsal without a GPU: nothing below says anything of one.\n"


def verdict(found: Found) -> str:
    """The first line."""
    cases = [r for r in found.values() if r.stage != "run"]
    counts = {status: sum(r.status == status for r in cases) for status in (FAILED, DID_NOT_RUN, PASSED)}
    word = "FAILED" if counts[FAILED] else "INCOMPLETE" if counts[DID_NOT_RUN] or not cases else "PASSED"
    devices = sorted({r.device for r in cases if r.device and r.device != REHEARSAL}) or ["no GPU"]
    numbers = ", ".join(f"{count} {status}" for status, count in counts.items() if count or status == PASSED)
    return f"# GPU check: {word} ({numbers}; {', '.join(devices)})\n"


def failures(found: Found) -> str:
    rows = [(r.name, r.detail[:300], f"{r.seconds:.0f}") for r in found.values() if r.status == FAILED]
    return markdown(["failed", "what", "seconds"], rows)


def missing(found: Found) -> str:
    """By reason, those with most cases first."""
    by_reason: dict[str, list[Record]] = defaultdict(list)
    for record in found.values():
        if record.status == DID_NOT_RUN:
            by_reason[record.detail].append(record)
    rows = []
    for reason, records in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        names = [r.name for r in records]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        rows.append((reason[:300], len(names), "; ".join(names[:3]) + more))
    return markdown(["did not run: why", "cases", "which"], rows)


def stages(found: Found) -> str:
    rows = []
    for name in dict.fromkeys(r.stage for r in found.values() if r.stage != "run"):
        of_stage = [r for r in found.values() if r.stage == name and not r.name.startswith("stage/")]
        whole = found.get(f"stage/{name}")
        counts = (sum(r.status == status for r in of_stage) for status in (PASSED, FAILED, DID_NOT_RUN))
        rows.append((name, f"{whole.seconds:.0f}" if whole else "-", *counts))
    return markdown(["stage", "seconds", PASSED, FAILED, DID_NOT_RUN], rows)


def text(found: Found) -> str:
    run = found.get("run")
    parts = [verdict(found)]
    if run is not None and not tables.measured(found):
        parts.append(REHEARSED if run.data.get("rehearsal") else "")
    parts += [failures(found), missing(found)]
    rehearsed = "" if tables.measured(found) else " (rehearsed)"
    for title, table in (
        ("Machine", tables.machine(found)),
        ("Stages", stages(found)),
        ("Times, forward and backward", tables.times(found)),
        ("Tilings of the Triton kernels", tables.tilings(found)),
        ("Nsight Compute", tables.profiles(found)),
        ("Accuracy: nearest to the bounds", tables.accuracy(found)),
    ):
        if table:
            parts.append(f"## {title}{rehearsed}\n\n{table}")
    return "\n".join(part for part in parts if part)


def write(found: Found, path: Path) -> None:
    """At once or not at all: whoever reads meanwhile sees a whole report."""
    part = path.with_suffix(".part")
    part.write_text(text(found))
    os.replace(part, path)
