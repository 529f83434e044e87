"""The trainer's objective over several taps, and its auxiliary head."""

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
from heteroakd.methods import Taps, build_distiller, objective_of
from heteroakd.training.checkpoint import load_checkpoint
from heteroakd.training.step import TrainingStep, build_optimizer
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from hetero_kernels import Distiller

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


def pair(taps: list[str], config: LossConfig, teacher_taps: list[str] | None = None, **options: Any) -> Distiller:
    torch.manual_seed(0)
    auxiliary_tap = "encoder.layer3" if options.get("auxiliary_weight") else None
    networks = TwoStages(CLASSES), TwoStages(CLASSES, 10)
    method, paths = options.pop("method", "heteroakd"), Taps(taps, teacher_taps or taps, auxiliary_tap)
    return build_distiller(*networks, method, config, CLASSES, SIZE, paths, **options).eval()


def test_wrong_numbers_of_taps_are_named() -> None:
    with pytest.raises(ValueError, match=r"student.tap names 2 modules \(encoder.layer3, .*teacher.tap 1 \(encoder"):
        pair(BOTH, LossConfig(), BOTH[:1])
    with pytest.raises(ValueError, match=r"at least one module, and each once, got \['head', 'head'\]"):
        pair(BOTH, LossConfig(), ["head", "head"])


def test_networks_of_other_classes_are_named() -> None:
    few, right, taps = TwoStages(2), TwoStages(CLASSES), Taps("head", "head")
    with pytest.raises(ValueError, match=r"the student must return logits of 4 classes, got \(1, 2, 2, 4\)"):
        build_distiller(few, right, "kd", LossConfig(), CLASSES, SIZE, taps)
    with pytest.raises(ValueError, match=r"the teacher must return logits of 4 classes, got \(1, 2, 2, 4\)"):
        build_distiller(right, few, "kd", LossConfig(), CLASSES, SIZE, taps)


