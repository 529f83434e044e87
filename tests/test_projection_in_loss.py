"""The projection within the loss: values, gradients and buffers, what no operator of torch sees, what torch is left to
run."""

import copy
import warnings

import pytest
import torch
from cases import leaves, make_labels, relative_l2
from test_projection import PROJECTORS, by_torch, channels_last
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hetero_kernels import HeteroAKDLoss, PixelProjector, reference
from hetero_kernels.ops import backends

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")
GRIDS = {"equal": (6, 7), "other": (3, 4)}


def make_loss(projector="conv_bn", training=True, backend=None, **options):
    torch.manual_seed(1)
    module = HeteroAKDLoss(8, 12, 5, projector=projector, backend=backend, **options).train(training)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.endswith("1.weight") else 0.0, 0.5)
    return module


def make_batch(grid="other", mean=0.0):
    torch.manual_seed(0)
    return torch.randn(2, 8, 6, 7) + mean, torch.randn(2, 12, *GRIDS[grid]) + mean, make_labels(2, (24, 28), 5)


def loss_results(module, student, teacher, labels):
    inputs = leaves(student, teacher)
    out = module(*inputs, labels)
    gradients = torch.autograd.grad(out.loss, [*inputs, *module.parameters()])
    return [out.loss.detach(), out.hakd, out.proj, *gradients, *module.buffers()]


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_loss_against_float64(projector, training, resolution, grid, mean):
    """Through batch norm ignored pixels, too, have gradients."""
    student, teacher, labels = make_batch(grid, mean)
    options = {"resolution": resolution, "temperature": 2.0}
    module = make_loss(projector, training, **options)
    exact, plain = (make_loss(projector, training, "reference", **options) for _ in range(2))
    actual = loss_results(module, student, teacher, labels)
    theirs = loss_results(plain, student, teacher, labels)
    expected = loss_results(exact.double(), student.double(), teacher.double(), labels)
    for i, (a, t, e) in enumerate(zip(actual, theirs, expected, strict=True)):
        limit = max(2e-6, 1.01 * relative_l2(t, e))
        assert relative_l2(a, e) <= limit or (a - e).abs().max() <= 2e-8, (i, relative_l2(a, e), limit)
    if training and projector != "conv":
        assert (actual[3] != 0).all()


@pytest.mark.parametrize("kem", ["class", "spatial", "none"])
@pytest.mark.parametrize("kind", ["small", "large"])
def test_bounded_and_guarded_mathematics_look_at_what_logits_mean(kem, kind):
    """Raw logits and what they mean lie on different sides of the guard's limit."""
    student, teacher, labels = make_batch()
    module, exact = make_loss("conv_bn_relu", kem=kem), make_loss("conv_bn_relu", kem=kem, backend="reference")
    for m in (module, exact):
        for p in (m.student_projector, m.teacher_projector):
            p[0].weight.data *= 1e-3 if kind == "large" else 1e3
            p[1].eps = 1e-12
            p[1].weight.data *= 300 if kind == "large" else 1
    actual = loss_results(module, student, teacher, labels)
    expected = loss_results(exact.double(), student.double(), teacher.double(), labels)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert relative_l2(a, e) <= 2e-4 if kind == "large" else 5e-6, (i, relative_l2(a, e))


