"""What the loss of a run costs by a backend: time and peak memory, on random maps of the shapes that the run had.

`python -m heteroakd.training.loss_cost RUN BACKEND` measures in a process of its own, so that its peak is its own, and
prints a JSON object.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn

from heteroakd.config.groups import LossConfig, from_dict
from heteroakd.methods.distiller import Teacher, build_distiller
from heteroakd.networks.taps import TappedNetwork, TappedOutput, probe
from heteroakd.system.distributed import choose_device, world_size
from heteroakd.training.log import peak_memory
from heteroakd.training.run import CONFIG, SUMMARY, Run
from heteroakd.training.step import PRECISIONS

SECONDS = 2.0  # of measuring, more where three steps take longer


@dataclass(frozen=True)
class LossCost:
    """One forward and backward of the loss over one process's images of a step."""

    backend: str
    seconds: float
    """Median, of all micro-batches together."""
    peak_bytes: int
    """Beyond what was there before, gradients of the maps included."""
    machine: str
    """Where it was measured."""


def describe_machine(device: torch.device) -> str:
    """The device's model, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def loss_inputs(run: Run) -> dict[str, Any]:
    """What `measure` needs to know of a run besides its configuration: shapes of student's and teacher's outputs for a
    training crop, and images per process and micro-batch; JSON-compatible."""
    height, width = run.config["data"]["crop_size"]

    def shapes(network: TappedNetwork) -> dict[str, Any]:
        return {name: _shape(value) for name, value in probe(network, (height, width))._asdict().items()}

    return {
        "student": shapes(run.distiller.student),
        "teacher": None if run.teacher is None else shapes(run.teacher.network),
        "images": run.schedule.batch_size // world_size() // run.schedule.micro_batches,
        "crop_size": [height, width],
    }


def _shape(value: Tensor | tuple[Tensor, ...] | None) -> Any:
    if value is None:
        return None
    return list(value.shape[1:]) if isinstance(value, Tensor) else [list(one.shape[1:]) for one in value]


class Maps(nn.Module):
    """In the place of a network: random outputs of recorded shapes, which get gradients where `learns`."""

    stride = 1
    taps: tuple[str, ...] = ()

    def __init__(self, shapes: dict[str, Any], dtype: torch.dtype, learns: bool) -> None:
        super().__init__()
        self.shapes, self.dtype, self.learns = shapes, dtype, learns
        self.device = nn.Parameter(torch.zeros(()))  # where the outputs are to be
        self.outputs: dict[int, TappedOutput] = {}

    def forward(self, images: Tensor) -> TappedOutput:
        """The same outputs for every batch of one size."""
        count = len(images)
        if count not in self.outputs:
            self.outputs[count] = TappedOutput(
                **{name: self._random(shape, count) for name, shape in self.shapes.items()}
            )
        return self.outputs[count]

    def _random(self, shape: Any, count: int) -> Any:
        if shape is None:
            return None
        if isinstance(shape[0], list):
            return tuple(self._random(one, count) for one in shape)
        values = torch.randn(count, *shape, device=self.device.device, dtype=self.dtype)
        return values.requires_grad_(self.learns)


def loss_step(folder: Path, backend: str, device: torch.device) -> tuple[Callable[[int], Callable[[], None]], int]:
    """By number of images, whose maps it makes, a forward and backward of a run's loss; and the run's own number."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    inputs, dtype = summary["loss_inputs"], PRECISIONS[summary["precision"]]
    torch.manual_seed(0)
    student = Maps(inputs["student"], dtype, learns=True).to(device)
    teacher = None
    if inputs["teacher"] is not None:
        teacher = Teacher(cast(TappedNetwork, Maps(inputs["teacher"], dtype, learns=False).to(device)))
    classes, (height, width) = inputs["student"]["logits"][0], inputs["crop_size"]
    distiller = build_distiller(
        cast(TappedNetwork, student),
        teacher,
        config.get("method", "none"),
        from_dict(LossConfig, {**config["loss"], "backend": backend}, str(folder)),
        classes,
        (height, width),
    ).to(device)

    def prepare(count: int) -> Callable[[], None]:
        images = torch.zeros(count, 3, 1, 1, device=device)
        coarse = torch.randint(classes, (count, -(-height // 8), -(-width // 8)), device=device)
        labels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()
        learning = [value for value in student(images) for value in (value if isinstance(value, tuple) else (value,))]
        outputs = None if teacher is None else teacher(images)

        def step() -> None:
            distiller(images, labels, outputs).loss.backward()
            for value in learning:
                if value is not None:
                    value.grad = None

        return step

    return prepare, inputs["images"]


def measure(folder: Path, backend: str) -> LossCost:
    """Time and peak memory, on the device and with the threads of the run. Raises OSError and ValueError where the
    folder holds no run, its device is not here, or the backend cannot run."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    device = choose_device(summary["device"], summary["threads"])
    prepare, count = loss_step(folder, backend, device)
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    prepare(1)()  # libraries, threads and autograd are warm
    step = prepare(count)
    before = _memory(device, peak=False)
    _forget_peak(device)
    step()
    peak = max(0, _memory(device, peak=True) - before)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return LossCost(backend, median(seconds) * config["schedule"]["micro_batches"], peak, describe_machine(device))


def _memory(device: torch.device, peak: bool) -> int:
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device)
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux: the growth of the largest size so far is the least that the step took
        return peak_memory(device)
    key = "VmHWM:" if peak else "VmRSS:"
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the kernel's counter starts again


def measure_apart(folder: Path, backend: str) -> LossCost | str:
    """`measure` in a process of its own; in words, what went wrong there (memory that was not enough, for instance)."""
    command = [sys.executable, "-m", "heteroakd.training.loss_cost", str(folder), backend]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        return lines[-1] if lines else f"ended with status {finished.returncode} (-9: perhaps too little memory)"
    return LossCost(**json.loads(finished.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(vars(measure(Path(sys.argv[1]), sys.argv[2]))))
