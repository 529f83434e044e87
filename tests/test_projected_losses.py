"""The loss on features against the float64 reference: values and every gradient, layouts, dtypes, edges.

Tests that take ``backend`` run once more on the emulated CUDA kernels (cuda_backend/test_emulated_projected_losses.py).
"""

import functools

import pytest
import torch
import torch.nn.utils.prune
import torch.utils.checkpoint
from cases import TOLERANCE, make_labels, relative_l2

from hetero_kernels import HeteroAKDLoss, functional, reference
from hetero_kernels.ops import projected_losses
from hetero_kernels.ops.library import pack_scalars

NAMES = ("student_features", "teacher_features", "student_weight", "teacher_weight", "student_bias", "teacher_bias")

# (B, Cs, Ct, K, grid, labels): tiles of 64 pixels, blocks of 64 channels, vectors of 4 to 16.
SHAPES = {
    "whole tiles": (2, 64, 128, 7, (8, 16), (32, 64)),
    "odd": (2, 23, 41, 5, (9, 11), (36, 44)),
    "many channels": (1, 70, 300, 19, (7, 13), (20, 31)),
    "many classes": (1, 20, 16, 150, (6, 7), (24, 28)),
    "one of each": (1, 1, 1, 1, (1, 1), (2, 3)),
    "one row": (1, 5, 6, 3, (1, 90), (1, 90)),
    "one column": (3, 6, 5, 4, (70, 1), (70, 1)),
}

OPTIONS = {
    "defaults": {},
    "supervised": {"temperature": 2.0, "proj_weight": 0.7},
    "ce": {"temperature": 1.5, "divergence": "ce", "kem": "none", "proj_weight": 1.0},
    "no mixing": {"temperature": 4.0, "kmm": False, "reduction": "sum", "proj_weight": 1.0},
    "per pixel": {"temperature": 2.0, "reduction": "none", "proj_weight": 1.0},
}


def make_inputs(shape, dtype=torch.float32, spread=2.0):
    """The six tensors of NAMES, and labels with ignored pixels; ``shape`` is in SHAPES, or as there."""
    batch, student, teacher, classes, grid, size = SHAPES.get(shape, shape)
    torch.manual_seed(0)
    tensors = [
        torch.randn(batch, student, *grid).to(dtype), torch.randn(batch, teacher, *grid).to(dtype),
        torch.randn(classes, student) * spread / student**0.5, torch.randn(classes, teacher) * spread / teacher**0.5,
        torch.randn(classes), torch.randn(classes),
    ]  # fmt: skip
    return tensors, make_labels(batch, size, classes)


def run(function, tensors, labels, options, layout=lambda x: x):
    """Loss, and the gradients of all six tensors of three times the loss."""
    tensors = [layout(t.detach().clone()) if t.dim() == 4 else t.detach().clone() for t in tensors]
    for t in tensors:
        t.requires_grad_()
    a, b, c, d, e, f = tensors
    loss = function(a, b, c, d, labels, student_bias=e, teacher_bias=f, resolution="feature", **options)
    loss.backward(torch.linspace(3, -1.5, loss.numel(), dtype=loss.dtype).view_as(loss))
    return loss.detach(), dict(zip(NAMES, tensors, strict=True))


def assert_close(tensors, labels, options, dtype, backend, layout=lambda x: x):
    exact, exact_inputs = run(reference.projected_hakd_loss, [t.double() for t in tensors], labels, options)
    eager, eager_inputs = run(reference.projected_hakd_loss, tensors, labels, options, layout)
    ours = functools.partial(functional.projected_hakd_loss, backend=backend)
    fused, fused_inputs = run(ours, tensors, labels, options, layout)
    assert fused.dtype == eager.dtype and fused.shape == eager.shape
    # Projections round in float32 whatever follows: twice eager's own error is the measure where that is more.
    bound = 2 * TOLERANCE[torch.float32 if fused.dtype == torch.float32 else torch.float64]
    assert relative_l2(fused, exact) <= max(bound, 2 * relative_l2(eager, exact))
    for name in NAMES:
        actual, expected, plain = (x[name].grad for x in (fused_inputs, exact_inputs, eager_inputs))
        assert actual.dtype == fused_inputs[name].dtype and actual.shape == fused_inputs[name].shape
        wide = TOLERANCE[dtype] if name.endswith("features") else bound
        assert relative_l2(actual, expected) <= max(wide, 2 * relative_l2(plain, expected)), name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(backend, shape, options):
    tensors, labels = make_inputs(shape)
    assert_close(tensors, labels, OPTIONS[options], torch.float32, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ["whole tiles", "odd"])
