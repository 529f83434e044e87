"""The teacher's outputs on disk: the same training with and without, and files that are damaged."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heteroakd.commands.teacher_cache import network_digest
from heteroakd.commands.train import run_distill, run_teacher
from heteroakd.config.commands import DistillRun, TeacherRun
from heteroakd.config.groups import ModelConfig, OptimizerConfig, RuntimeConfig, ScheduleConfig, TeacherConfig
from heteroakd.data import DataConfig, build_data
from heteroakd.methods.distiller import Teacher
from heteroakd.networks.taps import TappedNetwork
from heteroakd.networks.zoo import build_tapped
from heteroakd.training.checkpoint import load_checkpoint

DATA = DataConfig(crop_size=(32, 64), image_size=(48, 56), train_images=5, val_images=1, augment=False)
QUIET = RuntimeConfig(device="cpu", threads=1, pictures=0, progress="none", tensorboard=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    model = ModelConfig(architecture="fpn", encoder="tu-mobilenetv3_small_050", weights=None)
    schedule = ScheduleConfig(steps=2, batch_size=2)
    run_teacher(TeacherRun(data=DATA, model=model, schedule=schedule, runtime=QUIET, output=str(folder)))
    return str(folder / "last.pt")


def distil(folder: Path, checkpoint: str, cache: Path | str | None, **changes: Any) -> dict[str, torch.Tensor]:
    run = DistillRun(
        data=DATA,
        student=ModelConfig(options={"decoder_segmentation_channels": 16}),
        teacher=TeacherConfig(checkpoint),
        schedule=ScheduleConfig(steps=6, batch_size=2),
        runtime=replace(QUIET, teacher_cache=None if cache is None else str(cache)),
        output=str(folder),
    )
    run_distill(replace(run, **changes))
    finished = load_checkpoint(folder / "last.pt")
    return {**finished.network, **finished.loss}


def count_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that the teacher computed in training."""
    computed: list[int] = []
    call = Teacher.__call__

    def counting(self: Teacher, images: torch.Tensor) -> Any:
        computed.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Teacher, "__call__", counting)
    return computed


