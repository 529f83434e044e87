"""`heteroakd evaluate --projections`: what both networks know in the space that they are matched in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from heteroakd.cli import main
from heteroakd.commands.evaluate import run_with_projectors
from heteroakd.config.commands import EvaluateRun
from heteroakd.methods import Taps, build_distiller, objective_of
from heteroakd.training.checkpoint import load_checkpoint
from heteroakd.training.trained import load_trained
from segmentation_models_pytorch.base import SegmentationModel

DATA = "{crop_size: [32, 64], image_size: [32, 64], train_images: 2, val_images: 2}"
NETWORK = "{architecture: fpn, encoder: tu-mobilenetv3_small_050, weights: null, tap: %s}"
COMMON = [
    *("--data", DATA, "--schedule", "{steps: 2, batch_size: 2}", "--optimizer.lr", "0.01"),
    *("--runtime", "{device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 0}"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("projections")
    taps = "[encoder, decoder]"
    teacher = ["teacher", "--model", NETWORK % taps, "--output", str(folder / "teacher")]
    assert main([*teacher, *COMMON]) == 0
    for method in ("kd", "heteroakd"):
        student = ["distill", "--student", NETWORK % taps, "--method", method, "--output", str(folder / method)]
        assert main([*student, "--teacher.checkpoint", str(folder / "teacher" / "last.pt"), *COMMON]) == 0
    return folder


def test_projections_are_measured_as_predictions(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = str(runs / "heteroakd" / "last.pt"), runs / "numbers.json"
    assert main(["evaluate", "--checkpoint", checkpoint, "--projections", "true", "--output", str(output)]) == 0
    numbers = json.loads(output.read_text())
    names = [
        "teacher",
        *(f"{who}, projected from {tap}" for tap in ("encoder", "decoder") for who in ("student", "teacher")),
    ]
    assert list(numbers["projections"]) == names
    shown = capsys.readouterr().out
    for name, found in {"student": numbers, **numbers["projections"]}.items():
        assert f"{name:<31}  mIoU {100 * found['miou']:6.2f} %" in shown

    trained = load_trained(EvaluateRun(checkpoint, threads=1), "cpu")
    saved, student, data = trained.checkpoint, trained.network, trained.build_data()
    teacher = load_trained(EvaluateRun(str(runs / "teacher" / "last.pt"), threads=1), "cpu").network
    run = run_with_projectors(checkpoint, saved)
    classes = len(data.classes)
    taps = Taps(["encoder", "decoder"], ["encoder", "decoder"])
    distiller = build_distiller(student, teacher, run.method, run.loss, classes, run.data.crop_size, taps).eval()
    objective_of(distiller).criterion.load_state_dict(saved.loss)
    confusion = torch.zeros(4, classes, classes, dtype=torch.int64)
    for image, label in data.val:
        outputs = distiller.outputs(image[None])
        for tap, pair in enumerate(objective_of(distiller).pairs):
            for who, (name, projector) in enumerate(
                (("student", pair.student_projector), ("teacher", pair.teacher_projector))
            ):
                with torch.no_grad():
                    logits = projector(outputs[f"{name}_features"][tap])
                prediction = F.interpolate(logits, size=label.shape, mode="bilinear").argmax(1)[0]
                for row, column in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
                    if row != 255:
                        confusion[2 * tap + who, row, column] += 1
    assert torch.equal(confusion, torch.tensor([numbers["projections"][name]["confusion"] for name in names[1:]]))
    teacher_alone = load_checkpoint(runs / "teacher" / "last.pt").metrics["miou"]
    assert numbers["projections"]["teacher"]["miou"] == pytest.approx(teacher_alone)


def test_each_network_runs_once_for_an_image(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many taps there are, and at every scale once."""
    counted: list[int] = []

    def count(network: SegmentationModel, images: torch.Tensor) -> torch.Tensor:
        counted.append(images.shape[-1])
        return forward(network, images)

    forward = SegmentationModel.forward
    monkeypatch.setattr(SegmentationModel, "forward", count)
    arguments = ["evaluate", "--checkpoint", str(runs / "heteroakd" / "last.pt"), "--projections", "true"]
    assert main([*arguments, "--evaluation.scales", "[1.0, 2.0]"]) == 0
    images, networks, probes = 2, 2, 2
    assert len(counted) == probes + images * networks * 2 and counted.count(128) == images * networks


def test_a_teacher_elsewhere_and_runs_without_projectors(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = ["evaluate", "--checkpoint", str(runs / "heteroakd" / "last.pt"), "--projections", "true"]
    moved = (runs / "teacher" / "last.pt").rename(runs / "moved.pt")
    try:
        assert main(student) == 1
        assert f"{runs / 'teacher' / 'last.pt'}: " in capsys.readouterr().err
        assert main([*student, "--teacher", str(moved)]) == 0
    finally:
        moved.rename(runs / "teacher" / "last.pt")
    for name in ("kd", "teacher"):
        assert main(["evaluate", "--checkpoint", str(runs / name / "last.pt"), "--projections", "true"]) == 1
        message = f"projections: {runs / name / 'last.pt'} is of the method '{'kd' if name == 'kd' else 'none'}'"
        assert message in capsys.readouterr().err
