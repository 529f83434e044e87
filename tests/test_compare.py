"""Methods x seeds: statistics by hand, continuing, the tables, and what is not claimed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import heteroakd
import pytest
from heteroakd.cli import main
from heteroakd.commands import compare
from heteroakd.commands.compare import markdown, run_compare
from heteroakd.commands.train import run_distill
from heteroakd.config.commands import CompareRun, DistillRun
from heteroakd.config.groups import ModelConfig, RuntimeConfig, ScheduleConfig, TeacherConfig
from heteroakd.data import DataConfig
from heteroakd.report.read_runs import Difference, mean_and_spread, paired_difference
from heteroakd.system.signals import StoppedError
from heteroakd.training.checkpoint import CheckpointError


def test_statistics_by_hand() -> None:
    difference = paired_difference({0: 0.5, 1: 0.6, 2: 0.9, 7: 0.1}, {2: 0.6, 0: 0.4, 1: 0.4})
    assert difference.mean == pytest.approx(0.2) and difference.seeds == 3
    assert difference.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert difference.verdict == "better"
    assert mean_and_spread({0: 0.5, 1: 0.7}) == pytest.approx((0.6, math.sqrt(0.02)))
    assert mean_and_spread({0: 0.5}) == (0.5, None) and mean_and_spread({}) == (None, None)
    assert paired_difference({0: 0.5}, {1: 0.4}) == (None, None, 0)


def test_nothing_is_claimed_below_two_standard_errors() -> None:
    verdicts = [Difference(mean, 0.01, 3).verdict for mean in (0.0199, 0.02, -0.0199, -0.02, 0.0)]
    assert verdicts == ["no claim", "better", "no claim", "worse", "no claim"]
    assert Difference(0.5, None, 1).verdict == "no claim"


def test_table_has_a_column_for_every_method_before() -> None:
    config = CompareRun(methods=["none", "kd", "heteroakd"], seeds=[0, 1])
    values = {"none": (0.4, 0.5), "kd": (0.3, 0.62), "heteroakd": (0.41, 0.52)}
    lines = markdown(config, {m: {s: {"miou": v[s]} for s in (0, 1)} for m, v in values.items()}).splitlines()  # type: ignore[misc]
    assert lines[2] == "| method | seeds | mIoU, % | spread | minus none | minus kd |"
    assert lines[4] == "| none | 2 | 45.00 | 7.07 |  |  |"
    assert lines[5] == "| kd | 2 | 46.00 | 22.63 | +1.00 ± 11.00 |  |"
    assert lines[6] == "| heteroakd | 2 | 46.50 | 7.78 | +1.50 ± 0.50 **better** | +0.50 ± 10.50 |"


def configuration(folder: Path) -> CompareRun:
    return CompareRun(
        data=DataConfig(crop_size=(32, 32), image_size=(32, 32), train_images=4, val_images=1),
        student=ModelConfig(architecture="fpn", encoder="tu-mobilenetv3_small_050"),
        teacher=TeacherConfig(checkpoint=str(folder / "teacher" / "last.pt")),
        methods=["none", "cwd"],
        seeds=[3, 4],
        schedule=ScheduleConfig(steps=2, batch_size=2),
        runtime=RuntimeConfig("cpu", threads=1, pictures=0, progress="none", tensorboard=False, save_every=1),
        output=str(folder / "runs-{method}"),
    )


def test_comparison_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, started, in_its_own_process = configuration(tmp_path), [], compare._train
    run_distill(DistillRun(**{**_shared(config), "method": "none", "output": str(tmp_path / "teacher")}))

    def train(run: DistillRun, processes: int) -> None:
        started.append(Path(run.output).name)
        if len(started) == 3:
            raise StoppedError("stopped", signal.SIGTERM)
        if len(started) == 4:
            in_its_own_process(run, processes)
        else:
            run_distill(run, resume_or_start=True)

    monkeypatch.setattr(compare, "_train", train)
    with pytest.raises(StoppedError):
        run_compare(config)
    partial = json.loads((tmp_path / "runs-compare" / "comparison.json").read_text())
    assert [list(method["runs"]) for method in partial["methods"].values()] == [["3"], ["3"]]
    table = run_compare(config)
    assert started == ["none-seed3", "cwd-seed3", "none-seed4", "none-seed4", "cwd-seed4"]
    assert run_compare(config) == table and len(started) == 5  # nothing is left to run
    assert "4 runs, 4 of them finished before" in capfd.readouterr().out
    results = json.loads(table.with_suffix(".json").read_text())
    runs = {name: method["runs"] for name, method in results["methods"].items()}
    (pair,) = results["paired_differences"]
    differences = [runs["cwd"][seed]["miou"] - runs["none"][seed]["miou"] for seed in ("3", "4")]
    assert pair["seeds"] == 2 and pair["mean"] == pytest.approx(sum(differences) / 2)
    assert "| cwd | 2 |" in table.read_text()
    summary = tmp_path / "runs-compare" / "cwd-seed4" / "summary.json"
    summary.write_text(summary.read_text().replace(json.loads(summary.read_text())["teacher"], "another"))
    (tmp_path / "runs-compare" / "cwd-seed3" / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="another teacher than the one that is there now has cwd-seed4: it"):
        run_compare(config)
    assert len(started) == 5
    with pytest.raises(CheckpointError, match=r"schedule\.steps \(2 there, 3 now\)"):
        run_compare(CompareRun(**{**vars(config), "schedule": ScheduleConfig(steps=3, batch_size=2)}))


def _shared(config: CompareRun) -> dict[str, object]:
    return {name: getattr(config, name) for name in ("data", "student", "schedule", "runtime")}


def test_failing_run_ends_the_comparison_with_its_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--data.name", "camvid", "--data.root", str(tmp_path / "nowhere")]
    assert main(["compare", *data, "--methods", "[none]", "--output", str(tmp_path / "x")]) == 1
    errors = capfd.readouterr().err
    assert "/nowhere" in errors and "ended with status 1; its message is above" in errors


def test_a_missing_teacher_is_named_before_any_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--teacher.checkpoint", str(tmp_path / "none.pt"), "--output", str(tmp_path / "x")]
    assert main(["compare", *options, "--method", "kd"]) == 1  # as a file of `heteroakd distill` may have it
    printed, errors = capfd.readouterr()
    assert "method kd is not used: compared are the methods none, kd, cwd, heteroakd" in printed
    assert "none.pt: no such checkpoint" in errors and not (tmp_path / "x").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python puts the current folder first")
def test_a_run_imports_nothing_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout's hetero_kernels, for one, would hide the installed one, unless it is what this process imported."""
    monkeypatch.chdir(Path(heteroakd.__file__).parents[1])
    assert compare.environment_of_a_run() == os.environ
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heteroakd").mkdir()
    (tmp_path / "heteroakd" / "__init__.py").touch()
    (tmp_path / "heteroakd" / "__main__.py").write_text("raise SystemExit('of the current folder')")
    command = [sys.executable, "-m", "heteroakd", "--version"]
    safe = compare.environment_of_a_run()
    for environment, status in (({**safe, "PYTHONSAFEPATH": ""}, 1), (safe, 0)):
        assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == status


