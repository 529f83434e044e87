"""Inputs and comparisons of the GPU kernels' tests, on small grids: in Triton's interpreter, in the emulation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import TOLERANCE, backward, leaves, make_labels, make_logits, relative_l2

from hetero_kernels import functional, reference

# (B, K, student grid, teacher grid, labels)
SHAPES = {
    "stride 4": (2, 5, (3, 4), (3, 4), (12, 16)),
    "mixed strides": (1, 7, (4, 5), (2, 3), (13, 19)),
    "non-integer": (1, 4, (5, 7), (3, 2), (17, 11)),
    "same grid": (2, 6, (5, 7), (5, 7), (5, 7)),
    "downsampled": (1, 3, (9, 8), (4, 3), (4, 5)),
    "two tiles": (1, 19, (2, 20), (3, 40), (6, 150)),
    "narrow tiles": (1, 40, (2, 9), (2, 9), (5, 70)),
    "many classes": (1, 150, (2, 3), (1, 2), (5, 6)),
    "a thousand classes": (1, 1000, (1, 2), (2, 2), (2, 3)),
    "one pixel": (1, 2, (1, 1), (1, 1), (1, 1)),
    "one coarse pixel": (2, 3, (1, 1), (1, 1), (20, 9)),
    "one class": (1, 1, (2, 3), (2, 2), (5, 6)),
    "tall bands": (1, 3, (2, 2), (2, 2), (70, 3)),
    "equal heights": (1, 3, (4, 3), (4, 6), (4, 6)),
}
SEGMENTATION_OPTIONS = {
    "temperature": (1.0, 2.0, 1.5),
    "label_smoothing": (0.0, 0.1),
    "weighted": (False, True),
    "with_teacher": (True, False),
    "align_corners": (False, True),
    "reduction": ("mean", "sum", "none"),
}


def make_case(shape, kind, seed=0):
    torch.manual_seed(seed)
    batch, classes, student, teacher, size = SHAPES[shape]
    labels = make_labels(batch, size, classes, block=2)
    return *(make_logits(kind, (batch, classes, *grid), labels) for grid in (student, teacher)), labels


def run_hakd(function, case, dtype, options):
    student, teacher = leaves(*case[:2], dtype=dtype)
    options = {"hakd_weight": 1.3, "proj_weight": 0.2, **options}
    out = function(student, teacher, case[2], return_terms=True, **options)
    backward(out.loss, 256.0)
    return {**out._asdict(), "student": student.grad, "teacher": teacher.grad}


def run_segmentation(function, case, dtype, options):
    options = dict(options)
    student, teacher = leaves(*case[:2], dtype=dtype)
    weight = torch.linspace(0.5, 2.0, 2 * student.shape[1])[::2] if options.pop("weighted", False) else None
    teacher_logits = teacher if options.pop("with_teacher", True) else None
    out = function(
        student, case[2], teacher_logits, task_weight=0.8, kd_weight=0.4, class_weight=weight, return_terms=True,
        **options,
    )  # fmt: skip
    backward(out.loss, 256.0)
    return {**out._asdict(), "student": student.grad}


def cancellation(name, case, options):
    """How much larger a loss's pixels are than their sum: l_n has both signs."""
    if name != "hakd_loss":
        return 1.0
    maps = reference.hakd_loss(case[0].double(), case[1].double(), case[2], **{**options, "reduction": "none"})
    return (maps.abs().sum() / maps.sum().abs().clamp(min=1e-30)).item()


def compare_with_reference(ours, run, name, case, dtype=torch.float32, slack=1.0, **options):
    """Within the dtype's bound of float64 on the same rounded inputs, or as near as eager in the same dtype is."""
    case = (case[0].to(dtype), case[1].to(dtype), case[2])
    exact = run(getattr(reference, name), case, torch.float64, options)
    fused, eager = run(ours, case, dtype, options), run(getattr(reference, name), case, dtype, options)
    for key, expected in exact.items():
        assert fused[key].dtype == eager[key].dtype and fused[key].shape == eager[key].shape, key
        # Spatial weights pick few pixels whose terms of both signs cancel: one rounding decides which is nearer.
        slack = max(slack, 3.0 if options.get("kem") == "spatial" else 1.0)
        allowed = max(slack * TOLERANCE[dtype], 3 * relative_l2(eager[key], expected))
        if key in ("loss", "hakd") and expected.dim() == 0:
            allowed = max(allowed, slack * TOLERANCE[dtype] * cancellation(name, case, options))
        assert relative_l2(fused[key], expected) <= allowed, (key, relative_l2(fused[key], expected), allowed)


# Masked classes ---------------------------------------------------------------------------------------------------

LOWS = (-float("inf"), torch.finfo(torch.float32).min)


def masked(case, who, low, part=False):
    """Class 2 at ``low`` in ``who``'s logits (or in the left half of them) and no pixel's label."""
    student, teacher, labels = (x.clone() for x in case)
    for name, logits in (("student", student), ("teacher", teacher)):
        if who in (name, "both"):
            logits[:, 2, :, : max(1, logits.shape[3] // 2) if part else None] = low
    return student, teacher, labels.masked_fill(labels == 2, 1)


def run_masked_segmentation(function, case, dtype, options):
    """:func:`run_segmentation` with weights of which class 2 has none, so that label smoothing does not draw to it."""
    student, teacher = leaves(*case[:2], dtype=dtype)
    weight = torch.linspace(0.5, 2.0, student.shape[1]).index_fill(0, torch.tensor([2]), 0.0)
    options = dict(options)
    teacher_logits = teacher if options.pop("with_teacher", True) else None
    out = function(student, case[2], teacher_logits, kd_weight=0.4, class_weight=weight, return_terms=True, **options)
    backward(out.loss, 256.0)
    return {**out._asdict(), "student": student.grad}


def compare_masked(ours, run, case, who, low, dtype=torch.float32, part=False, **options):
    """With a class at ``low``: what float64 has with it merely at -2e4, where e^z is 0 but nothing is infinite."""
    name = "hakd_loss" if run is run_hakd else "segmentation_loss"
    exact = run(getattr(reference, name), masked(case, who, -2e4, part), torch.float64, options)
    fused = run(ours, masked(case, who, low, part), dtype, options)
    plain = {key: value for key, value in options.items() if key not in ("hakd_weight", "proj_weight")}
    for key, expected in exact.items():
        allowed = 3 * TOLERANCE[dtype]
        if key in ("loss", "hakd"):
            allowed *= cancellation(name, masked(case, who, -2e4, part), plain)
        assert relative_l2(fused[key], expected) <= allowed, (key, who, low, options, fused[key], expected)


class Losses(NamedTuple):
    """A backend's public functions."""

    hakd_loss: Callable
    segmentation_loss: Callable

    def compare(self, run, name, case, dtype=torch.float32, slack=1.0, **options):
        compare_with_reference(getattr(self, name), run, name, case, dtype, slack, **options)


TRITON = Losses(*(functools.partial(f, backend="triton") for f in (functional.hakd_loss, functional.segmentation_loss)))
