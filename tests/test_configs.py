"""The configuration files in configs/, alone and merged, and the recipe that a run prints."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from heteroakd.cli import COMMANDS, build_parser, gather_lists, main
from heteroakd.commands.recipe import recipe
from heteroakd.config.commands import CompareRun, DistillRun, fill_names
from heteroakd.config.groups import LossConfig, ModelConfig, ScheduleConfig
from heteroakd.data import DataConfig, SegmentationData
from heteroakd.methods import METHODS, Taps, build_distiller
from heteroakd.networks.shapes import probe, tap_paths
from heteroakd.networks.zoo import build_network
from heteroakd.training.checkpoint import load_checkpoint
from heteroakd.training.run import Run
from PIL import Image
from torch import nn

CONFIGS = Path(__file__).parent.parent / "configs"
DATA, TEACHERS, PAIRS = (sorted((CONFIGS / name).glob("*.yaml")) for name in ("data", "teachers", "pairs"))
ALONE = sorted(CONFIGS.glob("*.yaml"))
STRIDES = {"resnet101": 8, "resnet18": 8, "mobilenet_v2": 8, "mit_b4": 32, "mit_b0": 4}
"""Of the logits of the paper's networks, by encoder."""


def parsed(command: str, *paths: Path) -> Any:
    parser = build_parser()
    options = [option for path in paths for option in ("--config", str(path))]
    values = parser.instantiate(parser.parse_args([command, *options]))[command]
    config_class = COMMANDS[command][0]
    return config_class(**{field.name: values[field.name] for field in fields(config_class)})


def logits_and_taps(model: ModelConfig, crop: tuple[int, int], classes: int = 19) -> tuple[torch.Size, int]:
    network, _ = build_network(model, classes, load_weights=False)
    auxiliary = [model.auxiliary_tap] if model.auxiliary_weight else []
    output = probe(network.to("meta"), [*auxiliary, *tap_paths(model.tap)], crop)
    return output.logits.shape, output.maps[-1].shape[1]


def test_the_papers_pairs_are_there_in_both_directions() -> None:
    assert {path.stem for path in DATA} == {"cityscapes", "voc", "ade20k"}
    pairs = {tuple(path.stem.split("_to_")) for path in PAIRS}
    assert pairs >= {("resnet101", "segformer_b0")}
    assert pairs >= {("mit_b4", f"{student}") for student in
                     ("deeplabv3_mobilenet_v2", "deeplabv3_resnet18", "pspnet_resnet18")}  # fmt: skip
    assert {path.stem for path in ALONE} == {
        f"{name}_{command}" for name in ("street", "street_reverse", "camvid") for command in ("teacher", "distill")
    }


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
@pytest.mark.usefixtures("uninitialized")
def test_files_for_small_runs_are_valid_alone(path: Path) -> None:
    command = "teacher" if "teacher" in path.stem else "distill"
    run = parsed(command, path)
    assert all(size % 32 == 0 for size in run.data.crop_size)
    if command == "distill":
        teacher = yaml.safe_load(path.with_name(path.name.replace("distill", "teacher")).read_text())
        assert run.teacher.checkpoint == f"{teacher['output']}/last.pt"
        assert run.data.name == teacher["data"]["name"] and "{method}" in run.output
    shape, _ = logits_and_taps(run.model if command == "teacher" else run.student, (64, 64))
    assert shape[:2] == (1, 19)


NETWORKS = [*TEACHERS, *PAIRS]
COVERED = [(data, network) for data in DATA for network in (NETWORKS if data.stem == "cityscapes" else NETWORKS[::3])]
"""Every network on Cityscapes, where it is built, and a teacher and a pair on the other sets: what one file says, the
other does not."""


@pytest.mark.parametrize(("data", "network"), COVERED, ids=lambda path: path.stem)
@pytest.mark.usefixtures("uninitialized")
def test_every_pair_on_every_data_set_is_the_recipe_and_can_be_built(data: Path, network: Path) -> None:
    command = "teacher" if network in TEACHERS else "distill"
    run = parsed(command, data, network)
    model = run.model if command == "teacher" else run.student
    cnn = not model.encoder.startswith("mit_")
    assert (run.optimizer.name, run.optimizer.lr) == (("sgd", 0.02) if cnn else ("adamw", 2e-4))
    assert run.schedule.batch_size == (16 if cnn else 8) and run.schedule.power == 0.9
    assert run.schedule.steps == (160_000 if not cnn else 80_000 if command == "teacher" else 40_000)
    assert model.auxiliary_weight == (0.4 if "resnet" in model.encoder else 0) and model.weights == "imagenet"
    assert run.data.crop_size == ((512, 1024) if data.stem == "cityscapes" else (512, 512))
    assert run.data.scale_range == (0.5, 2.0) and run.loss.logits_align_corners
    run = fill_names(run, "kd")
    assert "{" not in run.output and run.data.name in run.output
    if command == "distill":
        teachers = [fill_names(parsed("teacher", data, path), "").output for path in TEACHERS]
        assert run.teacher.checkpoint in [f"{output}/last.pt" for output in teachers]
        assert isinstance(parsed("compare", data, network).student, ModelConfig)
    if data.stem == "cityscapes":  # the network is the same on all of them
        crop = run.data.crop_size
        shape, _ = logits_and_taps(model, crop)
        assert shape == (1, 19, crop[0] // STRIDES[model.encoder], crop[1] // STRIDES[model.encoder])


def documented(name: str) -> list[str]:
    """The command lines of `heteroakd` in a page's shell blocks, with the page's own variables filled in."""
    blocks = re.findall(r"```bash\n(.*?)```", (CONFIGS.parent / "docs" / name).read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    variables = {"method": "kd", **dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(lines), re.M))}
    found = []
    for line in lines:
        line = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)
        if command := re.search(r"\bheteroakd (" + "|".join(COMMANDS) + r")\b.*", line):
            found.append(command[0])
    return found


