"""The training loop, and the little around it that makes a run repeatable and resumable."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from heteroakd.batches import training_batches
from heteroakd.checkpoint import (
    Checkpoint,
    check_same_run,
    load_latest,
    load_state,
    random_states,
    remove_leftovers,
    restore_random_states,
    save_checkpoint,
    write_text,
)
from heteroakd.config import OptimizerConfig, RuntimeConfig, ScheduleConfig
from heteroakd.data import SegmentationData
from heteroakd.distiller import Distiller, Teacher
from heteroakd.evaluate import Evaluation, evaluate
from heteroakd.interruption import StoppedError, StopRequest
from heteroakd.logs import TERMS, RunLog, peak_memory
from heteroakd.meter import Meter
from heteroakd.visualize import write_pictures

LAST, BEST, SUMMARY, PICTURES = "last.pt", "best.pt", "summary.json", "pictures"


class DivergedError(ArithmeticError):
    """The loss or the network is no longer finite."""


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

    Writes into `run.output`: last.pt and those before it (and best.pt where evaluations happen on the way),
    metrics.jsonl, TensorBoard events, pictures/ and summary.json. With `resume`, continues from last.pt or, where that
    is damaged, from the one before it; on a CPU with the same number of threads the result is bit for bit that of the
    uninterrupted run. At SIGINT and SIGTERM it finishes the step, writes last.pt and raises StoppedError.

    Raises CheckpointError where there is nothing fitting to resume, DivergedError when loss or network are not finite
    (no such network is ever saved), and OSError where a file cannot be written.
    """
    schedule, runtime, distiller = run.schedule, run.runtime, run.distiller
    if schedule.steps < 1:
        raise ValueError(f"schedule.steps must be at least 1, got {schedule.steps}")
    if runtime.keep < 1:
        raise ValueError(f"runtime.keep must be at least 1, got {runtime.keep}")
    device = next(distiller.parameters()).device
    optimizer = build_optimizer(distiller, run.optimizer)
    first_step, best_miou = 0, float("-inf")
    torch.manual_seed(schedule.seed)  # dropout is the same for every method, whatever was initialised before
    remove_leftovers(run.output)
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
    meter = Meter(device, schedule.batch_size)
    keeper = _Keeper(run, optimizer, saved=first_step if resume else None)
    memory_before = peak_memory(device)
    distiller.train()
    log = RunLog(
        run.output,
        first_step=first_step,
        steps=schedule.steps,
        progress=runtime.progress,
        tensorboard=runtime.tensorboard,
    )
    with log, StopRequest() as stop:
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
                keeper.check_finite(step, values)
                log.train(step, {**values, "lr": run.optimizer.lr * factor})
            if _due(step, runtime.evaluate_every) and step < schedule.steps:
                miou = _evaluate(run, step, log).miou
                if miou > best_miou:
                    best_miou = miou
                    keeper.save(BEST, step, miou, best_miou)
            if _due(step, runtime.save_every) or step == schedule.steps or stop.signal_number is not None:
                # At the last step too: an evaluation on a large set may be cut off as training may.
                keeper.save(LAST, step, float("nan"), best_miou)
            if stop.signal_number is not None:
                raise StoppedError(
                    f"stopped at step {step} of {schedule.steps}; --resume continues from {run.output / LAST}",
                    stop.signal_number,
                )

        peak = peak_memory(device)  # before the evaluation, whose images may be larger than the crops
        evaluation = _evaluate(run, schedule.steps, log)
    if runtime.evaluate_every and evaluation.miou > best_miou:
        keeper.save(BEST, schedule.steps, evaluation.miou, evaluation.miou)
    keeper.save(LAST, schedule.steps, evaluation.miou, max(best_miou, evaluation.miou))
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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


class _Keeper:
    """Writes the run's checkpoints, none of which holds a network that is not finite."""

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer, saved: int | None) -> None:
        self.run = run
        self.optimizer = optimizer
        self.saved = saved

    def save(self, name: str, step: int, miou: float, best_miou: float) -> None:
        """Write a checkpoint; of LAST older ones are kept, but not several of one step."""
        distiller = self.run.distiller
        if wrong := _not_finite(distiller):
            raise DivergedError(f"the network is not finite after step {step} ({wrong}); {self._advice()}")
        checkpoint = Checkpoint(
            kind=self.run.kind,
            step=step,
            config=self.run.config,
            model=self.run.model,
            classes=list(self.run.data.classes),
            network=distiller.student.network.state_dict(),
            loss=distiller.loss.state_dict(),
            optimizer=self.optimizer.state_dict(),
            random_states=random_states(),
            metrics={"miou": miou, "best_miou": best_miou},
        )
        keep = self.run.runtime.keep if name == LAST and step != self.saved else 1
        save_checkpoint(self.run.output / name, checkpoint, keep=keep)
        if name == LAST:
            self.saved = step

    def check_finite(self, step: int, values: dict[str, float]) -> None:
        """Raises DivergedError, with what is known of the cause, where a loss term is not finite."""
        if all(math.isfinite(values[term]) for term in TERMS):
            return
        shown = ", ".join(f"{term} {values[term]:.4g}" for term in TERMS)
        network = _not_finite(self.run.distiller) or "the network is still finite: look at the data and the loss"
        rate = self.optimizer.param_groups[0]["lr"]
        raise DivergedError(
            f"the loss is not finite at step {step} ({shown}; learning rate {rate:.3g}; {network}); {self._advice()}"
        )

    def _advice(self) -> str:
        last = self.run.output / LAST
        good = (
            "no checkpoint was saved before"
            if self.saved is None
            else f"last good checkpoint: {last}, step {self.saved}"
        )
        return f"{good}. A lower optimizer.lr or a warm-up (schedule.warmup_steps) usually helps"


def _not_finite(distiller: Distiller) -> str:
    """Which tensors of the network and the projectors hold NaN or infinities, in words; empty where none does."""
    tensors = {name: value for name, value in distiller.state_dict().items() if value.is_floating_point()}
    wrong = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    return f"{len(wrong)} of its {len(tensors)} tensors hold NaN or inf, the first is {wrong[0]}" if wrong else ""


def _restore(run: Run, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Put the run where its last.pt left it; returns the steps taken and the best mIoU so far."""
    last = run.output / LAST
    path, checkpoint = load_latest(last, lambda error: print(f"passed over: {error}", flush=True))
    print(f"resuming from {path}, step {checkpoint.step}", flush=True)
    check_same_run(path, checkpoint.config, run.config, may_differ={"runtime", "output"})
    load_state(run.distiller.student.network.load_state_dict, checkpoint.network, str(path))
    load_state(run.distiller.loss.load_state_dict, checkpoint.loss, str(path))
    load_state(optimizer.load_state_dict, checkpoint.optimizer, str(path))
    restore_random_states(checkpoint.random_states)
    if path != last:
        os.replace(path, last)  # else the next checkpoint would keep the damaged one, and drop this
    return checkpoint.step, checkpoint.metrics["best_miou"]
