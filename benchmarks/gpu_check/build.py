"""Builds the libraries in place, for this card alone, without a network and without pip."""

from __future__ import annotations

import os
import sys

from . import tools
from .case import Case, Data, DidNotRun, Wrong
from .device import Device

LIMIT = 240.0
ASK = """
import sys, hetero_kernels
hetero_kernels.show_config()
from hetero_kernels import native
problem = native.problem("cuda")
sys.exit(f"the CUDA library does not load: {problem}" if problem and sys.argv[1] == "cuda" else 0)
"""


def architectures(device: Device) -> str:
    """In CMake's notation."""
    if chosen := os.environ.get("HETERO_KERNELS_CUDA_ARCHS"):
        return chosen
    capability = device.facts()["capability"]
    if capability is None:
        raise DidNotRun("no GPU, and HETERO_KERNELS_CUDA_ARCHS names no architecture")
    return f"{capability[0]}{capability[1]}-real"


def build(device: Device) -> Data:
    chosen = architectures(device)
    folder = str(tools.ROOT / "build" / "gpu_check")
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", folder, "--build-lib", folder]
    done = tools.run_into(tools.folder() / "build.log", command, LIMIT, HETERO_KERNELS_CUDA="1",
                          HETERO_KERNELS_CUDA_ARCHS=chosen)  # fmt: skip
    if done.status is None:
        raise Wrong(f"not done after {LIMIT:.0f} s (build.log)", {"tail": done.tail()})
    if done.status:
        lines = done.output.strip().splitlines() or ["no output"]
        raise Wrong(f"{lines[-1]} (build.log)", {"tail": done.tail(30)})
    asked = tools.run([sys.executable, "-c", ASK, device.kind], 60, tools.folder() / "build.log")
    if asked.status:
        raise Wrong(asked.tail(1), {"tail": asked.tail(30)})
    return {"detail": f"for {chosen}", "config": asked.output}


def cases() -> list[Case]:
    return [Case("build/CUDA library", build, rehearse=True, limit=LIMIT + 60)]
