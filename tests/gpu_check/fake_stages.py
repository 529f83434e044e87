"""Cases that a check must survive, without torch's time to import."""

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu_check.case import Case, DidNotRun, Wrong


def passes(device):
    print("printed, which is no answer")
    return {"detail": "right", "number": 3}


def fails(device):
    raise Wrong("too far off", {"error": 0.5})


def cannot(device):
    raise DidNotRun("the machine refuses")


def crashes(device):
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(device):
    os._exit(5)


def hangs(device):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def awkward():
    return [
        Case("fails", fails, rehearse=True), Case("crashes", crashes, rehearse=True),
        Case("hangs", hangs, rehearse=True, limit=0.7), Case("leaves", leaves, rehearse=True),
        Case("cannot", cannot, rehearse=True), Case("gpu", passes), Case("passes", passes, rehearse=True),
    ]  # fmt: skip


def slow():
    """Cases for longer than any stage has; a process of their own that nobody waits for."""

    def leaves_a_process(device):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(os.environ["GPU_CHECK_FOLDER"] + "/left", "w") as file:
            file.write(str(process.pid))
        hangs(device)

    return [Case("slow 1", leaves_a_process, rehearse=True, limit=500), Case("slow 2", passes, rehearse=True)]


def _in_a_stage():
    return "benchmarks.gpu_check.stage" in " ".join(sys.orig_argv)


def dies():
    """Its stage is killed, as by the system when memory is short."""
    if _in_a_stage():
        os.kill(os.getpid(), signal.SIGKILL)
    return [Case("never", passes, rehearse=True)]


def breaks():
    """Its stage crashes."""
    if _in_a_stage():
        raise RuntimeError("broken stage")
    return [Case("unreached", passes, rehearse=True)]


def stuck():
    """Its stage hangs, deaf to everything but SIGKILL."""
    if _in_a_stage():
        hangs(None)
    return [Case("waiting", passes, rehearse=True)]


def unlisted():
    raise ImportError("no such module")


def good():
    return [Case("good 1", passes, rehearse=True), Case("good 2", passes, rehearse=True)]
