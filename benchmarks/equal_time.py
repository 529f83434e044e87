"""What a faster loss buys: one method trained for the same time with the eager loss and with ours.

``python -m benchmarks.equal_time --config configs/camvid_distill.yaml -- --data.root data/camvid``. First a few steps
of each are timed, in turns; the schedules are then as long as fit into the minutes, so that each backend's learning
rate ends where its time does. Evaluations are not counted. Everything lands in ``--output``; what is there already is
not made again. The picture has mIoU over minutes of training: steps times the seconds that a step took when timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BACKENDS = ("reference", "cpu")


def distill(output: Path, config: Path, steps: int, options: Sequence[str]) -> list[dict[str, Any]]:
    """Events of a heteroakd run's ``metrics.jsonl``; trained (or trained on, if it was cut) unless it is there.
    Ends the program with the run's status where it fails, and where the run that is there has another length."""
    command = [
        sys.executable, "-m", "heteroakd", "distill", "--config", str(config), "--method", "heteroakd",
        "--output", str(output), "--schedule.steps", str(steps), "--resume_or_start", *options,
    ]  # fmt: skip
    if not (output / "summary.json").exists():
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    if (done := max(e.get("step", 0) for e in events)) != steps:
        sys.exit(
            f"{output} holds a run of {done} steps, not of {steps}: another --output, or the options it was made by"
        )
    return events


def seconds_per_step(events: Sequence[Mapping[str, Any]]) -> float:
    """Median of a run's second half: the first steps read files and warm up."""
    seconds = [e["seconds_per_step"] for e in events if e["event"] == "train"]
    return statistics.median(seconds[len(seconds) // 2 :])


def time_steps(
    output: Path, config: Path, options: Sequence[str], steps: int = 40, rounds: int = 2
) -> dict[str, float]:
    """Seconds of a training step by backend, the backends' runs in turns; kept in ``output``/seconds.json."""
    kept = output / "seconds.json"
    if not kept.exists():
        found: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for turn in range(rounds):
            for backend in BACKENDS:
                events = distill(output / f"timed-{backend}-{turn}", config, steps,
                                 [*options, "--loss.backend", backend, "--runtime.log_every", "1"])  # fmt: skip
                found[backend].append(seconds_per_step(events))
        kept.write_text(json.dumps({backend: statistics.median(values) for backend, values in found.items()}) + "\n")
    return json.loads(kept.read_text())


def train(
    output: Path, config: Path, options: Sequence[str], seconds: Mapping[str, float], minutes: float,
    seeds: Sequence[int], evaluations: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every backend and seed: its minutes and mIoU at every evaluation, and its number of steps."""
    rows = []
    for seed in seeds:
        for backend in BACKENDS:
            every = max(1, round(60 * minutes / seconds[backend] / evaluations))
            events = distill(
                output / f"{backend}-seed{seed}", config, every * evaluations,
                [*options, "--loss.backend", backend, "--schedule.seed", str(seed),
                 "--runtime.evaluate_every", str(every), "--runtime.save_every", str(every)],
            )  # fmt: skip
            found = {e["step"]: e["miou"] for e in events if e["event"] == "evaluation"}
            rows.append({"backend": backend, "seed": seed, "steps": every * evaluations, "miou": list(found.values()),
                         "minutes": [step * seconds[backend] / 60 for step in found]})  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="What follows -- goes to every heteroakd distill.")
    parser.add_argument("--config", type=Path, default=Path("configs/camvid_distill.yaml"))
    parser.add_argument("--minutes", type=float, default=8, help="of training of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--evaluations", type=int, default=8, help="of every run")
    parser.add_argument("--output", type=Path, default=Path("runs/equal-time"))
    parser.add_argument("--picture", type=Path, help="of mIoU over minutes, e.g. docs/pictures/camvid-equal-time.svg")
    parser.add_argument("options", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not (0 < arguments.minutes < 1e6 and arguments.evaluations > 0 and min(arguments.seeds) >= 0):
        parser.error("--minutes and --evaluations must be above 0, --seeds not below")
    if not arguments.config.is_file():
        parser.error(f"--config: no such file: {arguments.config}")
    output, config = arguments.output, arguments.config
    output.mkdir(parents=True, exist_ok=True)
    seconds = time_steps(output, config, arguments.options)
    rows = train(output, config, arguments.options, seconds, arguments.minutes, arguments.seeds, arguments.evaluations)
    (output / "equal-time.json").write_text(json.dumps({"seconds": seconds, "runs": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['backend']}, seed {row['seed']}: {row['steps']} steps in {row['minutes'][-1]:.1f} minutes "
              f"({seconds[row['backend']]:.3f} s a step), mIoU {100 * row['miou'][-1]:.1f}")  # fmt: skip
    if arguments.picture:
        from . import plots  # needs matplotlib

        print(plots.draw_equal_time(rows, arguments.picture))


if __name__ == "__main__":
    main()
