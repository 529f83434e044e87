"""Cases and stages that fail, crash, hang or are killed: each has its record, the report is there by the deadline."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import plan, pool, records, runner, tools
from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.case import load
from benchmarks.gpu_check.plan import Stage
from benchmarks.gpu_check.records import DID_NOT_RUN, FAILED, PASSED, Record

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
WITHOUT_TORCH = (str(FOLDER / "fake_worker.py"),)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")


def run_pool(source, seconds=60.0, workers=2):
    kept = []
    pool.run(load(source), source, "cpu", workers, time.monotonic() + seconds, kept.append, "stage", WITHOUT_TORCH)
    assert len(kept) == len({r.name for r in kept})
    return {r.name: r for r in kept}


def test_one_case_takes_nothing_with_it(fake_stages):
    found = run_pool("fake_stages:awkward")
    assert {name: r.status for name, r in found.items()} == {
        "fails": FAILED, "crashes": FAILED, "hangs": FAILED, "leaves": FAILED, "cannot": DID_NOT_RUN,
        "gpu": DID_NOT_RUN, "passes": PASSED,
    }  # fmt: skip
    assert "too far off" in found["fails"].detail and found["fails"].data["error"] == 0.5
    assert "Traceback" in found["fails"].data["traceback"]
    assert found["crashes"].detail.endswith("killed by SIGSEGV")
    assert found["leaves"].detail.endswith("exit status 5")
    assert found["hangs"].detail == "hung: killed after 1 s" and found["hangs"].seconds >= 0.7
    assert found["cannot"].detail == "the machine refuses" and found["gpu"].detail == "needs a GPU"
    assert found["passes"].detail == "right" and found["passes"].data == {"number": 3}
    assert all(r.device == "a fake" for r in found.values())


def test_time_that_is_up_is_no_verdict(fake_stages, tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_CHECK_FOLDER", str(tmp_path))
    found = run_pool("fake_stages:slow", seconds=2.0, workers=1)
    assert {r.status for r in found.values()} == {DID_NOT_RUN}
    assert found["slow 1"].detail == "no time left: cut while it ran" and found["slow 2"].detail == "no time left"
    os.kill(int((tmp_path / "left").read_text()), 9)


def test_workers_that_never_start(fake_stages):
    found = {}
    pool.run(load("fake_stages:good"), "no_such_module:cases", "cpu", 1, time.monotonic() + 60,
             lambda r: found.update({r.name: r}), "stage", WITHOUT_TORCH)  # fmt: skip
    assert {r.status for r in found.values()} == {FAILED} and "before they are ready" in found["good 1"].detail


def alive(process):
    """Whether a process that was killed is there for longer than the system takes to end one."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return False
        except OSError:
            return False
        time.sleep(0.02)
    return True


@no_gpu
def test_stages_that_crash_hang_and_are_killed(fake_stages, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 1.0)
    waves = [
        [Stage(name, f"fake_stages:{name}", 1, 10) for name in ("dies", "breaks", "stuck", "slow", "unlisted")],
        [Stage("good", "fake_stages:good", 1, 10)],
    ]
    begin = time.monotonic()
    check = runner.Runner(tmp_path, 25, rehearse=True, waves=waves)
    assert check.run() == 1
    assert time.monotonic() - begin <= 25
    found = records.latest(records.read(tmp_path / records.RESULTS))
    assert found["good 1"].status == found["good 2"].status == found["stage/good"].status == PASSED
    for stage, case, how in (
        ("dies", "never", "ended early: killed by SIGKILL"),
        ("breaks", "unreached", "ended early: exit status 1"),
        ("stuck", "waiting", "killed at its limit"),
    ):
        assert found[f"stage/{stage}"].status == FAILED and how in found[f"stage/{stage}"].detail
        assert found[case].status == DID_NOT_RUN and how in found[case].detail
    assert found["unlisted/cases"].status == FAILED and "no such module" in found["unlisted/cases"].detail
    # A case that is cut leaves its stage whole; what it started ends with the stage.
    assert found["slow 1"].status == found["slow 2"].status == DID_NOT_RUN
    assert found["stage/slow"].status == PASSED
    assert not alive(int((tmp_path / "left").read_text()))
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# GPU check: FAILED (4 failed, ") and "stage/dies" in report
    assert "broken stage" in (tmp_path / "stages.log").read_text()
    assert len(list(tmp_path.iterdir())) <= 8


