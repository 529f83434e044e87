"""One process of a pool: takes names of cases from its input, answers each with a line of JSON.

python -m benchmarks.gpu_check.worker SOURCE DEVICE
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from typing import Any

from .case import Case, DidNotRun, load
from .device import Device, open_device
from .records import DID_NOT_RUN, FAILED, PASSED

TAIL = 4000  # characters of a traceback that are kept


@functools.cache
def _missing(backend: str, device: str) -> str | None:
    """Why a backend does not run here."""
    import hetero_kernels

    try:
        hetero_kernels.select_backend(backend, device)
    except (RuntimeError, ValueError) as problem:
        return str(problem)
    return None


def perform(case: Case, device: Device) -> dict[str, Any]:
    """A case's outcome: the fields of its record that it knows itself."""
    begin = time.perf_counter()
    data: dict[str, Any] = {}
    status, detail = PASSED, ""
    try:
        if device.kind == "cpu" and not case.rehearse:
            raise DidNotRun("needs a GPU")
        if case.backend and (problem := _missing(device.backend(case.backend), device.kind)):
            raise DidNotRun(problem)
        data = dict(case.run(device) or {})
        device.synchronize()  # what goes wrong asynchronously goes wrong here
        detail = str(data.pop("detail", ""))
    except DidNotRun as reason:
        status, detail = DID_NOT_RUN, str(reason)
    except Exception as problem:  # a case that breaks has failed; the others still run
        status, detail = FAILED, f"{type(problem).__name__}: {problem}"
        data = {**getattr(problem, "data", {}), "traceback": traceback.format_exc()[-TAIL:]}
    return {"status": status, "detail": detail, "data": data, "seconds": time.perf_counter() - begin}


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed is no answer
    source, kind = sys.argv[1:3]
    device = open_device(kind)
    cases = {case.name: case for case in load(source)}
    print(json.dumps({"ready": device.name}), file=answers, flush=True)
    for line in sys.stdin:
        outcome = perform(cases[json.loads(line)], device)
        ends = outcome["status"] == FAILED and not device.healthy()
        print(json.dumps({**outcome, "last": ends}, default=str), file=answers, flush=True)
        if ends:
            os._exit(0)  # nothing can be put away in a broken context
        device.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
