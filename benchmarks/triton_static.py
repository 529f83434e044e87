"""What can be said of the Triton kernels without a GPU: registers, spills, shared memory, instructions per element.

An element is a (pixel, class) of the pixel losses, a thousand multiplications of a matrix product on features.

They are compiled ahead of time exactly as they would be launched: the losses run on meta tensors of the paper's sizes,
their launches are recorded instead of started, and Triton's launcher specialises and compiles them for a driver that is
not there. Counts are of the machine code. No time is measured here; none is claimed.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hetero_kernels.triton import tuning

from . import sass

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory of the smallest card of a family, bytes a program may use (CUDA programming guide; 64 KB of LDS).
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx90a": 64, "gfx942": 64}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


# Launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A kernel as the public functions would start it."""

    kernel: JITFunction
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def loss_grid(launch: Launch) -> tuple[int, int]:
    """Height and width, which the launch has ``hidden``."""
    grid = launch.arguments["grid"]
    return ~grid.height >> 1, ~grid.width >> 1


@contextlib.contextmanager
def recorded_launches(family: str = "nvidia") -> Iterator[list[Launch]]:
    """Collects launches instead of starting them, as they would be on a ``family`` of tuning.py."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        names = self.arg_names
        arguments = dict(zip(names, args, strict=False))
        launches.append(Launch(self, int(torch.Size(grid).numel()), arguments, kwargs, options))

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(tuning, "family", lambda device: family):
        yield launches


class StubDriver:
    """What Triton's launcher asks of a driver, for a ``target`` that this machine need not have: enough to specialise
    and compile a launch, not to start it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)  # the launcher keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel of a launch, specialised by Triton's own launcher."""
    given = dict(launch.constants)
    if target.backend == "hip" and "PRECISION" in given:
        given["PRECISION"] = "ieee"
    with mock.patch.object(driver, "_active", StubDriver(target)):
        return launch.kernel.run(
            *launch.arguments.values(), grid=(launch.programs,), warmup=True, **given, **launch.options
        )


class Typed(Exception):
    """A launch's code is complete but for what is the target's: its branches are chosen, its types and shapes fit."""


def type_launch(launch: Launch, target: GPUTarget) -> None:
    """What a compilation of a launch would find wrong with the kernel's source; the target's passes, which take most of
    the time, are left out."""
    backend = type(make_backend(target))
    add_stages = backend.add_stages

    def stop(*_: Any) -> None:
        raise Typed

    def until_typed(self: Any, stages: dict, *arguments: Any, **options: Any) -> None:
        add_stages(self, stages, *arguments, **options)
        stages["ttgir"] = stop

    with mock.patch.object(backend, "add_stages", until_typed), contextlib.suppress(Typed):
        compile_launch(launch, target)


