"""``show_config``: which backends there are, what they were built with and why one is missing."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from . import native
from .ops import backends
from .options import BACKENDS


def _version() -> str:
    try:
        return metadata.version("hetero-kernels")
    except metadata.PackageNotFoundError:
        return "not installed (imported from a source tree)"


def describe_config() -> str:
    """The text that :func:`show_config` prints."""
    lines = [
        f"hetero-kernels {_version()}",
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()} {platform.system()}, "
        f"{torch.get_num_threads()} threads",
        "backends:",
    ]
    for backend in BACKENDS:
        problem = backends.unavailable(backend)
        lines.append(f"  {backend:<10} {'available' if problem is None else 'not available: ' + problem}")
        if backend == "cuda" and problem is None:
            each = [native.problem("cuda", f"cuda:{i}") for i in range(torch.cuda.device_count())]
            lines += [f"  {'':<10} not for cuda:{i}: {problem}" for i, problem in enumerate(each) if problem]
    if forced := os.environ.get("HETERO_KERNELS_BACKEND"):
        known = "" if forced in BACKENDS else ", which is no backend"
        lines.append(f"HETERO_KERNELS_BACKEND={forced}{known}: every call without backend= uses it")
    host = native.host_module()
    if host is None:
        lines.append("build: the compiled parts are not installed; only the reference runs")
    else:
        built = host.build_info()
        architectures = built["cuda_architectures"]
        lines.append("build: " + ", ".join(f"{key} {built[key] or 'none'}" for key in ("torch", "compiler", "cuda")))
        if architectures:
            lines.append(f"cuda architectures: {', '.join(architectures.split())}")
        try:
            active = host.active_instruction_set()
        except RuntimeError as error:
            active = f"none: {error}"
        lines.append(
            f"cpu instruction set: {active} "
            f"(this machine has {', '.join(host.instruction_sets())}; HETERO_KERNELS_CPU_ISA forces one)"
        )
    return "\n".join(lines)


def show_config() -> None:
    """Prints versions, backends (with the reason where one is not available) and build facts."""
    print(describe_config())
