"""The Triton projection, interpreted. An interpreted program takes 10 ms and more: shapes are a few tiles."""

import copy

import pytest
import torch
from cases import leaves, relative_l2
from gpu_projection import ProjectionTests, make, raw_case
from test_projection import by_torch, compare
from torch import nn

from hetero_kernels import HeteroAKDLoss, PixelProjector
from hetero_kernels.triton import tuning

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on what is masked later


class TestInterpreted(ProjectionTests):
    backend = operators = "triton"
    infinity_stays = False

    @pytest.mark.parametrize("resolution", ["label", "feature"])
    def test_normalized_in_the_loop_over_classes(self, monkeypatch, resolution):
        monkeypatch.setattr(tuning, "_TILES", {"nvidia": ()})
        tuning.tilings.cache_clear()
        try:
            self.check_loss(raw_case("equal heights", "randn", (True, False)), proj_weight=0.5, resolution=resolution)
        finally:
            monkeypatch.undo()
            tuning.tilings.cache_clear()

    @pytest.mark.parametrize("alternative", [1, 2])
    def test_alternative_tilings(self, monkeypatch, alternative):
        features, classes = make("tiles")
        for name in ("project_tilings", "back_tilings"):
            original = getattr(tuning, name)
            monkeypatch.setattr(tuning, name, lambda *a, original=original: (original(*a)[alternative],))
        compare(self.make_ours(features, classes), features)

    def test_float64_is_torchs_to_project(self):
        features, classes = make("small")
        module = self.make_ours(features, classes).double()
        assert relative_l2(module(features.double()), by_torch(copy.deepcopy(module), features.double())) <= 1e-14


def test_launches(launches):
    """The features come twice, forward and for the weights' gradient; theirs is written once."""
    loss = HeteroAKDLoss(12, 20, 5, projector="conv_bn_relu", backend="triton")
    features = leaves(torch.randn(2, 12, 3, 4), torch.randn(2, 20, 2, 3))
    out = loss(*features, torch.randint(0, 5, (2, 9, 11)))
    projection = ["pilot_kernel", "project_kernel", "statistics_kernel"]
    assert launches == [*projection, *projection, "hakd_kernel", "finish_kernel", *["sum_parts_kernel"] * 2]
    launches.clear()
    out.loss.backward()
    assert launches == ["weights_kernel", "finish_weight_kernel", "project_back_kernel"] * 2


def test_divisors_of_raw_logits_are_not_counted_early(launches):
    """At the loss grid, too: their gradient is read and written again in any case."""
    tensors, relu, labels = raw_case("equal heights", "randn", (True, False))
    TestInterpreted().loss(leaves(*tensors), relu, labels, {"resolution": "feature"})
    assert launches == ["hakd_kernel", "finish_kernel", "sum_parts_kernel"]


def test_replaced_layers_are_torchs(launches):
    module = PixelProjector(4, 3, backend="triton")
    module[0] = nn.Conv2d(4, 3, 1, padding=1)
    with pytest.warns(RuntimeWarning, match="leaves a projector to torch"):
        module(torch.randn(2, 4, 3, 3))
    assert not launches
