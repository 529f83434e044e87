"""The networks of the literature: strides and channels, and Mix Transformers that stay what their weights fit."""

from __future__ import annotations

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from heteroakd.config.groups import ModelConfig
from heteroakd.networks.shapes import probe, stride_of
from heteroakd.networks.zoo import build_network
from torch import nn

SIZE = (64, 128)


def shapes(config: ModelConfig) -> tuple[int, int, int]:
    """Channels and stride of the tap, and stride of the logits; nothing is computed."""
    output = probe(build_network(config, 19)[0].to("meta"), ["encoder"], SIZE)
    assert output.logits.shape[:2] == (1, 19)
    return output.maps[0].shape[1], SIZE[1] // output.maps[0].shape[3], SIZE[1] // output.logits.shape[3]


@pytest.mark.usefixtures("uninitialized")
@pytest.mark.parametrize(
    ("architecture", "encoder", "options", "expected"),
    [
        ("deeplabv3", "resnet101", {"decoder_atrous_rates": [12, 24, 36]}, (2048, 8, 8)),
        ("deeplabv3", "resnet18", {"encoder_output_stride": 16}, (512, 16, 16)),
        ("deeplabv3", "mobilenet_v2", {}, (1280, 8, 8)),
        ("deeplabv3", "mit_b4", {}, (512, 32, 32)),
        ("pspnet", "resnet18", {}, (512, 8, 8)),
        ("pspnet", "resnet18", {"encoder_output_stride": 32, "psp_out_channels": 64}, (512, 32, 32)),
        *(("segformer", f"mit_b{size}", {}, (256 if size == 0 else 512, 32, 4)) for size in range(6)),
    ],
)
def test_channels_and_strides(
    architecture: str, encoder: str, options: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    assert shapes(ModelConfig(architecture=architecture, encoder=encoder, options=options)) == expected


def test_rates_of_the_aspp_are_dilations() -> None:
    for encoder, rates, expected in (
        ("resnet18", None, (12, 24, 36)),
        ("mit_b0", None, (3, 6, 9)),
        ("mit_b0", [2, 4, 6], (2, 4, 6)),
    ):
        options = {} if rates is None else {"decoder_atrous_rates": rates}
        network, _ = build_network(ModelConfig(architecture="deeplabv3", encoder=encoder, options=options), 5)
        found = {m.dilation[0] for m in network.decoder.modules() if isinstance(m, nn.Conv2d)} - {1}
        assert found == set(expected)


def test_deeplabv3_on_a_mix_transformer_reads_the_features_that_its_weights_were_trained_for() -> None:
    torch.manual_seed(0)
    plain = smp.encoders.get_encoder("mit_b0", weights=None).eval().requires_grad_(False)
    for parameter in plain.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
    network, _ = build_network(ModelConfig(architecture="deeplabv3", encoder="mit_b0"), 5)
    network.encoder.load_state_dict(dict(plain.state_dict()))
    images = torch.randn(1, 3, 64, 96)
    expected = plain(images)[-1]
    found = []
    network.encoder.register_forward_hook(lambda module, inputs, output: found.append(output[-1]))
    logits = network.eval()(images)
    torch.testing.assert_close(found[0], expected)
    assert expected.std() > 0.01 and logits.shape == (1, 5, 2, 3) and stride_of(network) == 32
    dilated = smp.DeepLabV3("mit_b0", encoder_weights=None).eval()  # what would be wrong
    dilated.encoder.load_state_dict(dict(plain.state_dict()))
    assert dilated.encoder(images)[-1].shape != expected.shape


@pytest.mark.parametrize("architecture", ["deeplabv3plus", "pspnet"])
def test_architectures_that_would_ruin_a_mix_transformer_are_refused(architecture: str) -> None:
    with pytest.raises(ValueError, match=f"'{architecture}' dilates its encoder.*'mit_b0' useless; deeplabv3"):
        build_network(ModelConfig(architecture=architecture, encoder="mit_b0"), 5)


def test_misspelt_options_are_named_for_every_way_to_build() -> None:
    for architecture, encoder, known in (
        ("deeplabv3", "mit_b0", "decoder_atrous_rates"),
        ("pspnet", "resnet18", "encoder_output_stride"),
    ):
        config = ModelConfig(architecture=architecture, encoder=encoder, options={"rates": 3})
        with pytest.raises(ValueError, match=f"can be .*{known}.*; got rates"):
            build_network(config, 5)
