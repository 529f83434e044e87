"""The methods: what each computes, that all start alike, and that both kinds of pairs learn."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import heteroakd
import pytest
import torch
from heteroakd.config.commands import CompareRun, DistillRun
from heteroakd.config.groups import LossConfig, Method, ModelConfig
from heteroakd.methods import METHODS, Taps, build_distiller, objective_of
from heteroakd.networks.zoo import build_network
from torch import Tensor, nn

from hetero_kernels import Distiller, HeteroAKDLoss, functional

NUM_CLASSES = 5
SIZE = (64, 64)
CNN = ModelConfig(architecture="fpn", encoder="tu-mobilenetv3_small_050")
TRANSFORMER = ModelConfig(encoder="mit_b0", options={"decoder_segmentation_channels": 16})


TAPS = Taps("encoder", "encoder")
pytestmark = pytest.mark.usefixtures("one_block_in_each_stage")


def network(config: ModelConfig) -> nn.Module:
    return build_network(config, NUM_CLASSES)[0]


def batch() -> tuple[Tensor, Tensor]:
    """Two images whose classes can be told from their colours, some pixels ignored."""
    generator = torch.Generator().manual_seed(3)
    labels = (
        torch.randint(0, NUM_CLASSES, (2, 4, 4), generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)
    )
    colours = torch.randn(NUM_CLASSES, 3, generator=generator)
    images = colours[labels].permute(0, 3, 1, 2).contiguous()
    labels[:, :3] = 255
    return images, labels


def distiller(method: Method, teacher: nn.Module | None, config: LossConfig | None = None) -> Distiller:
    torch.manual_seed(0)
    return build_distiller(network(TRANSFORMER), teacher, method, config or LossConfig(), NUM_CLASSES, SIZE, TAPS)


@pytest.mark.parametrize(("teacher_config", "student_config"), [(CNN, TRANSFORMER), (TRANSFORMER, CNN)])
@pytest.mark.parametrize("method", ["kd", "cwd", "heteroakd"])
def test_both_directions_reduce_the_loss(
    method: Method, teacher_config: ModelConfig, student_config: ModelConfig
) -> None:
    torch.manual_seed(0)
    networks = network(student_config), network(teacher_config)
    module = build_distiller(*networks, method, LossConfig(), NUM_CLASSES, SIZE, TAPS)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    images, labels = batch()
    losses = []
    for _ in range(8):
        loss = module(images, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_all_trained_parameters_get_gradients_projectors_included() -> None:
    teacher = network(CNN)
    module = distiller("heteroakd", teacher)
    images, labels = batch()
    module(images, labels).loss.backward()
    assert isinstance(objective_of(module).criterion, HeteroAKDLoss)
    assert all(parameter.grad is not None for parameter in module.parameters())
    for parameter in module.criterion.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_methods_start_from_the_same_student() -> None:
    teacher = network(CNN)
    states = [distiller(method, teacher).student.state_dict() for method in METHODS]
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())


def test_none_is_cross_entropy_alone_and_kd_adds_its_term() -> None:
    images, labels = batch()
    teacher = network(CNN)
    none, kd = distiller("none", None).eval(), distiller("kd", teacher, LossConfig(kd_weight=0.5)).eval()
    terms_none, terms_kd = none(images, labels).terms, kd(images, labels).terms
    logits = none.student(images)
    full = torch.nn.functional.interpolate(logits, size=SIZE, mode="bilinear")
    expected = torch.nn.functional.cross_entropy(full, labels, ignore_index=255)
    torch.testing.assert_close(terms_none.loss, expected)
    assert float(terms_none.kd) == float(terms_none.hakd) == float(terms_none.proj) == 0
    torch.testing.assert_close(terms_kd.task, terms_none.task)
    assert float(terms_kd.kd) > 0
    torch.testing.assert_close(terms_kd.loss.detach(), terms_kd.task + 0.5 * terms_kd.kd)


def test_heteroakd_computes_what_the_kernels_compute_from_projected_features() -> None:
    images, labels = batch()
    teacher = network(CNN)
    config = LossConfig(temperature=2.0, kem="spatial", divergence="ce", kmm=False, hakd_weight=3.0, proj_weight=0.5)
    module = distiller("heteroakd", teacher, config).eval()
    terms, outputs = module(images, labels).terms, module.outputs(images)
    loss = objective_of(module).criterion
    assert isinstance(loss, HeteroAKDLoss)
    hakd = functional.hakd_loss(
        loss.student_projector(outputs["student_features"][0]),
        loss.teacher_projector(outputs["teacher_features"][0]),
        labels,
        temperature=2.0,
        kem="spatial",
        divergence="ce",
        kmm=False,
    )
    torch.testing.assert_close(terms.hakd, hakd.detach())
    total = terms.task + 0.1 * terms.kd + 3.0 * terms.hakd + 0.5 * terms.proj
    torch.testing.assert_close(terms.loss.detach(), total)


def test_cwd_is_the_divergence_of_softmaxes_over_space() -> None:
    images, labels = batch()
    teacher = network(CNN)
    module = distiller("cwd", teacher, LossConfig(cwd_weight=2.0, cwd_temperature=3.0)).eval()
    terms, outputs = module(images, labels).terms, module.outputs(images)
    logits = outputs["student_logits"]
    resized = torch.nn.functional.interpolate(outputs["teacher_logits"], size=logits.shape[2:], mode="bilinear")
    expected = 0.0
    for image in range(2):
        for channel in range(NUM_CLASSES):
            p, q = (torch.softmax(maps[image, channel].flatten() / 3, 0) for maps in (resized, logits))
            expected += float((p * (p.log() - q.log()).detach()).sum()) * 9 / (2 * NUM_CLASSES)
    assert expected > 0 and float(terms.cwd) == pytest.approx(expected, rel=1e-4)
    assert float(terms.kd) == 0
    torch.testing.assert_close(terms.loss.detach(), terms.task + 2 * terms.cwd)


def test_ablations_leave_out_one_part_each() -> None:
    teacher = network(CNN)
    found = {}
    for method in ("heteroakd", "heteroakd_no_kmm", "heteroakd_no_kem"):
        loss = objective_of(distiller(method, teacher)).criterion  # type: ignore[arg-type]
        assert isinstance(loss, HeteroAKDLoss)
        found[method] = (loss.kmm, loss.kem)
    assert list(found.values()) == [(True, "class"), (False, "class"), (True, "none")]


def test_class_weights_and_label_smoothing_reach_the_cross_entropy() -> None:
    images, labels = batch()
    config = LossConfig(class_weight=[1.0, 2.0, 3.0, 4.0, 5.0], label_smoothing=0.1)
    module = distiller("none", None, config).eval()
    full = torch.nn.functional.interpolate(module.student(images), size=SIZE, mode="bilinear")
    expected = torch.nn.functional.cross_entropy(
        full, labels, weight=torch.arange(1.0, 6.0), ignore_index=255, label_smoothing=0.1
    )
    torch.testing.assert_close(module(images, labels).loss, expected)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="method must be one of none, kd, cwd, .*, got 'crd'"):
        DistillRun(method="crd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="methods must be one of none, kd, cwd, .*, got 'crd'"):
        CompareRun(methods=["kd", "crd"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="method 'kd' needs a teacher"):
        distiller("kd", None)
    with pytest.raises(ValueError, match=r"loss.class_weight must hold 5 values, got 2"):
        distiller("none", None, LossConfig(class_weight=[1.0, 2.0]))
    for method, needed in METHODS.items():
        if needed.needs_teacher:
            with pytest.raises(ValueError, match=f"method '{method}' needs a teacher, got None"):
                distiller(method, None)  # type: ignore[arg-type]


def test_a_teacher_of_other_strides_is_fine() -> None:
    images, labels = batch()
    coarse = nn.Sequential(nn.Conv2d(3, NUM_CLASSES, 32, 32))
    student = network(TRANSFORMER)
    module = build_distiller(student, coarse, "kd", LossConfig(), NUM_CLASSES, SIZE, Taps("encoder", "0"))
    assert torch.isfinite(module(images, labels).loss)


def test_options_and_objects_name_the_same_methods() -> None:
    assert get_args(Method) == tuple(METHODS)


def compared_methods(source: str) -> list[str]:
    """Names of methods that a program compares something with, or asks the beginning of a name for."""
    names = set(METHODS) - {"none"}  # which other options have, too
    found = []
    for node in ast.walk(ast.parse(source)):
        asked = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            asked = node.args
        found += [each.value for each in asked if isinstance(each, ast.Constant) and each.value in names]
    return found


def test_nobody_else_asks_for_a_methods_name() -> None:
    trainer = Path(heteroakd.__file__).parent
    for path in trainer.rglob("*.py"):
        if path.parent != trainer / "methods":
            assert not compared_methods(path.read_text(encoding="utf-8")), path
    assert compared_methods("if method == 'kd' or name.startswith('heteroakd'): pass") == ["kd", "heteroakd"]
