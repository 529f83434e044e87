"""The 1x1 projections where torch runs them: what ignored pixels may hold, derivatives, dtypes, inference mode."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, leaves, make_labels, relative_l2

from hetero_kernels import HeteroAKDLoss, PixelProjector, functional, reference

NAMES = ("student_features", "teacher_features", "student_weight", "teacher_weight", "student_bias", "teacher_bias")

# Options, and the teacher's grid; the student's is 6 x 7 and the labels' 24 x 28.
ROUTES = {
    "label": ({}, (6, 7)),
    "label, spatial": ({"kem": "spatial"}, (3, 4)),
    "label, corners": ({"align_corners": True}, (6, 7)),
    "feature, spatial": ({"resolution": "feature", "kem": "spatial"}, (6, 7)),
    "feature, other grid": ({"resolution": "feature"}, (3, 4)),
    "feature, one pass": ({"resolution": "feature"}, (6, 7)),
}


def make_inputs(teacher_grid=(6, 7)):
    torch.manual_seed(0)
    tensors = [
        torch.randn(2, 8, 6, 7), torch.randn(2, 12, *teacher_grid), torch.randn(5, 8), torch.randn(5, 12),
        torch.randn(5), torch.randn(5),
    ]  # fmt: skip
    return tensors, make_labels(2, (24, 28), 5)


def poisoned(features, value):
    """The last column of the first image. Its labels from column 10 on are ignored: what a teacher of 4 columns reaches
    from there."""
    features = features.clone()
    features[0, 1, :, -1] = value
    return features


def run(function, tensors, labels, **options):
    tensors = leaves(*tensors)
    a, b, c, d, e, f = tensors
    loss = function(a, b, c, d, labels, student_bias=e, teacher_bias=f, proj_weight=0.7, **options)
    return loss.detach(), torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("route", ROUTES)
def test_features_behind_ignored_pixels_count_nothing(any_backend, route, value):
    options, grid = ROUTES[route]
    tensors, labels = make_inputs(grid)
    labels[0, :, 10:] = 255
    function = functools.partial(functional.projected_hakd_loss, backend=any_backend, **options)
    clean, expected = run(function, tensors, labels)
    loss, actual = run(function, [*(poisoned(t, value) for t in tensors[:2]), *tensors[2:]], labels)
    assert relative_l2(loss, clean) <= 1e-6
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert relative_l2(a, e) <= 2e-6, name
    assert all(g[0, :, :, -1].count_nonzero() == 0 for g in actual[:2])


@pytest.mark.parametrize("route", ROUTES)
def test_features_that_count_spread_what_is_not_a_number(any_backend, route):
    options, grid = ROUTES[route]
    tensors, labels = make_inputs(grid)
    labels[:] = 1
    tensors[0] = poisoned(tensors[0], float("nan"))
    loss, gradients = run(functional.projected_hakd_loss, tensors, labels, backend=any_backend, **options)
    assert not loss.isfinite() and not gradients[2].isfinite().all()


@pytest.mark.parametrize("projector", ["conv", "conv_bn", "conv_bn_relu"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize("autocast", [False, True])
def test_modules_leave_ignored_features_out(projector, resolution, autocast):
    """All parameters, batch norm's too where it uses running statistics."""
    (student, teacher, *_), labels = make_inputs((3, 4))
    labels[0, :, 10:] = 255
    module = HeteroAKDLoss(8, 12, 5, projector=projector, resolution=resolution).eval()
    results = []
    for value in (0.5, float("nan")):
        inputs = leaves(poisoned(student, value), poisoned(teacher, value))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = module(*inputs, labels).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, [*inputs, *module.parameters()])))
    for expected, actual in zip(*results, strict=True):
        assert relative_l2(actual, expected) <= (1e-3 if autocast else 2e-6)


def test_ignored_features_under_compilation():
    def step(*tensors):
        return functional.projected_hakd_loss(*tensors, proj_weight=0.7)

    torch._dynamo.reset()
    tensors, labels = make_inputs()
    labels[0, :, 10:] = 255
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    clean = leaves(*tensors[:4])
    expected = torch.autograd.grad(step(*clean, labels), clean)
    inputs = leaves(poisoned(tensors[0], float("nan")), poisoned(tensors[1], float("inf")), *tensors[2:4])
    for a, e in zip(torch.autograd.grad(compiled(*inputs, labels), inputs), expected, strict=True):
        assert relative_l2(a, e) <= 2e-6


