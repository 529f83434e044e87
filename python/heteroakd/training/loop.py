"""The training loop, the same for one process and for many; what it is made of stands in `heteroakd.training.run`."""

from __future__ import annotations

import json
import math
from functools import partial

import torch

from heteroakd.data.batches import mix, training_batches
from heteroakd.evaluation.metrics import Evaluation
from heteroakd.system.distributed import (
    describe_machine,
    is_main,
    largest_over_processes,
    on_main,
    rank,
    say,
    world_size,
)
from heteroakd.system.files import LAST, SUMMARY, remove_leftovers, write_text
from heteroakd.system.signals import StopRequest, stopped
from heteroakd.training.checkpoint import seed_generators
from heteroakd.training.keeper import Keeper
from heteroakd.training.log import Meter, RunLog, peak_memory
from heteroakd.training.run import Run, due
from heteroakd.training.step import TrainingStep, build_optimizer, synchronize_batch_norm
from heteroakd.training.validation import Validation


def train(run: Run, *, resume: bool = False) -> Evaluation:
    """Train to the schedule's last step; returns the evaluation after it.

    Writes into `run.output`: last.pt and those before it (and best.pt where evaluations happen on the way),
    metrics.jsonl, TensorBoard events, pictures/ and summary.json. With `resume`, continues from last.pt or, where that
    is damaged, from the one before it; on a CPU with the same number of threads the result is bit for bit that of the
    uninterrupted run, and a run that is finished is left as it is. At SIGINT, SIGTERM and SIGHUP it finishes the step,
    leaves evaluations for later, writes last.pt and raises StoppedError.

    Raises CheckpointError where there is nothing fitting to resume, DivergedError when loss or network are not finite
    (no such network is ever saved), and OSError where a file cannot be written.
    """
    schedule, runtime, distiller = run.schedule, run.runtime, run.distiller
    device = next(distiller.parameters()).device
    synchronize_batch_norm(distiller)
    optimizer = build_optimizer(distiller, run.optimizer)
    take_step = TrainingStep(distiller, optimizer, run.optimizer, schedule, runtime)
    keeper = Keeper(run, take_step)
    first_step, best_miou, evaluated = 0, float("-inf"), True
    # Here, so that dropout is the same for every method, whatever was initialised before; and other for every process.
    seed_generators(mix("process", schedule.seed, rank()) if rank() else schedule.seed)
    on_main(partial(remove_leftovers, run.output))
    if resume:
        first_step, metrics = keeper.restore()
        best_miou, evaluated = metrics["best_miou"], not math.isnan(metrics["miou"])
        finished = on_main(partial(_finished, run)) if first_step == schedule.steps else None
        if finished is not None:
            say(f"{run.output}: finished before, all {schedule.steps} steps and the evaluation; nothing is written")
            return finished
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
    memory_before = peak_memory(device)
    distiller.train()
    log = RunLog(
        run.output if is_main() else None,
        first_step=first_step,
        evaluated=evaluated and first_step < schedule.steps,  # the last one is repeated where there is no summary
        steps=schedule.steps,
        progress=runtime.progress,
        tensorboard=runtime.tensorboard,
    )
    with log, StopRequest() as stop:
        validation = Validation(run, take_step, keeper, log, stop, best_miou)
        if validation.due(first_step) and not evaluated:  # where the run was stopped
            validation.measure(first_step)
        for step, (images, labels) in enumerate(meter.wait_for(batches), start=first_step + 1):
            meter.start_step()
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            meter.end_step(take_step(step - 1, images, labels))
            log.advance()
            signal_number = largest_over_processes(stop.signal_number or 0)  # all of them stop after the same step

            if due(step, runtime.log_every) or step == schedule.steps:
                values = meter.means()
                keeper.check_finite(step, values)
                log.train(step, {**values, "lr": optimizer.param_groups[0]["lr"]})
            if due(step, runtime.save_every) or validation.due(step) or step == schedule.steps or signal_number:
                # Before an evaluation, which on a large set takes long, and may be cut off as training may.
                keeper.save(LAST, step, math.nan, validation.best_miou)
            if signal_number:
                raise stopped(step, schedule.steps, run.output / LAST, signal_number)
            if validation.due(step):
                validation.measure(step)

        peak = peak_memory(device)  # before the evaluation, whose images may be larger than the crops
        evaluation = validation.measure(schedule.steps)
    summary = {
        "steps": schedule.steps,
        "resumed_at": first_step,
        "loss_backend": run.loss_backend,
        "device": str(device),
        "machine": describe_machine(device),
        "processes": world_size(),
        "precision": run.optimizer.precision,
        "threads": torch.get_num_threads(),
        "workers": runtime.workers,
        **meter.summary(),
        "peak_memory_bytes": peak,
        "memory_before_training_bytes": memory_before,
        "teacher": keeper.teacher,
        "parameters": sum(parameter.numel() for parameter in distiller.student.parameters()),
        **evaluation.to_dict(),
        "measured": run.measured,
        "confusion": evaluation.confusion.tolist(),
    }
    on_main(partial(write_text, run.output / SUMMARY, json.dumps(summary, indent=2) + "\n"))
    say(f"written: {run.output / LAST}")
    return evaluation


def _finished(run: Run) -> Evaluation | None:
    """The evaluation after the last step, where the run got as far as its summary."""
    try:
        summary = json.loads((run.output / SUMMARY).read_text(encoding="utf-8"))
        counts = torch.tensor(summary["confusion"])
        if summary["steps"] == run.schedule.steps and counts.shape == (len(run.data.classes),) * 2:
            return Evaluation(counts, run.data.classes, summary["images"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # damaged or not there: the evaluation is done again
    return None