def test_parts_of_a_step_that_are_unequal_are_refused_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--processes", "3", "--output", str(tmp_path / "x")]) == 1
    message = (
        "schedule.batch_size must be a multiple of schedule.micro_batches 1 times the number of processes 3, got 8"
    )
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_signal_is_passed_on_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Child:
        returncode = None
        terminated = 0

        def __init__(self, command: list[str], **options: object) -> None:
            assert options == {"start_new_session": True, "env": compare.environment_of_a_run()}
            os.kill(os.getpid(), signal.SIGINT)

        def poll(self) -> int | None:
            return 143 if self.terminated else None

        def wait(self, timeout: float | None = None) -> None:
            pass

        def terminate(self) -> None:
            Child.terminated += 1

    monkeypatch.setattr(compare.subprocess, "Popen", Child)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
    try:
        with pytest.raises(StoppedError, match="the same command continues there"):
            compare._train(DistillRun(output=str(tmp_path / "run")), 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert Child.terminated == 1


def test_a_damaged_summary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_train", lambda run, processes: run_distill(run))
    config = replace(configuration(tmp_path), methods=["none"], seeds=[3])
    run_compare(config)
    for contents, problem in {
        "{": "no JSON",
        "[1]": "no summary",
        '{"miou": "x"}': "no summary",
        "{}": "no sum",
    }.items():
        (tmp_path / "runs-compare" / "none-seed3" / "summary.json").write_text(contents)
        with pytest.raises(CheckpointError, match=rf"none-seed3/summary\.json: {problem}"):
            run_compare(config)
