"""``python -m benchmarks.run``: measures everything, the providers of a case in turns, and writes one JSON file.

Seconds and bytes throughout. ``--quick`` prints one table in less than a minute instead.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import memory, report, timing
from .cases import (
    CASES,
    PAPER_SIZES,
    PIXEL_LOSSES,
    PROJECTED_LOSSES,
    PROJECTIONS,
    SERIES,
    TRAIN_STEPS,
    VARIANTS,
    WHOLE_LOSSES,
    Case,
    PixelCase,
)
from .results import COMPARED
from .steps import fused_backends, make_step, providers

QUICK = (
    "R101 -> R18, K=19",
    "hakd K=19",
    "hakd feature resolution",
    "CE + KD",
    "CE",
    "hakd tiny",
    "CE tiny",
    "projected K=19",
)


class Runner:
    """Measures parts of the suite.

    Args:
        device: of all tensors.
        threads: of torch.
        seconds: that the rounds of one comparison should take together.
        limits: least and largest number of rounds.
    """

    def __init__(self, device: str, threads: int, seconds: float, limits: tuple[int, int] = (3, 15)) -> None:
        self.device, self.threads, self.seconds, self.limits = device, threads, seconds, limits
        torch.set_num_threads(threads)
        self.fused = fused_backends(device)

    def comparison(self, case: Case, names: Sequence[str], share: float = 1.0) -> dict[str, Any]:
        """One case by several providers, in ``share`` of the seconds."""
        torch._dynamo.reset()
        steps = {name: make_step(case, name, self.device) for name in names}
        times = timing.measure(steps, share * self.seconds, self.limits)
        del steps
        gc.collect()
        row = {"case": case.name, "elements": case.elements, "times": times, "asked": case.asked}
        if isinstance(case, PixelCase) and case.allowance is not None:
            row["allowance"] = case.allowance
        return row

    def comparisons(self, cases: Iterable[Case]) -> list[dict[str, Any]]:
        rows = []
        for case in cases:
            _say(case.name)
            rows.append(self.comparison(case, providers(case, self.device)))
        return rows

    def whole_loss(self) -> list[dict[str, Any]]:
        return self.comparisons(WHOLE_LOSSES.values())

    def pixel_losses(self) -> list[dict[str, Any]]:
        return self.comparisons(PIXEL_LOSSES.values())

    def projection(self) -> list[dict[str, Any]]:
        return self._with_rates(PROJECTIONS)

    def projected_losses(self) -> list[dict[str, Any]]:
        return self._with_rates(PROJECTED_LOSSES)

    def _with_rates(self, cases: Mapping[str, Any]) -> list[dict[str, Any]]:
        rows = self.comparisons(cases.values())
        for row in rows:
            case = cases[row["case"]]
            row["operations"], row["bytes"] = case.operations, case.feature_bytes
        return rows

    def variants(self) -> list[dict[str, Any]]:
        """Groups of cases by our backends alone; a case that does not run here says why."""
        groups = []
        for group, variants in VARIANTS.items():
            _say(group)
            for backend in self.fused:
                steps, missing = {}, {}
                if backend != "cpu" and any(v.case.threads or v.case.instruction_set for v in variants):
                    continue
                for variant in variants:
                    step = make_step(variant.case, backend, self.device)
                    try:
                        step()
                    except RuntimeError as error:  # an instruction set that this machine lacks
                        missing[variant.label] = str(error).splitlines()[0]
                    else:
                        steps[variant.label] = step
                times = timing.measure(steps, self.seconds, self.limits)
                rows = [
                    {"label": v.label, "elements": v.case.elements, "limit": v.limit, "times": times[v.label]}
                    for v in variants
                    if v.label in times
                ]
                groups.append({"group": group, "backend": backend, "rows": rows, "missing": missing})
        return groups

    def scaling(self) -> list[dict[str, Any]]:
        """Time, and on a CPU memory, of eager and ours along every series."""
        names = ["reference", *self.fused]
        result = []
        for series in SERIES.values():
            _say(f"by {series.name}")
            points = [{"x": x, **self.comparison(case, names, share=0.5)} for x, case in series.points]
            if self.device == "cpu":
                peaks = self._memory_of([point["case"] for point in points], names)
                for point in points:
                    point["memory"] = {name: peaks[name][point["case"]] for name in names}
            result.append({"series": series.name, "quantity": series.quantity, "points": points})
        return result

    def _memory_of(self, cases: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
        """By provider and case; the providers' processes run at the same time, which changes no size."""
        processes = {name: memory.start(cases, name, self.threads) for name in names}
        return {name: memory.finish(process) for name, process in processes.items()}

    def memory(self) -> list[dict[str, Any]]:
        """Measured peaks on a CPU, a fresh process for each."""
        rows = []
        suites: tuple[Mapping[str, Case], ...] = (WHOLE_LOSSES, PIXEL_LOSSES, PROJECTIONS, PROJECTED_LOSSES)
        for case in itertools.chain.from_iterable(cases.values() for cases in suites):
            _say(f"memory of {case.name}")
            names = [name for name in providers(case) if name != "compile"]
            peaks = self._memory_of([case.name], names)
            rows.append({"case": case.name, "peaks": {name: peaks[name][case.name] for name in names}})
        return rows

    def predicted(self) -> list[dict[str, Any]]:
        """Predicted peaks of the whole loss at the paper's sizes, on CPU tensors, and measured ones of ours."""
        rows = []
        for whole in PAPER_SIZES.values():
            _say(f"predicted memory of {whole.name}")
            backends = fused_backends()
            peaks = {backend: memory.predict(whole, backend) for backend in ("reference", *backends)}
            measured = {b: p[whole.name] for b, p in self._memory_of([whole.name], backends).items()}
            rows.append({"case": whole.name, "assumptions": whole.assumptions, "peaks": peaks, "measured": measured})
        return rows

    def train_step(self) -> list[dict[str, Any]]:
        """A whole training step and its loss alone, eager and ours."""
        from .distillation import Distillation  # needs the trainer's packages

        rows = []
        for case in TRAIN_STEPS.values():
            _say(f"train step, {case.name}")
            pair = Distillation(case, self.device)
            steps = {
                f"{part}, {backend}": getattr(pair, part)(backend)
                for part in ("step", "loss")
                for backend in ("reference", *self.fused)
            }
            times = timing.measure(steps, self.seconds, self.limits)
            size = f"{case.batch} x {case.crop[0]}x{case.crop[1]}, K={case.num_classes}"
            rows.append({"case": case.name, "size": size, "backends": self.fused, "times": times})
        return rows