def test_taps_and_auxiliary_maps_pass_through_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LossConfig(projector="conv", hakd_weight=3.0)
    images, labels = batch()
    losses = []
    for compiled in (False, True):
        module = pair(BOTH, config, auxiliary_weight=0.4)
        if compiled:
            compile_without_compiler = partial(torch.compile, backend="eager", fullgraph=True)
            monkeypatch.setattr(torch, "compile", compile_without_compiler)
            module.student.compile()
            module.teacher.compile()
        losses.append([module(images, labels).loss for _ in range(2)])
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_several_taps_average_the_terms_of_each(resolution: Any) -> None:
    config = LossConfig(projector="conv", kd_weight=0.7, hakd_weight=3.0, proj_weight=0.5, resolution=resolution)
    images, labels = batch()
    both = pair(BOTH, config)
    pairs = objective_of(both).pairs
    terms = both(images, labels).terms
    terms.loss.backward()
    singles = []
    for number, tap in enumerate(BOTH):
        single = pair([tap], config)
        objective_of(single).criterion.load_state_dict(pairs[number].state_dict())
        singles.append((single, single(images, labels).terms))
    for name in ("loss", "task", "kd", "hakd", "proj"):  # task and kd are the same in each: counted once
        expected = torch.stack([getattr(each, name) for _, each in singles]).mean()
        torch.testing.assert_close(getattr(terms, name), expected)
    assert terms.hakd != singles[0][1].hakd
    (sum(each.loss for _, each in singles) / 2).backward()
    for name, parameter in both.student.named_parameters():
        expected = sum(dict(single.student.named_parameters())[name].grad for single, _ in singles)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-5)
    for number, (single, _) in enumerate(singles):
        for ours, theirs in zip(pairs[number].parameters(), single.criterion.parameters(), strict=True):
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
        module = pair(BOTH, config, auxiliary_weight=0.4)
        schedule = ScheduleConfig(steps=1, batch_size=4, micro_batches=parts)
        optimizer = build_optimizer(module, OptimizerConfig(name="sgd", lr=1e-9))
        TrainingStep(module, optimizer, OptimizerConfig(), schedule, RuntimeConfig())(0, images, labels)
        gradients.append([parameter.grad for parameter in module.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, atol=1e-6, rtol=1e-5)


def test_weights_of_every_pair_warm_up() -> None:
    objective = objective_of(pair(BOTH, LossConfig(kd_weight=0.2, hakd_weight=4.0)))
    for factor in (0.5, 1.0):
        objective.warm_up(factor)
        assert [each.hakd_weight for each in objective.pairs] == [4 * factor] * 2
        assert [each.kd_weight for each in objective.pairs] == [0.2 * factor] * 2


@pytest.mark.parametrize("method", ["none", "heteroakd"])
def test_auxiliary_head_adds_its_cross_entropy_by_hand(method: str) -> None:
    config = LossConfig(class_weight=[1.0, 2.0, 0.5, 1.0], label_smoothing=0.1, logits_align_corners=True)
    images, labels = batch()
    module = pair(BOTH[1:], config, method=method, auxiliary_weight=0.4)
    plain = copy.deepcopy(module)
    terms = module(images, labels).terms
    terms.loss.backward()
    head = objective_of(plain).auxiliary.head
    objective_of(plain).auxiliary = None
    without = plain(images, labels).terms
    logits = head(plain.student.encoder["layer3"](images))
    full = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=True)
    weight = torch.tensor(config.class_weight)
    by_hand = F.cross_entropy(full, labels, weight=weight, ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(terms.auxiliary, by_hand.detach())
    torch.testing.assert_close(terms.task, without.task)
    (without.loss + 0.4 * by_hand).backward()
    pairs = [(module.student, plain.student), (objective_of(module).auxiliary.head, head)]
    for ours, theirs in pairs:
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


def test_auxiliary_head_learns_at_the_rate_of_the_head() -> None:
    module = pair(BOTH, LossConfig(), auxiliary_weight=0.4)
    groups = build_optimizer(module, OptimizerConfig(lr=0.1, head_lr_multiplier=5.0)).param_groups
    rates = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    assert set(rates) == {id(parameter) for parameter in module.parameters()}
    assert {rates[id(parameter)] for parameter in objective_of(module).auxiliary.parameters()} == {0.5}


def test_auxiliary_head_is_no_part_of_the_network() -> None:
    module = pair(BOTH[1:], LossConfig(), auxiliary_weight=0.4)
    assert set(module.student.state_dict()) == set(TwoStages(CLASSES).state_dict())
    for weight in (-1, math.nan):
        with pytest.raises(ValueError, match=f"auxiliary_weight must be a number between 0 and .*, got {weight}"):
            ModelConfig(auxiliary_weight=weight)


def test_an_auxiliary_head_may_sit_on_the_tap() -> None:
    images, labels = batch()
    module = pair(BOTH[:1], LossConfig(), auxiliary_weight=0.4)
    output = module(images, labels)
    assert output.terms.auxiliary > 0 and module.student_tap == BOTH[:1]


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
        trust_architecture=f"{__name__}:torchvision_network",
        output=str(tmp_path / "whole"),
    )
    run_distill(whole)
    assert "tap encoder.layer3 (6, 16, 16), tap encoder.layer4 (12, 8, 8), auxiliary" in capsys.readouterr().out
    cut, forward, calls = replace(whole, output=str(tmp_path / "cut")), Distiller.forward, []

    def stopping(self: Distiller, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) > 3:
            raise InterruptedError
        return forward(self, *arguments, **options)

    with monkeypatch.context() as context, pytest.raises(InterruptedError):
        context.setattr(Distiller, "forward", stopping)
        run_distill(cut)
    run_distill(cut, resume=True)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for ours, theirs in ((a.network, b.network), (a.loss, b.loss), (a.auxiliary, b.auxiliary)):
        assert ours and ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert {name.partition(".")[0] for name in a.loss} == {"criteria"} and list(
        (tmp_path / "whole" / "pictures").iterdir()
    )
