"""The CUDA projection, run by the emulation: what both GPU backends must do, and what is its kernels' own."""

import copy

import emulation
import pytest
import torch
from cases import leaves
from gpu_projection import PROJECTORS, ProjectionTests, make_case, raw_case
from test_emulated_projected_losses import padded_channels, padded_pixels
from test_projection import LAYOUTS, by_torch, compare, make_projector, run

from hetero_kernels import HeteroAKDLoss, functional
from hetero_kernels.ops import projection as ops

pytestmark = pytest.mark.usefixtures("emulated")
# (B, C, h, w, K): what else is cut in a way of its own. Several tiles of an image, several images.
SHAPES = {
    "many slices": (2, 300, 5, 13, 30),
    "forty classes": (1, 70, 9, 8, 40),
    "hundred classes": (1, 300, 5, 9, 100),
    "most classes": (1, 133, 3, 7, 190),
    "chunks": (2, 140, 3, 7, 200),
    "one class": (3, 16, 4, 4, 1),
}
BACK = ["projection_weights_kernel", "finish_weights_kernel", "project_back_kernel"]
PROJECTION = ["pilot_kernel", "pack_weights_kernel", "project_kernel", "statistics_kernel"]


@pytest.fixture
def emulated():
    """Whoever names no backend gets the emulated one."""
    with emulation.active():
        yield


class TestEmulated(ProjectionTests):
    backend, operators = None, emulation.NAME
    approximate_exponentials = True


def make(shape, mean=0.0):
    torch.manual_seed(0)
    batch, channels, height, width, classes = SHAPES[shape]
    return torch.randn(batch, channels, height, width) + mean, classes


def results(features, classes, projector="conv_bn_relu", order="forward"):
    emulation.Settings.order = order
    upstream = torch.linspace(-1, 1, features[:, 0].numel() * classes).view(-1, classes, *features.shape[2:])
    return run(lambda m, x: m(x), make_projector(features.shape[1], classes, projector), features, upstream)


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes(shape, layout):
    features, classes = make(shape, mean=2.0)
    compare(make_projector(features.shape[1], classes), LAYOUTS[layout](features))


@pytest.mark.parametrize("multiprocessors", [1, 2, 4, 16])
def test_warps_share_channels_where_tiles_are_few(multiprocessors):
    """From eight tiles of a block to one, whose channels all warps have."""
    emulation.Settings.multiprocessors = multiprocessors
    torch.manual_seed(0)
    features = torch.randn(2, 150, 5, 26)
    compare(make_projector(150, 11), features)
    compare(make_projector(150, 11, "conv").eval(), LAYOUTS["channels_last"](features))


@pytest.mark.parametrize(("shape", "order"), [("many slices", "reverse"), ("chunks", "shuffled")])
def test_orders_of_threads_and_blocks_change_nothing(shape, order):
    """Bit for bit, and so from run to run."""
    emulation.Settings.multiprocessors = 3
    features, classes = make(shape, mean=1.0)
    first, other = (results(features, classes, order=o) for o in ("forward", order))
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", [padded_pixels, padded_channels])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_that_end_within(layout, dtype):
    features, classes = make("many slices")
    compare(make_projector(features.shape[1], classes), layout(features.to(dtype)))


def test_little_shared_memory():
    """Fewer slices are under way; where not one fits, the message says what to do."""
    features, classes = make("forty classes")
    expected = results(features, classes)
    emulation.Settings.shared_per_block = 48 << 10
    assert all(torch.equal(a, b) for a, b in zip(results(features, classes), expected, strict=True))
    emulation.Settings.shared_per_block = 16 << 10
    with pytest.raises(RuntimeError, match="a projection needs .* and this card has 16384; use backend='triton'"):
        results(features, classes)


