"""What a run does with its val set while it trains: evaluations, their pictures, and the best network so far."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from heteroakd.evaluation.metrics import Evaluation, evaluate
from heteroakd.evaluation.pictures import panel
from heteroakd.evaluation.visualize import KnowledgeMaps, sample_pictures, save_maps
from heteroakd.system.distributed import is_main, largest_over_processes, share_buffers
from heteroakd.system.files import BEST, LAST, MAPS, PICTURES, step_file
from heteroakd.system.signals import StopRequest, stopped
from heteroakd.training.keeper import Keeper
from heteroakd.training.log import RunLog
from heteroakd.training.run import Run, due
from heteroakd.training.step import TrainingStep

PANEL_COLUMNS = 3


@dataclass
class Validation:
    """Evaluations of a run, on the way and after its last step."""

    run: Run
    training: TrainingStep
    """Has what is evaluated, the student or its moving average."""
    keeper: Keeper
    """Writes best.pt, and last.pt once more, with what was found."""
    log: RunLog
    stop: StopRequest
    """The signal that cuts an evaluation off."""
    best_miou: float
    """The best so far, -inf where there was none."""

    def due(self, step: int) -> bool:
        """Whether an evaluation on the way follows the step."""
        return due(step, self.run.runtime.evaluate_every) and step < self.run.schedule.steps

    def measure(self, step: int) -> Evaluation:
        """Evaluate after a step whose last.pt is written. Every process must call this.

        Raises StoppedError, with nothing else written, where a process has got a signal.
        """
        run, started = self.run, time.perf_counter()
        share_buffers(self.training.evaluated.student)
        with self.training.eagerly():
            evaluation = evaluate(
                self.training.evaluated.student,
                run.data.val,
                run.data.classes,
                run.evaluation,
                align_corners=run.align_corners,
                workers=run.runtime.workers,
                progress=run.runtime.progress in ("auto", "bar"),
                stop=self.stop,
            )
        if signal_number := largest_over_processes(self.stop.signal_number or 0):
            raise stopped(step, run.schedule.steps, run.output / LAST, signal_number)
        self.log.evaluation(step, evaluation, time.perf_counter() - started)
        if is_main():
            with self.training.eagerly():
                self._write_pictures(step)
        if evaluation.miou > self.best_miou:
            self.best_miou = evaluation.miou
            if run.runtime.evaluate_every:
                self.keeper.save(BEST, step, evaluation.miou, self.best_miou)
        self.keeper.save(LAST, step, evaluation.miou, self.best_miou)
        return evaluation

    def _write_pictures(self, step: int) -> None:
        """A panel of each of some val images spread over the set; KMM's and KEM's maps, where there are some, as files
        of numbers, and their means in the log."""
        run, data = self.run, self.run.data
        count = min(run.runtime.pictures, len(data.val))
        found: list[KnowledgeMaps] = []
        for index in (number * len(data.val) // count for number in range(count)):
            captioned, maps = sample_pictures(
                self.training.evaluated,
                *data.val[index],
                data.palette,
                options=run.evaluation,
                align_corners=run.align_corners,
            )
            path = step_file(run.output / PICTURES, step, index, ".png")
            panel(captioned, path, columns=PANEL_COLUMNS, classes=data.classes, palette=data.palette)
            for caption, picture in captioned:
                self.log.picture(f"val_{index:02d}/{caption.partition(',')[0]}", step, picture)
            if maps is not None:
                found.append(maps)
                save_maps(step_file(run.output / MAPS, step, index, ".npz"), maps)
        if found:
            means = [float(torch.cat([one.flatten() for one in same]).nanmean()) for same in zip(*found, strict=True)]
            self.log.knowledge(step, *means)
