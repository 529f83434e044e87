"""The training loop, and the little around it that makes a run repeatable and resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heteroakd.batches import training_batches
from heteroakd.checkpoint import (
    Checkpoint,
    check_same_run,
    load_checkpoint,
    load_state,
    random_states,
    restore_random_states,
    save_checkpoint,
    write_text,
)
from heteroakd.config import OptimizerConfig, RuntimeConfig, ScheduleConfig
from heteroakd.data import SegmentationData
from heteroakd.distiller import Distiller, Teacher
from heteroakd.evaluate import Evaluation, evaluate
from heteroakd.logs import TERMS, RunLog, peak_memory
from heteroakd.visualize import write_pictures

LAST, BEST, SUMMARY, PICTURES = "last.pt", "best.pt", "summary.json", "pictures"
UNTIMED_STEPS = 3  # allocators and caches warm up


class DivergedError(ArithmeticError):
    """The loss is no longer finite."""


@dataclass
class Run:
    """All that one training run is made of."""

    kind: Literal["teacher", "student"]
    """What the checkpoints will say."""
    distiller: Distiller
    """Network to train, with its loss."""
    teacher: Teacher | None
    """Frozen teacher, where the method has one."""
    data: SegmentationData
    """Data set."""
    schedule: ScheduleConfig
    """How long, and on which batches."""
    optimizer: OptimizerConfig
    """How the network is updated."""
    runtime: RuntimeConfig
    """Where the run happens and what it writes."""
    output: Path
    """Folder for everything that is written."""
    config: dict[str, Any]
    """The whole configuration, for checkpoints."""
    model: dict[str, Any]
    """The network's ModelConfig, for checkpoints."""
    loss_backend: str
    """Name of the backend that computes the losses."""
    align_corners: bool = False
    """How evaluation interpolates the logits."""


