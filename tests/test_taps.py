"""What networks may return, several taps, and the auxiliary head."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heteroakd.commands.train import run_distill, run_teacher
from heteroakd.config.commands import DistillRun, TeacherRun
from heteroakd.config.groups import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
    ScheduleConfig,
    TeacherConfig,
)
from heteroakd.data import DataConfig
from heteroakd.methods.distiller import Distiller, Teacher, build_distiller
from heteroakd.methods.losses import MeanOverTaps
from heteroakd.networks.taps import TappedNetwork, output_logits, probe
from heteroakd.training.checkpoint import load_checkpoint
from heteroakd.training.step import TrainingStep, build_optimizer
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

CLASSES = 4
SIZE = (16, 32)


class TwoStages(nn.Module):
    """Two stages of strides 4 and 8, without batch norm, in a shape of output of one's choice."""

    def __init__(self, num_classes: int, width: int = 6, returns: str = "tensor") -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer3": nn.Conv2d(3, width, 4, 4), "layer4": nn.Conv2d(width, 2 * width, 2, 2)})
        self.encoder.output_stride = 8
        self.head = nn.Conv2d(2 * width, num_classes, 1)
        self.returns = returns

    def forward(self, images: Tensor) -> Any:
        logits = self.head(self.encoder["layer4"](self.encoder["layer3"](images).tanh()).tanh())
        shaped = {"out": {"out": logits, "aux": -logits}, "logits": {"logits": logits}, "tuple": (logits, images)}
        return {**shaped, "list": [logits, images], "tensor": logits, "nothing": {"loss": logits}}[self.returns]


BOTH = ["encoder.layer3", "encoder.layer4"]


def batch(images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (images, *SIZE), generator=generator)
    labels[:, :5] = 255
    labels[0] = labels[0].where(torch.rand(SIZE, generator=generator) < 0.3, 255)
    return torch.randn(images, 3, *SIZE, generator=generator), labels


def pair(
    taps: list[str], config: LossConfig, teacher_taps: list[str] | None = None, **options: Any
) -> tuple[Distiller, Teacher]:
    torch.manual_seed(0)
    auxiliary_tap = "encoder.layer3" if options.get("auxiliary_weight") else None
    student = TappedNetwork(TwoStages(CLASSES), taps, auxiliary_tap)
    teacher = Teacher(TappedNetwork(TwoStages(CLASSES, 10), teacher_taps or taps))
    method = options.pop("method", "heteroakd")
    return build_distiller(student, teacher, method, config, CLASSES, SIZE, **options).eval(), teacher


@pytest.mark.parametrize("returns", ["tensor", "out", "logits", "tuple", "list"])
def test_logits_are_found_in_whatever_networks_return(returns: str) -> None:
    network, images = TwoStages(CLASSES, returns=returns), torch.randn(1, 3, *SIZE)
    plain = copy.deepcopy(network)
    plain.returns = "tensor"
    torch.testing.assert_close(TappedNetwork(network, "encoder.layer4")(images).logits, plain(images))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"loss": torch.ones(1, 2, 3, 3)}, "dictionary with them as 'out' or 'logits'; got a dict with 'loss'"),
        ((torch.ones(2), torch.ones(1, 2, 3, 3)), r"got a tuple that begins with a tensor of shape \(2,\)"),
        (torch.ones(3, 4, 4), r"got a tensor of shape \(3, 4, 4\)"),
        (None, "got a NoneType"),
    ],
)
def test_outputs_without_logits_are_described(output: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_logits(output)


def test_wrong_numbers_of_taps_are_named() -> None:
    with pytest.raises(ValueError, match=r"student.tap names 2 modules \(encoder.layer3, .*teacher.tap 1 \(encoder"):
        pair(BOTH, LossConfig(), BOTH[:1])
    with pytest.raises(ValueError, match=r"at least one module, and each once, got \['head', 'head'\]"):
        TappedNetwork(TwoStages(CLASSES), ["head", "head"])
    with pytest.raises(ValueError, match="at least one module"):
        TappedNetwork(TwoStages(CLASSES), [])


def test_a_network_of_one_module_has_no_candidates() -> None:
    with pytest.raises(ValueError, match="tap 'encoder' names no module of the network; candidates: none, as no mod"):
        TappedNetwork(nn.Conv2d(3, CLASSES, 1), "encoder")


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="the network has no parameters"):
        probe(TappedNetwork(nn.Sequential(nn.Identity()), "0"), (32, 32))