@pytest.mark.parametrize("options", [{"method": "heteroakd"}, {"method": "kd", "precision": "bf16"}])
def test_training_is_the_same_bit_for_bit(
    tmp_path: Path, teacher: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changes = {
        "method": options.get("method", "heteroakd"),
        "optimizer": OptimizerConfig(precision=options.get("precision", "fp32")),
    }
    without = distil(tmp_path / "without", teacher, None, **changes)
    computed = count_images(monkeypatch)
    filling = distil(tmp_path / "filling", teacher, tmp_path / "cache", **changes)
    assert 5 <= sum(computed) < 12
    printed = capsys.readouterr().out
    # Logits and, for HeteroAKD, the last feature map, 288 channels at stride 32.
    size = (12 * 8 * 16 + (288 * 2 if changes["method"] == "heteroakd" else 0)) * (2 if "precision" in options else 4)
    assert f"teacher cache: 5 images x {size / 1e6:.3g} MB = " in printed and "0 of them there" in printed
    assert len(list((tmp_path / "cache").glob("street-32x64-*/*.pt"))) == 5
    computed.clear()
    filled = distil(tmp_path / "filled", teacher, tmp_path / "cache", **changes)
    assert not computed and "5 of them there" in capsys.readouterr().out
    for name, value in without.items():
        assert torch.equal(value, filling[name]) and torch.equal(value, filled[name]), name


def test_damaged_files_are_computed_anew(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = distil(tmp_path / "first", teacher, tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("*/*.pt"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].write_bytes(b"")
    torch.save([torch.ones(1, 3)], files[2])
    torch.save({"logits": 3}, files[3])
    middle = files[4].read_bytes()
    flipped = bytes([middle[len(middle) // 2] ^ 255])
    files[4].write_bytes(middle[: len(middle) // 2] + flipped + middle[len(middle) // 2 + 1 :])
    computed = count_images(monkeypatch)
    again = distil(tmp_path / "second", teacher, tmp_path / "cache")
    assert computed and all(torch.equal(value, again[name]) for name, value in expected.items())
    printed = capsys.readouterr().out
    for path in files:
        assert f"{path} is damaged, computed anew" in printed
    assert files[0].read_bytes() == whole


def test_another_teacher_has_a_folder_of_its_own() -> None:
    networks = [build_tapped(ModelConfig(), 5)[0].network for _ in range(2)]
    same, other = (network_digest(TappedNetwork(network, "encoder")) for network in networks)
    assert same != other and same == network_digest(TappedNetwork(networks[0], "encoder"))
    assert same != network_digest(TappedNetwork(networks[0], "decoder"))


def test_augmented_runs_and_full_disks_are_refused(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="with data.augment every crop is another: set data.augment to false"):
        distil(tmp_path / "a", teacher, tmp_path / "cache", data=replace(DATA, augment=True))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="runtime.teacher_cache must name a folder, or be null, got ''"):
        distil(tmp_path / "c", teacher, "")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(OSError, match=r"runtime.teacher_cache: 5 images x .*0 of them there, and only 1e-06 GB free"):
        distil(tmp_path / "b", teacher, tmp_path / "cache")


def test_without_augmentation_the_middle_of_the_image_is_seen() -> None:
    source = build_data(replace(DATA, crop_size=(48, 56)))
    image, label = source.train[0]
    raw, _ = source.train.source[0]
    assert image.shape == (3, 48, 56) and torch.equal(label.to(torch.uint8), source.train.source[0][1])
    smaller = build_data(DATA).train
    for index in range(2):
        assert torch.equal(smaller[0][0], smaller[0][0])
        assert torch.equal(smaller[0][0][:, :, :56], image[:, 8:40]), index  # 32 of the 48 rows, all of the columns
    assert bool((smaller[0][1][:, 56:] == 255).all()) and raw.shape == (3, 48, 56)


class Scaled(torch.nn.Module):
    """Networks of the same weights that compute different things."""

    def __init__(self, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.backbone = torch.nn.Conv2d(3, 4, 8, stride=8)
        self.head = torch.nn.Conv2d(4, num_classes, 1)
        self.scale = scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.backbone(images)) * self.scale
        return logits


def test_a_teacher_of_other_options_and_the_same_weights_is_another(tmp_path: Path) -> None:
    torch.save(Scaled(12).state_dict(), tmp_path / "w.pth")
    model = ModelConfig(architecture=f"{__name__}:Scaled", weights=str(tmp_path / "w.pth"), tap="backbone")
    scaled = replace(model, options={"scale": 50.0})
    teacher = TeacherConfig(model=scaled)
    distil(tmp_path / "filled", "", tmp_path / "cache", method="kd", teacher=TeacherConfig(model=model))
    cached = distil(tmp_path / "a", "", tmp_path / "cache", method="kd", teacher=teacher)
    computed = distil(tmp_path / "b", "", None, method="kd", teacher=teacher)
    assert all(torch.equal(cached[name], computed[name]) for name in computed)
    # a setting of a layer that changes neither names nor shapes
    networks = [build_tapped(ModelConfig(), 5)[0].network for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    convolution = next(module for module in networks[1].modules() if isinstance(module, torch.nn.Conv2d))
    digests = [network_digest(TappedNetwork(network, "encoder")) for network in networks]
    convolution.dilation = (2, 2)
    digests.append(network_digest(TappedNetwork(networks[1], "encoder")))
    assert digests[0] == digests[1] != digests[2]


def test_a_disk_that_fills_up_is_named(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(contents: object, file: object) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch's writer does when it closes

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"runtime\.teacher_cache: .*\.pt cannot be written .*No space left on device"):
        distil(tmp_path / "run", teacher, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
