"""A stage's process: runs its cases in a pool and appends their records to the folder's results.

python -m benchmarks.gpu_check.stage NAME SOURCE WORKERS DEVICE FOLDER SECONDS NICENESS < names of cases as JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from . import pool, records
from .case import load


def _stop(*_: object) -> None:
    raise SystemExit("stopped")


def main() -> int:
    until = time.monotonic() + float(sys.argv[6])
    os.nice(int(sys.argv[7]))
    name, source, workers, device, folder = sys.argv[1:6]
    signal.signal(signal.SIGTERM, _stop)
    wanted = json.load(sys.stdin)
    cases = [case for case in load(source) if case.name in wanted]
    results = Path(folder) / records.RESULTS
    pool.run(cases, source, device, int(workers), until, lambda record: records.append(results, record), name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
