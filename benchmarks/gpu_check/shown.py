"""What the tools look at: our operators alone, a line printed after each.

python -m benchmarks.gpu_check.shown BACKEND small|full
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from . import calls, paper
from .device import Device, has_gpu, open_device

SMALL = tuple(calls.PROBLEMS)
FULL = ("hakd K=19", "CE + KD K=19", "projected K=19, stride 8", "whole loss, R101 -> R18, K=19")
REHEARSED = 3  # calls without a GPU
DONE = "shown: "


def steps(backend: str, size: str, device: Device) -> Iterator[tuple[str, Callable]]:
    names = SMALL if size == "small" else FULL
    for name in names if device.kind == "cuda" else names[:REHEARSED]:
        if size == "small":
            yield name, calls.make_step(name, device.device, device.backend(backend))
        else:
            what = paper.sized(name, "float32", device)
            yield name, paper.make_step(what, paper.make_set(what, device), backend, device)


def main() -> int:
    backend, size = sys.argv[1:3]
    device = open_device("cuda" if has_gpu() else "cpu")
    for name, step in steps(backend, size, device):
        if size == "full":
            step()  # compiles
            with device.profiled():
                step()
        else:
            step()
        device.synchronize()
        print(DONE + name, flush=True)
        device.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