@no_gpu
def test_the_command_without_a_gpu(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = records.latest(records.read(tmp_path / records.RESULTS))
    assert len(found) > 500 and found.pop("run").status == PASSED
    assert {(r.status, r.detail) for r in found.values()} == {(DID_NOT_RUN, "torch sees no GPU")}
    assert done.stdout.startswith(f"# GPU check: INCOMPLETE ({len(found)} did not run, 0 passed; no GPU)")


@no_gpu
def test_rehearsed_again_where_it_failed(tmp_path, capsys):
    """``--only FAILED`` runs what failed before, from another folder's results, and keeps what passed."""
    earlier, folder = tmp_path / "earlier", tmp_path / "new"
    earlier.mkdir()
    for name, status in (("machine/versions", FAILED), ("machine/copy bandwidth", PASSED), ("stage/machine", FAILED)):
        records.append(earlier / records.RESULTS, Record(name, "machine", status, "before"))
    arguments = ["--output", str(folder), "--only", "FAILED", "--allow-no-gpu", "--deadline", "400"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "there are no earlier results" in capsys.readouterr().err
    assert main([*arguments, "--earlier", str(earlier)]) == 0
    found = records.latest(records.read(folder / records.RESULTS))
    assert found["machine/versions"].status == PASSED and found["machine/versions"].detail != "before"
    assert found["machine/copy bandwidth"].detail == "before" and found["stage/machine"].status == PASSED
    assert "machine/clocks" not in found
    assert capsys.readouterr().out.count("# GPU check: PASSED") == 1
    alone = {"stage/machine": Record("stage/machine", "machine", FAILED), "m": Record("m", "machine", PASSED)}
    assert runner.choose("FAILED", alone) == {"stage/machine", "m"}
    assert runner.choose("machine/c*", {}) == {"machine/clocks", "machine/clocks after work", "machine/copy bandwidth"}


def test_records_survive_a_line_that_was_cut(tmp_path):
    path = tmp_path / records.RESULTS
    assert list(records.read(path)) == []
    records.append(path, Record("a", "s", FAILED, data={"error": float("nan"), "path": tmp_path}))
    with path.open("a") as file:
        file.write('{"name": "b", "stage": "s", "sta')
    records.append(path, Record("a", "s", PASSED))
    records.append(path, Record("c", "s", PASSED, "é"))
    assert [(r.name, r.status) for r in records.read(path)] == [("a", FAILED), ("a", PASSED), ("c", PASSED)]
    assert records.latest(records.read(path))["a"].status == PASSED


def test_every_wave_has_its_share_whatever_those_before_took():
    assert plan.REPORT + sum(map(plan.share, plan.WAVES)) == plan.DEADLINE
    for deadline in (400.0, 180.0):
        scale, spent = deadline / plan.DEADLINE, 0.0
        for i, wave in enumerate(plan.WAVES):
            limit = plan.limit(i, plan.WAVES, deadline, spent)
            assert limit == pytest.approx(scale * plan.share(wave))  # nothing was left over
            spent += limit
        assert deadline - spent == pytest.approx(scale * plan.REPORT)
    assert plan.limit(6, plan.WAVES, 400.0, 100.0) == pytest.approx(295)  # much was


def test_tools_end_with_what_they_started(tmp_path):
    script = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    done = tools.run([sys.executable, "-c", script], 5.0, tmp_path / "log")
    assert done.status is None and not alive(int(done.output))
    assert (tmp_path / "log").read_text().endswith(f"{done.output}\n")
    done = tools.run_into(tmp_path / "log", [sys.executable, "-c", "print(7); raise SystemExit(3)"], 30)
    assert done == tools.Done(3, "7\n") and json.loads(done.tail()) == 7
