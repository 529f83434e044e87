"""The GPU chapter of docs/performance.md, from the results of a check and from nothing else.

    python -m benchmarks.gpu_check.chapter runs/gpu [--page docs/performance.md]

Without measurements the chapter says that there are none. ``make bench`` keeps the chapter that it finds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import records, tables
from .tables import Found

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
TITLE = "## On a GPU\n"
NOT_RUN = f"""{TITLE}
No kernel has been run on a GPU yet: there are no times, and what docs/cuda.md and docs/triton.md predict is no
measurement. `make gpu-check` measures where there is a GPU, `python -m benchmarks.gpu_check.chapter` writes it here.
"""
TIMES = """\
Forward and backward, medians by CUDA events with their quartiles; inputs rotate over more bytes than the second-level
cache holds. "Replayed": from a CUDA graph, without the host. GB/s are the least bytes that a step moves (inputs once,
gradients once) over the replayed time, beside a copy's. Predicted: by benchmarks/gpu_model.py, a lower bound. Eager and
torch.compile compute the float32 case.
"""


def text(found: Found) -> str:
    """The chapter."""
    measured = tables.measured(found)
    if not any(name.startswith("times/") for name in measured):
        return NOT_RUN
    parts = [TITLE, "Measured by `make gpu-check`.\n", tables.machine(measured), TIMES, tables.times(measured)]
    for title, table in (("Tilings", tables.tilings(measured)), ("Nsight Compute", tables.profiles(measured))):
        if table:
            parts.append(f"### {title}\n\n{table}")
    return "\n".join(parts)


def kept(page: str) -> str:
    """The chapter of a page, markers included; of a page without one, that there is none."""
    start, end = page.find(BEGIN), page.find(END)
    return page[start : end + len(END)] if 0 <= start < end else mark(NOT_RUN)


def mark(chapter: str) -> str:
    return f"{BEGIN}\n{chapter}\n{END}"


def replace(page: str, chapter: str) -> str:
    """``page`` with that chapter in place of its own, or at its end."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{mark(chapter)}\n"
    return page.replace(kept(page), mark(chapter))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what benchmarks.gpu_check wrote")
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args(argv)
    results = options.folder / records.RESULTS
    if not results.exists():
        parser.error(f"{results} is not there")
    found = records.latest(records.read(results))
    options.page.write_text(replace(options.page.read_text(), text(found)))
    print(options.page)


if __name__ == "__main__":
    main()