def test_offsets_beyond_32_bits():
    """A view over memory that is never touched but where the view looks."""
    step = 1 << 30
    storage = torch.empty(3 * step + 64, dtype=torch.float16)
    features = storage.as_strided((1, 3, 2, 2), (1, step, 2, 1))
    values = torch.randn(1, 3, 2, 2).half()
    features.copy_(values)
    weight = torch.randn(4, 3)
    pairs = zip(*(ops.project(x, weight, True, "none", emulation.NAME) for x in (features, values)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_buffers(value):
    """As in torch: of infinity the mean is infinite."""
    features, classes = make("many slices")
    features[1, 3, 2, 2] = value
    module = make_projector(300, classes)
    plain = copy.deepcopy(module)
    by_torch(plain, features)
    assert module(features).isnan().all() and not plain[1].running_mean.isfinite().any()
    assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(module.buffers(), plain.buffers(), strict=True))


def test_an_infinite_weight_makes_nan():
    """Of its class alone."""
    features, classes = make("one class")
    weight = torch.randn(5, features.shape[1])
    weight[2, 3] = float("inf")
    z = ops.project(features, weight, False, "none", emulation.NAME)[0]
    assert z[:, 2].isnan().all() and z[:, [0, 1, 3, 4]].isfinite().all() and classes == 1


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("shape", ["same grid", "two tiles", "narrow tiles"])
def test_losses_on_raw_logits_in_tiles_of_every_height(shape, multiprocessors):
    emulation.Settings.multiprocessors = multiprocessors
    test = TestEmulated()
    for kem in ("class", "spatial"):
        test.check_loss(raw_case(shape, "randn", (True, False)), 3e-6, proj_weight=0.5, kem=kem)


def test_what_raw_logits_of_scale_one_mean():
    """Bit for bit what the loss on logits gives, but where a gradient is in place there."""
    student, teacher, labels = make_case("mixed strides", "trained")
    one, zero = torch.ones(student.shape[1]), torch.zeros(student.shape[1])
    a, b = leaves(student, student)
    loss = TestEmulated().loss((a, one, zero, teacher, one, zero), (False, False), labels, {}).loss
    other = functional.hakd_loss(b, teacher, labels)
    loss.backward()
    other.backward()
    assert torch.equal(loss, other) and torch.equal(a.grad, b.grad)


def launches():
    return emulation.take_traffic()[3]


@pytest.mark.parametrize("projector", PROJECTORS)
def test_launches(projector):
    """The features come twice, forward and for the weights' gradient; theirs is written once. K-sized sums are all that
    raw logits add to the loss."""
    loss = HeteroAKDLoss(12, 20, 5, projector=projector)
    features = leaves(torch.randn(2, 12, 3, 4), torch.randn(2, 20, 2, 3))
    launches()
    out = loss(*features, torch.randint(0, 5, (2, 9, 11)))
    projection = PROJECTION if projector != "conv" else PROJECTION[1:3]
    assert launches() == [*projection, *projection, "hakd_kernel", "finish_kernel", "normalization_kernel"]
    out.loss.backward()
    assert launches() == BACK * 2


def test_divisors_of_raw_logits_are_not_counted_early():
    """At the loss grid, too: their gradient is read and written again in any case."""
    tensors, relu, labels = raw_case("equal heights", "randn", (True, False))
    launches()
    TestEmulated().loss(leaves(*tensors), relu, labels, {"resolution": "feature"})
    assert launches() == ["hakd_kernel", "finish_kernel", "normalization_kernel"]


def traffic(channels, classes, grid, dtype=torch.float32, channels_last=False, multiprocessors=1):
    """Bytes by buffer of a projection with statistics, forward and backward; features' and logits' own sizes."""
    emulation.Settings.multiprocessors = multiprocessors
    torch.manual_seed(0)
    features = torch.randn(1, channels, *grid, dtype=dtype)
    x, weight = leaves(
        LAYOUTS["channels_last"](features) if channels_last else features, torch.randn(classes, channels)
    )
    emulation.take_traffic()
    z, _, statistics = ops.project(x, weight, True, "none", emulation.NAME)
    torch.autograd.backward((z, statistics), (torch.randn_like(z), torch.randn_like(statistics)))
    return emulation.take_traffic_by_buffer(), x.nbytes, z.nbytes


@pytest.mark.parametrize(
    ("channels", "classes", "dtype", "channels_last"),
    [(128, 19, torch.float32, False), (128, 32, torch.float32, True), (128, 19, torch.bfloat16, False)],
    ids=["K19", "K32 last", "bf16"],
)
def test_two_reads_and_one_write(channels, classes, dtype, channels_last):
    """At most 1.15 times the features read twice and written once, logits written and twice read, their gradient read
    twice: weights, and a slot of their gradient for each block, are the rest, beside the pilot's look at 64 pixels."""
    moved, features, logits = traffic(channels, classes, (32, 64), dtype, channels_last)
    assert moved["features_gradient"] == (0, features)
    pilot = channels * 64 * features // (channels * 32 * 64)
    assert 2 * features <= moved["features"][0] <= 2 * features + 2 * pilot
    least = 3 * features + 5 * logits
    total = sum(read + written for read, written in moved.values())
    assert least <= total <= 1.15 * least, (total / least, moved)
