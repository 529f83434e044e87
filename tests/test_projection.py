"""The projection on its own: values, gradients, buffers, batch norm's corners, the operators."""

import copy
import itertools

import pytest
import torch
from cases import TOLERANCE, leaves, make_labels, relative_l2
from torch import nn
from torch.utils.checkpoint import checkpoint

from hetero_kernels import PixelProjector, native
from hetero_kernels.ops import backends, pixel_losses
from hetero_kernels.ops import projection as ops
from hetero_kernels.ops.library import pack_scalars

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")
HOST = native.host_module()
PROJECTORS = ("conv", "conv_bn", "conv_bn_relu")
# (B, C, h, w, K): tiles of every kind, rests of vectors, channels and classes.
SHAPES = {
    "small": (2, 7, 5, 3, 4),
    "wide": (1, 130, 31, 37, 19),
    "many classes": (2, 40, 9, 8, 150),
    "one class": (3, 16, 4, 4, 1),
    "one row": (2, 33, 1, 700, 6),
    "whole blocks": (2, 576, 16, 20, 19),  # read and written where they lie, in either order
    "images that share a tile": (70, 9, 3, 3, 5),  # 7 forward, 56 backward, and rests
}


@pytest.fixture(params=HOST.instruction_sets() if HOST else [None])
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("HETERO_KERNELS_CPU_ISA", request.param)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "dense": lambda x: x,
    "channels_last": channels_last,
    "cropped": lambda x: nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "of more channels": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "of more channels, last": lambda x: channels_last(torch.cat((x, x), 1))[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1, :, :1, :1].expand(x.shape),
}


def make(shape="small", mean=0.0, seed=0):
    torch.manual_seed(seed)
    batch, channels, height, width, classes = SHAPES[shape]
    spread = torch.linspace(0.5, 1.5, channels)[:, None, None]
    return torch.randn(batch, channels, height, width) * spread + mean * spread, classes


def make_projector(channels, classes, projector="conv_bn", **changes):
    torch.manual_seed(1)
    out = PixelProjector(channels, classes, projector)
    for parameter in out.parameters():
        nn.init.normal_(parameter, 0.3, 1.0)
    if projector != "conv":
        out[1].running_mean.normal_()
        out[1].running_var.uniform_(0.5, 2.0)
        for name, value in changes.items():
            setattr(out[1], name, value)
    return out


def by_torch(module, x):
    """The layers as torch runs them."""
    for layer in module:
        x = layer(x)
    return x


def run(forward, module, features, upstream):
    (x,) = leaves(features)
    y = forward(module, x)
    wanted = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y, [x, *wanted], upstream.to(y.dtype), allow_unused=True)
    return [y.detach(), *gradients, *(b.clone() for b in module.buffers())]


def compare(module, features, bound=TOLERANCE[torch.float32], forward=lambda m, x: m(x)):
    """Values, gradients and buffers against float64, no farther off than ``bound`` (of the dtype for the features'
    gradient) or than torch is."""
    exact, plain = copy.deepcopy(module).double(), copy.deepcopy(module)
    y = by_torch(copy.deepcopy(exact), features.double())
    upstream = torch.randn(y.shape, dtype=torch.float64)
    actual = run(forward, module, features, upstream)
    theirs = run(by_torch, plain, features.to(module[0].weight.dtype), upstream)
    expected = run(by_torch, exact, features.double(), upstream)
    for i, (a, t, e) in enumerate(zip(actual, theirs, expected, strict=True)):
        if e is None:
            assert a is None
            continue
        assert a.dtype == (features.dtype if i == 1 else t.dtype), i
        least = max(bound, TOLERANCE[features.dtype]) if i == 1 else bound
        error, limit = relative_l2(a, e), max(least, relative_l2(t, e))
        assert error <= limit or (a.double() - e).abs().max() <= 1e-12, (i, error, limit)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_gradients_and_buffers(instruction_set, shape, projector, training):
    features, classes = make(shape)
    compare(make_projector(features.shape[1], classes, projector).train(training), features)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["small", "one row", "whole blocks"])
