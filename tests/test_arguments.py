"""Bad input: the error names the argument, what came and what was expected."""

import warnings

import pytest
import torch

from hetero_kernels import HeteroAKDLoss, PixelProjector, SegmentationLoss, functional
from hetero_kernels.ops import backends

LOGITS = torch.randn(2, 5, 4, 6)
LABELS = torch.zeros(2, 16, 24, dtype=torch.long)


def hakd(student=LOGITS, teacher=LOGITS, labels=LABELS, **options):
    return functional.hakd_loss(student, teacher, labels, **options)


def segmentation(logits=LOGITS, labels=LABELS, teacher=None, **options):
    return functional.segmentation_loss(logits, labels, teacher, **options)


BAD = [
    (
        lambda: hakd(student=LOGITS[0]),
        ValueError,
        r"student_logits is torch.float32 \[5, 4, 6\], expected \[B, K, h, w\]",
    ),
    (lambda: hakd(student=[1]), TypeError, "student_logits is list"),
    (lambda: hakd(student=LOGITS.long()), TypeError, "student_logits is torch.int64"),
    (lambda: hakd(teacher=LOGITS[:, :4]), ValueError, "teacher_logits is .* same batch and class sizes"),
    (lambda: hakd(teacher=LOGITS[:1]), ValueError, "teacher_logits"),
    (lambda: hakd(teacher=LOGITS.to("meta")), ValueError, "teacher_logits is on meta, expected cpu"),
    (lambda: hakd(labels=LABELS[:, None]), ValueError, r"labels is .* expected \[B, H, W\].*squeeze"),
    (lambda: hakd(labels=torch.zeros(2, 5, 16, 24).long()), ValueError, "labels is .*argmax"),
    (lambda: hakd(labels=LABELS[:1]), ValueError, r"labels is .* expected \[B, H, W\] with B=2"),
    (lambda: hakd(labels=LABELS.float()), TypeError, "labels is torch.float32 .* expected one of int64, int32, uint8"),
    (lambda: hakd(labels=LABELS.to("meta")), ValueError, "labels is on meta"),
    (lambda: hakd(labels=None), TypeError, "labels is NoneType"),
    (lambda: hakd(temperature=0), ValueError, "temperature is 0, expected a finite number > 0"),
    (lambda: hakd(temperature=float("nan")), ValueError, "temperature is nan"),
    (lambda: hakd(temperature="2"), TypeError, "temperature is str '2'"),
    (lambda: hakd(hakd_weight=-1.0), ValueError, "hakd_weight is -1.0, expected a finite number >= 0"),
    (lambda: hakd(proj_weight=float("inf")), ValueError, "proj_weight is inf"),
    (lambda: hakd(kem="pixel"), ValueError, "kem is 'pixel', expected one of 'class', 'spatial', 'none'"),
    (lambda: hakd(divergence="js"), ValueError, "divergence is 'js'"),
    (lambda: hakd(resolution="image"), ValueError, "resolution is 'image'"),
    (lambda: hakd(reduction="avg"), ValueError, "reduction is 'avg'"),
    (lambda: hakd(kmm=1), TypeError, "kmm is 1, expected True or False"),
    (lambda: hakd(ignore_index=255.0), TypeError, "ignore_index is 255.0, expected an int"),
    (lambda: hakd(normalizer=3.0), ValueError, "normalizer for 'hakd' is float 3.0, expected a real 0-dim Tensor"),
    (lambda: hakd(normalizer=torch.ones(2)), ValueError, "normalizer for 'hakd'"),
    (lambda: hakd(normalizer={"task": torch.tensor(1)}), ValueError, r"normalizer has \['task'\]"),
    (lambda: hakd(normalizer=torch.tensor(1.0, device="meta")), ValueError, "normalizer for 'hakd' is on meta"),
    (lambda: hakd(normalizer=torch.tensor(1j)), ValueError, "expected a real 0-dim Tensor"),
    (lambda: hakd(normalizer={1: None, "foo": None}), ValueError, "normalizer has"),
    (lambda: hakd(temperature=1e-40), ValueError, r"temperature is 1e-40, expected a number in \[1e-06, 1e\+06\]"),
    (lambda: hakd(hakd_weight=10**400), ValueError, "hakd_weight is 1000"),
    (lambda: hakd(ignore_index=2**63), ValueError, "ignore_index is 9223372036854775808, expected an int of 64 bits"),
    (lambda: segmentation(class_weight=torch.ones(5, requires_grad=True)), ValueError, "class_weight requires grad"),
    (lambda: hakd(backend="gpu"), ValueError, "backend is 'gpu', expected one of"),
    (lambda: hakd(backend="triton"), ValueError, "backend='triton' does not serve tensors on 'cpu'"),
    (lambda: segmentation(logits=LOGITS[0]), ValueError, "logits is"),
    (lambda: segmentation(teacher=LOGITS[:, :1]), ValueError, "teacher_logits is"),
    (
        lambda: segmentation(class_weight=torch.ones(4)),
        ValueError,
        r"class_weight is .* expected a floating Tensor \[5\]",
    ),
    (lambda: segmentation(class_weight=[1.0] * 5), ValueError, "class_weight is list"),
    (lambda: segmentation(label_smoothing=1.0), ValueError, "label_smoothing is 1.0, expected .* < 1.0"),
    (lambda: segmentation(kd_weight=None), TypeError, "kd_weight is NoneType"),
    (lambda: HeteroAKDLoss(8, 8, 5, projector="mlp"), ValueError, "projector is 'mlp'"),
    (lambda: HeteroAKDLoss(8, 8, 5, kem=None), ValueError, "kem is None"),
    (lambda: HeteroAKDLoss(8, 8, 5, class_weight=torch.ones(4)), ValueError, "class_weight"),
    (lambda: HeteroAKDLoss(8, 8, 5, task_weight=-1), ValueError, "task_weight"),
    (lambda: PixelProjector(0, 5), ValueError, "in_channels is 0, expected an int >= 1"),
    (lambda: HeteroAKDLoss(8, 8, 5)(LOGITS, LOGITS, LABELS), ValueError, "student_features is .* expected 8 channels"),
    (
        lambda: functional.projected_hakd_loss(LOGITS, LOGITS, torch.randn(3, 4), torch.randn(3, 5), LABELS),
        ValueError,
        r"student_weight is .* expected a floating Tensor \[K, 5\]",
    ),
    (
        lambda: functional.projected_hakd_loss(LOGITS, LOGITS, torch.randn(3, 5), torch.randn(2, 5), LABELS),
        ValueError,
        r"teacher_weight is .* expected a floating Tensor \[3, 5\]",
    ),
]