@pytest.mark.parametrize(("page", "count"), [("training.md", 9), ("trainer.md", 12), ("camvid.md", 2)])
def test_documented_commands_are_valid(page: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    lines = documented(page)
    assert len(lines) >= count, lines
    parser = build_parser()
    for line in lines:
        parser.parse_args(gather_lists(shlex.split(line, comments=True)[1:]))


def test_names_are_filled_in_paths() -> None:
    run = CompareRun(data=DataConfig(name="street"), output="runs/{data}-{method}")
    run.teacher.checkpoint = "runs/{data}/last.pt"
    filled = fill_names(run, "compare")
    assert (filled.output, filled.teacher.checkpoint) == ("runs/street-compare", "runs/street/last.pt")
    assert run.teacher.checkpoint == "runs/{data}/last.pt"
    assert fill_names(DistillRun(), "kd").output == "runs/street-kd"


def test_configuration_of_a_public_set_trains_on_its_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val"):
        for folder, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            (tmp_path / folder / part / "ulm").mkdir(parents=True)
            picture = Image.new("RGB" if folder == "leftImg8bit" else "L", (128, 64), None if "8bit" in name else 7)
            picture.save(tmp_path / folder / part / "ulm" / f"ulm_000000_000019_{name}.png")
    files = (CONFIGS / "data" / "cityscapes.yaml", CONFIGS / "teachers" / "deeplabv3_resnet101.yaml")
    options = {
        "data.root": tmp_path,
        "data.crop_size": "[64, 64]",
        "model.encoder": "resnet18",
        "model.weights": "null",
        "schedule.steps": 2,
        "schedule.batch_size": 2,
        "runtime.workers": 1,
        "runtime.pictures": 0,
        "runtime.tensorboard": "false",
        "output": tmp_path / "r",
    }
    arguments = [option for path in files for option in ("--config", str(path))]
    arguments += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["teacher", *arguments]) == 0
    finished = load_checkpoint(tmp_path / "r" / "last.pt")
    assert len(finished.classes) == 19 and finished.step == 2 and finished.metrics["miou"] >= 0
    printed = capsys.readouterr().out
    for line in (
        f"data          cityscapes in {tmp_path}: 1 train and 1 val images, 19 classes",
        "augmentation  scale 0.5 to 2 in steps of 0.1, random crop 64x64, mirrored with probability 0.5",
        "teacher       deeplabv3 resnet18, weights random, encoder_output_stride 8, decoder_atrous_rates [12, 24, 36]",
        "loss          1 x cross-entropy\n",
        "              + 0.4 x cross-entropy of an FCN head on encoder.layer3\n",
        "              logits interpolated with aligned corners\n",
        "optimizer     sgd, lr 0.02, momentum 0.9, weight decay 0.0001, fp32",
        "schedule      2 steps of 2 images (4.0 epochs), poly 0.9, seed 0",
    ):
        assert f"  {line}" in printed, printed


TERMS = {
    "none": "1 x cross-entropy (class weights, label smoothing 0.1) logits interpolated without",
    "kd": "+ 0.1 x KD (T 1) logits",
    "cwd": "+ 3 x channel-wise KD (T 4) logits",
    "heteroakd": "+ 0.1 x KD (T 1) + 12 x HeteroAKD (T 1, KMM, KEM by class, kl, at label resolution)",
    "heteroakd_no_kmm": "HeteroAKD (T 1, no KMM, KEM by class, kl",
    "heteroakd_no_kem": "HeteroAKD (T 1, KMM, no KEM, kl",
}


@pytest.mark.parametrize("method", METHODS)
def test_recipe_says_what_each_method_adds(method: Any) -> None:
    config = DistillRun(method=method, loss=LossConfig(hakd_weight=12.0, class_weight=[1.0] * 5, label_smoothing=0.1))
    config.optimizer.ema_decay, config.optimizer.head_lr_multiplier = 0.99, 2.0
    config.schedule = ScheduleConfig(steps=3, micro_batches=2, warmup_steps=7, distillation_warmup_steps=9)
    config.student.tap = "0"
    student, teacher = (nn.Sequential(nn.Conv2d(3, 5, 1)) for _ in range(2))
    networks = (student, None if method == "none" else teacher)
    data = SegmentationData([0] * 12, [0], tuple("abcde"), torch.zeros(5, 3))  # type: ignore[arg-type]
    distiller = build_distiller(*networks, method, config.loss, 5, (32, 32), Taps("0", "0"))
    run = Run(config, distiller, data, config.student, "cpu")
    text = recipe(run)
    assert TERMS[method] in " ".join(text.split())
    assert ("teacher       runs/street-teacher/last.pt" in text) == (method != "none")
    assert ("taps          0 <- 0" in text) == ("projectors x 10" in text) == method.startswith("heteroakd")
    assert "head x 2" in text and "weight decay 0.01, not of norms and biases, fp32, moving average 0.99" in text
    assert "1 processes x 2 micro-batches, poly 0.9, warm-up 7 steps" in text
    assert ("rise over 9 steps" in text) == (method != "none") and "student       segformer mit_b0, weights" in text
