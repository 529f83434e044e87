"""Weights from files: other codebases' names, the report, and files that do not fit."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from heteroakd.commands.train import run_distill
from heteroakd.config.commands import DistillRun
from heteroakd.config.groups import ModelConfig, RuntimeConfig, ScheduleConfig, TeacherConfig
from heteroakd.data import DataConfig
from heteroakd.networks.weights import WeightsError, load_weights
from heteroakd.networks.zoo import build_network
from torch import Tensor, nn

RESNET = ModelConfig(architecture="fpn", encoder="resnet18")
MIT = ModelConfig(architecture="segformer", encoder="mit_b0")
State = dict[str, Tensor]


def state_of(module: nn.Module) -> State:
    """Values that no initialisation gives."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in nn.Module.state_dict(module).items()
    }


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def resnet() -> State:
    return state_of(torchvision.models.resnet18(weights=None))


def mix_transformer() -> State:
    return state_of(smp.encoders.get_encoder("mit_b0", weights=None))


def saved(folder: Path, contents: Any, name: str = "weights.pth") -> str:
    path = folder / name
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(contents, path)
    else:
        torch.save(contents, path)
    return str(path)


def loaded(config: ModelConfig, path: str, **options: Any) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    config = ModelConfig(config.architecture, config.encoder, path, **options)
    return build_network(config, 5)


@pytest.mark.parametrize(
    ("config", "state", "wrap", "shown"),
    [
        (RESNET, resnet, lambda state: state, "unused in the file: fc.weight, fc.bias"),
        (RESNET, resnet, lambda state: {"state_dict": OrderedDict(prefixed(state, "module.")), "epoch": 3},
         "entry 'state_dict', names without 'module.'"),
        (RESNET, resnet, lambda state: {"model": prefixed(state, "backbone.")}, "names without 'backbone.'"),
        (RESNET, resnet, lambda state: prefixed(state, "module.pretrained."), "names without 'module.pretrained.'"),
        (RESNET, resnet, lambda state: prefixed(state, "encoder."), "unused in the file: encoder.fc.weight"),
        (MIT, mix_transformer, lambda state: prefixed(state, "backbone."), "names without 'backbone.'"),
        (MIT, mix_transformer, lambda state: {**state, "head.weight": torch.ones(9, 4)}, "unused in the file: head.w"),
    ],
)  # fmt: skip
def test_encoders_of_other_codebases(tmp_path: Path, config: ModelConfig, state: Any, wrap: Any, shown: str) -> None:
    contents = state()
    network, report = loaded(config, saved(tmp_path, wrap(contents)))
    for name, value in nn.Module.state_dict(network.encoder).items():
        assert torch.equal(value, contents[name]), name
    assert shown in report, report
    count = len([name for name in network.encoder.state_dict() if not name.endswith("tracked")])
    assert f"encoder: {count} of {count} tensors from the file\n" in report
    assert "random values in decoder." in report


def test_timm_classifier_into_its_feature_extractor(tmp_path: Path) -> None:
    name = "convnext_atto"
    contents = state_of(timm.create_model(name))
    network, report = loaded(
        ModelConfig("fpn", f"tu-{name}"), saved(tmp_path, contents, "w.safetensors"), options={"encoder_depth": 4}
    )
    assert "timm's names" in report
    stem = network.encoder.model.state_dict()
    assert torch.equal(stem["stem_0.weight"], contents["stem.0.weight"])
    assert torch.equal(stem["stages_2.blocks.1.conv_dw.weight"], contents["stages.2.blocks.1.conv_dw.weight"])


def test_whole_networks_are_covered_decoder_and_head_too(tmp_path: Path) -> None:
    source = smp.FPN("resnet18", encoder_weights=None, classes=5)
    contents = state_of(source)
    network, report = loaded(RESNET, saved(tmp_path, {"teacher": prefixed(contents, "module.")}))
    assert all(torch.equal(value, contents[name]) for name, value in network.state_dict().items())
    assert "random values" not in report and "entry 'teacher'" in report
    path = saved(tmp_path, prefixed(state_of(smp.FPN("resnet18", encoder_weights=None, classes=7)), "module."))
    _, report = loaded(RESNET, path)
    assert "rest: 29 of 31 tensors from the file, random values in segmentation_head.0.weight, segm" in report
    assert "of another shape in the file: segmentation_head.0.weight (7, 128, 1, 1), not (5, 128, 1, 1)" in report
    with pytest.raises(WeightsError, match="2 of the network's tensors not in the file\n"):
        load_weights(network, path, whole=True)


def test_files_of_transformers_are_its_own_to_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    network = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes))
    state = network.state_dict()
    for contents in ({"gamma": torch.ones(3)}, dict(list(state.items())[:9])):
        with pytest.raises(WeightsError, match=r"from_pretrained, in the function .* weights: null\n"):
            load_weights(network, saved(tmp_path, contents), whole=True)
    with pytest.raises(WeightsError) as caught:
        load_weights(nn.Linear(2, 2), saved(tmp_path, {"gamma": torch.ones(3)}))
    assert "from_pretrained" not in str(caught.value)