# Machine code ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a compiled kernel uses. ``bodies``: its innermost loops, in order of appearance."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    bodies: list[list[sass.Instruction]] = field(default_factory=list)

    @property
    def loops(self) -> list[collections.Counter]:
        """Their opcodes."""
        return [sass.count(body) for body in self.bodies]

    def main_loop(self, *marks: str) -> list[sass.Instruction]:
        """The first with one of these opcodes."""
        return next(body for body in self.bodies if any(i.kind in marks for i in body))


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inspect(compiled: Any, target: GPUTarget) -> Report:
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def number(key: str) -> int:
            found = re.findall(rf"\.{key}:\s+(\d+)", text)
            return int(found[-1]) if found else 0

        spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        return Report(number("vgpr_count"), spilled, compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", cubin.name)
        (code,) = sass.parse(_run(_tool("nvdisasm"), "-c", "-hex", cubin.name)).values()
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    return Report(registers, stack, compiled.metadata.shared, code.loops())


def occupancy(launch: Launch, report: Report, target: str) -> int:
    """Warps that fit a multiprocessor: by its 64 Ki registers, its shared memory, its 2048 (1536) threads."""
    warps = launch.options.get("num_warps", 4)
    by_registers = 65536 // (32 * max(report.registers, 1)) // warps
    kilobytes = {"sm_80": 164, "sm_90": 228, "sm_100": 228}.get(target, 100)
    by_shared = kilobytes * 1024 // (report.shared_bytes + 1024)
    most = 64 if target in ("sm_80", "sm_90", "sm_100") else 48
    return min(by_registers, by_shared, most // warps, 32) * warps


# Cases -------------------------------------------------------------------------------------------------------------


def paper_launches(dtype: torch.dtype = torch.float32, classes: int = 19, family: str = "nvidia") -> list[Launch]:
    """The default calls at the paper's sizes, logits at stride 8: Cityscapes 512x1024 batch 8 (K = 19) or ADE20K
    512x512 batch 16 (K = 150); ``hakd_loss`` at both resolutions, ``segmentation_loss`` with and without a teacher."""
    from hetero_kernels.triton import pixel_losses

    batch, height, width = (16, 512, 512) if classes == 150 else (8, 512, 1024)

    def logits() -> Tensor:
        return torch.empty(batch, classes, height // 8, width // 8, dtype=dtype, device="meta")

    labels = torch.empty(batch, height, width, dtype=torch.int64, device="meta")
    hakd: Callable = pixel_losses.hakd_loss
    with recorded_launches(family) as launches:
        for resolution, proj_weight in (("label", 0.0), ("feature", 0.0), ("label", 1.0)):
            scalars = torch.tensor([2.0, 1.0, proj_weight], dtype=torch.float64)
            hakd(
                logits(), logits(), labels, scalars, None, None, None, True, "class", "kl", resolution, False, 255,
                "mean", True, proj_weight != 0,
            )  # fmt: skip
        scalars = torch.tensor([1.0, 1.0, 0.1, 0.0], dtype=torch.float64)
        for teacher in (logits(), None):
            pixel_losses.segmentation_loss(
                logits(), teacher, labels, None, scalars, None, None, None, False, 255, "mean", True
            )
    return launches


def projected_launches(dtype: torch.dtype = torch.float32, classes: int = 19, family: str = "nvidia") -> list[Launch]:
    """``projected_hakd_loss`` and its backward at stride 32 of the paper's images, 256 and 512 channels."""
    from hetero_kernels.triton import projected_losses

    batch, height, width = (16, 16, 16) if classes == 150 else (8, 16, 32)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    features = [empty(batch, channels, height, width) for channels in (256, 512)]
    weights, biases = [empty(classes, c, dtype=torch.float32) for c in (256, 512)], [empty(classes) for _ in range(2)]
    labels = empty(batch, 32 * height, 32 * width, dtype=torch.int64)
    scalars = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    with recorded_launches(family) as launches:
        gradient = projected_losses.projected_hakd_loss(
            *features, *weights, *biases, labels, scalars, None, None, None, True, "class", "kl", 255, "mean",
            True, True, False, True,
        )[3]  # fmt: skip
        projected_losses.project_back(gradient, weights[0], empty(dtype=torch.float32), features[0])
    return launches


def projection_launches(dtype: torch.dtype = torch.float32, classes: int = 19, family: str = "nvidia") -> list[Launch]:
    """A step of ``HeteroAKDLoss``'s defaults from features, ResNet101 (2048 channels, stride 8) to ResNet18 (512), at
    the sizes of :func:`paper_launches`: batch norm in training mode, a teacher whose features need no gradient."""
    from hetero_kernels.triton import pixel_losses, projection

    batch, height, width = (16, 512, 512) if classes == 150 else (8, 512, 1024)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    features = [empty(batch, channels, height // 8, width // 8, dtype=dtype) for channels in (512, 2048)]
    weights = [empty(classes, x.shape[1]) for x in features]
    labels = empty(batch, height, width, dtype=torch.int64)
    scalars = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    with recorded_launches(family) as launches:
        projected = [projection.project(x, w, True, "none") for x, w in zip(features, weights, strict=True)]
        networks = [t for z, _, _ in projected for t in (z, empty(classes), empty(classes))]
        gradients = pixel_losses.normalized_hakd_loss(
            *networks, labels, scalars, None, None, None, False, False, True, "class", "kl", "label", False, 255,
            "mean", True, True,
        )[3:5]  # fmt: skip
        for x, w, outputs, gradient in zip(features, weights, projected, gradients, strict=True):
            student = x is features[0]
            projection.project_gradients(gradient, outputs[2], x, w, *outputs, "none", student, True)
    return launches


def all_launches(dtype: torch.dtype = torch.float32, classes: int = 19, family: str = "nvidia") -> list[Launch]:
    makers = (paper_launches, projected_launches, projection_launches)
    return [launch for make in makers for launch in make(dtype, classes, family)]


def family_of(target: str) -> str:
    return "amd" if TARGETS[target].backend == "hip" else "nvidia"


def describe(launch: Launch) -> str:
    given = launch.constants
    notes = []
    if launch.name in ("hakd_kernel", "hakd_many_kernel"):
        notes = ["feature resolution" if given["STUDENT_DIRECT"] else "label resolution"]
        notes += ["with L_proj"] if given["PROJ"] else []
        notes += ["raw logits"] if launch.arguments["student"].scale is not None else []
    elif launch.name == "finish_kernel" and launch.arguments["student"].scale is not None:
        notes = ["raw logits"]
    elif launch.name == "project_back_kernel" and launch.arguments["gradient"].by_statistics is not None:
        notes = ["raw logits"]
    elif launch.name in ("segmentation_kernel", "segmentation_many_kernel"):
        notes = ["CE + KD" if given["HAS_TEACHER"] else "CE"]
    return launch.name + (f" ({', '.join(notes)})" if notes else "")


# Kinds of instructions, by opcode; all of them first.
KINDS = {"instructions": (), "MUFU": ("MUFU",), "FMA": ("FFMA", "FMUL", "FADD"), "LDS": ("LDS",),
         "LDG": ("LDG", "LDGSTS"), "tensor core": ("HMMA", "HGMMA", "QGMMA", "UTCHMMA")}  # fmt: skip
COLUMNS = ("kernel", "K", "dtype", "target", "registers", "spilled bytes", "shared KB", "warps per SM",
           "instructions per element", *list(KINDS)[1:])  # fmt: skip


def table(targets: list[str], dtypes: list[torch.dtype]) -> str:
    rows: list[tuple[object, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for classes, dtype in itertools.product((19, 150), dtypes):
        for target, launch in ((t, x) for t in targets for x in all_launches(dtype, classes, family_of(t))):
            report = inspect(compile_launch(launch, TARGETS[target]), TARGETS[target])
            counted = instructions_per_element(launch, report, classes)
            rows.append((
                describe(launch), classes, DTYPES[dtype], target, report.registers, report.spilled_bytes,
                round(report.shared_bytes / 1024), occupancy(launch, report, target),
                *(("-",) * len(KINDS) if counted is None else (f"{n:.1f}" for n in counted.values())),
            ))  # fmt: skip
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def elements_per_thread(launch: Launch, classes: int) -> float:
    """What a thread of a kernel does in one round of its main loop, counted in elements: (pixel, class) pairs of a row
    where the loop is over rows of pixels, else thousands of a matrix product's multiplications."""
    given, threads = launch.constants, 32 * launch.options["num_warps"]
    if launch.name in ROW_KERNELS:
        return classes * given["TILE"] / threads
    if launch.name == "project_back_kernel":
        return given["CLASSES"] * given["PIXELS"] * given["CHANNELS"] / threads / 1000
    columns = sum(given["PRODUCTS" if launch.name == "projected_hakd_kernel" else "BLOCKS"])
    return columns * given["PIXELS"] * given["CHANNELS"] / threads / 1000


ROW_KERNELS = ("hakd_kernel", "segmentation_kernel")
PRODUCT_KERNELS = (
    "projected_hakd_kernel", "weight_gradients_kernel", "project_kernel", "weights_kernel", "project_back_kernel",
)  # fmt: skip


def instructions_per_element(launch: Launch, report: Report, classes: int) -> dict[str, float] | None:
    """By kind, of the first loop with special functions (a row of pixels; of the bounded mathematics where there are
    two) or with tensor core instructions, for each of the elements that a thread has in it."""
    mark = "MUFU" if launch.name in ROW_KERNELS else "tensor core" if launch.name in PRODUCT_KERNELS else None
    loop = next((loop for loop in report.loops if mark and any(loop[op] for op in KINDS[mark])), None)
    if loop is None:
        return None
    elements = elements_per_thread(launch, classes)
    return {kind: sum(loop[op] for op in ops or loop) / elements for kind, ops in KINDS.items()}