@pytest.mark.parametrize("projector", ["conv_bn", "conv_bn_relu"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_what_is_not_a_number_reaches_loss_and_statistics(projector, resolution):
    """Even if only ignored pixels hold it, as in torch: batch norm has seen it."""
    student, teacher, labels = make_batch()
    student[0, 1, :, -1] = float("nan")
    labels[0, :, 10:] = 255
    module = make_loss(projector, resolution=resolution)
    assert module(student, teacher, labels).loss.isnan()
    assert module.student_projector[1].running_mean.isnan().all()
    assert module.teacher_projector[1].running_mean.isfinite().all()


@pytest.mark.parametrize("projector", PROJECTORS)
def test_loss_compiles_as_one_graph_and_updates_buffers(projector):
    torch._dynamo.reset()
    student, teacher, labels = make_batch()
    module, plain = make_loss(projector), make_loss(projector)
    compiled = torch.compile(module, fullgraph=True, backend="inductor")
    for _ in range(2):
        actual, expected = (loss_results(m, student, teacher, labels) for m in (compiled, plain))
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert relative_l2(a, e) <= 1e-5 or (a - e).abs().max() <= 1e-7, i


class Seen(TorchDispatchMode):
    """Sizes of what aten operators but views take or return."""

    VIEWS = ("view", "detach", "alias", "expand", "permute", "transpose", "t.", "unsqueeze", "select", "slice")

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("aten.") and not name.removeprefix("aten.").startswith(self.VIEWS):
            for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
                if isinstance(x, torch.Tensor):
                    self.sizes[name] = max(self.sizes.get(name, 0), x.numel())
        return out


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("resolution", ["label", "feature"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_no_operator_of_torch_sees_a_feature_map(projector, training, resolution, grid):
    """Nor anything of the size of the classes times the loss grid."""
    torch.manual_seed(0)
    student, teacher = leaves(torch.randn(2, 64, 6, 7), channels_last(torch.randn(2, 96, *GRIDS[grid])))
    labels = make_labels(2, (24, 28), 5)
    module = HeteroAKDLoss(64, 96, 5, projector=projector, resolution=resolution).train(training)
    module(student, teacher, labels).loss.backward()  # what is done once only
    with Seen() as seen:
        module(student.detach().requires_grad_(), teacher.detach().requires_grad_(), labels).loss.backward()
    smallest = min(student.numel(), teacher.numel(), labels.numel() * 5)
    assert seen.sizes and max(seen.sizes.values()) < smallest, seen.sizes


# What is torch's to run -----------------------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Counted(nn.Parameter):
    pass


def hooked(child):
    def change(projector):
        projector[child].register_forward_hook(lambda module, inputs, output: output * 2)

    return change


CHANGES = {
    "hooked convolution": hooked(0),
    "hooked batch norm": hooked(1),
    "hooked relu": hooked(2),
    "another forward": lambda p: setattr(p[0], "forward", lambda x, f=p[0].forward: f(x) * 2),
    "parametrized": lambda p: nn.utils.parametrizations.weight_norm(p[0]),
    "subclass of the convolution": lambda p: p.__setitem__(0, Doubled(8, 5, 1)),
    "subclass of batch norm": lambda p: p.__setitem__(1, Shifted(5)),
    "subclass of its weight": lambda p: setattr(p[0], "weight", Counted(p[0].weight.data)),
    "another layer": lambda p: p.append(nn.Tanh()),
    "a larger kernel": lambda p: p.__setitem__(0, nn.Conv2d(8, 5, 3, padding=1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_torchs_to_run(change):
    backends.warn_once.cache_clear()
    torch.manual_seed(0)
    module = PixelProjector(8, 5, "conv_bn_relu")
    CHANGES[change](module)
    plain = copy.deepcopy(module)
    x = torch.randn(2, 8, 6, 7)
    with pytest.warns(RuntimeWarning, match="leaves a projector to torch"):
        actual = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.eval()(x)  # says it once
    if change != "another forward":  # whose copy still calls the original
        assert relative_l2(actual, by_torch(plain, x)) <= 1e-6
    assert module[1].num_batches_tracked == 1


def test_global_hooks_are_torchs_to_run():
    backends.warn_once.cache_clear()
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        with pytest.warns(RuntimeWarning, match="all modules have hooks"):
            make_loss()(*make_batch())
    finally:
        handle.remove()
    assert calls.count(nn.Conv2d) == 2 and calls.count(nn.BatchNorm2d) == 2


def test_fake_tensors_take_the_same_way():
    """Predictions of memory look at what runs."""
    with FakeTensorMode(), Seen() as seen:
        module = HeteroAKDLoss(64, 96, 5)
        features = torch.randn(2, 64, 6, 7, requires_grad=True), torch.randn(2, 96, 3, 4)
        module(*features, torch.zeros(2, 24, 28, dtype=torch.long)).loss.backward()
    assert not any("conv" in name or "batch_norm" in name for name in seen.sizes)


def test_hooks_of_a_projector_run():
    student, teacher, labels = make_batch()
    module = make_loss()
    expected = module(student, teacher, labels).loss
    module.student_projector.register_forward_hook(lambda module, inputs, output: output.clone())
    assert relative_l2(module(student, teacher, labels).loss, expected) <= 1e-6
    module.student_projector.register_forward_hook(lambda module, inputs, output: output * 2)
    assert relative_l2(module(student, teacher, labels).loss, expected) > 1e-2


class Louder(PixelProjector):
    def forward(self, features):
        return super().forward(features) * 3 + 1


class LouderLayers(nn.Sequential):
    def forward(self, features):
        return super().forward(features) * 3 + 1


@pytest.mark.parametrize("kind", [Louder, LouderLayers])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_projector_of_a_class_of_its_own_runs_its_forward(kind, training, backend):
    module = make_loss("conv", training, backend, resolution="feature")
    own = Louder(8, 5, "conv") if kind is Louder else LouderLayers(nn.Conv2d(8, 5, 1))
    own.load_state_dict(module.student_projector.state_dict())
    module.student_projector = own
    student, teacher, labels = make_batch("equal")
    logits = module.teacher_projector(teacher)
    expected = reference.hakd_loss(own(student), logits, labels, proj_weight=1.0, resolution="feature")
    torch.testing.assert_close(module(student, teacher, labels).loss, expected)


def test_layers_that_are_left_to_torch_compile_as_one_graph():
    module = make_loss()
    module.student_projector[1].register_forward_hook(lambda *_: None)
    student, teacher, labels = make_batch()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = module(student, teacher, labels).loss
    torch.testing.assert_close(compiled(student, teacher, labels).loss, expected)


def test_the_reference_backend_never_runs_a_kernel():
    """Not even where a hook calls the projector as a module."""
    module = make_loss(backend="reference")
    module.student_projector.register_forward_hook(lambda *_: None)
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        module(*make_batch()).loss.backward()
    assert seen and not [name for name in seen if name.startswith("hetero_kernels.project")]


@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_without_one_of_its_parameters(missing, training):
    projector = PixelProjector(6, 5).train(training)
    setattr(projector[1], missing, None)
    features = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(projector(features), nn.Sequential(*copy.deepcopy(list(projector)))(features))
    module = HeteroAKDLoss(6, 6, 5, resolution="feature").train(training)
    module.student_projector = projector
    module(features, features, torch.zeros(2, 4, 5, dtype=torch.long)).loss.backward()


@pytest.mark.parametrize("training", [True, False])
def test_layers_of_different_sizes_are_refused_as_by_torch(training):
    projector = PixelProjector(6, 5).train(training)
    projector[0] = nn.Conv2d(6, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(RuntimeError, match="should contain 1 elements not 5"):
            projector(torch.randn(2, 6, 4, 5))


def test_transforms_and_forward_mode_are_torchs():
    projector = PixelProjector(6, 5).eval()
    layers = nn.Sequential(*projector)
    features, tangent = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    for ours, theirs in (
        (torch.vmap(projector)(features[None]), torch.vmap(layers)(features[None])),
        (torch.func.jvp(projector, (features,), (tangent,)), torch.func.jvp(layers, (features,), (tangent,))),
        (torch.func.jacrev(projector)(features), torch.func.jacrev(layers)(features)),
    ):
        torch.testing.assert_close(ours, theirs)