def test_what_an_own_network_raises_is_named_and_its_mode_kept() -> None:
    network = TappedNetwork(TwoStages(CLASSES), "head").train()
    network.network.head = nn.Linear(7, 7)
    with pytest.raises(
        ValueError, match=r"the network TwoStages fails on an image \[1, 3, 32, 64\]: RuntimeError: mat"
    ):
        probe(network, (32, 64))
    assert network.training


def test_networks_of_other_classes_are_named() -> None:
    few, right = TappedNetwork(TwoStages(2), "head"), TappedNetwork(TwoStages(CLASSES), "head")
    with pytest.raises(ValueError, match=r"the student must return logits of 4 classes, got \(1, 2, 2, 4\)"):
        build_distiller(few, Teacher(right), "kd", LossConfig(), CLASSES, SIZE)
    with pytest.raises(ValueError, match=r"the teacher must return logits of 4 classes, got \(1, 2, 2, 4\)"):
        build_distiller(right, Teacher(few), "kd", LossConfig(), CLASSES, SIZE)


def test_taps_and_auxiliary_maps_pass_through_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LossConfig(projector="conv", hakd_weight=3.0)
    images, labels = batch()
    losses = []
    for compiled in (False, True):
        module, teacher = pair(BOTH, config, auxiliary_weight=0.4)
        if compiled:
            compile_without_compiler = partial(torch.compile, backend="eager", fullgraph=True)
            monkeypatch.setattr(torch, "compile", compile_without_compiler)
            module.compile_student()
            teacher.compile()
        losses.append([module(images, labels, teacher(images)).loss for _ in range(2)])
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_several_taps_average_the_terms_of_each(resolution: Any) -> None:
    config = LossConfig(projector="conv", kd_weight=0.7, hakd_weight=3.0, proj_weight=0.5, resolution=resolution)
    images, labels = batch()
    both, teacher = pair(BOTH, config)
    assert isinstance(both.loss, MeanOverTaps)
    terms = both(images, labels, teacher(images))
    terms.loss.backward()
    singles = []
    for number, tap in enumerate(BOTH):
        single, single_teacher = pair([tap], config)
        single.loss.load_state_dict(both.loss.pairs[number].state_dict())
        singles.append((single, single(images, labels, single_teacher(images))))
    for name in ("loss", "task", "kd", "hakd", "proj"):  # task and kd are the same in each: counted once
        expected = torch.stack([getattr(each, name) for _, each in singles]).mean()
        torch.testing.assert_close(getattr(terms, name), expected)
    assert terms.hakd != singles[0][1].hakd
    (sum(each.loss for _, each in singles) / 2).backward()
    for name, parameter in both.student.named_parameters():
        expected = sum(dict(single.student.named_parameters())[name].grad for single, _ in singles)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-5)
    for number, (single, _) in enumerate(singles):
        for ours, theirs in zip(both.loss.pairs[number].parameters(), single.loss.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("kem", ["class", "spatial"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_parts_of_a_step_add_up_with_several_taps_and_an_auxiliary_head(resolution: Any, kem: Any) -> None:
    config = LossConfig(
        projector="conv", hakd_weight=3.0, resolution=resolution, kem=kem, class_weight=[1.0, 2.0, 0.5, 1.0]
    )
    images, labels = batch(4)
    gradients = []
    for parts in (1, 2):
        module, teacher = pair(BOTH, config, auxiliary_weight=0.4)
        schedule = ScheduleConfig(steps=1, batch_size=4, micro_batches=parts)
        optimizer = build_optimizer(module, OptimizerConfig(name="sgd", lr=1e-9))
        TrainingStep(module, teacher, optimizer, OptimizerConfig(), schedule, RuntimeConfig())(0, images, labels)
        gradients.append([parameter.grad for parameter in module.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, atol=1e-6, rtol=1e-5)


def test_weights_of_every_pair_warm_up() -> None:
    module, _ = pair(BOTH, LossConfig(kd_weight=0.2, hakd_weight=4.0))
    module.scale_distillation(0.5)
    assert [each.hakd_weight for each in module.pairs] == [2.0, 2.0] and module.loss.logit_loss.kd_weight == 0.1
    module.scale_distillation(1.0)
    assert [each.hakd_weight for each in module.pairs] == [4.0, 4.0]


@pytest.mark.parametrize("method", ["none", "heteroakd"])
def test_auxiliary_head_adds_its_cross_entropy_by_hand(method: str) -> None:
    config = LossConfig(class_weight=[1.0, 2.0, 0.5, 1.0], label_smoothing=0.1, logits_align_corners=True)
    images, labels = batch()
    module, teacher = pair(BOTH[1:], config, method=method, auxiliary_weight=0.4)
    plain = copy.deepcopy(module)
    terms = module(images, labels, teacher(images))
    terms.loss.backward()
    head = plain.auxiliary.head
    plain.auxiliary = None
    without = plain(images, labels, teacher(images))
    logits = head(plain.student.network.encoder["layer3"](images))
    full = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=True)
    weight = torch.tensor(config.class_weight)
    by_hand = F.cross_entropy(full, labels, weight=weight, ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(terms.auxiliary, by_hand.detach())
    torch.testing.assert_close(terms.task, without.task)
    (without.loss + 0.4 * by_hand).backward()
    pairs = [(module.student, plain.student), (module.auxiliary.head, head)]
    for ours, theirs in pairs:
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


def test_auxiliary_head_learns_at_the_rate_of_the_head() -> None:
    module, _ = pair(BOTH, LossConfig(), auxiliary_weight=0.4)
    groups = build_optimizer(module, OptimizerConfig(lr=0.1, head_lr_multiplier=5.0)).param_groups
    rates = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    assert set(rates) == {id(parameter) for parameter in module.parameters()}
    assert {rates[id(parameter)] for parameter in module.auxiliary.parameters()} == {0.5}


def test_auxiliary_head_is_no_part_of_the_network() -> None:
    module, _ = pair(BOTH[1:], LossConfig(), auxiliary_weight=0.4)
    assert set(module.student.network.state_dict()) == set(TwoStages(CLASSES).state_dict())
    for weight in (-1, math.nan):
        with pytest.raises(ValueError, match=f"auxiliary_weight must be a finite number from 0 on, got {weight}"):
            pair(BOTH[1:], LossConfig(), auxiliary_weight=weight)
    with pytest.raises(ValueError, match="auxiliary_weight needs a network with an auxiliary_tap"):
        build_distiller(module.student.__class__(TwoStages(CLASSES), "head"), None, "none", LossConfig(), CLASSES, SIZE,
                        auxiliary_weight=0.4)  # fmt: skip


def torchvision_network(num_classes: int) -> nn.Module:
    """As torchvision gives it: a dictionary of logits at the images' own size."""
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)


def own_student(num_classes: int) -> nn.Module:
    return TwoStages(num_classes, returns="tuple")


def test_any_pair_of_modules_trains_with_taps_and_heads_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A torchvision network teaches one of another stride that returns a tuple, over two taps, bit for bit resumed."""
    data = DataConfig(crop_size=(64, 64), image_size=(64, 64), train_images=4, val_images=1)
    quiet = RuntimeConfig(device="cpu", threads=1, pictures=1, progress="none", tensorboard=False, save_every=2)
    schedule = ScheduleConfig(steps=4, batch_size=2)
    teacher = ModelConfig(architecture=f"{__name__}:torchvision_network", tap="backbone", weights=None,
                          auxiliary_weight=0.4, auxiliary_tap="backbone.4")  # fmt: skip
    run_teacher(TeacherRun(data=data, model=teacher, schedule=ScheduleConfig(steps=1, batch_size=2), runtime=quiet,
                           output=str(tmp_path / "teacher")))  # fmt: skip
    printed = capsys.readouterr().out
    assert "tap backbone (960, 4, 4), auxiliary head on backbone.4 (40, 8, 8), logits (" in printed
    assert load_checkpoint(tmp_path / "teacher" / "last.pt").auxiliary
    whole = DistillRun(
        data=data,
        student=ModelConfig(architecture=f"{__name__}:own_student", tap=BOTH, auxiliary_weight=0.4),
        teacher=TeacherConfig(str(tmp_path / "teacher" / "last.pt"), tap=["backbone.4", "backbone"]),
        optimizer=OptimizerConfig(ema_decay=0.5),
        schedule=schedule,
        runtime=quiet,
        output=str(tmp_path / "whole"),
    )
    run_distill(whole)
    assert "tap encoder.layer3 (6, 16, 16), tap encoder.layer4 (12, 8, 8), auxiliary" in capsys.readouterr().out
    cut, forward, calls = replace(whole, output=str(tmp_path / "cut")), Distiller.forward, []

    def stopping(self: Distiller, *arguments: Any) -> Any:
        calls.append(None)
        if len(calls) > 3:
            raise InterruptedError
        return forward(self, *arguments)

    with monkeypatch.context() as context, pytest.raises(InterruptedError):
        context.setattr(Distiller, "forward", stopping)
        run_distill(cut)
    run_distill(cut, resume=True)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for ours, theirs in ((a.network, b.network), (a.loss, b.loss), (a.auxiliary, b.auxiliary)):
        assert ours and ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert {name.partition(".")[0] for name in a.loss} == {"pairs"} and list(
        (tmp_path / "whole" / "pictures").iterdir()
    )