def test_dtypes(backend, shape, dtype):
    tensors, labels = make_inputs(shape, dtype)
    if dtype == torch.float64:
        tensors = [t.double() for t in tensors]
        if backend != "cpu":
            with pytest.raises(TypeError, match="student_features is float64, expected float32, bfloat16 or float16"):
                run(functools.partial(functional.projected_hakd_loss, backend=backend), tensors, labels, {})
            return
    assert_close(tensors, labels, OPTIONS["supervised"], dtype, backend)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_features_and_weights(backend, shape, channels_last):
    """Both factors in bfloat16: dot instructions where the machine has them, the float32 path everywhere else."""
    tensors, labels = make_inputs(shape)
    layout = LAYOUTS["channels_last"] if channels_last else lambda x: x
    assert_close([t.bfloat16() for t in tensors], labels, OPTIONS["supervised"], torch.bfloat16, backend, layout)


def test_bfloat16_that_is_not_a_number_where_nothing_counts(backend):
    tensors, labels = make_inputs("odd")
    tensors = [t.bfloat16() for t in tensors]
    sampled = reference.sample_labels(labels, tensors[0].shape[2:])
    spoiled = [t.clone() for t in tensors]
    for i, value in enumerate((float("nan"), float("inf"))):
        spoiled[i].movedim(1, -1)[sampled == 255] = value
    ours = functools.partial(functional.projected_hakd_loss, backend=backend)
    (loss, clean), (spoiled_loss, dirty) = (run(ours, x, labels, OPTIONS["supervised"]) for x in (tensors, spoiled))
    assert relative_l2(spoiled_loss, loss) <= 1e-6  # the guarded mathematics, where the unguarded was
    for name in NAMES[2:]:
        assert relative_l2(dirty[name].grad, clean[name].grad) <= 4e-3, name


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]].detach(),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other channel": lambda x: torch.repeat_interleave(x, 2, 1)[:, ::2].detach(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["whole tiles", "odd", "many channels"])
def test_layouts(backend, shape, layout):
    tensors, labels = make_inputs(shape)
    assert_close(tensors, labels, OPTIONS["supervised"], torch.float32, backend, LAYOUTS[layout])


def test_gradients_keep_the_features_memory_format(backend):
    tensors, labels = make_inputs("odd")
    function = functools.partial(functional.projected_hakd_loss, backend=backend)
    _, inputs = run(function, tensors, labels, {"proj_weight": 1.0}, LAYOUTS["channels_last"])
    for name in NAMES[:2]:
        assert inputs[name].grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", ["defaults", "supervised", "no mixing"])
def test_logits_of_any_size(backend, options):
    """Tiles of the unguarded and of the guarded mathematics, side by side."""
    tensors, labels = make_inputs("many channels", spread=3.0)
    tensors[0][..., :4] *= 40
    tensors[1][..., 2:5] *= 300
    assert_close(tensors, labels, OPTIONS[options], torch.float32, backend)