@pytest.mark.parametrize("bias", [False, True])
def test_projection_has_derivatives_of_every_kind(bias):
    torch.manual_seed(0)
    shapes = ((2, 3, 4, 5), (4, 3), (4,))[: 2 + bias]
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def project(features, weight, bias=None):
        return reference.project(features, weight, bias)

    assert torch.autograd.gradcheck(project, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(project, inputs)


def test_projection_is_a_convolution_to_function_transforms():
    torch.manual_seed(0)
    features, weights = torch.randn(2, 3, 4, 5), torch.randn(6, 4, 3)

    def ours(weight):
        return reference.project(features, weight, None).square().sum()

    def plain(weight):
        return F.conv2d(features, weight[:, :, None, None]).square().sum()

    for transform in (lambda f: f, torch.func.grad, lambda f: torch.func.jacfwd(torch.func.grad(f))):
        actual, expected = (torch.func.vmap(transform(f))(weights) for f in (ours, plain))
        assert relative_l2(actual, expected) <= 1e-6


def test_second_derivative_leaves_ignored_features_out():
    tensors, labels = make_inputs()
    labels[0, :, 10:] = 255
    results = []
    for value in (0.5, float("nan")):
        features, weight = leaves(poisoned(tensors[0], value), tensors[2])
        loss = reference.projected_hakd_loss(
            features, tensors[1], weight, tensors[3], labels, hakd_weight=0.0, proj_weight=1.0
        )
        first = torch.autograd.grad(loss, (features, weight), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (features, weight)))
    for expected, actual in zip(*results, strict=True):
        assert relative_l2(actual, expected) <= 2e-6


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_finite_features_are_not_copied(memory_format):
    """Neither forward nor backward makes another tensor of the features' size; and neither is a convolution, whose
    factors cuDNN rounds to TF32."""
    features, weight = torch.randn(2, 64, 9, 10).to(memory_format=memory_format), torch.randn(3, 64, requires_grad=True)
    sizes, operators = [], []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
            own = features.untyped_storage().data_ptr()
            sizes.extend(t.numel() for t in made if t.untyped_storage().data_ptr() != own)
            operators.append(str(func))
            return out

    with Spy():
        reference.project(features, weight, None).sum().backward()
    assert sizes and max(sizes) < features.numel()
    assert not [name for name in operators if "conv" in name]


# Dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["conv", "conv_bn", "conv_bn_relu"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_features_and_float32_modules(dtype, backend, training, resolution, projector):
    (student, teacher, *_), labels = make_inputs()
    torch.manual_seed(1)
    mixed = HeteroAKDLoss(8, 12, 5, projector=projector, resolution=resolution, backend=backend).train(training)
    exact = HeteroAKDLoss(8, 12, 5, projector=projector, resolution=resolution, backend="reference").train(training)
    exact.load_state_dict(mixed.state_dict())
    exact.double()
    results = []
    for module, to in ((mixed, dtype), (exact, torch.float64)):
        inputs = leaves(student.to(dtype), teacher.to(dtype), dtype=to)
        loss = module(*inputs, labels).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, [*inputs, *module.parameters()])))
    (loss, *gradients), (expected_loss, *expected) = results
    assert loss.dtype == torch.float32 and relative_l2(loss, expected_loss) <= 1e-5
    for i, (a, e) in enumerate(zip(gradients, expected, strict=True)):
        assert a.dtype == (dtype if i < 2 else torch.float32)
        assert relative_l2(a, e) <= (TOLERANCE[dtype] if i < 2 else 2e-5) or (a - e).abs().max() <= 1e-7