def test_layouts(instruction_set, layout, shape):
    features, classes = make(shape)
    if layout == "expanded":
        features = features + 0.1 * torch.randn(1, 1, 1, 1)
        module = make_projector(features.shape[1], classes).eval()  # all values of a channel are the same
    else:
        module = make_projector(features.shape[1], classes)
    compare(module, LAYOUTS[layout](features))


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize("shape", ["wide", "whole blocks"])
def test_channels_far_from_zero(instruction_set, shape, layout):
    """Mean 100, deviation 1: the logits are as right as at mean 0, and better than torch's."""
    features, classes = make(shape, mean=100.0)
    module = make_projector(features.shape[1], classes)
    compare(module, LAYOUTS[layout](features), bound=1.5e-6)
    exact = by_torch(make_projector(features.shape[1], classes).double(), features.double())
    assert relative_l2(module(LAYOUTS[layout](features)), exact) <= 6e-7


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_a_pixel_far_from_all_others(layout):
    """Wherever it is, also where the pilot looks: it does not spoil what the others are measured from."""
    features, classes = make("wide")
    module = make_projector(features.shape[1], classes)
    pixels = features.shape[2] * features.shape[3]
    for place in (0, pixels // 8, 3 * pixels // 8 + 5, pixels // 2):
        outlier = features.clone()
        outlier.flatten(2)[:, :, place] = 1e5
        compare(copy.deepcopy(module), LAYOUTS[layout](outlier))


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize("place", [0, 600, -1])
def test_infinity_reaches_the_buffers_as_in_torch(layout, place):
    """The mean of a batch with an infinite value is infinite, whichever tile it is in, and stays so."""
    features, classes = make("one row")
    features[1, 3].flatten()[place] = float("inf")
    module, plain = make_projector(features.shape[1], classes), make_projector(features.shape[1], classes)
    for values in (features, make("one row", seed=1)[0]):
        module(LAYOUTS[layout](values))
        by_torch(plain, values)
        assert plain[1].running_mean.isinf().all()
        assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(module.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("eps", [0.0, -1e-3])
def test_an_epsilon_that_torch_refuses(eps):
    module = make_projector(7, 4, eps=eps)
    for forward in (module, lambda x: by_torch(module, x)):
        with pytest.raises(ValueError, match=f"batch_norm eps must be positive during training, but got {eps}"):
            forward(torch.randn(2, 7, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_dtypes(instruction_set, dtype, layout, training):
    features, classes = make("wide")
    features = LAYOUTS[layout](features.to(dtype))
    module = make_projector(features.shape[1], classes).train(training)
    if dtype == torch.float64:
        return compare(module.double(), features, TOLERANCE[dtype])
    exact = copy.deepcopy(module).double()
    upstream = torch.randn(by_torch(copy.deepcopy(exact), features.double()).shape)
    actual = run(lambda m, x: m(x), module, features, upstream)
    expected = run(by_torch, exact, features.double(), upstream.double())
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == (dtype if i == 1 else a.dtype)
        assert relative_l2(a, e) <= (TOLERANCE[dtype] if i == 1 else 2e-6), i


def check_autocast(module, features, dtype):
    """Factors are rounded as torch rounds them, and nothing else before the result."""
    exact = copy.deepcopy(module).double()
    exact[0].weight.data = module[0].weight.data.to(dtype).double()
    with torch.autocast("cpu", dtype=dtype):
        (x,) = leaves(features)
        y = module(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
    (wide,) = leaves(features.to(dtype).double())
    expected = by_torch(exact, wide)
    expected.square().sum().backward()
    assert relative_l2(y, expected.to(dtype)) <= TOLERANCE[dtype] / 4
    assert x.grad.dtype == torch.float32 and module[0].weight.grad.dtype == torch.float32
    if len(module) == 1:  # the gradient passes y's rounding; with batch norm it is all cancellation
        assert relative_l2(x.grad, wide.grad) <= TOLERANCE[dtype]
    for actual, wanted in zip(module.buffers(), exact.buffers(), strict=True):
        assert relative_l2(actual, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_autocast_rounds_factors_as_torch(dtype, projector):
    features, classes = make("wide", mean=1.0)
    check_autocast(make_projector(features.shape[1], classes, projector), features, dtype)


# Batch norm's own corners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}, {"eps": 0.5}, {"affine": False}],
    ids=str,
)
@pytest.mark.parametrize("projector", ["conv_bn", "conv_bn_relu"])
def test_batch_norms_options(changes, projector):
    features, classes = make()
    module = make_projector(features.shape[1], classes, projector)
    if "affine" in changes or "track_running_stats" in changes:
        module[1] = nn.BatchNorm2d(classes, **changes)
    else:
        vars(module[1]).update(changes)
    plain = copy.deepcopy(module)
    for step in range(3):
        compare(module, features + step)
        by_torch(plain, features + step)
    for actual, expected in zip(module.buffers(), plain.buffers(), strict=True):
        assert actual.dtype == expected.dtype and relative_l2(actual, expected) <= 1e-6
    compare(module.eval(), features)


def test_buffers_change_once_a_forward_and_never_in_backward():
    features, classes = make()
    module = make_projector(features.shape[1], classes)
    (x,) = leaves(features)
    with torch.no_grad():
        module(x)
    assert module[1].num_batches_tracked == 1
    y = module(x)
    before = [b.clone() for b in module.buffers()]
    assert before[2] == 2
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), before, strict=True))
    checkpoint(module, x, use_reentrant=False).sum().backward()
    assert module[1].num_batches_tracked == 4  # as with torch's own


def test_buffers_keep_their_dtype():
    features, classes = make()
    module = make_projector(features.shape[1], classes).bfloat16()
    exact = copy.deepcopy(module).double()
    module(features.bfloat16())
    by_torch(exact, features.bfloat16().double())
    for actual, expected in zip(list(module.buffers())[:2], exact.buffers(), strict=False):
        assert actual.dtype == torch.bfloat16 and relative_l2(actual, expected) <= 4e-3


def test_one_value_a_channel_raises_as_in_torch():
    module = make_projector(7, 4)
    for forward in (module, lambda x: by_torch(module, x)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            forward(torch.randn(1, 7, 1, 1))
    assert module.eval()(torch.randn(1, 7, 1, 1)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_an_empty_batch_counts_and_no_more(projector):
    module = make_projector(7, 4, projector)
    before = [b.clone() for b in module.buffers()]
    (x,) = leaves(torch.randn(0, 7, 3, 5))
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    for i, (now, then) in enumerate(zip(module.buffers(), before, strict=True)):
        assert torch.equal(now, then + (i == 2))


@pytest.mark.parametrize("frozen", ["0.weight", "1.weight", "1.bias", "features", "all"])
def test_single_parameters_freeze(frozen):
    features, classes = make()
    module = make_projector(features.shape[1], classes, "conv_bn_relu")
    expected = copy.deepcopy(module).double()
    results = []
    for m, x, forward in ((module, features, lambda m, x: m(x)), (expected, features.double(), by_torch)):
        for name, p in m.named_parameters():
            p.requires_grad_(frozen not in (name, "all"))
        x = x.clone().requires_grad_(frozen != "features")
        forward(m, x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in m.parameters())])
    for actual, wanted in zip(*results, strict=True):
        assert (actual is None) == (wanted is None)
        assert actual is None or relative_l2(actual, wanted) <= 2e-6


def test_gradcheck():
    torch.manual_seed(0)
    for projector, last in itertools.product(PROJECTORS, (False, True)):
        module = make_projector(5, 3, projector, track_running_stats=False).double()
        x = torch.randn(2, 5, 3, 4, dtype=torch.float64) + 10
        x = (channels_last(x) if last else x).requires_grad_()
        parameters = list(module.parameters())

        def forward(x, *_, module=module):
            return module(x)

        assert torch.autograd.gradcheck(forward, (x, *parameters))


def test_second_derivatives_are_a_clear_error():
    features, classes = make()
    module = make_projector(features.shape[1], classes)
    (x,) = leaves(features)
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.square().sum().backward()


# The operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(statistics, layout, dtype):
    features, classes = make()
    x, weight = leaves(LAYOUTS[layout](features.to(dtype)), torch.randn(classes, features.shape[1]))
    torch.library.opcheck(ops.project_op, (x, weight, statistics, "none", ""))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_of_the_loss(reduction):
    torch.manual_seed(0)
    s, t = leaves(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 3))
    scales = leaves(*(torch.rand(3) + 0.5 for _ in range(4)))
    labels = make_labels(2, (8, 9), 3)
    wanted = (reduction != "none",) * 2
    torch.library.opcheck(
        pixel_losses.normalized_hakd_op,
        (s, scales[0], scales[1], t, scales[2], scales[3], labels, pack_scalars(2.0, 1.0, 0.5), None, None, None,
         True, False, True, "class", "kl", "label", False, 255, reduction, *wanted, ""),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_bit_identical_for_any_number_of_threads(instruction_set, layout):
    features, classes = make("wide")
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            module = make_projector(features.shape[1], classes, "conv_bn_relu")
            upstream = torch.linspace(-1, 1, 19 * 31 * 37).view(1, 19, 31, 37)
            results.append(run(lambda m, x: m(x), module, LAYOUTS[layout](features), upstream))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
