"""How the network is updated: parameter groups, learning rates, one optimiser step over all processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from hetero_kernels import Distiller, mean_over_processes
from heteroakd.config.groups import OptimizerConfig, RuntimeConfig, ScheduleConfig
from heteroakd.methods import Terms, objective_of
from heteroakd.networks.shapes import batch_norm_named, tap_paths
from heteroakd.system.distributed import say, world_size

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_optimizer(distiller: Distiller, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Optimiser over parameter groups: encoder, head (and auxiliary head), projectors, each with and without decay.

    Every group carries its own peak learning rate as `peak_lr`. Raises ValueError where encoder and head are to differ
    and nothing says which the encoder is.
    """
    learning_rates = {
        "encoder": config.lr,
        "head": config.lr * config.head_lr_multiplier,
        "projector": config.lr * config.projector_lr_multiplier,
    }
    parameters: dict[tuple[str, bool], list[nn.Parameter]] = {}
    objective = objective_of(distiller)
    encoder = encoder_prefixes(distiller, config)
    student = distiller.student.named_parameters()
    named = [("encoder" if name.startswith(encoder) else "head", parameter) for name, parameter in student]
    named += [("projector", parameter) for parameter in objective.criterion.parameters()]
    if objective.auxiliary is not None:
        named += [("head", parameter) for parameter in objective.auxiliary.parameters()]
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
    return torch.optim.AdamW(groups, lr=config.lr)


def encoder_prefixes(distiller: Distiller, config: OptimizerConfig) -> tuple[str, ...]:
    """What the names of the encoder's parameters begin with: as the options say, else `encoder.` and `backbone.`, else
    the module around the first tap where the network begins in it. Raises ValueError as `build_optimizer` does."""
    names = [name for name, _ in distiller.student.named_parameters()]
    modules = sorted({name.partition(".")[0] for name in names})
    if config.encoder is not None:
        if not any(name.startswith(f"{config.encoder}.") for name in names):
            raise ValueError(
                f"optimizer.encoder {config.encoder!r} has no parameters; modules are {', '.join(modules)}"
            )
        return (f"{config.encoder}.",)
    if found := tuple(f"{name}." for name in ("encoder", "backbone") if name in modules):
        return found
    for tap in tap_paths(distiller.student_tap or [])[:1]:
        around = f"{tap.rpartition('.')[0] or tap}."
        if names[0].startswith(around):
            return (around,)
    if config.head_lr_multiplier != 1:
        raise ValueError(
            f"optimizer.head_lr_multiplier is {config.head_lr_multiplier:g}, and nothing says what the encoder is: "
            f"--optimizer.encoder NAME, a module's path; the network's are {', '.join(modules)}"
        )
    return ()


def learning_rate_factor(step: int, schedule: ScheduleConfig) -> float:
    """Factor on the peak learning rates for the step numbered `step` from 0: linear warm-up times polynomial decay."""
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return float(warmup * (1 - step / schedule.steps) ** schedule.power)


def distillation_factor(step: int, schedule: ScheduleConfig) -> float:
    """Factor on the weights of the distillation terms for the step numbered `step` from 0: a linear warm-up."""
    return min(1.0, (step + 1) / schedule.distillation_warmup_steps) if schedule.distillation_warmup_steps else 1.0


def synchronize_batch_norm(distiller: Distiller) -> None:
    """Over several GPUs let student and projectors take their batch statistics from all of them; torch has no such
    batch norm for CPUs."""
    if world_size() > 1 and next(distiller.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller)  # in place: the distiller itself is no batch norm


def check_parts(schedule: ScheduleConfig, processes: int) -> None:
    """Raises ValueError where a step's images are not the same number for every process and micro-batch."""
    if schedule.batch_size % (schedule.micro_batches * processes):
        raise ValueError(
            f"schedule.batch_size must be a multiple of schedule.micro_batches {schedule.micro_batches} times the "
            f"number of processes {processes}, got {schedule.batch_size}"
        )


