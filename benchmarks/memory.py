"""Peak memory of one step beyond its inputs, gradients included: measured, and predicted for sizes that do not fit.

Measured by torch's CPU allocator and by the process's resident size, in a process of its own:
``python -m benchmarks.memory --cases "hakd K=19" --provider cpu`` prints one JSON object in bytes. Predicted from fake
tensors, which have shapes but no data: what the operators return is counted, what they need inside is not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cases import CASES, Case, WholeCase, shrink
from .steps import make_step

# Measured --------------------------------------------------------------------------------------------------------


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


def allocator_peak(step: Callable[[], object]) -> int:
    """Largest sum of live allocations, in bytes, that torch's CPU allocator sees during ``step``."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure(case: Case, provider: str) -> dict[str, int]:
    """Bytes: peaks beyond the inputs ("allocator", "resident") and the gradients that are part of them ("gradients").

    The resident peak is meaningful for the first case of a fresh process only.
    """
    make_step(shrink(case), provider)()  # libraries, threads and autograd are warm
    step = make_step(case, provider)
    if provider == "compile":
        step()  # compiles; the measured step then reuses the code
        step.release()
    _forget_peak()
    before = _resident(peak=False)
    step()
    resident = max(_resident(peak=True) - before, 0)
    step.release()
    allocator = allocator_peak(step)
    gradients = sum(leaf.grad.nbytes for leaf in step.leaves if leaf.grad is not None)
    return {"allocator": allocator, "resident": resident, "gradients": gradients}


def start(names: Sequence[str], provider: str, threads: int) -> subprocess.Popen:
    """Measures cases (:data:`benchmarks.cases.CASES`) in a new process; :func:`finish` waits for it."""
    command = [sys.executable, "-m", "benchmarks.memory", "--cases", *names, "--provider", provider]
    return subprocess.Popen(
        [*command, "--threads", str(threads)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> dict[str, dict[str, int]]:
    """By case what :func:`measure` returned. Raises RuntimeError with the process's message where it failed."""
    out, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"benchmarks.memory failed: {error.strip()[-2000:]}")
    return json.loads(out.splitlines()[-1])


# Predicted -------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators return while they live, and the largest sum; of fake tensors or
    of real ones."""

    def __init__(self, fake: bool = True) -> None:
        super().__init__()
        self._fake = fake
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self._fake and func is torch.ops.aten._local_scalar_dense.default:
            return False  # fake tensors have no values; "is any of them wrong?" is the only question asked
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:  # a view of an input is none
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def predict(whole: WholeCase, backend: str) -> int:
    """Predicted peak in bytes of one forward and backward beyond the inputs, gradients included, without what the
    operators need inside."""
    with FakeTensorMode():
        step = make_step(whole, backend)
        with LiveBytes() as bytes_:
            step()
        return bytes_.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), required=True, metavar="CASE")
    parser.add_argument("--provider", required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps({name: measure(CASES[name], arguments.provider) for name in arguments.cases}))


if __name__ == "__main__":
    main()
