"""What is asked of a GPU, with torch.cuda replaced: names that exist, in the right order, undone afterwards."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import device as module
from benchmarks.gpu_check.device import Cpu, Cuda

PACKAGE = Path(module.__file__).parent


def cuda_names(path):
    """Dotted names below torch.cuda that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name.startswith("torch.cuda.") and name.replace(".", "").isidentifier():
            found.add(name.removeprefix("torch.cuda."))
    return found


def test_only_the_device_speaks_to_cuda_and_by_names_that_exist():
    used = {path.name: cuda_names(path) for path in PACKAGE.glob("*.py")}
    for name in used.pop("device.py"):
        target = torch.cuda
        for part in name.split("."):
            target = getattr(target, part)
    assert not any(used.values()), used


class Fake:
    """Records what is called, in order."""

    def __init__(self, log):
        self.log = log

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.log.append(name)
            return self

        return call


@pytest.fixture
def log(monkeypatch):
    log, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            clock[0] += 1.5
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    @contextlib.contextmanager
    def region(name, *_):
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    def note(name, result=None):
        def call(*arguments, **_):
            log.append(" ".join([name, *(a for a in arguments if isinstance(a, str))]))
            return result

        return call

    class Properties:
        multi_processor_count, total_memory, L2_cache_size = 7, 10**9, 10**6

    for name, value in {
        "Event": Event, "Stream": lambda *_: Fake(log), "current_stream": lambda *_: Fake(log),
        "stream": lambda s: region("stream"), "graph": lambda g: region("graph"), "CUDAGraph": lambda: Fake(log),
        "set_device": note("set_device"), "get_device_name": note("name", "fake"), "synchronize": note("synchronize"),
        "set_sync_debug_mode": note("mode"), "memory_allocated": note("allocated", 100),
        "max_memory_allocated": note("most", 350), "reset_peak_memory_stats": note("reset"),
        "empty_cache": note("empty"), "mem_get_info": note("info", (5, 9)), "device_count": note("count", 2),
        "get_device_properties": note("properties", Properties), "get_device_capability": note("capability", (9, 0)),
        "is_available": lambda: True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.profiler, "start", note("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", note("stop"))
    return log


@pytest.fixture
def cuda(log):
    device = Cuda()
    log.clear()
    return device


def test_facts(cuda):
    facts = cuda.facts()
    assert facts["capability"] == [9, 0] and facts["L2_cache_size"] == 10**6 and facts["devices"] == 2
    assert facts["shared_memory_per_block_optin"] is None  # of a torch that does not say
    assert cuda.name == "fake" and cuda.free_bytes() == 5 and cuda.others() == [torch.device("cuda", 1)]
    assert module.count() == 2 and cuda.backend("triton") == "triton"


def test_times_come_from_events_around_each_call(cuda, log):
    called = []
    times, host = cuda.times([lambda: called.append(0), lambda: called.append(1)], 5)
    assert times == [1.5] * 5 and called == [0, 1, 0, 1, 0] and host >= 0
    assert log == ["synchronize", "synchronize"]


def test_peak_is_beyond_what_was_there(cuda, log):
    assert cuda.peak(lambda: log.append("work")) == 250
    assert log == ["synchronize", "allocated", "reset", "work", "synchronize", "most"]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_undone(cuda, log, fails):
    regions = {cuda.without_synchronisation: ("mode error", "mode default"), cuda.profiled: ("start", "stop")}
    for region, (before, after) in regions.items():
        log.clear()
        with contextlib.suppress(ValueError), region():
            log.append("work")
            if fails:
                raise ValueError
        assert log[log.index("work") - 1] == before and log[-1] == after


def test_a_capture_warms_up_elsewhere_first(cuda, log):
    replay, results = cuda.capture(lambda: log.append("work") or ["result"])
    assert results == ["result"]
    assert log == ["wait_stream", "enter stream", "work", "work", "work", "leave stream", "wait_stream", "synchronize",
                   "enter graph", "work", "leave graph"]  # fmt: skip
    replay()
    assert log[-1] == "replay"


def test_a_broken_context_is_known(cuda, monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.tensor([1]))
    assert cuda.healthy()
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not cuda.healthy()


def test_the_stand_in_answers_the_same_questions():
    public = {name for name in dir(Cuda) if not name.startswith("_")}
    assert public <= {name for name in dir(Cpu()) if not name.startswith("_")}
    assert module.out_of_memory(torch.cuda.OutOfMemoryError("no")) and not module.out_of_memory(RuntimeError("no"))
    before = torch.backends.cudnn.allow_tf32
    try:
        module.open_device("cpu")
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
