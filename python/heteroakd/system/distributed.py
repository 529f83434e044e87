"""Several processes, as torchrun starts them: which one this is, what all of them agree on, and who writes.

Without torchrun there is one process, every function here works, and none of them communicates.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heteroakd.system.signals import reader_may_leave

Value = TypeVar("Value")


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def say(text: str, *, needed: bool = False) -> None:
    """Print a line, once for all processes. With `needed`, as it is what a command is for, OSError where it cannot be
    written."""
    if is_main():
        with reader_may_leave(sys.stdout, needed=needed):
            print(text, flush=True)


def choose_device(name: str, threads: int | None) -> torch.device:
    """The torch device by name, "auto" meaning cuda where there is one; sets the number of CPU threads.

    Under torchrun "auto" and "cuda" mean a GPU of its own for every process of a machine. Raises ValueError for a
    device that torch does not know or have.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def describe_machine(device: torch.device) -> str:
    """The device's model, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started (NCCL between GPUs, gloo between CPUs) while the context lasts.

    Nothing happens without torchrun, and where the caller has a group already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart torchrun's store still holds the addresses of the dead. (Machines count restarts each on its
        # own, so that several need a store of their own for each try: docs/trainer.md.)
        store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Objects and counts go by gloo on GPUs too: they come from the host and return there.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor; one of one process is returned as it is."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def largest_over_processes(value: int) -> int:
    """The largest of every process's value."""
    tensor = torch.tensor(value)
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather(value: Value) -> list[Value]:
    """Every process's value, by rank."""
    values: list[Any] = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], Value]) -> Value:
    """What `function` returns in the main process, in all of them; what it raises there, all of them raise."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: Value = outcome[0]
    return result


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others do: one download, then a cache for the rest."""
    if world_size() > 1 and not is_main():
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and is_main():
            dist.barrier()


def share_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers: batch norm's statistics, which differ where it is not synchronised."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
