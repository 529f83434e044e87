"""What a call of the Triton backend costs the host, with a driver that starts nothing.

    python -m benchmarks.host_time                   # microseconds of a forward and a backward
    python -m benchmarks.host_time --against FOLDER  # and those of another checkout, in turns

Kernels are specialised, compiled for sm_90 and looked up by Triton's own launcher; what stands in for the driver takes
their arguments and returns. Tensors lie on the CPU: allocations and torch's own operators take a CPU's time, and the
choice of the current GPU is left out, as is the look at the labels, which only tensors on the CPU get.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROUNDS, CALLS = 15, 200
CASES = ("hakd, feature resolution", "hakd, label resolution", "CE + KD, label resolution")


class Idle:
    """A driver whose launches do nothing."""

    class utils:  # noqa: N801
        @staticmethod
        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
            return None, None, 0, 0, 1024

        @staticmethod
        def unload_module(module: object) -> None:
            pass

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024}

    @staticmethod
    def launcher_cls(source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def calls() -> dict[str, Callable[[], None]]:
    """Forward and backward of each case. The host does the same for all sizes; few classes compile sooner."""
    from triton.runtime import driver

    from hetero_kernels import functional
    from hetero_kernels.ops import backends
    from hetero_kernels.triton import pixel_losses

    driver.set_active(Idle())
    backends.triton_is_interpreted = lambda: True  # which lets the backend have tensors on the CPU
    if hasattr(pixel_losses, "check_labels"):
        pixel_losses.check_labels = lambda *_: None
    student, teacher = torch.randn(2, 2, 3, 8, 16).unbind()
    labels = torch.randint(0, 3, (2, 64, 128))
    student.requires_grad_()

    def hakd(resolution: str) -> None:
        functional.hakd_loss(student, teacher, labels, resolution=resolution, backend="triton").backward()
        student.grad = None

    def segmentation() -> None:
        functional.segmentation_loss(student, labels, teacher, backend="triton").backward()
        student.grad = None

    functions = (lambda: hakd("feature"), lambda: hakd("label"), segmentation)
    return dict(zip(CASES, functions, strict=True))


def serve() -> None:
    """Measures a round at every line of the standard input: microseconds of each case."""
    torch.set_num_threads(1)
    functions = calls()
    for function in functions.values():
        for _ in range(20):
            function()
    print("ready", flush=True)
    for _ in sys.stdin:
        found = []
        for function in functions.values():
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            found.append((time.perf_counter() - start) / CALLS * 1e6)
        print(*found, flush=True)


def measure(folders: list[Path]) -> list[list[float]]:
    """Medians of each case by checkout, of rounds that are taken in turns."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": str(folder)},
        )
        for folder in folders
    ]  # fmt: skip
    rounds: list[list[list[float]]] = [[] for _ in workers]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for _ in range(ROUNDS):
        for worker, found in zip(workers, rounds, strict=True):
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            found.append([float(number) for number in worker.stdout.readline().split()])
    for worker in workers:
        worker.communicate()
    return [[statistics.median(values) for values in zip(*found, strict=True)] for found in rounds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    folders = [Path(__file__).parents[1], *([options.against] if options.against else [])]
    for case, *times in zip(CASES, *measure(folders), strict=True):
        print(f"{case:28}", *(f"{time:8.0f} us" for time in times))


if __name__ == "__main__":
    main()