@pytest.mark.parametrize("low", [-float("inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("options", ["supervised", "ce"])
def test_masked_classes(backend, options, low):
    """A class that both biases switch off: what float64 has with one that is merely low."""
    tensors, labels = make_inputs("odd")
    labels = labels.masked_fill(labels == 3, 1)
    results = []
    for function, value, dtype in (
        (reference.projected_hakd_loss, -2e4, torch.float64),
        (functools.partial(functional.projected_hakd_loss, backend=backend), low, torch.float32),
    ):
        *others, b, d = (t.to(dtype) for t in tensors)
        biases = [x.index_fill(0, torch.tensor([3]), value) for x in (b, d)]
        loss, inputs = run(function, [*others, *biases], labels, OPTIONS[options])
        results.append((loss, *(inputs[name].grad for name in NAMES)))
    for expected, actual in zip(*results, strict=True):
        assert relative_l2(actual, expected) <= 4e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_pixels_that_count_spread_what_is_not_a_number(backend, value):
    tensors, labels = make_inputs("whole tiles")
    labels = labels[:, ::4, ::4].contiguous()
    labels[0, 2, 3] = 255
    clean, clean_inputs = run(functional.projected_hakd_loss, tensors, labels, {"proj_weight": 1.0, "backend": backend})
    for features in tensors[:2]:
        features[0, 5, 2, 3] = value
    loss, inputs = run(functional.projected_hakd_loss, tensors, labels, {"proj_weight": 1.0, "backend": backend})
    assert relative_l2(loss, clean) <= 1e-6
    for name in NAMES:
        assert relative_l2(inputs[name].grad, clean_inputs[name].grad) <= 1e-6, name
    labels[0, 2, 3] = 1
    loss, _ = run(functional.projected_hakd_loss, tensors, labels, {"proj_weight": 1.0, "backend": backend})
    assert not loss.isfinite()


def test_nothing_to_average(backend):
    tensors, labels = make_inputs("odd")
    options = {"proj_weight": 1.0, "backend": backend}
    for chosen in (tensors, [t[:0] if t.dim() == 4 else t for t in tensors]):
        ignored = torch.full_like(labels, 255)[: chosen[0].shape[0]]
        loss, inputs = run(functional.projected_hakd_loss, chosen, ignored, options)
        assert loss == 0 and all(x.grad.abs().sum() == 0 for x in inputs.values())


def test_without_supervision_the_teacher_gets_exact_zeros(backend):
    tensors, labels = make_inputs("odd")
    _, inputs = run(functional.projected_hakd_loss, tensors, labels, {"proj_weight": 0.0, "backend": backend})
    assert all((x.grad == 0).all() == name.startswith("teacher") for name, x in inputs.items())


@pytest.mark.parametrize("trained", [[0], [2], [3, 5], [1], [4], []])
def test_any_subset_of_gradients(backend, trained):
    tensors, labels = make_inputs("odd")
    options = {"proj_weight": 1.0, "temperature": 2.0}
    _, everything = run(functional.projected_hakd_loss, tensors, labels, {**options, "backend": backend})
    tensors = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    loss = functional.projected_hakd_loss(
        *tensors[:4], labels, student_bias=tensors[4], teacher_bias=tensors[5], resolution="feature", backend=backend,
        **options,
    )  # fmt: skip
    assert loss.requires_grad == bool(trained)
    if trained:
        wanted, three = [tensors[i] for i in trained], torch.tensor(3.0)
        gradients = torch.autograd.grad(loss, wanted, three, retain_graph=True)
        again = torch.autograd.grad(loss, wanted, three)
        for i, g, h in zip(trained, gradients, again, strict=True):
            assert torch.equal(g, everything[NAMES[i]].grad) and torch.equal(g, h)


@pytest.mark.parametrize("threads", [1, 3])
def test_result_does_not_depend_on_threads(backend, threads):
    tensors, labels = make_inputs("whole tiles")
    options = {"proj_weight": 1.0, "backend": backend}
    expected, inputs = run(functional.projected_hakd_loss, tensors, labels, options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual, others = run(functional.projected_hakd_loss, tensors, labels, options)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual, expected)
    assert all(torch.equal(inputs[name].grad, others[name].grad) for name in NAMES)


def test_normalizer_and_terms(backend):
    tensors, labels = make_inputs("odd")
    options = {
        "proj_weight": 0.5, "normalizer": {"hakd": torch.tensor(50.0), "proj": torch.tensor(20)}, "return_terms": True,
        "resolution": "feature",
    }  # fmt: skip
    actual = functional.projected_hakd_loss(*tensors[:4], labels, backend=backend, **options)
    expected = reference.projected_hakd_loss(*[t.double() for t in tensors[:4]], labels, **options)
    for a, e in zip(actual, expected, strict=True):
        assert relative_l2(a, e) <= 2e-6


def test_bad_input_is_named(backend):
    tensors, labels = make_inputs("odd")
    call = functools.partial(functional.projected_hakd_loss, resolution="feature", backend=backend)
    with pytest.raises(ValueError, match="labels is"):
        call(*tensors[:4], labels[:, None])
    with pytest.raises(ValueError, match="temperature is 0"):
        call(*tensors[:4], labels, temperature=0.0)
    with pytest.raises(ValueError, match="student_bias is"):
        call(*tensors[:4], labels, student_bias=torch.zeros(3))
    wrong = labels.clone()
    wrong[1, 0, 0] = 77
    with pytest.raises(RuntimeError, match=r"labels\[1, 0, 0\] is 77, expected a class in \[0, 5\)"):
        call(*tensors[:4], wrong)


def test_opcheck_and_second_derivative(backend):
    tensors, labels = make_inputs("odd")
    tensors = [t.requires_grad_() for t in tensors]
    projected, back = (
        getattr(torch.ops.hetero_kernels, name + ("" if backend == "cpu" else f"_{backend}")).default
        for name in ("projected_hakd_loss", "project_back")
    )
    for reduction in ("mean", "none"):
        torch.library.opcheck(
            projected,
            (*tensors, labels, pack_scalars(2.0, 1.0, 1.0), None, torch.tensor(9.0), None, True, "class", "kl", 255,
             reduction, *(reduction == "mean",) * 4, ""),
        )  # fmt: skip
    like = torch.randn(2, 6, 4, 5)
    for x in (like, like.contiguous(memory_format=torch.channels_last), like.bfloat16()):
        torch.library.opcheck(back, (torch.randn(2, 3, 4, 5), torch.randn(3, 6), torch.tensor(2.0), x, ""))
    loss = functional.projected_hakd_loss(*tensors[:4], labels, resolution="feature", backend=backend)
    (gradient,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_fullgraph(channels_last):
    def step(a, b, c, d, labels):
        return functional.projected_hakd_loss(a, b, c, d, labels, resolution="feature", proj_weight=0.5)

    torch._dynamo.reset()
    tensors, labels = make_inputs("odd")
    if channels_last:
        tensors[:2] = [LAYOUTS["channels_last"](t) for t in tensors[:2]]
    ours, theirs = ([t.clone().requires_grad_() for t in tensors[:4]] for _ in range(2))
    compiled = torch.compile(step, fullgraph=True)(*ours, labels)
    plain = step(*theirs, labels)
    compiled.backward()
    plain.backward()
    assert torch.equal(compiled, plain) and all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_strided_weights_and_biases(backend):
    """Sliced, transposed and expanded: what a user may have made of one tensor."""
    tensors, labels = make_inputs("odd")
    strided = [t.clone() for t in tensors]
    strided[2] = tensors[2].mT.contiguous().mT
    strided[3] = torch.repeat_interleave(tensors[3], 2, 1)[:, ::2]
    strided[4] = torch.stack([tensors[4], tensors[4] + 9], 1)[:, 0]
    strided[5] = torch.tensor(0.3).expand(5)
    dense = [t.contiguous() for t in strided]
    options = {"proj_weight": 1.0, "temperature": 2.0, "resolution": "feature", "backend": backend}
    losses = [
        functional.projected_hakd_loss(*x[:4], labels, student_bias=x[4], teacher_bias=x[5], **options)
        for x in (strided, dense)
    ]
    assert relative_l2(*losses) <= 1e-6


@pytest.mark.parametrize("projector", ["conv", "conv_bn", "conv_bn_relu"])
@pytest.mark.parametrize("training", [False, True])
def test_module_takes_the_one_pass_path_where_it_can(monkeypatch, projector, training):
    """A convolution, or batch norm in eval mode folded into one; the results agree."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 6, 7, requires_grad=True), torch.randn(2, 12, 6, 7)
    labels = make_labels(2, (24, 28), 5)
    fused = HeteroAKDLoss(8, 12, 5, projector=projector, resolution="feature", temperature=2.0)
    eager = HeteroAKDLoss(8, 12, 5, projector=projector, resolution="feature", temperature=2.0, backend="reference")
    for p in (fused.student_projector, fused.teacher_projector):
        for norm in list(p)[1:2]:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
    eager.load_state_dict(fused.state_dict())
    calls = []
    op = projected_losses.projected_hakd_loss
    monkeypatch.setattr(projected_losses, "projected_hakd_loss", lambda *a: calls.append(1) or op(*a))
    results = []
    for module in (fused, eager):
        module.train(training)
        loss = module(student, teacher, labels).loss
        results.append((loss, *torch.autograd.grad(loss, [student, *module.parameters()])))
    assert bool(calls) == (projector == "conv" or (projector == "conv_bn" and not training))
    for actual, expected in zip(*results, strict=True):
        assert relative_l2(actual, expected) <= 2e-5


def _other_projectors():
    def changed(change):
        def make(**options):
            module = HeteroAKDLoss(8, 12, 5, temperature=2.0, **options).eval()
            change(module.student_projector)
            return module

        return make

    def set_layer(index, layer):
        return lambda p: p.__setitem__(index, layer.eval())

    return {
        "hook": changed(lambda p: p[0].register_forward_hook(lambda module, inputs, output: output * 2)),
        "batch norm's hook": changed(lambda p: p[1].register_forward_hook(lambda module, inputs, output: output * 2)),
        "batch norm's pre-hook": changed(
            lambda p: p[1].register_forward_pre_hook(lambda module, inputs: inputs[0] * 2)
        ),
        "batch norm's forward": changed(lambda p: setattr(p[1], "forward", lambda x, f=p[1].forward: f(x) * 2)),
        "variances as small as eps": changed(lambda p: p[1].running_var.fill_(1e-5)),
        "weight norm": changed(lambda p: torch.nn.utils.parametrizations.weight_norm(p[0])),
        "pruned": changed(lambda p: torch.nn.utils.prune.l1_unstructured(p[0], "weight", amount=0.5)),
        "bias before batch norm": changed(set_layer(0, torch.nn.Conv2d(8, 5, 1))),
        "batch norm without scale": changed(set_layer(1, torch.nn.BatchNorm2d(5, affine=False))),
        "batch norm without statistics": changed(set_layer(1, torch.nn.BatchNorm2d(5, track_running_stats=False))),
        "identity": changed(set_layer(1, torch.nn.Identity())),
        "3x3": changed(set_layer(0, torch.nn.Conv2d(8, 5, 3, padding=1))),
    }


@pytest.mark.filterwarnings("ignore:hetero_kernels leaves a projector to torch")
@pytest.mark.parametrize("route", [(None, "feature"), ("reference", "feature"), ("reference", "label")], ids=str)
@pytest.mark.parametrize("kind", _other_projectors())
def test_module_computes_what_its_projectors_say(kind, route):
    """Whatever was done to them; twice, as a training loop would. Against the layers themselves, one by one."""
    torch.manual_seed(0)
    backend, resolution = route
    module = _other_projectors()[kind](backend=backend, resolution=resolution)
    student, teacher = torch.randn(2, 8, 6, 7, requires_grad=True), torch.randn(2, 12, 6, 7)
    labels = make_labels(2, (24, 28), 5)
    for _ in range(2):
        tensors = [student, *module.parameters()]
        loss = module(student, teacher, labels).loss
        projected = [torch.nn.Sequential(*p)(x) for p, x in zip(module.children(), (student, teacher), strict=True)]
        expected = reference.hakd_loss(*projected, labels, temperature=2.0, proj_weight=1.0, resolution=resolution)
        assert relative_l2(loss, expected) <= 1e-5
        for a, e in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True):
            assert relative_l2(a, e) <= 2e-5


def test_checkpointing_and_functional_gradients(backend):
    """Of whatever size: what is compared are two ways to the same launches."""
    tensors, labels = make_inputs((2, 6, 10, 5, (2, 3), (4, 6)))

    features = tensors[0].requires_grad_()
    for reduction in ("mean", "none"):

        def loss(features, reduction=reduction):
            return functional.projected_hakd_loss(
                features, *tensors[1:4], labels, resolution="feature", reduction=reduction, backend=backend
            ).sum()

        (expected,) = torch.autograd.grad(loss(features), features)
        checkpointed = torch.utils.checkpoint.checkpoint(loss, features, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(checkpointed, features)[0], expected)
        assert torch.equal(torch.func.grad(loss)(features.detach()), expected)
    logits = torch.randn(2, 5, 2, 3)
    for function in (
        lambda z: functional.hakd_loss(z, logits.flip(0), labels, backend=backend),
        lambda z: functional.segmentation_loss(z, labels, backend=backend),
        lambda z: functional.hakd_loss(z, logits.flip(0), labels, reduction="none", backend=backend).sum(),
        lambda z: functional.segmentation_loss(z, labels, reduction="none", backend=backend).sum(),
    ):
        z = logits.clone().requires_grad_()
        assert torch.equal(torch.func.grad(function)(logits), torch.autograd.grad(function(z), z)[0])
