"""Peak memory of one step, beyond what was there before it: by torch's allocator and by the process's resident size.

Each measurement runs in a process of its own: ``python -m benchmarks.memory --case "hakd K=19" --provider cpu`` prints
one JSON object in bytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from .cases import PIXEL_LOSSES, PROVIDERS, Case, make_step


def _resident(peak: bool) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        key = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    """Lets the kernel's peak counter start again (Linux; elsewhere the peak since the start of the process counts)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def allocator_peak(step) -> int:
    """Largest sum of live allocations that torch's CPU allocator sees during ``step``."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure(case: Case, provider: str) -> dict[str, int]:
    """Peaks of this very process; call it in a fresh one."""
    tiny = replace(case, shape=(*case.shape[:2], 2, 2), size=(16, 16))
    make_step(tiny, provider)()  # libraries, threads and autograd are warm
    step = make_step(case, provider)
    if provider == "compile":
        step()  # compiles; the measured step then reuses the code
    _forget_peak()
    before = _resident(peak=False)
    step()
    resident = _resident(peak=True) - before
    return {"allocator": allocator_peak(step), "resident": resident}


def measure_fresh(case_name: str, provider: str, threads: int) -> dict[str, int]:
    """Runs :func:`measure` in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", case_name, "--provider", provider]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=PIXEL_LOSSES, required=True)
    parser.add_argument("--provider", choices=PROVIDERS, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(measure(PIXEL_LOSSES[arguments.case], arguments.provider)))


if __name__ == "__main__":
    main()