def test_incomplete_encoder_is_an_error_unless_allowed(tmp_path: Path) -> None:
    contents = {name: value for name, value in resnet().items() if not name.startswith("layer4.1.conv")}
    path = saved(tmp_path, contents)
    with pytest.raises(WeightsError, match=r"2 of the encoder's tensors not in .*weights_strict: false") as caught:
        loaded(RESNET, path)
    assert "random values in encoder.layer4.1.conv1.weight, encoder.layer4.1.conv2.weight" in str(caught.value)
    network, report = loaded(RESNET, path, weights_strict=False)
    assert "random values in encoder.layer4.1.conv1.weight" in report
    assert torch.equal(network.encoder.conv1.weight, contents["conv1.weight"])


def test_refused_file_leaves_the_network_alone(tmp_path: Path) -> None:
    network, _ = build_network(RESNET, 5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError):
        load_weights(network, saved(tmp_path, {"conv1.weight": torch.ones(64, 3, 7, 7)}))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"w": torch.ones(3)}, "no tensor of the file fits the network"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "expected a state_dict, or one as state_dict, .*; got epoch, args"),
        ([torch.ones(3)], "expected a state_dict, got a list"),
        ({"state_dict": Harmful()}, "no file of tensors alone"),
    ],
)
def test_files_that_are_no_weights(
    tmp_path: Path, contents: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, contents)
    with pytest.raises(WeightsError, match=message) as caught:
        loaded(RESNET, path, weights_strict=False)
    assert path in str(caught.value) and "weights_only" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_missing_truncated_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pth: no such file of weights"):
        loaded(RESNET, str(tmp_path / "nowhere.pth"))
    path = Path(saved(tmp_path, resnet()))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="truncated"):
        loaded(RESNET, str(path))
    (tmp_path / "w.safetensors").write_bytes(b"1")
    with pytest.raises(WeightsError, match="truncated"):
        loaded(RESNET, str(tmp_path / "w.safetensors"))


class Foreign(nn.Module):
    """A network of another codebase: a list of outputs, and names of its own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())
        self.classify = nn.Conv2d(8, num_classes, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.trunk(images)
        return [self.classify(features), features]


def test_teacher_of_another_codebase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = state_of(Foreign(12))
    path = saved(tmp_path, {"state_dict": prefixed(contents, "module.")})
    teacher = ModelConfig(architecture=f"{__name__}:Foreign", weights=path, tap="trunk")
    run = DistillRun(
        data=DataConfig(crop_size=(32, 64), image_size=(32, 64), train_images=2, val_images=1),
        student=ModelConfig(options={"decoder_segmentation_channels": 16}),
        teacher=TeacherConfig(model=teacher),
        schedule=ScheduleConfig(steps=1, batch_size=2),
        runtime=RuntimeConfig(device="cpu", threads=1, pictures=0, progress="none", tensorboard=False),
        output=str(tmp_path / "run"),
    )
    run_distill(run)
    printed = capsys.readouterr().out
    assert "network: 4 of 4 tensors from the file" in printed and "classes are taken to be the data set's: " in printed
    assert "tap trunk (8, 4, 8)" in printed
    saved(tmp_path, {name: value for name, value in contents.items() if name != "classify.bias"})
    with pytest.raises(WeightsError, match="1 of the network's tensors not in the file"):
        run_distill(run, overwrite=True)
    run.teacher.model = ModelConfig(architecture="fpn", encoder="resnet18", weights="imagenet")
    with pytest.raises(ValueError, match=r"teacher.model.weights must be a file .pth.* got 'imagenet'"):
        run_distill(run, overwrite=True)


def test_tensors_beside_the_state_dict_do_not_hide_it(tmp_path: Path) -> None:
    state = resnet()
    contents = {"epoch": torch.tensor(3), "best": torch.ones(1), "state_dict": state}
    _, report = loaded(RESNET, saved(tmp_path, contents))
    assert "entry 'state_dict'" in report and "unused in the file: fc.weight, fc.bias" in report


def test_sparse_tensors_are_read(tmp_path: Path) -> None:
    state = resnet()
    dense, _ = loaded(RESNET, saved(tmp_path, state))
    sparse, _ = loaded(RESNET, saved(tmp_path, {**state, "conv1.weight": state["conv1.weight"].to_sparse()}))
    assert torch.equal(sparse.encoder.conv1.weight, dense.encoder.conv1.weight)


def test_files_with_other_keys_than_names(tmp_path: Path) -> None:
    for contents, message in (({0: 1, 1: "a"}, "got 0, 1"), ({}, "got nothing in it")):
        with pytest.raises(WeightsError, match=message):
            loaded(RESNET, saved(tmp_path, contents))