EIGHT = torch.float8_e4m3fn
FEATURES = LOGITS  # [2, 5, 4, 6]
SIZES = ((3, 5), (3, 5), (3,), (3,))


def projected(student=FEATURES, teacher=FEATURES, dtypes=(None,) * 4, **options):
    """``dtypes`` of both weights, then of both biases."""
    tensors = [torch.randn(*shape).to(d or torch.float32) for shape, d in zip(SIZES, dtypes, strict=True)]
    biases = {"student_bias": tensors[2], "teacher_bias": tensors[3]}
    return functional.projected_hakd_loss(student, teacher, *tensors[:2], LABELS, **biases, **options)


def module(student=FEATURES, teacher=FEATURES, change=None, **options):
    loss = HeteroAKDLoss(5, 5, 3, **options)
    if change is not None:
        change(loss)
    return loss(student, teacher, LABELS)


def float8(part):
    def change(loss):
        getattr(loss, part).to(EIGHT)

    return change


FLOAT8 = [
    (lambda: hakd(student=LOGITS.to(EIGHT)), "student_logits"),
    (lambda: hakd(teacher=LOGITS.to(EIGHT)), "teacher_logits"),
    (lambda: hakd(normalizer=torch.tensor(2.0).to(EIGHT)), "normalizer for 'hakd'"),
    (lambda: segmentation(logits=LOGITS.to(EIGHT)), "logits"),
    (lambda: segmentation(teacher=LOGITS.to(EIGHT)), "teacher_logits"),
    (lambda: segmentation(class_weight=torch.ones(5).to(EIGHT)), "class_weight"),
    (lambda: functional.hakd_maps(LOGITS.to(EIGHT), LOGITS, LABELS), "student_logits"),
    (lambda: projected(student=FEATURES.to(EIGHT)), "student_features"),
    (lambda: projected(teacher=FEATURES.to(EIGHT), resolution="feature"), "teacher_features"),
    (lambda: projected(dtypes=(EIGHT, None, None, None), resolution="feature"), "student_weight"),
    (lambda: projected(dtypes=(None, EIGHT, None, None)), "teacher_weight"),
    (lambda: projected(dtypes=(None, None, EIGHT, None)), "student_bias"),
    (lambda: projected(dtypes=(None, None, None, EIGHT), resolution="feature"), "teacher_bias"),
    (lambda: module(student=FEATURES.to(EIGHT)), "student_features"),
    (lambda: module(teacher=FEATURES.to(EIGHT), projector="conv", resolution="feature"), "teacher_features"),
    (lambda: module(change=float8("student_projector")), "student_projector.0.weight"),
    (lambda: module(change=float8("teacher_projector"), projector="conv"), "teacher_projector.0.weight"),
    (lambda: PixelProjector(5, 3)(FEATURES.to(EIGHT)), "features"),
    (lambda: PixelProjector(5, 3).to(EIGHT)(FEATURES), "0.weight"),
]