class TrainingStep:
    """One optimiser step after the other, the same on every process: forward, backward, update.

    Over several processes the distiller is one DistributedDataParallel module; its teacher, which has nothing to
    synchronise, is no part of that.

    Args:
        distiller: student, loss and perhaps a teacher, on their device.
        optimizer: from `build_optimizer`.
        config: precision and moving average.
        schedule: learning rates, micro-batches and normalisation.
        runtime: memory format and compilation.

    Raises ValueError, naming the option, for values that make no sense.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        schedule: ScheduleConfig,
        runtime: RuntimeConfig,
    ) -> None:
        check_parts(schedule, world_size())
        self.distiller = distiller
        self.optimizer = optimizer
        self.schedule = schedule
        self._device_type = next(distiller.parameters()).device.type
        self._precision = PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=self._precision == torch.float16)
        """Keeps float16's gradients from underflow; does nothing in other precisions."""
        self._memory_format = torch.channels_last if runtime.channels_last else torch.preserve_format
        if runtime.channels_last:
            distiller.to(memory_format=torch.channels_last)
        self.average: AveragedModel | None = None
        """Moving average of the student, where the run has one."""
        if config.ema_decay:
            self.average = AveragedModel(
                distiller.student, multi_avg_fn=partial(_moving_average, config.ema_decay), use_buffers=True
            )
        self.evaluated = distiller
        """What evaluations measure: the distiller, with the average in the student's place where there is one."""
        if self.average is not None:
            taps = {"student_tap": distiller.student_tap, "teacher_tap": distiller.teacher_tap}
            self.evaluated = Distiller(self.average.module, distiller.teacher, distiller.criterion, **taps)
        self._compiled = runtime.compile
        if runtime.compile:
            for network in (distiller.student, distiller.teacher):
                if network is not None:
                    network.compile()
        self._looked_for_unused = False
        self._parallel: nn.Module = distiller
        if world_size() > 1:
            self._parallel = DistributedDataParallel(distiller, find_unused_parameters=runtime.find_unused_parameters)

    def eagerly(self) -> AbstractContextManager[None]:
        """For evaluations, whose images have many sizes: networks that are compiled run as they are."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def __call__(self, step: int, images: Tensor, labels: Tensor) -> Terms:
        """Take the step numbered `step` from 0 on this process's images [B, 3, H, W] and labels [B, H, W].

        Returns this process's terms; their mean over the processes is the loss of the step. The first step names what
        gets no gradient; raises ValueError where several processes would wait for it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, self.schedule)
        objective_of(self.distiller).warm_up(distillation_factor(step, self.schedule))
        images = images.to(memory_format=self._memory_format)
        self.optimizer.zero_grad(set_to_none=True)
        parts, normalizer = self.schedule.micro_batches, None
        if world_size() * parts > 1:  # the sum over the parts, and the mean over the processes, is that over all pixels
            normalizer = mean_over_processes(self.distiller.divisors(labels))
        share = 1 / parts if normalizer is None else 1.0  # with divisors of the whole step the parts just add up
        sums: list[Tensor] = []
        for number, (image, label) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), start=1):
            with self._synchronizing(number == parts), batch_norm_named(self.distiller):
                with torch.autocast(self._device_type, self._precision, enabled=self._precision != torch.float32):
                    terms = cast(Terms, self._parallel(image, label, normalizer=normalizer).terms)
                self.scaler.scale(terms.loss * share).backward()
            shares = [term.detach() * share for term in terms]
            sums = [a + b for a, b in zip(sums, shares, strict=True)] if sums else shares
        if not self._looked_for_unused:
            self._name_unused()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.distiller.student)
        return Terms(*sums)

    def _name_unused(self) -> None:
        """Before DistributedDataParallel's own error, which comes a step later and has no names."""
        self._looked_for_unused = True
        unused = [name for name, p in self.distiller.named_parameters() if p.requires_grad and p.grad is None]
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in unused))
        said = f"no gradient reaches {', '.join(modules[:6])}{', ...' if modules[6:] else ''}"
        if unused and not getattr(self._parallel, "find_unused_parameters", True):
            raise ValueError(f"{said}: freeze them, or set runtime.find_unused_parameters: true")
        if unused:
            say(f"{said}: the loss does not depend on their parameters, which stay as they are")

    def _synchronizing(self, wanted: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged once per step, with those of its last part."""
        if wanted or not isinstance(self._parallel, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[None], self._parallel.no_sync())


def _moving_average(decay: float, averages: Any, current: Any, steps: Tensor | int) -> None:
    """average = decay * average + (1 - decay) * current, in place; the decay rises with the steps, so that the start
    is soon forgotten. Tensors of one dtype."""
    weight = 1 - min(decay, (1 + int(steps)) / (10 + int(steps)))
    for average, value in zip(averages, current, strict=True):
        if average.is_floating_point():
            average.lerp_(value, weight)
        else:
            average.copy_(value)  # a count
