"""Under another default device and dtype the losses are what they were: every internal tensor names its own."""

import pytest
import torch
from cases import leaves, make_case, other_defaults
from torch import nn

from hetero_kernels import HeteroAKDLoss, PixelProjector, functional

DTYPES = (torch.float64, torch.float16)


def outputs(call, inputs):
    """Values and gradients."""
    inputs = leaves(*inputs)
    out = [x for x in call(*inputs) if isinstance(x, torch.Tensor)]
    total = sum(x.float().sum() for x in out if x.requires_grad)
    gradients = torch.autograd.grad(total, inputs, allow_unused=True) if isinstance(total, torch.Tensor) else ()
    return [*out, *gradients]


def assert_unchanged(call, inputs, dtype):
    expected = outputs(call, inputs)
    with other_defaults(dtype):
        actual = outputs(call, inputs)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None and e is None) or (a.dtype == e.dtype and torch.equal(a, e))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions(any_backend, dtype):
    student, teacher, labels = make_case("mixed strides", "randn")
    masked = student.index_fill(1, torch.tensor([2]), -float("inf"))
    labels = labels.masked_fill(labels == 2, 3)
    weight, projections = torch.rand(7), (torch.randn(7, 7), torch.randn(7, 7))

    def hakd(s, t, **options):
        return functional.hakd_loss(s, t, labels, proj_weight=0.5, return_terms=True, backend=any_backend, **options)

    def segmentation(s, t, **options):
        return functional.segmentation_loss(s, labels, t, return_terms=True, backend=any_backend, **options)

    for options in (
        {}, {"reduction": "none", "resolution": "feature"}, {"kem": "spatial", "divergence": "ce", "temperature": 2.0},
        {"normalizer": torch.tensor(9.0)},
    ):  # fmt: skip
        assert_unchanged(lambda s, t, o=options: hakd(s, t, **o), (student, teacher), dtype)
    assert_unchanged(hakd, (masked, teacher), dtype)
    for options in ({"class_weight": weight, "label_smoothing": 0.1}, {"reduction": "none", "temperature": 2.0}):
        assert_unchanged(lambda s, t, o=options: segmentation(s, t, **o), (student, teacher), dtype)
    assert_unchanged(lambda s, t: segmentation(s, t, label_smoothing=0.1), (teacher, masked), dtype)
    assert_unchanged(lambda s, t: functional.hakd_maps(s, t, labels), (student, teacher), dtype)

    def projected(s, t, a, b, **options):
        return (functional.projected_hakd_loss(s, t, a, b, labels, backend=any_backend, **options),)

    same = (student, student.flip(0), *projections)
    assert_unchanged(lambda *x: projected(*x, resolution="feature"), same, dtype)
    assert_unchanged(projected, (student, teacher, *projections), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projector", ["conv", "conv_bn", "conv_bn_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_modules(projector, training, dtype):
    student, teacher, labels = make_case("mixed strides", "randn")
    for backend, resolution in ((None, "label"), (None, "feature"), ("reference", "feature")):
        module = HeteroAKDLoss(7, 7, 7, projector=projector, resolution=resolution, backend=backend).train(training)
        for batch in (slice(None), slice(0)):  # of no image, too
            x = [t[batch] for t in (student, teacher, labels)]
            assert_unchanged(lambda s, t, m=module, y=x[2]: m(s, t, y, s, t), x[:2], dtype)
    assert_unchanged(lambda s: (PixelProjector.forward(module.student_projector, s),), (student,), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled(dtype):
    student, teacher, labels = make_case("mixed strides", "randn")

    def step(s, t):
        return (functional.hakd_loss(s, t, labels, proj_weight=0.5) + functional.segmentation_loss(s, labels, t),)

    expected = outputs(step, (student, teacher))
    torch._dynamo.reset()
    with other_defaults(dtype):
        actual = outputs(torch.compile(step, fullgraph=True, backend="aot_eager"), (student, teacher))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_module_made_there_lives_there():
    """As any of torch's: parameters follow the defaults, and class weights that are given as numbers."""
    with other_defaults(torch.float64):
        module = HeteroAKDLoss(3, 4, 2, class_weight=[1.0, 2.0])
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert module.class_weight.dtype == torch.float64 == next(module.parameters()).dtype
    assert isinstance(module.student_projector, nn.Sequential)