PARTS = (*COMPARED, "variants", "scaling", "memory", "predicted", "train_step")
CPU_ONLY = ("memory",)


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def measure_parts(runner: Runner, parts: Iterable[str], output: Path) -> dict[str, Any]:
    """Measures ``parts`` and writes them into ``output``, beside the other parts of an earlier run on this machine."""
    machine = timing.machine()
    results: dict[str, Any] = {"machine": machine}
    if output.exists():
        earlier = json.loads(output.read_text())
        if earlier["machine"] == machine:
            results = earlier
    output.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if runner.device == "cpu" or part not in CPU_ONLY:
            measure: Callable[[], Any] = getattr(runner, part)
            results[part] = measure()
            output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def quick(runner: Runner) -> str:
    """One table: eager (torch.compile of the first case only, for it takes long to compile) and ours."""
    rows = []
    for name in QUICK:
        case = CASES[name]
        names = ["reference", *(["compile"] if name == QUICK[0] else []), *runner.fused]
        rows.append(runner.comparison(case, names))
    return report.comparison_table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="of all rounds of one comparison together")
    parser.add_argument("--quick", action="store_true", help="print one table, write nothing")
    arguments = parser.parse_args(argv)
    seconds = arguments.seconds if arguments.seconds is not None else 1.5 if arguments.quick else 6.0
    runner = Runner(arguments.device, arguments.threads, seconds)
    if arguments.quick:
        print(timing.describe(timing.machine()) + "\n")
        print(quick(runner))
    else:
        measure_parts(runner, arguments.parts, arguments.output)


if __name__ == "__main__":
    main()