@pytest.mark.parametrize("call, name", FLOAT8, ids=lambda x: x if isinstance(x, str) else "")
def test_float8_is_no_dtype_to_compute_with(call, name):
    with pytest.raises(TypeError, match=rf"^{name} is torch.float8_e4m3fn .*expected .*float32"):
        call()


def test_batch_norm_cannot_take_what_is_wider_than_its_parameters():
    with pytest.raises(TypeError, match=r"^student_features is torch.float64 .*1.weight torch.float32"):
        module(student=FEATURES.double())
    with pytest.raises(TypeError, match=r"^features is torch.float32 .*; expected torch.bfloat16 features"):
        PixelProjector(5, 3).bfloat16()(FEATURES)


@pytest.mark.parametrize("call, error, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_uint8_labels_cannot_hold_many_classes():
    with pytest.raises(ValueError, match="labels is uint8, which cannot hold 256 classes"):
        functional.hakd_loss(*torch.randn(2, 1, 256, 2, 2), torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_debug_switch_reports_all_wrong_labels(monkeypatch):
    monkeypatch.setenv("HETERO_KERNELS_CHECK_LABELS", "1")
    labels = LABELS.clone()
    labels[0, :2, 0] = torch.tensor([7, 9])
    with pytest.raises(RuntimeError, match=r"labels holds \[7, 9\], expected classes in \[0, 5\)"):
        hakd(labels=labels)
    with pytest.raises(RuntimeError, match=r"labels holds \[255\]"):  # -1 would wrap to 255 in uint8
        hakd(labels=torch.full_like(LABELS, 255, dtype=torch.uint8), ignore_index=-1)
    labels = LABELS.clone()
    labels[:, 1] = 99  # not sampled
    hakd(labels=labels, resolution="feature")


@pytest.mark.parametrize("loss", ["hakd", "segmentation", "projected"])
def test_a_class_that_is_ignored_is_said_once(loss):
    """Class 255 of more, by the default ignore_index; whoever chose another, or has no such class, hears nothing."""

    def call(classes, **options):
        logits, labels = torch.zeros(1, classes, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)
        if loss == "projected":
            weight = torch.zeros(classes, 3)
            features = torch.zeros(1, 3, 2, 2)
            functional.projected_hakd_loss(features, features, weight, weight, labels, resolution="feature", **options)
        else:
            (hakd if loss == "hakd" else segmentation)(logits, labels=labels, teacher=logits, **options)

    backends.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="ignores label 255, which is also a class"):
        call(256)
    backends.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(255)
        call(256, ignore_index=-100)
    with pytest.warns(RuntimeWarning, match="another ignore_index"):
        call(256)
        call(256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(300)


def test_a_backend_of_no_such_name_is_refused_where_it_is_said():
    for build in (
        lambda backend: HeteroAKDLoss(8, 12, 5, backend=backend),
        lambda backend: SegmentationLoss(backend=backend),
        lambda backend: PixelProjector(8, 5, backend=backend),
    ):
        for wrong in ("gpu", 3):
            with pytest.raises(ValueError, match=f"backend is {wrong!r}, expected one of 'reference', 'cpu'"):
                build(wrong)


def test_a_backend_is_selected_for_a_device_by_name_or_object():
    assert backends.select("reference", torch.device("cpu")) == "reference"
    assert backends.available(torch.device("cpu")) == backends.available("cpu")


def test_shapes_alone_are_enough_for_shapes():
    """Tensors on torch's "meta" device, which has no autocast."""
    features = [torch.randn(2, c, 4, 4, device="meta") for c in (8, 12)]
    logits = [torch.randn(2, 5, 4, 4, device="meta") for _ in range(2)]
    labels = torch.zeros(2, 8, 8, dtype=torch.long, device="meta")
    out = HeteroAKDLoss(8, 12, 5, backend="reference").to("meta")(*features, labels, *logits)
    assert all(term.shape == () and term.device.type == "meta" for term in out)
    assert all(m.shape == (2, 5, 8, 8) for m in functional.hakd_maps(*logits, labels))
