"""The report and the documentation's chapter, from a record that was made up; what other tools' output is taken for."""

from pathlib import Path

import pytest

from benchmarks.gpu_check import chapter, ncu, records, report, sanitizer, tables
from benchmarks.gpu_check.case import DidNotRun, Wrong
from benchmarks.gpu_check.device import REHEARSAL
from benchmarks.gpu_check.records import DID_NOT_RUN, FAILED, PASSED, Record
from benchmarks.gpu_check.tools import Done

CARD = "A CARD THAT A TEST MADE UP"


def made_up(device=CARD):
    """Round numbers that no machine would measure."""

    def record(name, **data):
        return Record(name, name.partition("/")[0], PASSED, data.pop("detail", ""), 1.0, device, data)

    def time(provider, ms, **more):
        return record(f"times/hakd K=19, float32, {provider}", case="hakd K=19", dtype="float32", provider=provider,
                      bytes=10**9, sets=2, ms=[ms, ms / 2, 2 * ms], MiB=1.0, **{"host us": 10.0}, **more)  # fmt: skip

    error = {"error": 5e-7, "eager": 1e-7, "bound": 1e-6, "relaxed": False, "condition": 1.0}
    found = [
        Record("run", "run", PASSED, "1900-01-01 00:00", data={"rehearsal": device == REHEARSAL}),
        record("machine/versions", detail=device, python="3.0", nvcc="made up"),
        record("machine/copy bandwidth", detail="1000 GB/s", **{"GB/s": 1000.0}),
        time("cuda", 4.0, **{"graph ms": [2.0, 1.0, 4.0]}),
        time("reference", 400.0),
        time("compile", 40.0),
        record("predicted/cuda", rows={"hakd K=19": {"ms": 1.0}}),
        record("tilings/hakd K=19", case="hakd K=19",
               rows=[{"tiling": "T0", "ms": 3.0}, {"tiling": "T1", "ms": None, "why": "too much shared memory"}]),
        record("ncu/cuda", launches=[{"kernel": "made_up_kernel", "gpu__time_duration.sum": "7 us"}]),
        record("cuda/hakd", results={"loss": error}),
    ]  # fmt: skip
    return records.latest(found)


def test_a_report_says_the_verdict_first():
    found = made_up()
    text = report.text(found)
    assert text.startswith(f"# GPU check: PASSED (9 passed; {CARD})\n") and "rehears" not in text
    for name, status in (("b", FAILED), ("c", DID_NOT_RUN), ("d", DID_NOT_RUN)):
        found[name] = Record(name, "cuda", status, "a | b\nwhy")
    lines = report.text(found).splitlines()
    assert lines[0] == f"# GPU check: FAILED (1 failed, 2 did not run, 9 passed; {CARD})"
    assert "| b | a / b why | 0 |" in lines[:6]
    assert "| a / b why | 2 | c; d |" in lines[:12]
    del found["b"]
    assert report.text(found).startswith("# GPU check: INCOMPLETE (2 did not run, 9 passed")
    assert report.text({}).startswith("# GPU check: INCOMPLETE (0 passed; no GPU)")


def test_the_table_of_times():
    (row,) = [line for line in tables.times(made_up()).splitlines() if "CUDA" in line]
    # 10^9 bytes in 2 ms are 500 GB/s, half of the copy's; twice what was predicted; 4 ms against 400 and 40.
    assert row == "| hakd K=19 | float32 | CUDA | 4 (2-8) | 2 | 10 | 1 | 500 | 50 % | 1 | 2 | 100x | 10x |"
    assert "| hakd K=19 | T1 | - | too much shared memory |" in tables.tilings(made_up())
    assert "| CUDA | made_up_kernel | 7 us |" in tables.profiles(made_up())
    assert "| cuda/hakd | loss | 5.0e-07 | 1.0e-07 | 1e-06 |  |" in tables.accuracy(made_up())


def test_a_rehearsal_is_no_measurement():
    found = made_up(REHEARSAL)
    assert "A rehearsal without a GPU" in report.text(found) and "no GPU)" in report.text(found).splitlines()[0]
    assert "(rehearsed)" in report.text(found)
    assert "| CUDA | 4 (2-8) | 2 | 10 | 1 | 500 | - | - | - | 100x | 10x |" in report.text(found)
    assert chapter.text(found) == chapter.text({}) == chapter.NOT_RUN


