"""Options as people write them: unused, doubled and impossible ones, paths with ~ and variables, import paths in
checkpoints."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from heteroakd.cli import COMMANDS, build_parser, main
from heteroakd.config.commands import CompareRun, DistillRun, EvaluateRun, ExportRun
from heteroakd.config.groups import DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TeacherConfig, from_dict
from heteroakd.config.options import PATHS, Options, build, expand_path
from heteroakd.training.checkpoint import load_checkpoint, save_checkpoint

NO_PATHS = {"architecture", "encoder", "tap", "auxiliary_tap", "device", "trust_architecture"}
NO_PATHS |= {"image_folder", "label_folder", "label_suffix"}  # below the root
"""Options that are strings and name no file."""


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (DataConfig, {"root": "/data/camvid"}, "root is not used by the data set 'street'"),
        (
            DataConfig,
            {"name": "camvid", "train_images": 9},
            "train_images is not used by the data set 'camvid', only by",
        ),
        (DataConfig, {"label_values": {0: 0}}, "label_values is not used by the data set 'street', only by 'folder'"),
        (OptimizerConfig, {"name": "adamw", "momentum": 0.8}, "momentum is not used by adamw"),
        (ModelConfig, {"auxiliary_tap": "encoder.layer2"}, "auxiliary_tap is not used where auxiliary_weight is 0"),
        (ModelConfig, {"weights_strict": False}, "weights_strict is not used without a file of weights"),
        (EvaluateRun, {"checkpoint": "a.pt", "teacher": "b.pt"}, "teacher is not used without projections"),
        (ExportRun, {"checkpoint": "a.pt", "image": "a.png", "root": "b"}, "root is not used where image is given"),
    ],
)
def test_an_option_that_is_not_used_is_an_error(group: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(group, options, "here")


def test_a_root_without_a_name_and_values_out_of_bounds_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (["--data.root", str(tmp_path)], "root is not used by the data set 'street'"),
        (["--data.crop_size", "[-64,64]"], "data.crop_size must be 2 whole numbers between 1 and 65536, got"),
        (["--data.root", "$NOT_SET/x"], "the variable NOT_SET is not set"),
    ):
        assert message in refused(["check-data", *options, "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "data: {seed: 1}\nschedule: {steps: 3}\ndata: {seed: 2}\n",
        "data:\n  seed: 1\n  seed: 2\n",
        "data:\n  label_values: {128: 1,\n  0x80: 2}\n",
    ],
)
def test_a_doubled_key_is_an_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "double.yaml"
    file.write_text(text)
    assert "stands twice in one mapping, the second time in line 3" in refused(
        ["teacher", "--config", str(file)], capsys
    )


def test_a_merged_key_of_yaml_is_no_doubled_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text("schedule: &of_all {steps: 3}\ndata: {<<: *of_all}\n")  # data knows no steps: it was merged
    assert "steps" in refused(["teacher", "--config", str(file)], capsys)


def test_a_doubled_key_in_a_groups_file_and_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "double.yaml"
    file.write_text("seed: 1\nseed: 2\n")
    for value in (str(file), "{seed: 1, seed: 2}"):
        assert "'seed' stands twice in one mapping" in refused(["check-data", "--data", value], capsys)


def test_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert expand_path("~/runs/{method}") == f"{tmp_path}/runs/{{method}}"
    assert expand_path("$SCRATCH/${SCRATCH}x") == "/scratch//scratchx"
    assert TeacherConfig(checkpoint="~/a.pt").checkpoint == f"{tmp_path}/a.pt"
    with pytest.raises(ValueError, match="'\\$NOT_SET/x': the variable NOT_SET is not set"):
        expand_path("$NOT_SET/x")
    monkeypatch.chdir(tmp_path)
    Path("a$b.png").touch()
    assert expand_path("a$b.png") == "a$b.png"


def options_of(group: type[Any], *kinds: type) -> list[tuple[type[Any], str]]:
    """Every option that is of one of the kinds or holds some, with its group."""
    found = []
    for name, kind in get_type_hints(group).items():
        inside = [kind, *get_args(kind), *(inner for each in get_args(kind) for inner in get_args(each))]
        mapping = any(get_origin(each) in (dict, ClassVar) for each in inside)
        found += [(group, name)] if {*kinds} & {*inside} and not mapping else []
        found += [one for each in inside if dataclasses.is_dataclass(each) for one in options_of(each, *kinds)]
    return found


def test_every_path_option_is_expanded() -> None:
    """A new option that is a string is a path or says here that it is none."""
    for config_class, _ in COMMANDS.values():
        for group, name in options_of(config_class, str):
            assert name in PATHS or name in NO_PATHS, f"{group.__name__}.{name}"
            assert name in NO_PATHS or issubclass(group, Options), group


REQUIRED = {"evaluate": ["--checkpoint", "x"], "predict": ["--checkpoint", "x"], "export": ["--checkpoint", "x"]}
REQUIRED |= {"report": ["--runs", "[x]"], "distill": ["--teacher.model.architecture", "fpn"]}


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (ScheduleConfig, {"steps": True}, "steps must be a whole number between 1 and .*, got True"),
        (ScheduleConfig, {"steps": 1.5}, "steps must be a whole number between 1 and .*, got 1.5"),
        (ScheduleConfig, {"steps": None}, "steps must be a whole number between 1 and .*, got None"),
        (OptimizerConfig, {"lr": True}, "lr must be a number between 0 and .*, got True"),
        (OptimizerConfig, {"name": "adam"}, "name must be one of sgd, adamw, got 'adam'"),
        (DataConfig, {"name": 3}, "name must be one of street, .*, got 3"),
        (DataConfig, {"crop_size": 64}, "crop_size must be 2 whole numbers between 1 and .*, got 64"),
        (DataConfig, {"crop_size": (64, 2.5)}, r"crop_size must be 2 whole numbers .*, got \(64, 2.5\)"),
        (DataConfig, {"lists": {"tarin": "x"}}, "lists must be one of train, val, test, got 'tarin'"),
        (DataConfig, {"label_values": {0: 1.5}}, "label_values must map to classes 0 to 254 .*, got 1.5"),
    ],
)
def test_options_of_another_type_are_refused_from_python_too(
    group: type[Any], options: dict[str, Any], message: str
) -> None:
    folder = {"name": "folder", "root": "/data"} if "label_values" in options or "lists" in options else {}
    with pytest.raises(ValueError, match=message):
        group(**folder, **options)


def groups_of_options(group: type[Options] = Options) -> Iterator[type[Options]]:
    for each in group.__subclasses__():
        yield each
        yield from groups_of_options(each)


def test_every_name_of_some_is_checked() -> None:
    """What is none of them is a ValueError that says so, None where it may be none is not, and a tuple is a list."""
    found = 0
    for group in groups_of_options():
        required = {entry.name: "x" for entry in dataclasses.fields(group) if entry.default is entry.default_factory}
        options = group(**required)
        for name, kind in get_type_hints(group).items():
            kinds = (kind, *get_args(kind))
            for choices in (get_args(each) for each in kinds if get_origin(each) is Literal):
                for wrong in (3, "none of them"):
                    with pytest.raises(ValueError, match=f"^{name} must be one of {', '.join(choices)}, got {wrong!r}"):
                        dataclasses.replace(options, **{name: wrong})
                if type(None) in kinds:
                    dataclasses.replace(options, **{name: None})
                found += 1
    assert found >= 15
    assert CompareRun(methods=("kd", "none")).methods == ("kd", "none")  # type: ignore[arg-type]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_bounds(command: str) -> None:
    """What lies just outside of them, no number and no finite one are refused by the option's full name."""
    parsed = build_parser().parse_args([command, *REQUIRED.get(command, [])])[command]
    found = 0
    for path in parsed.keys(branches=False):
        group, config_class = parsed, COMMANDS[command][0]
        for step in path.split(".")[:-1]:
            kind = get_type_hints(config_class)[step]
            group, config_class = (
                group[step],
                next(each for each in (kind, *get_args(kind)) if dataclasses.is_dataclass(each)),
            )
        name = path.split(".")[-1]
        if (config_class, name) not in options_of(config_class, int, float):
            continue
        (option,) = (entry for entry in dataclasses.fields(config_class) if entry.name == name)
        least, most, count = option.metadata["bounds"]
        several = "tuple" in str(option.type) or "list" in str(option.type)
        assert (count is not None) == ("tuple" in str(option.type)), path
        wrongs = [[each] * (count or 1) if several else each for each in (least - 1, most + 1, math.inf, math.nan, "5")]
        if several:
            wrongs += [[], [least] * (count + 1)] if count else [[]]
        before = group[name]
        for wrong in wrongs:
            group[name] = wrong
            with pytest.raises(ValueError, match=rf"^{re.escape(path)} must be .*, got {re.escape(repr(wrong))}"):
                build(COMMANDS[command][0], parsed)
        group[name] = before
        found += 1
    build(COMMANDS[command][0], parsed)
    assert found or command == "report"


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("distill", ["--schedule.steps", "0"], "schedule.steps must be a whole number between 1 and 1000000000, got 0"),
        (
            "distill",
            ["--schedule.seed", str(2**64)],
            "schedule.seed must be a whole number between 0 and 9223372036854775807, got",
        ),
        ("distill", ["--optimizer.lr", "-1"], "optimizer.lr must be a number between 0 and 1000000000, got -1.0"),
        (
            "distill",
            ["--optimizer.ema_decay", "1"],
            "optimizer.ema_decay must be a number between 0 and 0.999999, got 1.0",
        ),
        (
            "teacher",
            ["--evaluation.scales", "[0]"],
            "evaluation.scales must be one or more numbers between 0.001 and 16",
        ),
        ("teacher", ["--evaluation.scales", "[]"], "evaluation.scales must be one or more numbers"),
        (
            "teacher",
            ["--evaluation.window_stride", "[8,8]"],
            "evaluation.window_stride is that of window, which is null, got (8, 8)",
        ),
        ("distill", ["--teacher.checkpoint", ""], "teacher.checkpoint must name a file or a folder, got ''"),
        (
            "distill",
            ["--student.weights_strict", "false"],
            "student.weights_strict is not used without a file of weights",
        ),
        (
            "distill",
            ["--teacher.model.auxiliary_weight", "-1"],
            "teacher.model.auxiliary_weight must be a number between",
        ),
        ("teacher", ["--output", " "], "output must name a file or a folder, got ' '"),
        ("compare", ["--methods", "[kd, kd]"], "methods must name at least one, and each once, got ['kd', 'kd']"),
        ("compare", ["--seeds", "[]"], "seeds must be one or more whole numbers between 0"),
        ("compare", ["--seeds", "[1, 1]"], "seeds must name at least one, and each once, got [1, 1]"),
        ("compare", ["--processes", "0"], "processes must be a whole number between 1 and 4096, got 0"),
        ("demo", ["--methods", "[kd, kd]"], "methods must name at least one, and each once"),
        ("check-data", ["--workers", "-1"], "workers must be a whole number between 0 and 4096, got -1"),
        (
            "evaluate",
            ["--checkpoint", "x.pt", "--limit", "0"],
            "limit must be a whole number between 1 and 1000000000, got 0",
        ),
        ("predict", ["--checkpoint", "x.pt", "--alpha", "2"], "alpha must be a number between 0 and 1, got 2"),
        (
            "export",
            ["--checkpoint", "x.pt", "--tolerance", "-1"],
            "tolerance must be a number between 0 and 1000000000, got -1",
        ),
    ],
)
def test_values_that_no_run_can_have_are_refused_before_anything_is_loaded(
    command: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    error = refused([command, "--output", str(output), *options], capsys)
    assert error.startswith(f"heteroakd {command}: error: ") and message in error and error.count("\n") == 1
    assert not output.exists()


OWN = """
from torch import nn
def network(num_classes):
    body = nn.Conv2d(3, 8, 3, stride=4, padding=1)
    return nn.Sequential(body, nn.Conv2d(8, num_classes, 1))
"""
TINY = [
    *("--data", "{crop_size: [32, 32], image_size: [32, 32], train_images: 2, val_images: 1}"),
    *("--schedule", "{steps: 1, batch_size: 2}"),
    *("--runtime", "{device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 0}"),
]


def test_an_import_path_in_a_checkpoint_is_followed_only_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predict, evaluate, export and the teacher of a distillation, alone and under a comparison."""
    (tmp_path / "own_of_options.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ["{architecture: 'own_of_options:network', tap: '0', weights: null, options: {}}"]
    assert main(["teacher", "--model", *own, *TINY, "--output", "teacher"]) == 0
    stranger = load_checkpoint("teacher/last.pt")
    stranger.model = {**stranger.model, "architecture": "os:system", "options": {"command": "touch harm"}}
    save_checkpoint(Path("stranger.pt"), stranger)
    small = "{architecture: fpn, encoder: tu-mobilenetv3_small_050, weights: null}"
    distill = ["distill", "--method", "kd", *TINY, "--overwrite", "--output", "student", "--student", small]
    uses = [["evaluate", "--checkpoint"], ["predict", "--checkpoint"], ["export", "--checkpoint"]]
    for use in [*uses, [*distill, "--teacher.checkpoint"]]:
        for file, name in (("teacher/last.pt", "own_of_options:network"), ("stranger.pt", "os:system")):
            assert main([*use, file]) == 1, use
            message = capsys.readouterr().err
            assert f"{file}: its network is what {name!r} returns" in message
            assert f"--trust_architecture {name}" in message
    assert not Path("harm").exists()
    trusting = ["--trust_architecture", "own_of_options:network"]
    assert main(["evaluate", "--checkpoint", "teacher/last.pt", *trusting]) == 0
    assert main([*distill, "--teacher.checkpoint", "teacher/last.pt", *trusting]) == 0
    assert (
        main([*distill[:-2], "--student", *own, "--teacher.checkpoint", "teacher/last.pt"]) == 0
    )  # its own options' path


def test_trust_is_passed_on_to_the_runs_of_a_comparison_and_is_none_of_a_checkpoints() -> None:
    from heteroakd.commands.compare import distill_run
    from heteroakd.config.commands import CompareRun
    from heteroakd.config.groups import to_dict
    from heteroakd.training.checkpoint import check_same_run
    from heteroakd.training.trained import may_differ

    trusting = distill_run(CompareRun(trust_architecture="mine:network"), "kd", 0)
    assert yaml.safe_load(yaml.safe_dump(to_dict(trusting)))["trust_architecture"] == "mine:network"
    plain = dataclasses.replace(trusting, trust_architecture=[])
    assert isinstance(plain, DistillRun)
    saved = type("Saved", (), {"files": ""})
    check_same_run(Path("last.pt"), to_dict(trusting), to_dict(plain), may_differ=may_differ(saved, ""))  # type: ignore[arg-type]
