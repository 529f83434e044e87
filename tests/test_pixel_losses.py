"""The fused pixel losses against the float64 reference: values and gradients, on every backend present."""

import functools

import pytest
import torch
from cases import (
    OPTIONS,
    SHAPES,
    TOLERANCE,
    backward,
    leaves,
    make_case,
    make_labels,
    make_logits,
    pairwise,
    relative_l2,
)

from hetero_kernels import functional, reference

SCALE = 256.0  # as a GradScaler would: float16 cannot hold the gradient of a mean over many pixels otherwise

SEGMENTATION_OPTIONS = {
    "temperature": (1.0, 2.0, 4.0, 1.5),
    "label_smoothing": (0.0, 0.1),
    "weighted": (False, True),
    "with_teacher": (True, False),
    "align_corners": (False, True),
    "reduction": ("mean", "sum", "none"),
}


def run_hakd(function, student, teacher, labels, dtype, options):
    student, teacher = leaves(student, teacher, dtype=dtype)
    out = function(student, teacher, labels, hakd_weight=1.3, proj_weight=0.2, return_terms=True, **options)
    backward(out.loss, SCALE)
    return {**out._asdict(), "student": student.grad, "teacher": teacher.grad}


def run_segmentation(function, student, teacher, labels, dtype, options):
    options = dict(options)
    weight = torch.linspace(0.5, 2.0, student.shape[1]) if options.pop("weighted") else None
    with_teacher = options.pop("with_teacher")
    student, teacher = leaves(student, teacher, dtype=dtype)
    out = function(
        student, labels, teacher if with_teacher else None, task_weight=0.8, kd_weight=0.4, class_weight=weight,
        return_terms=True, **options,
    )  # fmt: skip
    backward(out.loss, SCALE)
    assert teacher.grad is None
    return {**out._asdict(), "student": student.grad}


def compare(run, ours, eager, case, dtype, options, slack=1.0):
    """Every value and gradient within the dtype's bound of float64 on the same rounded inputs, or as near to it
    as eager PyTorch in the same dtype is."""
    student, teacher, labels = case
    student, teacher = student.to(dtype), teacher.to(dtype)
    exact = run(eager, student, teacher, labels, torch.float64, options)
    fused = run(ours, student, teacher, labels, dtype, options)
    same = run(eager, student, teacher, labels, dtype, options)
    for name, expected in exact.items():
        assert fused[name].dtype == same[name].dtype and fused[name].shape == same[name].shape, name
        error, eager_error = relative_l2(fused[name], expected), relative_l2(same[name], expected)
        assert error <= max(TOLERANCE[dtype] * slack, slack * eager_error), (name, error, eager_error)


