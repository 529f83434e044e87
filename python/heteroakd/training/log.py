"""What a run measures and writes while it lasts: loss terms, seconds per step and images per second, as JSON lines,
TensorBoard events and a progress bar or plain lines."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import fmean, median
from typing import IO, Any, Literal

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from heteroakd.evaluation.metrics import Evaluation, none_if_nan
from heteroakd.methods import TERMS
from heteroakd.system.distributed import sum_over_processes, world_size
from heteroakd.system.files import EVENTS, METRICS, naming, write_text
from heteroakd.system.signals import reader_may_leave

SECONDS_BETWEEN_LINES = 5.0


class RunLog:
    """Metrics of one run, to `folder`/metrics.jsonl, TensorBoard and the terminal; a context manager.

    Each line of the file is an object with `event` (train, evaluation or knowledge), `step` (steps taken) and numbers.

    Args:
        folder: output folder of the run; None: a process that writes nothing.
        first_step: steps already taken; what the files say beyond it, of a run that was cut off, is dropped.
        evaluated: whether the evaluation after them was completed; else what the files say of it is dropped, too.
        steps: steps of the whole run.
        progress: "auto", "bar", "lines" or "none".
        tensorboard: write events as well.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        first_step: int,
        evaluated: bool = True,
        steps: int,
        progress: Literal["auto", "bar", "lines", "none"],
        tensorboard: bool,
    ) -> None:
        self._file: IO[str] | None = None
        self._board: SummaryWriter | None = None
        if folder is None:
            progress = "none"
        else:
            self.path, self._events = folder / METRICS, folder / EVENTS
            kept = [
                line
                for line in (read_metrics(self.path) if first_step else [])
                if line["step"] < first_step or (line["step"] == first_step and (evaluated or line["event"] == "train"))
            ]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder), purge_step=first_step + 1) if tensorboard else None
        if progress == "auto":
            progress = "bar" if sys.stderr.isatty() else "lines"
        self._lines = progress == "lines"
        self._bar = tqdm(
            total=steps, initial=first_step, unit="step", disable=progress != "bar", dynamic_ncols=True, leave=True
        )
        self._first_step, self._steps, self._started = first_step, steps, time.monotonic()
        self._miou: float | None = None
        self._last_line = float("-inf")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        with reader_may_leave(sys.stderr):
            self._bar.close()
        for closed in (self._file, self._board):
            # What cannot be written was said when it was tried; here it would hide the error that ends the run.
            with suppress(OSError) if exception[0] is not None else nullcontext():
                if closed is not None:
                    closed.close()

    def advance(self) -> None:
        """One more step was taken."""
        with reader_may_leave(sys.stderr):
            self._bar.update()

    def train(self, step: int, values: dict[str, float]) -> None:
        """Numbers averaged over the steps since the last call: loss terms, learning rate, seconds."""
        self._write("train", step, values, train=values)
        used = {name: value for name, value in values.items() if name == "loss" or (name in TERMS and value != 0)}
        shown = {name: f"{value:.3f}" for name, value in used.items()}
        if self._miou is not None:
            shown["mIoU"] = f"{self._miou:.3f}"
        speed = {"images/s": f"{values['images_per_second']:.1f}"}
        self._bar.set_postfix(shown | speed, refresh=False)
        now = time.monotonic()
        if self._lines and (now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps):
            self._last_line = now
            eta = tqdm.format_interval((now - self._started) / max(1, step - self._first_step) * (self._steps - step))
            terms = " ".join(f"{name} {value}" for name, value in shown.items())
            self.say(
                f"step {step}/{self._steps}  {terms}  {values['seconds_per_step']:.3f} s/step  "
                f"{values['images_per_second']:.1f} images/s  ETA {eta}"
            )

    def evaluation(self, step: int, evaluation: Evaluation, seconds: float) -> None:
        """The result of an evaluation after `step` steps that took `seconds`."""
        values = evaluation.to_dict()
        self._miou = evaluation.miou
        val = {"miou": evaluation.miou, "pixel_accuracy": evaluation.pixel_accuracy}
        val_iou = {name: iou for name, iou in values["iou"].items() if iou is not None}
        self._write("evaluation", step, {"seconds": seconds, **values}, val=val, val_iou=val_iou)
        if self._lines:
            self.say(f"step {step}/{self._steps}  mIoU {evaluation.miou:.4f}  ({seconds:.1f} s)")

    def knowledge(self, step: int, reliability: float, weight: float) -> None:
        """Means of KMM's reliability and KEM's weight over the labelled pixels of the val pictures; NaN without any."""
        values = {"reliability": reliability, "weight": weight}
        known = {name: none_if_nan(value) for name, value in values.items()}
        self._write("knowledge", step, known, knowledge=values)

    def picture(self, name: str, step: int, image: Tensor) -> None:
        """A uint8 [3, H, W] picture for TensorBoard."""
        if self._board is not None:
            with naming(self._events):
                self._board.add_image(name, image, step)

    def say(self, text: str) -> None:
        """A line on stdout that leaves the bar whole."""
        with reader_may_leave(sys.stdout):
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _write(self, event: str, step: int, values: dict[str, Any], **scalars: dict[str, float]) -> None:
        """A line of the file; TensorBoard gets the groups of `scalars`."""
        if self._file is not None:
            with naming(self.path):
                self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
                self._file.flush()
        if self._board is not None:
            with naming(self._events):
                for group, numbers in scalars.items():
                    for name, value in numbers.items():
                        self._board.add_scalar(f"{group}/{name}", value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, without a last one that was cut off; [] where there is no file.

    Raises ValueError, naming file and line, for anything else that is not a JSON object with an event and a step.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    metrics = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            metrics.append(dict(json.loads(line)))
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
        if missing := [name for name in ("event", "step") if name not in metrics[-1]]:
            raise ValueError(f"{path}, line {number}: lacks {', '.join(missing)}")
    return metrics


def peak_memory(device: torch.device) -> int:
    """Bytes: the largest that torch has had allocated on a CUDA device, or that this process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


UNTIMED_STEPS = 3  # allocators and caches warm up


class Meter:
    """Loss terms and seconds per step, averaged between two calls of `means`; `batch_size` counts the images of all
    processes."""

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
        started = time.perf_counter()
        for batch in batches:
            self._waits.append(time.perf_counter() - started)
            yield batch
            started = time.perf_counter()

    def start_step(self) -> None:
        """The batch is there; from here on it is the step that takes the time."""
        self._started = time.perf_counter()

    def end_step(self, terms: Iterable[Tensor]) -> None:
        """The step is done; `terms` are its losses, in the order of TERMS."""
        self._sums += torch.stack([term.detach().float() for term in terms])
        self._steps += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds.append(time.perf_counter() - self._started)

    def means(self) -> dict[str, float]:
        """Terms, seconds_per_step, seconds_waiting_for_data and images_per_second since the last call; the terms are
        those of all processes, which must call this together."""
        terms = sum_over_processes(self._sums) / (self._steps * world_size())
        speed = self._speed(self._seconds[-self._steps :], self._waits[-self._steps :])
        self._sums.zero_()
        self._steps = 0
        return dict(zip(TERMS, terms.tolist(), strict=True)) | speed

    def summary(self) -> dict[str, float | None]:
        """Of all steps but the first ones: median seconds_per_step (transfer, networks, loss and optimiser, without
        loading the data), mean seconds_waiting_for_data, and images_per_second by the time of both, without evaluations
        and checkpoints. None where no step was taken."""
        if not self._seconds:
            return dict.fromkeys(("seconds_per_step", "seconds_waiting_for_data", "images_per_second"))
        seconds, waits = (times[UNTIMED_STEPS:] or times for times in (self._seconds, self._waits))
        return {**self._speed(seconds, waits), "seconds_per_step": median(seconds)}

    def _speed(self, seconds: list[float], waits: list[float]) -> dict[str, float]:
        step, wait = fmean(seconds), fmean(waits)
        rate = self._batch_size / (step + wait)
        return {"seconds_per_step": step, "seconds_waiting_for_data": wait, "images_per_second": rate}