def choose_device(name: str, threads: int | None) -> torch.device:
    """The torch device by name, "auto" meaning cuda where there is one; sets the number of CPU threads.

    Raises ValueError for a device that torch does not know or have, and for fewer than one thread.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


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


def train(run: Run, *, resume: bool = False) -> Evaluation:
    """Train to the schedule's last step; returns the evaluation after it.

    Writes into `run.output`: last.pt (and best.pt where evaluations happen on the way), metrics.jsonl, TensorBoard
    events, pictures/ and summary.json. With `resume`, continues from last.pt; on a CPU with the same number of
    threads the result is bit for bit that of the uninterrupted run.

    Raises CheckpointError where there is nothing fitting to resume and DivergedError when the loss is not finite.
    """
    schedule, runtime, distiller = run.schedule, run.runtime, run.distiller
    if schedule.steps < 1:
        raise ValueError(f"schedule.steps must be at least 1, got {schedule.steps}")
    device = next(distiller.parameters()).device
    optimizer = build_optimizer(distiller, run.optimizer)
    first_step, best_miou = 0, float("-inf")
    torch.manual_seed(schedule.seed)  # dropout is the same for every method, whatever was initialised before
    if resume:
        first_step, best_miou = _restore(run, optimizer)
    batches = training_batches(
        run.data.train,
        batch_size=schedule.batch_size,
        steps=schedule.steps,
        seed=schedule.seed,
        first_step=first_step,
        workers=runtime.workers,
        pin_memory=device.type == "cuda",
    )
    meter = _Meter(device, schedule.batch_size)
    memory_before = peak_memory(device)
    distiller.train()
    log = RunLog(
        run.output,
        first_step=first_step,
        steps=schedule.steps,
        progress=runtime.progress,
        tensorboard=runtime.tensorboard,
    )
    with log:
        for step, (images, labels) in enumerate(meter.wait_for(batches), start=first_step + 1):
            factor = learning_rate_factor(step - 1, schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            meter.start_step()
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            terms = distiller(images, labels, None if run.teacher is None else run.teacher(images))
            optimizer.zero_grad(set_to_none=True)
            terms.loss.backward()
            optimizer.step()
            meter.end_step(terms)
            log.advance()

            if _due(step, runtime.log_every) or step == schedule.steps:
                values = meter.means()
                _check_finite(step, values, run.output)
                log.train(step, {**values, "lr": run.optimizer.lr * factor})
            if _due(step, runtime.evaluate_every) and step < schedule.steps:
                miou = _evaluate(run, step, log).miou
                if miou > best_miou:
                    best_miou = miou
                    save_checkpoint(run.output / BEST, _checkpoint(run, optimizer, step, miou, best_miou))
            if _due(step, runtime.save_every) and step < schedule.steps:
                save_checkpoint(run.output / LAST, _checkpoint(run, optimizer, step, float("nan"), best_miou))

        peak = peak_memory(device)  # before the evaluation, whose images may be larger than the crops
        evaluation = _evaluate(run, schedule.steps, log)
    final = _checkpoint(run, optimizer, schedule.steps, evaluation.miou, max(best_miou, evaluation.miou))
    if runtime.evaluate_every and evaluation.miou > best_miou:
        save_checkpoint(run.output / BEST, final)
    save_checkpoint(run.output / LAST, final)
    summary = {
        "steps": schedule.steps,
        "resumed_at": first_step,
        "loss_backend": run.loss_backend,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "workers": runtime.workers,
        "seconds_per_step": meter.median_seconds(),
        "seconds_waiting_for_data": meter.mean_wait(),
        "images_per_second": meter.images_per_second(),
        "peak_memory_bytes": peak,
        "memory_before_training_bytes": memory_before,
        "parameters": sum(parameter.numel() for parameter in distiller.student.parameters()),
        **evaluation.to_dict(),
    }
    write_text(run.output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return evaluation


class _Meter:
    """Loss terms and seconds per step, averaged between two calls of `means`; waits for the device only there."""

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device = device
        self._batch_size = batch_size
        self._sums = torch.zeros(len(TERMS), device=device)
        self._steps = 0
        self._seconds: list[float] = []
        self._waits: list[float] = []
        self._started = 0.0

    def wait_for(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, and how long the loop waits for each."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waits.append(time.perf_counter() - started)
            yield batch

    def start_step(self) -> None:
        self._started = time.perf_counter()

    def end_step(self, terms: Iterable[Tensor]) -> None:
        self._sums += torch.stack([term.detach().float() for term in terms])
        self._steps += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds.append(time.perf_counter() - self._started)

    def means(self) -> dict[str, float]:
        means = dict(zip(TERMS, (self._sums / self._steps).tolist(), strict=True))
        seconds, waits = fmean(self._seconds[-self._steps :]), fmean(self._waits[-self._steps :])
        means["seconds_per_step"] = seconds
        means["seconds_waiting_for_data"] = waits
        means["images_per_second"] = self._batch_size / (seconds + waits)
        self._sums.zero_()
        self._steps = 0
        return means

    def median_seconds(self) -> float | None:
        """Of transfer, networks, loss and optimiser, without loading the data. None where no step was taken."""
        return median(_warm(self._seconds)) if self._seconds else None

    def mean_wait(self) -> float | None:
        """Seconds per step that the loop waited for the data."""
        return fmean(_warm(self._waits)) if self._waits else None

    def images_per_second(self) -> float | None:
        """Images trained on, by the time for steps and for waiting, without evaluations and checkpoints."""
        if not self._seconds:
            return None
        return self._batch_size / (fmean(_warm(self._seconds)) + fmean(_warm(self._waits)))


def _warm(values: list[float]) -> list[float]:
    return values[UNTIMED_STEPS:] or values


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_finite(step: int, values: dict[str, float], output: Path) -> None:
    if not all(math.isfinite(values[term]) for term in TERMS):
        shown = ", ".join(f"{term} {values[term]:.4g}" for term in TERMS)
        raise DivergedError(
            f"the loss is not finite at step {step} ({shown}); the last good checkpoint, if one was saved, is "
            f"{output / LAST}. A lower optimizer.lr or a warm-up (schedule.warmup_steps) usually helps"
        )


def _evaluate(run: Run, step: int, log: RunLog) -> Evaluation:
    started = time.perf_counter()
    evaluation = evaluate(
        run.distiller.student,
        run.data.val,
        run.data.classes,
        align_corners=run.align_corners,
        workers=run.runtime.workers,
    )
    log.evaluation(step, evaluation, time.perf_counter() - started)
    write_pictures(
        run.distiller,
        run.teacher,
        run.data,
        count=run.runtime.pictures,
        step=step,
        folder=run.output / PICTURES,
        log=log,
        align_corners=run.align_corners,
    )
    return evaluation


def _checkpoint(run: Run, optimizer: torch.optim.Optimizer, step: int, miou: float, best_miou: float) -> Checkpoint:
    return Checkpoint(
        kind=run.kind,
        step=step,
        config=run.config,
        model=run.model,
        classes=list(run.data.classes),
        network=run.distiller.student.network.state_dict(),
        loss=run.distiller.loss.state_dict(),
        optimizer=optimizer.state_dict(),
        random_states=random_states(),
        metrics={"miou": miou, "best_miou": best_miou},
    )


def _restore(run: Run, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Put the run where its last.pt left it; returns the steps taken and the best mIoU so far."""
    path = run.output / LAST
    checkpoint = load_checkpoint(path)
    check_same_run(path, checkpoint.config, run.config, may_differ={"runtime", "output"})
    load_state(run.distiller.student.network.load_state_dict, checkpoint.network, str(path))
    load_state(run.distiller.loss.load_state_dict, checkpoint.loss, str(path))
    load_state(optimizer.load_state_dict, checkpoint.optimizer, str(path))
    restore_random_states(checkpoint.random_states)
    return checkpoint.step, checkpoint.metrics["best_miou"]
