"""The checkpoints of a run: when one may be written, and what it takes to go on from one."""

from __future__ import annotations

import math
import os
from typing import Any

from hetero_kernels import Distiller
from heteroakd.methods import TERMS, objective_of
from heteroakd.system.distributed import gather, on_main, rank, say
from heteroakd.system.files import LAST
from heteroakd.training import checkpoint
from heteroakd.training.run import Run
from heteroakd.training.step import TrainingStep
from heteroakd.training.trained import files_digest, may_differ


class DivergedError(ArithmeticError):
    """The loss or the network is no longer finite."""


class Keeper:
    """Writes the run's checkpoints, none of which holds a network that is not finite."""

    def __init__(self, run: Run, training: TrainingStep) -> None:
        self.run = run
        self.training = training
        self.saved: int | None = None
        """The step of the youngest checkpoint."""
        teacher = run.distiller.teacher
        self.teacher = "" if teacher is None else checkpoint.state_digest(teacher.state_dict())
        """What tells the run's teacher from others."""
        self.files = files_digest(run.data, run.config["data"]["root"])
        """What tells the data set's files from others."""

    def save(self, name: str, step: int, miou: float, best_miou: float) -> None:
        """Write a checkpoint; of LAST older ones are kept, but not several of one step. Every process must call this;
        one writes."""
        states = gather(checkpoint.random_states())
        on_main(lambda: self._save(name, step, {"miou": miou, "best_miou": best_miou}, states))
        if name == LAST:
            self.saved = step

    def _save(self, name: str, step: int, metrics: dict[str, float], states: list[dict[str, Any]]) -> None:
        if wrong := _not_finite(self.run.distiller):
            raise DivergedError(f"the network is not finite after step {step} ({wrong}); {self._advice()}")
        saved = checkpoint.Checkpoint(
            kind=self.run.kind,
            step=step,
            config=self.run.config,
            model=self.run.model,
            classes=list(self.run.data.classes),
            random_states=states,
            metrics=metrics,
            teacher=self.teacher,
            files=self.files,
            **{name: part.state_dict() for name, part in self._parts().items()},
        )
        keep = self.run.runtime.keep if name == LAST and step != self.saved else 1
        checkpoint.save_checkpoint(self.run.output / name, saved, keep=keep)

    def _parts(self) -> dict[str, Any]:
        """What has a state_dict, by its name in the checkpoint."""
        distiller, training = self.run.distiller, self.training
        parts = {
            "network": training.evaluated.student,
            "loss": objective_of(distiller).criterion,
            "auxiliary": objective_of(distiller).auxiliary,
            "optimizer": training.optimizer,
            "scaler": training.scaler,
            "updated": None if training.average is None else distiller.student,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def restore(self) -> tuple[int, dict[str, float]]:
        """Put the run where its last.pt left it, on every process; returns the steps taken and that step's metrics.

        Raises CheckpointError where there is nothing fitting.
        """
        last = self.run.output / LAST
        on_main(self._find)
        found = checkpoint.load_checkpoint(last)
        for name, part in self._parts().items():
            checkpoint.load_state(part.load_state_dict, getattr(found, name), str(last))
        if self.training.average is not None:
            self.training.average.n_averaged.fill_(found.step)
        if rank() < len(found.random_states):  # of more processes than before the new ones keep their seed
            checkpoint.restore_random_states(found.random_states[rank()])
        self.saved = found.step
        return found.step, found.metrics

    def _find(self) -> None:
        """Make the youngest checkpoint that can be read last.pt."""
        last = self.run.output / LAST
        path, found = checkpoint.load_latest(last, lambda error: say(f"passed over: {error}"))
        say(f"resuming from {path}, step {found.step}")
        checkpoint.check_same_run(path, found.config, self.run.config, may_differ=may_differ(found, self.files))
        if found.teacher and found.teacher != self.teacher:
            raise checkpoint.CheckpointError(
                f"{path}: has another teacher than the one that is there now, though their options are the same: it "
                "was trained again since. Put the old one back, or begin another run by another --output"
            )
        if path != last:
            os.replace(path, last)  # else the next checkpoint would keep the damaged one, and drop this

    def check_finite(self, step: int, values: dict[str, float]) -> None:
        """Raises DivergedError, with what is known of the cause, where a loss term is not finite."""
        if all(math.isfinite(values[term]) for term in TERMS):
            return
        shown = ", ".join(f"{term} {values[term]:.4g}" for term in TERMS)
        network = _not_finite(self.run.distiller) or "the network is still finite: look at the data and the loss"
        rate = self.training.optimizer.param_groups[0]["lr"]
        raise DivergedError(
            f"the loss is not finite at step {step} ({shown}; learning rate {rate:.3g}; {network}); {self._advice()}"
        )

    def _advice(self) -> str:
        good = "no checkpoint was saved before"
        if self.saved is not None:
            good = f"last good checkpoint: {self.run.output / LAST}, step {self.saved}"
        return f"{good}. A lower optimizer.lr or a warm-up (schedule.warmup_steps) usually helps"


def _not_finite(distiller: Distiller) -> str:
    """Which tensors of the network and the projectors hold NaN or infinities, in words; empty where none does."""
    tensors = {name: value for name, value in distiller.state_dict().items() if value.is_floating_point()}
    wrong = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    return f"{len(wrong)} of its {len(tensors)} tensors hold NaN or inf, the first is {wrong[0]}" if wrong else ""
