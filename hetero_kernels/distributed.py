"""Over several processes: the divisors of the joint batch, and whether replicas are replicas still."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def mean_over_processes(divisors: Mapping[str, Tensor], group: Any = None) -> dict[str, Tensor]:
    """What ``divisors(labels)`` gives, as the ``normalizer`` of a batch that is spread over processes: their sum over
    the processes divided by the number of these, as DistributedDataParallel and FSDP average gradients.

    Args:
        divisors: 0-dim tensors by term, the same terms on every process; of a step of several micro-batches, their sum.
        group: the processes; None: all of them. Without a process group the divisors come back as they are.

    Returns:
        0-dim float32 tensors. Nothing waits for the device.

    Raises:
        TypeError: ``divisors`` is no mapping of 0-dim tensors.
    """
    if not isinstance(divisors, Mapping) or not divisors:
        raise TypeError(f"divisors is {divisors!r:.80}, expected what divisors(labels) gives: 0-dim tensors by term")
    for term, value in divisors.items():
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise TypeError(f"divisors[{term!r}] is {value!r:.80}, expected a 0-dim Tensor")
    total = torch.stack([value.double() for value in divisors.values()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
        total = total / dist.get_world_size(group)
    return dict(zip(divisors, total.float(), strict=True))


def check_replicas(module: nn.Module, group: Any = None) -> None:
    """Compares a module's parameters over processes: for the end of a run, or after its first steps.

    What no DistributedDataParallel or FSDP wraps, projectors say, takes a way of its own in every process. Left out are
    buffers, which differ by design, and what is sharded. Every process must call it.

    Raises:
        RuntimeError: on every process, naming the parameters that differ and by how much.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    differing = []
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "device_mesh"):
            continue
        own = parameter.detach().clone(memory_format=torch.contiguous_format)
        largest, smallest = own.clone(), own
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
        difference = float((largest.double() - smallest.double()).abs().max()) if own.numel() else 0.0
        if difference != 0:  # NaN too
            differing.append(f"{name} by {difference:.3g}")
    if differing:
        raise RuntimeError(
            f"parameters differ between processes: {', '.join(differing[:8])}"
            f"{' and more' if len(differing) > 8 else ''}; wrap the module that holds them (the whole Distiller) in "
            "DistributedDataParallel"
        )
