"""compute-sanitizer on our operators alone: memory, races in shared memory, reads of what nobody wrote.

torch's caching allocator is left out: in its blocks an access beyond a tensor is within bounds.
"""

from __future__ import annotations

import functools
import re

from . import shown, tools
from .case import Case, Data, DidNotRun, Wrong
from .device import Device

TOOLS = ("memcheck", "racecheck", "initcheck")
BACKENDS = ("cuda", "triton")
SECONDS = 60.0
FOUND = 9  # exit status where something was found
COMPLAINT = re.compile(r"Invalid |Uninitialized |Race reported|Potential .* hazard|out of bounds|misaligned", re.I)


def judge(done: tools.Done, expected: int) -> Data:
    """What a run of the tool says."""
    finished = [line.removeprefix(shown.DONE) for line in done.output.splitlines() if line.startswith(shown.DONE)]
    data = {"finished": finished}
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY:\s*(\d+) (?:error|hazard)", done.output)
    reported = [line for line in done.output.splitlines() if line.startswith("=========")]
    complaints = [line for line in reported if COMPLAINT.search(line)]
    if complaints or done.status == FOUND or (summary and int(summary[1])):
        first = (complaints or reported or ["errors"])[0].lstrip("= ")
        raise Wrong(f"{first} (sanitizer.log)", {**data, "report": "\n".join(reported[:60])})
    if done.status is None:
        raise DidNotRun(f"cut after {SECONDS:.0f} s: nothing found in {len(finished)} of {expected} calls")
    if done.status and (refusal := done.refusal()):
        raise DidNotRun(refusal)
    if done.status:
        raise Wrong(f"exit status {done.status} (sanitizer.log)", {**data, "tail": done.tail(30)})
    if summary is None:
        raise DidNotRun("it printed no summary (sanitizer.log)")
    return {"detail": f"nothing found in {len(finished)} calls", **data}


def check(tool: str, backend: str, device: Device) -> Data:
    target = tools.python("shown", backend, "small")
    log = tools.folder() / "sanitizer.log"
    program = tools.watcher("compute-sanitizer", target, device.kind != "cpu", SECONDS, log)
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *target]
    done = tools.run(command, SECONDS, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return judge(done, len(shown.SMALL))


def cases() -> list[Case]:
    return [
        Case(f"sanitizer/{tool} {backend}", functools.partial(check, tool, backend), backend,
             rehearse=tool == "memcheck" and backend == "cuda", limit=SECONDS + 20)
        for backend in BACKENDS
        for tool in TOOLS
    ]  # fmt: skip
