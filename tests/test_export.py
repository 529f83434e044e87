"""`heteroakd export`: programs and ONNX models that say what PyTorch says, and errors before anything is written."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from heteroakd.cli import main
from heteroakd.commands import export
from heteroakd.commands.predict import read_image
from heteroakd.config.commands import ExportRun, TeacherRun
from heteroakd.config.groups import LossConfig, ModelConfig, to_dict
from heteroakd.data import DataConfig, build_data
from heteroakd.evaluation.inference import predict, whole_logits
from heteroakd.networks.shapes import stride_of
from heteroakd.networks.zoo import build_network
from heteroakd.training.checkpoint import Checkpoint, save_checkpoint
from heteroakd.training.trained import restore_network
from PIL import Image
from torch import Tensor, nn

RESNET = ModelConfig(architecture="fpn", encoder="resnet18", options={"decoder_segmentation_channels": 32})
TRANSFORMER = ModelConfig(options={"decoder_segmentation_channels": 16})
PYRAMID = ModelConfig(architecture="pspnet", encoder="resnet18")
TRUSTED = ("--trust_architecture", f"{__name__}:Branching")
pytestmark = pytest.mark.usefixtures("one_block_in_each_stage")


def branching(when: str) -> ModelConfig:
    """Of the network of one layer below."""
    return ModelConfig(TRUSTED[1], tap="backbone", options={"when": when})


def checkpoint(path: Path, model: ModelConfig, **loss: Any) -> nn.Module:
    """A network with random weights and statistics, as a run saves it."""
    torch.manual_seed(0)
    data = DataConfig(image_size=(50, 90), train_images=1, val_images=1, crop_size=(64, 64))
    classes = list(build_data(data).classes)
    network, _ = build_network(model, len(classes), load_weights=False)
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 64, 64))  # batch norm's statistics are no identity
    run = TeacherRun(data=data, model=model, loss=LossConfig(**loss))
    metrics = {"miou": 0.25, "best_miou": 0.25}
    saved = Checkpoint("teacher", 7, to_dict(run), to_dict(model), classes, network.state_dict(), {}, {}, [], metrics)
    save_checkpoint(path, saved)
    return restore_network(str(path), saved, model.architecture).eval()


def exported(path: Path, folder: Path, *options: str) -> int:
    return main(["export", "--checkpoint", str(path), "--output", str(folder), "--threads", "1", *options])


def test_program_for_any_size_says_what_the_checkpoint_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = checkpoint(tmp_path / "last.pt", TRANSFORMER, logits_align_corners=True)
    assert exported(tmp_path / "last.pt", tmp_path / "new" / "student.pt2") == 0
    printed = capsys.readouterr().out
    assert "largest difference from PyTorch" in printed and "dynamic: batch, height, width" in printed
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["student.pt2"]
    extra = {export.METADATA: ""}
    program = torch.export.load(tmp_path / "new" / "student.pt2", extra_files=extra).module()
    metadata = json.loads(extra[export.METADATA])
    assert metadata["classes"][0] == "road" and metadata["stride"] == 32 and metadata["upsampled"]
    assert metadata["mean"] == [0.485, 0.456, 0.406] and metadata["std"] == [0.229, 0.224, 0.225]
    assert metadata["miou"] == 0.25 and metadata["step"] == 7
    measured = metadata["measured"]
    assert (measured["data"], measured["part"], measured["window"]) == ("street", "val", None)
    for size in ((64, 96), (160, 64)):
        images = torch.randn(2, 3, *size)
        expected = torch.stack([whole_logits(network, image, align_corners=True) for image in images])
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)


def test_the_documented_use_of_an_onnx_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "InferenceSession(" in block)
    network = checkpoint(tmp_path / "last.pt", branching("never"))
    assert exported(tmp_path / "last.pt", tmp_path / "student.onnx", *TRUSTED) == 0
    random = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    expected = predict(network, read_image(tmp_path / "photo.jpg")).numpy()
    assert names["labels"].shape == (90, 130) and (names["labels"] == expected).mean() > 0.999


def test_onnx_model_says_what_the_checkpoint_says(tmp_path: Path) -> None:
    network = checkpoint(tmp_path / "last.pt", RESNET)
    assert exported(tmp_path / "last.pt", tmp_path / "student.onnx", "--upsample", "false") == 0
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map[export.METADATA_KEY])
    assert not metadata["upsampled"] and metadata["dynamic"] == ["batch", "height", "width"]
    images = torch.randn(2, 3, 96, 64)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = network(images)
    assert logits.shape == expected.shape != (2, expected.shape[1], 96, 64)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-3, atol=1e-4)
    image = build_data(DataConfig(image_size=(64, 96), train_images=1, val_images=1)).val[0][0]
    (logits,) = session.run(["logits"], {"images": image[None].numpy()})
    upsampled = torch.nn.functional.interpolate(torch.from_numpy(logits), size=(64, 96), mode="bilinear")
    assert (upsampled[0].argmax(0) == predict(network, image)).float().mean() > 0.999


def test_what_a_network_does_not_allow_is_said_and_left_fixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = checkpoint(tmp_path / "last.pt", PYRAMID)
    Image.new("RGB", (90, 50), (200, 30, 40)).save(tmp_path / "a.png")
    options = ["--image", str(tmp_path / "a.png"), "--image_size", "[64, 96]"]
    assert exported(tmp_path / "last.pt", tmp_path / "student.onnx", *options) == 1
    said = capsys.readouterr().err
    assert "nothing was written, dynamic 'sizes': " in said and "; dynamic may be batch or none instead" in said
    assert exported(tmp_path / "last.pt", tmp_path / "student.onnx", *options, "--dynamic", "batch") == 0
    assert "dynamic: batch" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, 64, 96]
    images = export.example(read_image(tmp_path / "a.png"), stride_of(network), (64, 96))
    (logits,) = session.run(["logits"], {"images": images.repeat(3, 1, 1, 1).numpy()})
    np.testing.assert_allclose(logits[2], whole_logits(network, images[0]).numpy(), rtol=1e-3, atol=1e-4)


def test_same_padding_of_tensorflow_is_refused_at_once() -> None:
    model = ModelConfig(architecture="fpn", encoder="tu-tf_efficientnet_lite0")
    network, _ = build_network(model, 3, load_weights=False)
    plain = export.PlainNetwork(network.eval(), upsample=True, align_corners=False)
    with pytest.raises(ValueError, match="depends on the image's size"):
        export.trace(plain, torch.zeros(1, 3, 64, 64), 32, "sizes")


def test_difference_above_the_tolerance_leaves_the_old_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "last.pt", PYRAMID)
    (tmp_path / "student.pt2").write_text("the old one")
    as_pt2 = export.as_pt2

    def wrong(*arguments: Any) -> tuple[bytes, export.Runner]:
        contents, run = as_pt2(*arguments)
        return contents, lambda images: run(images) * 1.01

    monkeypatch.setattr(export, "as_pt2", wrong)
    assert exported(tmp_path / "last.pt", tmp_path / "student.pt2", "--dynamic", "none") == 1
    error = capsys.readouterr().err
    assert "differs from PyTorch by 0.01 of the largest logit, tolerance is 0.0001" in error
    assert (tmp_path / "student.pt2").read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "student.pt2"]


def test_errors_name_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "last.pt", RESNET)
    assert exported(tmp_path / "last.pt", tmp_path / "student.pth") == 1
    assert "output must end with .pt2 or .onnx, got" in capsys.readouterr().err
    assert exported(tmp_path / "last.pt", tmp_path / "a.pt2", "--image_size", "[64, 80]") == 1
    assert "image_size must be multiples of the network's stride 32, got (64, 80)" in capsys.readouterr().err
    assert exported(tmp_path / "last.pt", tmp_path / "a.pt2", "--image", str(tmp_path / "last.pt")) == 1
    assert "last.pt: not a readable picture" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert exported(tmp_path / "last.pt", tmp_path / "a.onnx") == 1
    assert "pip install 'hetero-kernels[export]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


class Branching(nn.Module):
    """Logits that are doubled for images of some size: "wide", "tall" or "never"."""

    def __init__(self, num_classes: int, when: str) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, num_classes, 8, stride=8)
        self.when = when

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        doubled = self.when != "never" and (width > 300 if self.when == "wide" else height > width)
        logits: Tensor = self.backbone(images)
        return 2 * logits if doubled else logits


@pytest.mark.parametrize("when", ["wide", "tall"])
@pytest.mark.parametrize("name", ["student.pt2", "student.onnx"])
def test_networks_that_branch_on_the_size_are_left_at_one(tmp_path: Path, when: str, name: str) -> None:
    checkpoint(tmp_path / "last.pt", branching(when))
    assert exported(tmp_path / "last.pt", tmp_path / name, *TRUSTED, "--dynamic", "sizes") == 1
    assert not (tmp_path / name).exists()
    run = ExportRun(str(tmp_path / "last.pt"), trust_architecture=TRUSTED[1], dynamic="batch", threads=1)
    metadata = export.run_export(replace(run, output=str(tmp_path / name)))
    assert metadata["dynamic"] == ["batch"]
