"""What `Distiller` takes: whatever networks return, taps by path, criteria by what they name; and how it refuses."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from distiller_cases import CLASSES, Network, make_batch, make_distiller
from torch import nn

from hetero_kernels import Distiller, HeteroAKDLoss, MeanOverTaps, SegmentationLoss
from hetero_kernels.taps import last_feature_map, output_logits


@pytest.mark.parametrize("returns", ["tensor", "out", "logits", "tuple", "list"])
def test_logits_are_found_in_whatever_networks_return(returns):
    network = Network(returns=returns).eval()
    images, labels = make_batch()
    distiller = Distiller(network, None, SegmentationLoss()).eval()
    network.returns = "tensor"
    plain = network(images)
    network.returns = returns
    assert torch.equal(distiller(images).logits, plain) and torch.equal(distiller(images, labels).logits, plain)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"loss": torch.ones(1, 2, 3, 3)}, "dictionary with them as 'out' or 'logits'; got a dict with 'loss'"),
        ((torch.ones(2), torch.ones(1, 2, 3, 3)), r"got a tuple that begins with a tensor of shape \(2,\)"),
        (torch.ones(3, 4, 4), r"got a tensor of shape \(3, 4, 4\)"),
        (None, "got a NoneType"),
    ],
)
def test_outputs_without_logits_are_described(output, message):
    with pytest.raises(ValueError, match=message):
        output_logits(output)


def test_of_lists_and_dictionaries_the_last_map_is_taken():
    first, last = torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2)
    for output in (last, [first, last], {"a": first, "b": last}, {"last_hidden_state": first, "states": (first, last)}):
        assert last_feature_map(output) is last
    for output in (None, [], torch.ones(1, 2, 3), {"a": first, "b": "text"}):
        assert last_feature_map(output) is None


def test_an_unknown_tap_lists_candidates_with_their_channels():
    network = Network(returns="out").train()
    with pytest.raises(
        ValueError,
        match="student_tap: tap 'encoder' names no module of the network; candidates: "
        r"drop \(12 channels\), head \(5 channels\), stage \(12 channels\), stem \(6 channels\), st",
    ):
        Distiller(network, None, SegmentationLoss(), student_tap="encoder")  # fmt: skip
    assert network.training and not network.stage._forward_hooks
    with pytest.raises(ValueError, match="candidates: none, as no module inside the network returns a feature map"):
        Distiller(nn.Conv2d(3, CLASSES, 1), None, SegmentationLoss(), student_tap="encoder")


class Collecting(nn.Module):
    """Collects maps by hooks of its own, as transformers does, and fails where these are gone."""

    def __init__(self):
        super().__init__()
        self.layers, self.maps = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, CLASSES, 1)), []
        self.tokens = nn.Flatten(2)
        for layer in self.layers:
            layer.register_forward_hook(lambda module, inputs, output: self.maps.append(output))

    def forward(self, images):
        self.maps.clear()
        self.layers(images)
        self.tokens(self.maps[0])
        return self.maps[-1]


def test_a_network_may_collect_its_own_maps_by_hooks():
    network = Collecting()
    count = [len(layer._forward_hooks) for layer in network.layers]
    listed = r"candidates: layers \(5 channels\), layers.0 \(4 channels\), layers.1 \(5 channels\)$"
    with pytest.raises(ValueError, match=listed):
        Distiller(network, None, SegmentationLoss(), student_tap="layer")
    assert [len(layer._forward_hooks) for layer in network.layers] == count
    images, labels = make_batch()
    criterion = HeteroAKDLoss(4, 4, CLASSES)
    tokens = Distiller(network, Collecting(), criterion, student_tap="tokens", teacher_tap="layers.0")
    with pytest.raises(ValueError, match=r"got a tensor of shape \(4, 4, 24\) \(tokens \[B, N, C\].*" + listed):
        tokens(images, labels)
    assert not any(tap.listening for tap in tokens._student_taps)
    right = Distiller(Collecting(), Collecting(), criterion, student_tap="layers.0", teacher_tap="layers.0")
    assert torch.isfinite(right(images, labels).loss)


class Counting(Network):
    """Counts its forwards in a buffer, and draws random numbers even in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("forwards", torch.zeros(1))
        self.stage[1].eval()  # somebody's frozen batch norm

    def forward(self, images):
        self.forwards += 1
        return super().forward(images) + 0 * torch.rand(1)


def test_shapes_are_found_once_and_without_a_trace():
    student = Counting()
    calls = []
    student.register_forward_pre_hook(lambda module, inputs: calls.append(module.training))
    modes = [module.training for module in student.modules()]
    torch.manual_seed(3)
    expected = [HeteroAKDLoss(12, 20, CLASSES).state_dict(), torch.rand(1)]
    state, teacher = copy.deepcopy(student.state_dict()), Network(10)
    images = make_batch()[0][:1]
    torch.manual_seed(3)
    options = {"num_classes": CLASSES, "student_tap": "stage", "teacher_tap": "stage", "resolution": "feature"}
    distiller = Distiller.heteroakd(student, teacher, images, **options)
    assert torch.equal(torch.rand(1), expected[1])  # nothing but the projectors was drawn
    for name, value in distiller.criterion.state_dict().items():
        assert torch.equal(value, expected[0][name])
    distiller.divisors(torch.zeros(1, 16, 24, dtype=torch.long))
    assert calls == [False]  # for the grid of this size, too
    assert [module.training for module in student.modules()] == modes
    for name, value in student.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_networks_that_do_not_fit_are_named():
    images = make_batch()[0][:1]
    options = {"num_classes": 4, "student_tap": "stage", "teacher_tap": "stage"}
    with pytest.raises(ValueError, match=r"the student must return logits of num_classes=4 classes, got \[1, 5, 2, 3"):
        Distiller.heteroakd(Network(), Network(), images, **options)
    with pytest.raises(ValueError, match=r"student_tap names 2 modules \(\['stem', 'stage'\]\), teacher_tap 1"):
        Distiller.heteroakd(Network(), Network(), images, **{**options, "student_tap": ["stem", "stage"]})
    broken = Network().train()
    broken.head = nn.Linear(7, 7)
    with pytest.raises(ValueError, match=r"the network Network fails on images \[1, 3, 16, 24\]: RuntimeError: mat"):
        Distiller.heteroakd(Network(), broken, images, **{**options, "num_classes": CLASSES})
    with pytest.raises(ValueError, match="student and teacher share parameters"):
        Distiller(broken, broken, SegmentationLoss())


