"""Everything that is asked of a GPU, and a stand-in on the CPU with which the rest can be rehearsed.

No other module of this package names ``torch.cuda``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

REHEARSAL = "CPU (rehearsal)"
MIB = 2**20


class Device(Protocol):
    """A GPU, or what stands in for it. Times are in milliseconds, sizes in bytes."""

    kind: str
    name: str
    device: torch.device
    repeats: tuple[int, int]  # of a measurement, least and most

    def backend(self, name: str) -> str: ...
    def facts(self) -> dict[str, Any]: ...
    def synchronize(self) -> None: ...
    def healthy(self) -> bool: ...
    def empty_cache(self) -> None: ...
    def free_bytes(self) -> int: ...
    def without_synchronisation(self) -> AbstractContextManager[None]: ...
    def side_stream(self) -> AbstractContextManager[None]: ...
    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]: ...
    def times(self, works: Sequence[Callable[[], Any]], repeats: int) -> tuple[list[float], float]: ...
    def peak(self, work: Callable[[], Any]) -> int: ...
    def others(self) -> list[torch.device]: ...
    def profiled(self) -> AbstractContextManager[None]: ...


class Cuda:
    kind = "cuda"
    repeats = (5, 100)

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        self.name = torch.cuda.get_device_name(self.device)

    def backend(self, name: str) -> str:
        return name

    def facts(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.device)
        names = ("multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin",
                 "shared_memory_per_multiprocessor", "max_threads_per_multi_processor")  # fmt: skip
        return {
            "capability": list(torch.cuda.get_device_capability(self.device)),
            "devices": torch.cuda.device_count(),
            **{name: getattr(found, name, None) for name in names},
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def healthy(self) -> bool:
        """Whether the context still works: after an illegal access nothing does."""
        try:
            torch.cuda.synchronize(self.device)
            return int(torch.ones(1, device=self.device).sum()) == 1
        except Exception:  # whatever it is
            return False

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    @contextlib.contextmanager
    def without_synchronisation(self) -> Iterator[None]:
        torch.cuda.synchronize(self.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Runs on another stream, after what was asked for before, and before what is asked for after."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A CUDA graph of ``work``: what replays it, and what it writes to."""
        with self.side_stream():
            for _ in range(3):
                work()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = work()
        return graph.replay, results  # the method keeps the graph

    def times(self, works: Sequence[Callable[[], Any]], repeats: int) -> tuple[list[float], float]:
        """Milliseconds of each call, by events, the ``works`` in turns; and the host's microseconds a call."""
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        self.synchronize()
        begin = time.perf_counter()
        for i, (start, end) in enumerate(events):
            start.record()
            works[i % len(works)]()
            end.record()
        host = (time.perf_counter() - begin) / repeats * 1e6
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events], host

    def peak(self, work: Callable[[], Any]) -> int:
        """Most bytes that were allocated during ``work``, beyond those before."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def others(self) -> list[torch.device]:
        return [torch.device("cuda", i) for i in range(1, torch.cuda.device_count())]

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """What ncu looks at with ``--profile-from-start off``."""
        self.synchronize()
        torch.cuda.profiler.start()
        try:
            yield
            self.synchronize()
        finally:
            torch.cuda.profiler.stop()


class Cpu:
    """The stand-in: runs what a GPU would, says nothing of one."""

    kind = "cpu"
    repeats = (1, 2)
    name = REHEARSAL

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def backend(self, name: str) -> str:
        """The CPU's own kernels in place of CUDA's; Triton's are interpreted."""
        return {"cuda": "cpu"}.get(name, name)

    def facts(self) -> dict[str, Any]:
        return {"capability": None, "devices": 0, "L2_cache_size": 1, "multi_processor_count": 1}

    def synchronize(self) -> None:
        pass

    def healthy(self) -> bool:
        return True

    def empty_cache(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 2**30

    def without_synchronisation(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def side_stream(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        results = work()

        def replay() -> None:
            for old, new in zip(results, work(), strict=True):
                old.detach().copy_(new.detach())

        return replay, results

    def times(self, works: Sequence[Callable[[], Any]], repeats: int) -> tuple[list[float], float]:
        taken = []
        for i in range(repeats):
            begin = time.perf_counter()
            works[i % len(works)]()
            taken.append((time.perf_counter() - begin) * 1e3)
        return taken, sum(taken) / repeats * 1e3

    def peak(self, work: Callable[[], Any]) -> int:
        work()
        return 0

    def others(self) -> list[torch.device]:
        return []

    def profiled(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def has_gpu() -> bool:
    return torch.cuda.is_available()


def count() -> int:
    """Of GPUs."""
    return torch.cuda.device_count() if has_gpu() else 0


def out_of_memory(problem: Exception) -> bool:
    return isinstance(problem, torch.OutOfMemoryError)


def open_device(kind: str) -> Device:
    """``"cuda"`` or ``"cpu"``. With TF32 off, as float32 is compared with float64."""
    device: Device = Cuda() if kind == "cuda" else Cpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device
