"""Everything that only a GPU can say about the GPU backends, in one command.

    python -m benchmarks.gpu_check [--output runs/gpu] [--allow-no-gpu] [--interpreted]

Correctness of every backend on the device, accuracy of the device's exponentials on confident logits, run-to-run
identity, absence of synchronisation, CUDA graphs, compute-sanitizer where it is installed, then time and peak memory
beside eager and torch.compile at the paper's sizes. Writes OUTPUT.json and OUTPUT.md. Exits with 1 if a check failed,
or did not run and ``--allow-no-gpu`` was not given. ``--interpreted`` runs what Triton's interpreter can, on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # relative L2 against float64
# (B, K, student grid, teacher grid, labels); the first two also run interpreted.
SHAPES = {
    "small": (1, 5, (3, 4), (2, 5), (12, 16)),
    "equal grids": (2, 6, (5, 7), (5, 7), (5, 7)),
    "Cityscapes crop": (2, 19, (64, 128), (64, 128), (512, 1024)),
    "mixed strides": (2, 19, (33, 65), (17, 29), (257, 500)),
    "ADE20K crop": (1, 150, (64, 64), (32, 32), (256, 256)),
    "many classes": (1, 600, (9, 9), (9, 9), (65, 70)),
}
# (B, C of both networks, K, grid, labels); the first also runs interpreted.
FEATURES = {
    "small": (2, (20, 36), 7, (5, 7), (10, 14)),
    "Cityscapes at stride 32": (8, (256, 512), 19, (16, 32), (512, 1024)),
    "ADE20K at stride 16": (2, (320, 2048), 150, (32, 32), (512, 512)),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 2.0, "proj_weight": 0.3},
    {"temperature": 1.5, "kem": "spatial", "align_corners": True},
    {"kem": "none", "kmm": False, "divergence": "ce", "resolution": "feature", "proj_weight": 1.0},
    {"temperature": 4.0, "reduction": "none"},
)


class Skipped(Exception):
    """Why a check cannot run here."""


@dataclasses.dataclass
class Result:
    name: str
    status: str  # "passed", "failed" or "did not run"
    detail: str
    seconds: float
    data: Any = None


# Inputs ----------------------------------------------------------------------------------------------------------


def make_inputs(shape: str, kind: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Student and teacher logits and labels. ``kind``: "randn", "trained" (N(+-10, 4), the labelled class high) or
    "huge" (to 1e4)."""
    batch, classes, *grids, size = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, classes, (batch, 1, -(-size[0] // 5), -(-size[1] // 5)), generator=generator)
    labels = coarse.repeat_interleave(5, 2).repeat_interleave(5, 3)[..., : size[0], : size[1]]

    def logits(grid: tuple[int, int]) -> Tensor:
        z = torch.randn(batch, classes, *grid, generator=generator)
        if kind == "huge":
            return (z * 4000).clamp(-1e4, 1e4)
        if kind == "randn":
            return z * 3
        nearest = torch.nn.functional.interpolate(labels.float(), grid).long()
        return (z * 2 - 10).scatter_add_(1, nearest, torch.full(nearest.shape, 20.0))

    student, teacher = (logits(grid).to(device, dtype) for grid in grids)
    ignored = torch.rand(labels.shape, generator=generator) < 0.1
    return student, teacher, labels.masked_fill(ignored, 255)[:, 0].to(device)


def make_features(shape: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Both networks' features, weights [K, C] whose logits look trained or not by chance, and labels."""
    batch, channels, classes, grid, size = FEATURES[shape]
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(batch, c, *grid, generator=generator).to(device, dtype) for c in channels)
    weights = (torch.randn(classes, c, generator=generator).to(device) * 2 / c**0.5 for c in channels)
    labels = torch.randint(0, classes + 1, (batch, *size), generator=generator)
    return *features, *weights, labels.masked_fill(labels == classes, 255).to(device)


def run_features(function: Callable, inputs: Sequence[Tensor], dtype: torch.dtype | None, **options: Any) -> dict:
    """Loss and the gradients of features and weights, computed in ``dtype`` (None: as they come)."""
    leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in inputs[:4]]
    loss = function(*leaves, inputs[4], resolution="feature", temperature=2.0, proj_weight=0.5, **options)
    loss.backward()
    return {"loss": loss.detach(), **{f"gradient {i}": x.grad for i, x in enumerate(leaves)}}


def run(function: Callable, inputs: Sequence[Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients of ``function``, with ``segmentation_loss``'s argument order if that is what it is."""
    student, teacher = (x.detach().to(dtype).clone().requires_grad_() for x in inputs[:2])
    segmentation = "segmentation" in getattr(function, "__name__", "")
    loss = (
        function(student, inputs[2], teacher, **options)
        if segmentation
        else function(student, teacher, inputs[2], **options)
    )
    loss.backward(torch.linspace(-1, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).view_as(loss) * 256)
    gradients = {"student": student.grad, "teacher": teacher.grad}
    return {"loss": loss.detach(), **{k: g for k, g in gradients.items() if g is not None}}


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2. 1e-20: where both networks agree to 1e-30, a gradient of 0 and one of 4e-127 are the same."""
    return float((actual.double() - expected.double()).norm() / (expected.double().abs() + 1e-20).norm())


# Checks ----------------------------------------------------------------------------------------------------------


class Checks:
    """The checks of one device and one backend; each returns a line of text, and data for the JSON."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device
        self.shapes = list(SHAPES) if device != "cpu" else list(SHAPES)[:2]

    def _need_gpu(self) -> None:
        if self.device == "cpu":
            raise Skipped("interpreted on the CPU")

    def _compare(self, name: str, shape: str, kind: str, dtype: torch.dtype, options: dict[str, Any]) -> float:
        """Worst error of the gradients as a share of what is allowed: the dtype's bound, or eager's own error."""
        from hetero_kernels import functional, reference

        inputs = make_inputs(shape, kind, self.device, dtype)
        exact = run(getattr(reference, name), inputs, torch.float64, **options)
        ours = run(getattr(functional, name), inputs, dtype, backend=self.backend, **options)
        eager = run(getattr(reference, name), inputs, dtype, **options)
        worst = 0.0
        for key, expected in exact.items():
            if key == "loss":
                continue
            # Spatial weights pick few pixels whose terms cancel; of huge logits float32 knows 5e-4.
            slack = 8.0 if kind == "huge" else 3.0 if options.get("kem") == "spatial" else 1.0
            allowed = max(BOUNDS[dtype] * slack, max(slack, 2.0) * error(eager[key], expected))
            worst = max(worst, error(ours[key], expected) / allowed)
        if not worst <= 1:
            raise AssertionError(f"{name} {shape} {kind} {dtype} {options}: {worst:.2f} times the error allowed")
        return worst

    def correctness(self) -> tuple[str, Any]:
        errors = {}
        for shape in self.shapes:
            for options in OPTIONS:
                for kind in ("randn", "trained", "huge"):
                    key = f"hakd {shape} {kind} {options}"
                    errors[key] = self._compare("hakd_loss", shape, kind, torch.float32, options)
            for dtype in (torch.bfloat16, torch.float16):
                errors[f"hakd {shape} {dtype}"] = self._compare(
                    "hakd_loss", shape, "randn", dtype, {"temperature": 2.0}
                )
            for smoothing in (0.0, 0.1):
                options = {"label_smoothing": smoothing, "temperature": 2.0, "kd_weight": 0.5}
                for kind in ("randn", "trained"):
                    key = f"segmentation {shape} {kind} {smoothing}"
                    errors[key] = self._compare("segmentation_loss", shape, kind, torch.float32, options)
        return f"{len(errors)} cases, worst {max(errors.values()):.2f} of the error allowed", errors

    def features(self) -> tuple[str, Any]:
        """projected_hakd_loss: projections, loss and every gradient."""
        from hetero_kernels import functional, reference

        errors = {}
        for shape in list(FEATURES)[: 1 if self.device == "cpu" else None]:
            for dtype in (torch.float32, torch.bfloat16):
                inputs = make_features(shape, self.device, dtype)
                exact = run_features(reference.projected_hakd_loss, inputs, torch.float64)
                ours = run_features(functional.projected_hakd_loss, inputs, None, backend=self.backend)
                eager = run_features(reference.projected_hakd_loss, inputs, None)
                for key, expected in exact.items():
                    allowed = max(2 * BOUNDS[ours[key].dtype], 2 * error(eager[key], expected))
                    errors[f"{shape} {dtype} {key}"] = error(ours[key], expected) / allowed
        if not max(errors.values()) <= 1:
            raise AssertionError(f"times the error allowed: { {k: v for k, v in errors.items() if not v <= 1} }")
        return f"{len(errors)} results, worst {max(errors.values()):.2f} of the error allowed", errors

    def accuracy(self) -> tuple[str, Any]:
        """Gradients on confident logits, whose reliabilities are differences that coarse exponentials lose."""
        from hetero_kernels import functional, reference

        errors = {}
        for temperature in (1.0, 2.0, 4.0):
            inputs = make_inputs(self.shapes[-1 if self.device == "cpu" else 2], "trained", self.device)
            exact = run(reference.hakd_loss, inputs, torch.float64, temperature=temperature)
            ours = run(functional.hakd_loss, inputs, torch.float32, temperature=temperature, backend=self.backend)
            errors[temperature] = error(ours["student"], exact["student"])
        if max(errors.values()) > 1e-6:
            raise AssertionError(f"relative L2 of the gradient by temperature: {errors}, allowed 1e-6")
        return f"relative L2 of the gradient at most {max(errors.values()):.1e}", errors

    def identical_runs(self) -> tuple[str, Any]:
        from hetero_kernels import functional

        inputs = make_inputs(self.shapes[-1], "trained", self.device)
        first, second = (run(functional.hakd_loss, inputs, torch.float32, backend=self.backend) for _ in range(2))
        if not all(torch.equal(first[k], second[k]) for k in first):
            raise AssertionError("two runs differ")
        return "two runs are bit-identical", None

    def no_synchronisation(self) -> tuple[str, Any]:
        from hetero_kernels import functional

        self._need_gpu()
        inputs = make_inputs("mixed strides", "randn", self.device)
        run(functional.hakd_loss, inputs, torch.float32, backend=self.backend, proj_weight=1.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(functional.hakd_loss, inputs, torch.float32, backend=self.backend, proj_weight=1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return "forward and backward wait for nothing", None

    def cuda_graph(self) -> tuple[str, Any]:
        from hetero_kernels import functional

        self._need_gpu()
        student, teacher, labels = make_inputs("mixed strides", "randn", self.device)
        student.requires_grad_()

        def step() -> tuple[Tensor, Tensor]:
            loss = functional.hakd_loss(student, teacher, labels, temperature=2.0, backend=self.backend)
            return loss, torch.autograd.grad(loss, student)[0]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            student.copy_(torch.randn_like(student))
        graph.replay()
        expected = step()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True)):
            raise AssertionError("the replayed graph differs from an ordinary call")
        return "captured, replayed on new logits, identical", None

    def sanitizer(self) -> tuple[str, Any]:
        self._need_gpu()
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            raise Skipped("compute-sanitizer is not installed")
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--one-case", self.backend]
        done = subprocess.run(
            [tool, "--error-exitcode", "9", *command], capture_output=True, text=True, timeout=240, check=False
        )
        if done.returncode:
            raise AssertionError((done.stdout + done.stderr)[-2000:])
        return "memcheck clean on small cases", None

    def speed_and_memory(self) -> tuple[str, Any]:
        self._need_gpu()
        rows = [paper_case(name, self.backend, self.device) for name in PAPER_CASES]
        return "; ".join(f"{r['case']}: {r['reference ms'] / r['ours ms']:.1f}x eager" for r in rows), rows


PAPER_CASES = {
    "hakd, Cityscapes 8 x 512x1024": ("hakd", (8, 19, 64, 128), (512, 1024), {"temperature": 2.0}),
    "hakd at feature resolution": ("hakd", (8, 19, 64, 128), (512, 1024), {"resolution": "feature"}),
    "hakd, ADE20K 16 x 512x512": ("hakd", (16, 150, 64, 64), (512, 512), {"temperature": 2.0}),
    "CE + KD, Cityscapes 8 x 512x1024": ("segmentation", (8, 19, 64, 128), (512, 1024), {}),
    "hakd from features, 256 and 512 channels": (
        "projected",
        "Cityscapes at stride 32",
        None,
        {"resolution": "feature"},
    ),
}


def _paper_arguments(kind: str, shape: Any, size: Any, device: str) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What a loss is called with, and whose gradients are wanted."""
    if kind == "projected":
        features = make_features(shape, device)
        return features, [x.requires_grad_() for x in (features[0], features[2])]
    labels = torch.randint(0, shape[1], (shape[0], *size), device=device)
    student, teacher = (torch.randn(shape, device=device) * 3 for _ in range(2))
    student.requires_grad_()
    return ((student, teacher, labels) if kind == "hakd" else (student, labels, teacher)), [student]


def paper_case(name: str, backend: str, device: str) -> dict[str, Any]:
    """Milliseconds (median) and peak MiB beyond the inputs of a forward and backward, by provider."""
    from hetero_kernels import functional, reference

    from .timing import measure

    kind, shape, size, options = PAPER_CASES[name]
    arguments, learning = _paper_arguments(kind, shape, size, device)
    row: dict[str, Any] = {"case": name}
    steps, peaks = {}, {}
    torch._dynamo.reset()
    function = {"projected": "projected_hakd_loss"}.get(kind, f"{kind}_loss")
    losses = {
        "reference": getattr(reference, function),
        "compile": torch.compile(getattr(reference, function)),
        "ours": lambda *a, **k: getattr(functional, function)(*a, backend=backend, **k),
    }
    from .steps import Step

    for provider, loss in losses.items():
        step = Step(lambda loss=loss: loss(*arguments, **options), learning)
        try:
            step()
            step.release()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[provider] = torch.cuda.max_memory_allocated() - before
            step.release()
            steps[provider] = step
        except torch.cuda.OutOfMemoryError:
            row[f"{provider} ms"] = float("nan")
            step.release()
            torch.cuda.empty_cache()
    for provider, times in measure(steps, seconds=4.0, minimum=0.005).items():
        row[f"{provider} ms"] = times["both"][0] * 1e3
    for provider, peak in peaks.items():
        row[f"{provider} MiB"] = peak / 2**20
    return row


# Report ------------------------------------------------------------------------------------------------------------

CHECKS = ("correctness", "features", "accuracy", "identical_runs", "no_synchronisation", "cuda_graph", "sanitizer",
          "speed_and_memory")  # fmt: skip


def check(name: str, perform: Callable[[], tuple[str, Any]]) -> Result:
    start = time.perf_counter()
    try:
        detail, data = perform()
        status = "passed"
    except Skipped as reason:
        status, detail, data = "did not run", str(reason), None
    except Exception as problem:  # a check that breaks has failed; the others still run
        status, detail, data = "failed", f"{type(problem).__name__}: {problem}", traceback.format_exc()
    return Result(name, status, detail, time.perf_counter() - start, data)


def run_checks(interpreted: bool) -> list[Result]:
    import hetero_kernels

    if not interpreted and not torch.cuda.is_available():
        return [Result(name, "did not run", "torch sees no GPU", 0.0) for name in CHECKS]
    device = "cpu" if interpreted else "cuda"
    results = []
    for backend in ("triton",) if interpreted else ("cuda", "triton"):
        try:
            hetero_kernels.select_backend(backend, device)
        except RuntimeError as problem:
            results.append(Result(backend, "did not run", str(problem), 0.0))
            continue
        checks = Checks(backend, device)
        for name in CHECKS:
            print(f"{backend} {name} ...", flush=True)
            results.append(check(f"{backend} {name}", getattr(checks, name)))
    return results


def markdown(results: list[Result], about: str) -> str:
    lines = ["# GPU check", "", about, "", "| check | status | detail | seconds |", "|---|---|---|---|"]
    lines += [
        f"| {r.name} | {r.status if r.status == 'passed' else f'**{r.status}**'} | "
        f"{r.detail.splitlines()[0].replace('|', '/') if r.detail else ''} | {r.seconds:.1f} |"
        for r in results
    ]
    for result in results:
        if result.name.endswith("speed_and_memory") and result.data and result.status == "passed":
            columns = list(result.data[0])
            lines += ["", "Forward and backward, medians; MiB beyond the inputs.", ""]
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            for row in result.data:
                shown = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in (row.get(c, "-") for c in columns))
                lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def describe_machine(interpreted: bool) -> str:
    from importlib import metadata

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not found by that name"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    where = "Triton's interpreter on the CPU" if interpreted else gpu
    return f"{where}; torch {torch.__version__}, triton {triton}, python {sys.version.split()[0]}."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="without suffix; .json and .md are written"
    )
    parser.add_argument("--allow-no-gpu", action="store_true", help="what did not run is no failure")
    parser.add_argument("--interpreted", action="store_true", help="what Triton's interpreter can run, on the CPU")
    parser.add_argument("--one-case", metavar="BACKEND", help=argparse.SUPPRESS)  # what compute-sanitizer runs
    options = parser.parse_args(argv)
    if options.interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.one_case:
        checks = Checks(options.one_case, "cuda")
        for case in OPTIONS:
            checks._compare("hakd_loss", "small", "randn", torch.float32, case)
        return 0
    results, about = run_checks(options.interpreted), describe_machine(options.interpreted)
    text = markdown(results, about)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": about, "results": [dataclasses.asdict(r) for r in results]}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str))
    options.output.with_suffix(".md").write_text(text)
    print(text)
    failed = [r for r in results if r.status == "failed"]
    missing = [r for r in results if r.status == "did not run"]
    return int(bool(failed) or (bool(missing) and not options.allow_no_gpu))


if __name__ == "__main__":
    sys.exit(main())