def test_taps_that_give_nothing_are_named():
    images, labels = make_batch()
    network = Network()
    network.spare = nn.Conv2d(3, 3, 1)
    criterion = HeteroAKDLoss(3, 12, CLASSES)
    distiller = Distiller(network, Network(), criterion, student_tap="spare", teacher_tap="stage")
    with pytest.raises(ValueError, match="tap 'spare' is a module that the network did not run; if it was replaced"):
        distiller(images, labels)
    with pytest.raises(ValueError, match=r"student_tap: tap must name at least one module, and each once, got \['he"):
        Distiller(network, Network(), criterion, student_tap=["head", "head"], teacher_tap="stage")
    with pytest.raises(TypeError, match="tap is 3, expected the path of a module"):
        Distiller(network, Network(), criterion, student_tap=[3], teacher_tap="stage")


class Both(NamedTuple):
    loss: torch.Tensor
    more: torch.Tensor


class Own(nn.Module):
    """A user's own criterion, in a form of one's choice."""

    def __init__(self, form: str = "tensor"):
        super().__init__()
        self.form = form

    def forward(self, student_logits, teacher_features=None, *, weight=2.0):
        loss = weight * student_logits.mean()
        shaped = {"tensor": loss, "dictionary": {"loss": loss}, "tuple": Both(loss, loss)}
        return {**shaped, "maps": student_logits, "nothing": {"losses": loss}}[self.form]


@pytest.mark.parametrize("form", ["tensor", "dictionary", "tuple"])
def test_criteria_are_called_with_what_they_name(form):
    images, labels = make_batch()
    distiller = Distiller(Network(), Network(10), Own(form), student_tap="stage").eval()
    output = distiller(images, labels)
    assert torch.equal(output.loss, 2 * distiller.student(images).mean())
    names = {"tensor": {"loss"}, "dictionary": {"loss"}, "tuple": {"loss", "more"}}[form]
    scalars = output.scalars()
    assert scalars.keys() == names and not any(each.requires_grad for each in scalars.values())
    assert scalars["loss"] == output.loss and distiller(images).scalars() == {}
    assert set(distiller.outputs(images)) == {"student_logits"}  # the teacher, which nobody asks for, is not run
    with pytest.raises(TypeError, match="criterion Own takes no normalizer, got one"):
        distiller(images, labels, normalizer=torch.ones(()))
    with pytest.raises(TypeError, match=r"criterion Own has no divisors\(labels\)"):
        distiller.divisors(labels)


def test_criteria_that_cannot_be_called_are_refused():
    images, labels = make_batch()
    for form, got in (("maps", r"a tensor of shape \(4, 5, 2, 3\)"), ("nothing", "a dict with 'losses'")):
        with pytest.raises(TypeError, match=f"must return a 0-dim loss, .* got {got}"):
            Distiller(Network(), None, Own(form))(images, labels)
    with pytest.raises(TypeError, match="criterion CrossEntropyLoss requires 'input', expected a forward that names"):
        Distiller(Network(), None, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="criterion Identity requires 'input'"):
        Distiller(Network(), None, nn.Identity())
    with pytest.raises(TypeError, match="criterion is function, expected a torch.nn.Module"):
        Distiller(Network(), None, output_logits)
    loss = HeteroAKDLoss(12, 12, CLASSES)
    with pytest.raises(ValueError, match="criterion HeteroAKDLoss needs student_features, but student_tap is None"):
        Distiller(Network(), Network(), loss, teacher_tap="stage")
    with pytest.raises(ValueError, match="needs teacher_features, but teacher is None"):
        Distiller(Network(), None, loss, student_tap="stage")
    with pytest.raises(ValueError, match="needs teacher_features, but teacher_tap is None"):
        Distiller(Network(), Network(), loss, student_tap="stage")


def test_mean_over_taps_says_what_it_takes():
    with pytest.raises(ValueError, match="criteria is empty"):
        MeanOverTaps([])
    with pytest.raises(TypeError, match="criteria holds a SegmentationLoss, expected HeteroAKDLoss"):
        MeanOverTaps([SegmentationLoss()])
    distiller = make_distiller(several=True)
    images, labels = make_batch()
    maps = distiller.outputs(images)["student_features"]
    with pytest.raises(ValueError, match=r"teacher_features is a tuple .*, expected a tuple of 2 maps"):
        distiller.criterion(maps, maps[:1], labels)


def test_what_are_no_taps_or_images_is_said():
    images, options = make_batch()[0], {"num_classes": CLASSES, "teacher_tap": "stage"}
    for wrong in (None, 3, ("stage", 3)):
        with pytest.raises(TypeError, match="student_tap is .*expected a path of named_modules"):
            Distiller.heteroakd(Network(), Network(), images, student_tap=wrong, **options)
    with pytest.raises(TypeError, match="images is a ndarray, expected a Tensor"):
        Distiller.heteroakd(Network(), Network(), images.numpy(), student_tap="stage", **options)
