"""``python -m benchmarks.gpu_check``: see the package's docstring.

Exit status 1 if a case failed, or did not run and ``--allow-no-gpu`` was not given.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import benchmarks.gpu_check as package

from . import plan, records
from .runner import Runner, choose


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="for everything")
    parser.add_argument("--deadline", type=float, default=plan.DEADLINE, metavar="SECONDS", help="for everything")
    parser.add_argument("--only", metavar="FAILED|PATTERN", help="what failed or did not run before, or cases by name")
    parser.add_argument("--earlier", type=Path, metavar="FOLDER", help="of the earlier results, if not in --output")
    parser.add_argument("--allow-no-gpu", action="store_true", help="rehearse without one: did not run is no failure")
    options = parser.parse_args(argv)
    folder: Path = options.output
    earlier = list(records.read((options.earlier or folder) / records.RESULTS))
    if options.only == "FAILED" and not earlier:
        parser.error(f"--only FAILED: there are no earlier results in {options.earlier or folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if options.only is None:
        for name in (records.RESULTS, "report.md", "build.log", "stages.log", "sanitizer.log", "ncu.csv"):
            (folder / name).unlink(missing_ok=True)
    elif options.earlier:
        for record in earlier:
            records.append(folder / records.RESULTS, record)
    only = choose(options.only, records.latest(earlier))
    status = Runner(folder, options.deadline - (time.monotonic() - package.BEGIN), options.allow_no_gpu, only).run()
    print((folder / "report.md").read_text())
    return status


if __name__ == "__main__":
    sys.exit(main())
