"""README's example of `Distiller`, run on networks of torchvision, segmentation_models_pytorch and transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from cases import make_labels
from torch import nn
from torchvision.models.segmentation import deeplabv3_resnet50, lraspp_mobilenet_v3_large

README = Path(__file__).parent.parent / "README.md"
CLASSES = 19


def torchvision() -> nn.Module:
    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)


def small_torchvision() -> nn.Module:
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)


def timm() -> nn.Module:
    return smp.FPN("tu-mobilenetv3_small_050", encoder_weights=None, classes=CLASSES)


def smp_own() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)


def transformers() -> nn.Module:
    library = pytest.importorskip("transformers")
    config = library.SegformerConfig(
        num_labels=CLASSES, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=16
    )
    return library.SegformerForSemanticSegmentation(config)


PAIRS = [
    (timm, "encoder", torchvision, "backbone.layer4"),
    (transformers, "segformer", smp_own, "encoder"),
    (small_torchvision, "backbone", transformers, "segformer.stages.3"),
]


@pytest.mark.parametrize(("make_student", "student_tap", "make_teacher", "teacher_tap"), PAIRS)
def test_the_example_trains(make_student, student_tap, make_teacher, teacher_tap):
    section = README.read_text(encoding="utf-8").split("## Swap your loss")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    for name, tap in (("student", student_tap), ("teacher", teacher_tap)):
        code, count = re.subn(rf'({name}_tap)="[\w.]+"', rf'\1="{tap}"', code)
        assert count == 1
    torch.manual_seed(0)
    student, teacher = make_student(), make_teacher()
    keys = list(student.state_dict())
    names = {
        **{"torch": torch, "student": student, "teacher": teacher},
        **{"images": torch.randn(2, 3, 64, 96), "labels": make_labels(2, (64, 96), CLASSES)},
    }
    exec(code, names)
    distiller, optimizer, first = names["distiller"], names["optimizer"], names["out"]
    assert list(distiller.student.state_dict()) == keys and distiller.student is student
    for name, parameter in distiller.criterion.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero(), name
    losses = [first.loss.item()]
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        out = distiller(names["images"], names["labels"])
        out.loss.backward()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    assert not any(module.training for module in teacher.modules())


def test_the_table_lists_what_is_run():
    table = README.read_text(encoding="utf-8").split("| networks of |")[1].split("\n\n")[0]
    assert {tap for pair in PAIRS for tap in (pair[1], pair[3])} >= set(re.findall(r'\| `"([\w.]+)"`[^|]*\|\n', table))