@pytest.mark.parametrize("options", list(pairwise(OPTIONS)), ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("kind", ["randn", "trained"])
@pytest.mark.parametrize("shape", ["stride 8", "mixed strides"])
def test_hakd_options(backend, shape, kind, options):
    ours = functools.partial(functional.hakd_loss, backend=backend)
    # Spatial weights pick few pixels whose terms of both signs cancel: one rounding decides which is nearer.
    slack = 4.0 if options["kem"] == "spatial" else 1.0
    compare(run_hakd, ours, reference.hakd_loss, make_case(shape, kind), torch.float32, options, slack)


@pytest.mark.parametrize("options", list(pairwise(SEGMENTATION_OPTIONS)), ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("kind", ["randn", "trained"])
@pytest.mark.parametrize("shape", ["stride 8", "mixed strides"])
def test_segmentation_options(backend, shape, kind, options):
    ours = functools.partial(functional.segmentation_loss, backend=backend)
    compare(run_segmentation, ours, reference.segmentation_loss, make_case(shape, kind), torch.float32, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_hakd_shapes_and_dtypes(backend, shape, dtype, resolution):
    ours = functools.partial(functional.hakd_loss, backend=backend)
    options = {"temperature": 2.0, "resolution": resolution}
    # On a handful of pixels one rounding is the whole error: there the bound is a small multiple.
    small = SHAPES[shape][2][0] * SHAPES[shape][2][1] < 50
    compare(run_hakd, ours, reference.hakd_loss, make_case(shape, "randn"), dtype, options, slack=4.0 if small else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_segmentation_shapes_and_dtypes(backend, shape, dtype):
    ours = functools.partial(functional.segmentation_loss, backend=backend)
    options = {"weighted": True, "with_teacher": True, "label_smoothing": 0.1, "temperature": 2.0}
    small = SHAPES[shape][2][0] * SHAPES[shape][2][1] < 50
    compare(
        run_segmentation, ours, reference.segmentation_loss, make_case(shape, "randn"), dtype, options,
        slack=4.0 if small else 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["randn", "trained"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_accuracy_is_absolute(backend, kind, temperature, dtype):
    """The bounds of the project, with no allowance for eager's errors, on a grid of ordinary size."""
    torch.manual_seed(1)
    labels = make_labels(1, (256, 320), 19, block=37)
    student, teacher = (make_logits(kind, (1, 19, 32, 40), labels).to(dtype) for _ in range(2))
    options = {"temperature": temperature}
    ours = functools.partial(functional.hakd_loss, backend=backend)
    exact = run_hakd(reference.hakd_loss, student, teacher, labels, torch.float64, options)
    fused = run_hakd(ours, student, teacher, labels, dtype, options)
    for name in ("student", "teacher"):
        assert relative_l2(fused[name], exact[name]) <= TOLERANCE[dtype], name
    exact = run_segmentation(
        reference.segmentation_loss, student, teacher, labels, torch.float64, {"weighted": False, "with_teacher": True}
    )
    fused = run_segmentation(
        functools.partial(functional.segmentation_loss, backend=backend), student, teacher, labels, dtype,
        {"weighted": False, "with_teacher": True},
    )  # fmt: skip
    assert relative_l2(fused["student"], exact["student"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["huge", "mixed"])
@pytest.mark.parametrize("kem", ["class", "spatial", "none"])
@pytest.mark.parametrize("divergence", ["kl", "ce"])
def test_large_logits(backend, kind, kem, divergence):
    """The guarded mathematics, and tiles of both kinds in one call. float64 checks it; in float32 a logit of 1e4
    is itself uncertain by 5e-4, so eager's error is the yardstick."""
    case = make_case("stride 8", kind)
    ours = functools.partial(functional.hakd_loss, backend=backend)
    options = {"kem": kem, "divergence": divergence, "temperature": 2.0}
    exact = run_hakd(reference.hakd_loss, *case, torch.float64, options)
    double = run_hakd(functional.hakd_loss, *case, torch.float64, options)
    fused, eager = (run_hakd(f, *case, torch.float32, options) for f in (ours, reference.hakd_loss))
    for name, expected in exact.items():
        assert fused[name].isfinite().all(), name
        # 1e-20: where both networks agree to 1e-30, "0" and "4e-127" are the same loss.
        error, double_error, eager_error = (
            relative_l2(result[name].double() + 1e-20, expected + 1e-20) for result in (fused, double, eager)
        )
        assert double_error <= 1e-9, name
        assert error <= max(1e-5, 8 * eager_error), (name, eager_error)


@pytest.mark.parametrize("kind", ["huge", "mixed"])
def test_large_logits_segmentation(backend, kind):
    ours = functools.partial(functional.segmentation_loss, backend=backend)
    options = {"weighted": True, "with_teacher": True, "label_smoothing": 0.1, "temperature": 2.0}
    compare(
        run_segmentation,
        ours,
        reference.segmentation_loss,
        make_case("stride 8", kind),
        torch.float32,
        options,
        slack=3.0,
    )


def test_low_temperature_leaves_the_fast_path(backend):
    """T = 0.05 makes e^(z/T) overflow for ordinary logits."""
    ours = functools.partial(functional.hakd_loss, backend=backend)
    compare(
        run_hakd, ours, reference.hakd_loss, make_case("stride 8", "randn"), torch.float32, {"temperature": 0.05}, 4.0
    )


@pytest.mark.parametrize("grid", [(12, 10), (64, 3), (31, 11), (1, 7), (9, 1), (3, 300)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_joined_in_memory_or_not(backend, grid, reduction):
    """At feature resolution rows that follow each other are read as one: the result is that of rows that do not."""
    height, width = grid
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 5, height, width)
    labels = torch.randint(0, 5, (2, 3 * height, 2 * width))
    labels[torch.rand(labels.shape) < 0.2] = 255
    upstreams = {"dense": torch.rand(2, height, width), "expanded": torch.tensor(0.5).expand(2, height, width)}
    upstreams["transposed"] = upstreams["dense"].transpose(1, 2).contiguous().transpose(1, 2)

    def run(function, tensors, upstream, **options):
        student, teacher = (t.detach().requires_grad_() for t in tensors)
        loss = function(
            student,
            teacher,
            labels,
            temperature=2.0,
            proj_weight=0.5,
            resolution="feature",
            reduction=reduction,
            **options,
        )
        return loss.detach(), *torch.autograd.grad(loss, (student, teacher), upstream if loss.dim() else None)

    apart = torch.nn.functional.pad(maps, (0, 1, 0, 0))[..., :width]
    layouts = {
        "dense": maps,
        "apart": apart,
        "one apart": (maps[0], apart[1]),
        "channels_last": [m.contiguous(memory_format=torch.channels_last) for m in maps],
    }
    for name, upstream in upstreams.items():
        expected = run(reference.hakd_loss, maps.double(), upstream.double())
        for layout in layouts.values() if name == "dense" else (maps,):
            for a, e in zip(run(functional.hakd_loss, layout, upstream, backend=backend), expected, strict=True):
                assert relative_l2(a, e) <= 1e-6
