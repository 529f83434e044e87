"""How the network is updated: parameter groups, learning rates, one optimiser step over all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hetero_kernels import HeteroAKDOutput
from heteroakd.config import OptimizerConfig, ScheduleConfig
from heteroakd.distiller import Distiller, Teacher
from heteroakd.distributed import sum_over_processes, world_size


def build_optimizer(distiller: Distiller, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Optimiser over parameter groups: encoder, head and projectors, each with and without weight decay.

    Every group carries its own peak learning rate as `peak_lr`. Raises ValueError for an unknown name.
    """
    learning_rates = {
        "encoder": config.lr,
        "head": config.lr * config.head_lr_multiplier,
        "projector": config.lr * config.projector_lr_multiplier,
    }
    parameters: dict[tuple[str, bool], list[nn.Parameter]] = {}
    named = [(_part(name), parameter) for name, parameter in distiller.student.network.named_parameters()]
    named += [("projector", parameter) for parameter in distiller.loss.parameters()]
    for part, parameter in named:
        if parameter.requires_grad:
            decayed = config.decay_norms or parameter.ndim > 1
            parameters.setdefault((part, decayed), []).append(parameter)
    groups = [
        {
            "params": parameters[part, decayed],
            "lr": learning_rates[part],
            "peak_lr": learning_rates[part],
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for part, decayed in parameters
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    raise ValueError(f"optimizer.name must be 'sgd' or 'adamw', got {config.name!r}")


def _part(name: str) -> str:
    return "encoder" if name.startswith(("encoder.", "backbone.")) else "head"


def learning_rate_factor(step: int, schedule: ScheduleConfig) -> float:
    """Factor on the peak learning rates for the step numbered `step` from 0: linear warm-up times polynomial decay."""
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return float(warmup * (1 - step / schedule.steps) ** schedule.power)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, schedule: ScheduleConfig) -> None:
    """Give every parameter group its learning rate for the step numbered `step` from 0."""
    factor = learning_rate_factor(step, schedule)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def synchronize_batch_norm(distiller: Distiller) -> None:
    """Over several GPUs let student and projectors take their batch statistics from all of them; torch has no such
    batch norm for CPUs."""
    if world_size() > 1 and next(distiller.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller)  # in place: the distiller itself is no batch norm


class TrainingStep:
    """One optimiser step after the other, the same on every process: forward, backward, update.

    Over several processes student, projectors and loss are one DistributedDataParallel module, with synchronised batch
    norm on GPUs; the teacher, which has nothing to synchronise, stays outside. It takes over the parameters that
    `distiller` has when this is made: restore a checkpoint before.

    Args:
        distiller: student and loss.
        teacher: frozen teacher, or None.
        optimizer: from `build_optimizer`.
        schedule: learning rates and normalisation.
        find_unused_parameters: as in DistributedDataParallel.
    """

    def __init__(
        self,
        distiller: Distiller,
        teacher: Teacher | None,
        optimizer: torch.optim.Optimizer,
        schedule: ScheduleConfig,
        *,
        find_unused_parameters: bool = False,
    ) -> None:
        self.distiller = distiller
        self.teacher = teacher
        self.optimizer = optimizer
        self.schedule = schedule
        self._parallel: nn.Module = distiller
        if world_size() > 1:
            self._parallel = DistributedDataParallel(distiller, find_unused_parameters=find_unused_parameters)

    def __call__(self, step: int, images: Tensor, labels: Tensor) -> HeteroAKDOutput:
        """Take the step numbered `step` from 0 on this process's images [B, 3, H, W] and labels [B, H, W].

        Returns this process's terms; their mean over the processes is the loss of the step.
        """
        set_learning_rates(self.optimizer, step, self.schedule)
        teacher = None if self.teacher is None else self.teacher(images)
        self.optimizer.zero_grad(set_to_none=True)
        terms: HeteroAKDOutput = self._parallel(images, labels, teacher, self._normalizer(labels))
        terms.loss.backward()
        self.optimizer.step()
        return terms

    def _normalizer(self, labels: Tensor) -> dict[str, Tensor] | None:
        """Divisors that make the mean over the processes the mean over all their pixels; None: the loss's own do."""
        if self.schedule.normalize == "local" or world_size() == 1:
            return None
        divisors = self.distiller.divisors(labels)
        total = sum_over_processes(torch.stack(list(divisors.values()))) / world_size()
        return dict(zip(divisors, total.float(), strict=True))
