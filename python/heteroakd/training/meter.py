"""What a training loop measures while it runs: loss terms, seconds per step, images per second."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from statistics import fmean, median

import torch
from torch import Tensor

from heteroakd.methods import TERMS
from heteroakd.system.distributed import sum_over_processes, world_size

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
        means = dict(zip(TERMS, terms.tolist(), strict=True))
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