@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize(
    "features, weights, loss",
    [(torch.float32, torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16, torch.float32),
     (torch.float64, torch.float32, torch.float64)],
    ids=str,
)  # fmt: skip
def test_convolutions_compute_in_the_wider_dtype(features, weights, loss, resolution):
    (student, teacher, *_), labels = make_inputs()
    inputs = leaves(student, teacher, dtype=features)
    module = HeteroAKDLoss(8, 12, 5, projector="conv", resolution=resolution).to(weights)
    actual = module(*inputs, labels).loss
    exact = HeteroAKDLoss(8, 12, 5, projector="conv", resolution=resolution, backend="reference").double()
    exact.load_state_dict(module.state_dict())
    assert actual.dtype == loss
    assert relative_l2(actual, exact(*(x.double() for x in inputs), labels).loss) <= 1e-5
    actual.backward()
    assert all(x.grad.dtype == features for x in inputs)
    assert all(p.grad.dtype == weights for p in module.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_projector_leaves_autocast_its_dtype(training):
    features = torch.randn(2, 8, 6, 7)
    projector = PixelProjector(8, 5).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projector(features).dtype == torch.bfloat16
        assert projector.double()(features.double()).dtype == torch.float64
    assert projector.float()(features.bfloat16()).dtype == torch.float32
    assert projector.bfloat16()(features.bfloat16()).dtype == torch.bfloat16


def test_module_compiles_as_one_graph():
    torch._dynamo.reset()
    (student, teacher, *_), labels = make_inputs((3, 4))
    module = HeteroAKDLoss(8, 12, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = leaves(student.bfloat16(), teacher)
    wanted = [*inputs, *module.parameters()]
    actual, expected = (torch.autograd.grad(f(*inputs, labels).loss, wanted) for f in (compiled, module))
    for a, e in zip(actual, expected, strict=True):
        assert relative_l2(a, e) <= 1e-5 or (a - e).abs().max() <= 1e-7


# Tensors of torch.inference_mode -------------------------------------------------------------------------------------


def in_inference_mode(*tensors):
    with torch.inference_mode():
        return [t.clone() for t in tensors]


@pytest.mark.parametrize("route", ROUTES)
def test_features_of_inference_mode(any_backend, route):
    options, grid = ROUTES[route]
    (student, teacher, *parameters), labels = make_inputs(grid)
    normalizer = torch.tensor(300.0)
    results = []
    for t, y, n in ((teacher, labels, normalizer), in_inference_mode(teacher, labels, normalizer)):
        s, *p = leaves(student, *parameters)
        loss = functional.projected_hakd_loss(
            s, t, p[0], p[1], y, student_bias=p[2], teacher_bias=p[3], proj_weight=0.7, normalizer=n,
            backend=any_backend, **options,
        )  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(loss, [s, *p])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_inference_mode(any_backend, reduction):
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7), make_labels(2, (6, 7), 5)
    weight = torch.rand(5)
    results = []
    for t, y, w in ((teacher, labels, weight), in_inference_mode(teacher, labels, weight)):
        (s,) = leaves(student)
        loss = functional.hakd_loss(s, t, y, reduction=reduction, backend=any_backend).sum()
        loss = loss + functional.segmentation_loss(
            s, y, t, class_weight=w, reduction=reduction, backend=any_backend
        ).sum()  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(loss, s)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("projector", ["conv", "conv_bn"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize("hooked", [False, True])
def test_modules_take_a_teacher_of_inference_mode(projector, resolution, hooked):
    (student, teacher, *_), labels = make_inputs()
    module = HeteroAKDLoss(8, 12, 5, projector=projector, resolution=resolution)
    if hooked:
        module.teacher_projector[0].register_forward_hook(lambda module, inputs, output: output * 2)
    logits, teacher_logits = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 3, 4)
    results = []
    for t, y, z in ((teacher, labels, teacher_logits), in_inference_mode(teacher, labels, teacher_logits)):
        inputs = leaves(student, logits)
        loss = module(inputs[0], t, y, inputs[1], z).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, [*inputs, *module.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# A convolution as the projector --------------------------------------------------------------------------------------


def with_bare_student(resolution, convolution):
    module = HeteroAKDLoss(8, 12, 5, projector="conv", resolution=resolution)
    module.student_projector = convolution
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_a_bare_convolution_is_a_projector(monkeypatch, resolution, dtype):
    """As if it were within a PixelProjector: by the kernels, with features of any dtype."""
    torch.manual_seed(0)
    inside = HeteroAKDLoss(8, 12, 5, projector="conv", resolution=resolution)
    bare = with_bare_student(resolution, copy.deepcopy(inside.student_projector[0]))
    bare.teacher_projector = inside.teacher_projector
    (student, teacher, *_), labels = make_inputs()
    expected = inside(student.to(dtype), teacher, labels).loss
    monkeypatch.setattr(torch.nn.Conv2d, "__call__", None)  # torch is not asked
    found = bare(student.to(dtype), teacher, labels).loss
    assert torch.equal(found, expected)
    found.backward()
    (actual,) = torch.autograd.grad(expected, inside.student_projector[0].weight)
    assert torch.equal(bare.student_projector.weight.grad, actual)


@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize(
    ("channels", "classes", "message"),
    [
        (8, 7, r"student_projector returned \[2, 7, 6, 7\], expected 5 classes as constructed"),
        (9, 5, r"student_features is \[2, 8, 6, 7\], expected 9 channels as constructed"),
    ],
)
def test_a_bare_convolution_of_other_sizes_is_refused(resolution, channels, classes, message):
    module = with_bare_student(resolution, torch.nn.Conv2d(channels, classes, 1))
    (student, teacher, *_), labels = make_inputs()
    with pytest.raises(ValueError, match=message):
        module(student, teacher, labels)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_larger_convolution_is_torchs_to_run():
    convolution = torch.nn.Conv2d(8, 5, 3, padding=1)
    module = with_bare_student("label", convolution)
    (student, teacher, *_), labels = make_inputs()
    expected = functional.hakd_loss(
        convolution(student), module.teacher_projector(teacher), labels, proj_weight=module.proj_weight
    )
    assert relative_l2(module(student, teacher, labels).loss, expected) <= 1e-6