def test_the_chapter_is_what_was_measured():
    text = chapter.text(made_up())
    assert CARD in text and "| 4 (2-8) | 2 |" in text and "T1" in text and "made_up_kernel" in text
    page = "# Performance\n\ntext\n"
    once = chapter.replace(page, text)
    assert once.startswith(page.rstrip()) and chapter.kept(once) == chapter.mark(text)
    without = chapter.replace(once, chapter.NOT_RUN)
    assert without.count("On a GPU") == 1 and CARD not in without
    assert chapter.kept(page) == chapter.mark(chapter.NOT_RUN)


def test_benchmarks_of_the_cpu_keep_the_chapter(tmp_path, monkeypatch):
    from benchmarks import plots, timing
    from benchmarks import report as benchmarks

    monkeypatch.setattr(plots, "draw", lambda results, folder: {})
    page = tmp_path / "performance.md"
    benchmarks.write({"machine": timing.machine()}, page)
    assert chapter.kept(page.read_text()) == chapter.mark(chapter.NOT_RUN)
    page.write_text(chapter.replace(page.read_text(), chapter.text(made_up())))
    measured = page.read_text()
    benchmarks.write({"machine": timing.machine()}, page)
    assert page.read_text() == measured and CARD in measured


def test_the_chapter_from_a_folder(tmp_path, capsys):
    page = tmp_path / "performance.md"
    page.write_text("# Performance\n")
    with pytest.raises(SystemExit):
        chapter.main([str(tmp_path), "--page", str(page)])
    for record in made_up().values():
        records.append(tmp_path / records.RESULTS, record)
    chapter.main([str(tmp_path), "--page", str(page)])
    assert CARD in page.read_text()


def test_the_documentation_claims_no_more_than_was_measured():
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    shown = chapter.kept(page)
    assert shown == chapter.mark(chapter.NOT_RUN) or "Measured by `make gpu-check`" in shown
    assert CARD not in page and REHEARSAL not in page


# What the tools print ------------------------------------------------------------------------------------------------


SHOWN = "shown: hakd\nshown: segmentation\n"
CLEAN = f"{SHOWN}========= ERROR SUMMARY: 0 errors\n"
RACE = """========= Error: Race reported between Write access at x and Read access at y
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INVALID = "========= Invalid __global__ read of size 4 bytes\n"


@pytest.mark.parametrize(
    ("done", "outcome", "words"),
    [
        (Done(0, CLEAN), None, "nothing found in 2 calls"),
        (Done(0, f"{SHOWN}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"), None, "nothing"),
        (Done(9, f"{INVALID}{SHOWN}========= ERROR SUMMARY: 1 error\n"), Wrong, "Invalid __global__ read"),
        (Done(9, SHOWN + RACE), Wrong, "Race reported"),
        (Done(None, "========= Uninitialized __global__ memory read\nshown: hakd\n"), Wrong, "Uninitialized"),
        (Done(None, "shown: hakd\n"), DidNotRun, "nothing found in 1 of 2 calls"),
        (Done(1, "========= Error: Device not supported\n"), DidNotRun, "Device not supported"),
        (Done(1, "Traceback\nValueError: ours\n"), Wrong, "exit status 1"),
        (Done(0, SHOWN), DidNotRun, "no summary"),
    ],
)  # fmt: skip
def test_what_a_sanitizer_says(done, outcome, words):
    if outcome is None:
        assert words in sanitizer.judge(done, 2)["detail"]
    else:
        with pytest.raises(outcome, match=words):
            sanitizer.judge(done, 2)


def test_what_ncu_says():
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    output = f"""==PROF== Connected to process 7
shown: hakd
"ID","Kernel Name","gpu__time_duration.sum","{stall.format("wait")}","{stall.format("barrier")}","{ncu.LOCAL[0]}"
"","","us","inst","inst","inst"
"0","hakd_kernel(HakdProblem)","1,234.5","1.25","2.5","0"
"1","finish_kernel","3","","0","7"
==PROF== Disconnected from process 7
"""
    first, second = ncu.parse(output)
    assert first["kernel"] == "hakd_kernel" and first["gpu__time_duration.sum"] == "1,234.5 us"
    assert first["stalls"] == "barrier 2.5, wait 1.2" and second[ncu.LOCAL[0]] == "7 inst"
    assert ncu.parse("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n") == []
    assert "PERM" in Done(1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n").refusal()
    assert Done(1, "==ERROR== Failed to initialize the profiler: LibraryNotLoaded").refusal()
    assert Done(0, SHOWN).refusal() is None
