"""The command line of `heteroakd`: what is wrong usage, and how it is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from heteroakd.cli import build_parser, files_first, gather_lists, main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--loss.tempratur", "4"], "unrecognized arguments: --loss.tempratur 4; did you mean loss.temp"),
        (["distill", "--config", "wrong.yaml"], "does not accept option 'loss.kme'; did you mean loss.kmm or loss.kem"),
        (["compare", "--seds", "[1]"], "unrecognized arguments: --seds [1]; did you mean seeds?"),
        (["report", "--quite_another", "1"], "unrecognized arguments: --quite_another 1"),
    ],
)
def test_the_nearest_option_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("loss: {kme: spatial}")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and message in last and ("did you mean" in last) == ("did you mean" in message)


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (b"", "expected a mapping of options, got nothing"),
        (b"- a\n- b\n", "expected a mapping of options, got list"),
        (b"\xff\xfe\x00", "not a text file in UTF-8 (invalid start byte at byte 0)"),
        (b"a: [1", "not YAML: while parsing a flow sequence"),
    ],
)
def test_a_file_without_options_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: bytes, problem: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(contents)
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        with pytest.raises(SystemExit):
            main(["distill", *arguments])
        assert f"error: --config {path}: {problem}" in capsys.readouterr().err


def test_config_without_a_file_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--method", "none", "--config"])
    assert ended.value.code == 2 and "--config: expected" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"heteroakd {version('hetero-kernels')}\n"


def test_wrong_usage_is_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--metod", "kd"], ["--method", "heteroadk"], ["--config", "nowhere.yaml"]):
        with pytest.raises(SystemExit):
            main(["distill", *wrong])
        first, *rest = capsys.readouterr().err.splitlines()
        assert first == "usage: heteroakd distill [--config FILE] [options]; heteroakd distill --help lists them"
        assert len(rest) <= 6 and any(wrong[-1] in line or wrong[0] in line for line in rest)


@pytest.mark.parametrize("value", ["3", "null", "[1]"])
def test_a_number_in_the_place_of_a_group_is_wrong_usage(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(f"schedule: {value}\n")
    with pytest.raises(SystemExit) as finished:
        main(["distill", "--config", str(tmp_path / "wrong.yaml")])
    assert finished.value.code == 2 and "schedule" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--method", "crd"], "method"),
        (["distill", "--loss.kem", "pixel"], "kem"),
        (["distill", "--schedule.steps", "many"], "steps"),
        (["distill", "--scheduel.steps", "3"], "scheduel"),
        (["distill", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate"], "checkpoint"),
        ([], "command"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_the_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as finished:
        main(arguments)
    assert finished.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("separator", [" ", "="])
def test_options_beat_files_wherever_they_stand(tmp_path: Path, separator: str) -> None:
    files = []
    for name, steps in (("first", 3), ("second", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"schedule: {{steps: {steps}, batch_size: {steps}}}\n")
        files.append(f"--config{separator}{tmp_path / name}.yaml".split(" "))
    given = ["distill", *files[0], "--schedule.steps", "7", "--method", "kd", *files[1], "--output", "x"]
    parsed = build_parser().parse_args(files_first(given)[0]).distill
    assert (parsed.schedule.steps, parsed.schedule.batch_size) == (7, 4)
    assert (parsed.method, parsed.output) == ("kd", "x")


@pytest.mark.parametrize("contents", ["schedule: &all {steps: *all}\n", "loss: &a\n- x\n- *a\n"])
def test_an_alias_of_what_it_stands_in_is_an_error(
    contents: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "round.yaml").write_text(contents)
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--config", str(tmp_path / "round.yaml")])
    assert ended.value.code == 2
    assert "round.yaml: what begins in line 1 has an alias of itself in it" in capsys.readouterr().err
    (tmp_path / "twice.yaml").write_text("student: {options: &a {x: 1}}\nteacher: {model: {options: *a}}\n")
    parsed = build_parser().parse_args(["distill", "--config", str(tmp_path / "twice.yaml")]).distill
    assert parsed.student.options == {"x": 1} == parsed.teacher.model.options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer.momentum", "0.5"], "momentum is not used by adamw, got 0.5"),
        (["--data.root", "x"], "root is not used by the data set 'street'"),
        (["--output", "$NOT_SET_HERE/x"], "the variable NOT_SET_HERE is not set"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["teacher", *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("heteroakd teacher: error: ") and message in line


def test_lists_need_no_quotes() -> None:
    given = [
        "predict",
        "--images",
        "a.jpg",
        "b c.jpg",
        "--alpha",
        "0.5",
        "--seeds=3",
        "--runs",
        "[x,y]",
        "--images",
        "1",
    ]
    assert gather_lists(given) == [
        "predict", "--images", '["a.jpg", "b c.jpg"]', "--alpha", "0.5", "--seeds", "[3]", "--runs", "[x,y]",
        "--images", '["1"]',
    ]  # fmt: skip
    parsed = build_parser().parse_args(gather_lists(["report", "--runs", "a", "b", "--output", "c.html"]))
    assert parsed.report.runs == ["a", "b"] and parsed.report.output == "c.html"
    parsed = build_parser().parse_args(gather_lists(["compare", "--seeds", "1", "2", "--methods", "kd", "none"]))
    assert parsed.compare.seeds == [1, 2] and parsed.compare.methods == ["kd", "none"]
    assert build_parser().parse_args(["predict", "--checkpoint", "x"]).predict.images == []


def test_a_file_whose_name_begins_with_a_bracket_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[1].jpg").touch()
    assert gather_lists(["--images", "[1].jpg"]) == ["--images", '["[1].jpg"]']
    for wrong in (["report", "--runs"], ["compare", "--seeds", "{"], ["compare", "--seeds", "2026-01-01", "1"]):
        with pytest.raises(SystemExit):
            main(wrong)


@pytest.mark.parametrize("library", ["jsonargparse", "torch"])
def test_an_interruption_while_libraries_load_prints_no_traceback(library: str, tmp_path: Path) -> None:
    (tmp_path / f"{library}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    finished = subprocess.run(
        [sys.executable, "-m", "heteroakd", "report", "--runs", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert finished.returncode == -signal.SIGINT and finished.stderr == ""


def test_a_batch_norm_that_cannot_be_trained_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "{architecture: deeplabv3, encoder: tu-mobilenetv3_small_050, weights: null}"
    data = "{crop_size: [32, 32], image_size: [32, 32], train_images: 1, val_images: 1}"
    runtime = "{device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 0}"
    arguments = ["teacher", "--model", model, "--data", data, "--runtime", runtime, "--output", str(tmp_path / "run")]
    assert main([*arguments, "--schedule", "{steps: 1, batch_size: 1}"]) == 1
    printed = capsys.readouterr().err
    assert (
        printed.startswith("heteroakd teacher: error: student.decoder.") and "more than 1 value per channel" in printed
    )
    assert "raise schedule.batch_size" in printed
