"""What a run does with its val set while it trains: evaluations, their pictures, and the best network so far."""

from __future__ import annotations

import time

from heteroakd.evaluation.metrics import Evaluation, evaluate
from heteroakd.evaluation.visualize import write_pictures
from heteroakd.system.distributed import is_main, largest_over_processes, share_buffers
from heteroakd.system.signals import StopRequest, stopped
from heteroakd.training.keeper import Keeper
from heteroakd.training.log import RunLog
from heteroakd.training.run import BEST, LAST, Run, due
from heteroakd.training.step import TrainingStep


class Validation:
    """Evaluations of a run, on the way and after its last step.

    Args:
        run: the run.
        training: has what is evaluated, the student or its moving average.
        keeper: writes best.pt, and last.pt once more, with what was found.
        log: takes numbers and pictures.
        stop: the signal that cuts an evaluation off.
        best_miou: the best so far, -inf where there was none.
    """

    def __init__(
        self, run: Run, training: TrainingStep, keeper: Keeper, log: RunLog, stop: StopRequest, best_miou: float
    ) -> None:
        self.run = run
        self.training = training
        self.keeper = keeper
        self.log = log
        self.stop = stop
        self.best_miou = best_miou

    def due(self, step: int) -> bool:
        """Whether an evaluation on the way follows the step."""
        return due(step, self.run.runtime.evaluate_every) and step < self.run.schedule.steps

    def measure(self, step: int) -> Evaluation:
        """Evaluate after a step whose last.pt is written. Every process must call this.

        Raises StoppedError, with nothing else written, where a process has got a signal.
        """
        evaluation = self._evaluate(step)
        if evaluation.miou > self.best_miou:
            self.best_miou = evaluation.miou
            if self.run.runtime.evaluate_every:
                self.keeper.save(BEST, step, evaluation.miou, self.best_miou)
        self.keeper.save(LAST, step, evaluation.miou, self.best_miou)
        return evaluation

    def _evaluate(self, step: int) -> Evaluation:
        run, distiller = self.run, self.training.evaluated
        started = time.perf_counter()
        share_buffers(distiller.student)
        evaluation = evaluate(
            distiller.student,
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
            write_pictures(
                distiller,
                run.teacher,
                run.data,
                count=run.runtime.pictures,
                step=step,
                folder=run.output,
                log=self.log,
                options=run.evaluation,
                align_corners=run.align_corners,
            )
        return evaluation
