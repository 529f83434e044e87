"""The CUDA loss on features, run by the emulation: the tests of test_projected_losses.py once more, and what is the
kernels' own, against the float64 reference."""

import cases
import emulation
import pytest
import torch
from cases import make_labels, pairwise, relative_l2
from test_projected_losses import (  # noqa: F401
    LAYOUTS,
    NAMES,
    OPTIONS,
    SHAPES,
    assert_close,
    make_inputs,
    run,
    test_any_subset_of_gradients,
    test_bfloat16_features_and_weights,
    test_bfloat16_that_is_not_a_number_where_nothing_counts,
    test_checkpointing_and_functional_gradients,
    test_dtypes,
    test_gradients_keep_the_features_memory_format,
    test_layouts,
    test_logits_of_any_size,
    test_masked_classes,
    test_normalizer_and_terms,
    test_nothing_to_average,
    test_only_pixels_that_count_spread_what_is_not_a_number,
    test_opcheck_and_second_derivative,
    test_strided_weights_and_biases,
    test_values_and_gradients,
    test_without_supervision_the_teacher_gets_exact_zeros,
)

from hetero_kernels import functional, reference

# (B, Cs, Ct, K, grid, labels), as SHAPES: what other kernels serve, and the edges of what each does.
OTHERS = {
    "two reads": (1, 130, 800, 5, (3, 14), (6, 28)),
    "whole chunks": (1, 128, 256, 32, (4, 8), (4, 8)),
    "forty classes": (1, 20, 133, 40, (5, 9), (10, 9)),
    "ninety-six classes": (2, 16, 8, 96, (4, 8), (8, 8)),
    "most classes": (1, 18, 140, 192, (3, 7), (3, 7)),
    "more classes": (1, 6, 5, 193, (2, 3), (2, 3)),
}
SUPERVISED = OPTIONS["supervised"]
ROOM = {"weights too": 227, "small tiles": 95, "nothing": 50}  # KB of shared memory, and what fits
FITTED = (1, 200, 300, 7, (7, 9), (14, 18))


@pytest.fixture
def backend(monkeypatch):
    """The public functions are the emulated ones."""
    for name in ("projected_hakd_loss", "hakd_loss", "segmentation_loss"):
        monkeypatch.setattr(functional, name, getattr(emulation, name))
    return "emulated"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", OTHERS)
def test_other_shapes(backend, shape, channels_last):
    tensors, labels = make_inputs(OTHERS[shape])
    layout = LAYOUTS["channels_last"] if channels_last else lambda x: x
    for options in ("supervised", "no mixing"):
        assert_close(tensors, labels, OPTIONS[options], torch.float32, backend, layout)
    assert_close([t.half() for t in tensors[:2]] + tensors[2:], labels, SUPERVISED, torch.float16, backend, layout)


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cards(backend, room, dtype):
    """Weights and tile in shared memory, a small tile, or neither."""
    emulation.Settings.shared_per_block = ROOM[room] << 10
    tensors, labels = make_inputs(FITTED, dtype)
    emulation.take_traffic()
    assert_close(tensors, labels, SUPERVISED, dtype, backend)
    assert_close(tensors, labels, SUPERVISED, dtype, backend, LAYOUTS["channels_last"])
    launches = emulation.take_traffic()[3]
    assert ("weight_gradients_kernel" in launches) == (room == "nothing" and dtype == torch.float32)


def test_no_room(backend):
    emulation.Settings.shared_per_block = 30 << 10
    tensors, labels = make_inputs(FITTED)
    with pytest.raises(RuntimeError, match="7 classes of features need .* bytes .* and this card has 30720"):
        run(functional.projected_hakd_loss, tensors, labels, {})


GRID = {
    "temperature": (1.0, 2.0, 1.5), "kmm": (True, False), "kem": ("class", "none", "spatial"),
    "divergence": ("kl", "ce"), "reduction": ("mean", "sum", "none"), "proj_weight": (0.0, 0.7),
    "dtype": (torch.float32, torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("options", list(pairwise(GRID)), ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("shape", ["odd", (1, 40, 24, 40, (4, 9), (8, 18))], ids=["few classes", "many classes"])
def test_options(backend, shape, options):
    options = dict(options)
    dtype = options.pop("dtype")
    tensors, labels = make_inputs(shape, dtype)
    assert_close(tensors, labels, options, dtype, backend)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("block", [4, 64], ids=["mixed", "sure everywhere"])
def test_trained_logits(backend, temperature, block):
    """Features whose projections are logits as networks have them after training, N(+-10, 4)."""
    torch.manual_seed(1)
    labels = make_labels(1, (8, 32), 19, ignored=0.0, block=block)
    logits = [cases.make_logits("trained", (1, 19, 8, 32), labels) for _ in range(2)]
    weights = [torch.linalg.qr(torch.randn(c, 19))[0].mT.contiguous() for c in (24, 40)]
    features = [torch.einsum("kc,bkhw->bchw", w, z).contiguous() for w, z in zip(weights, logits, strict=True)]
    tensors = [*features, *weights, torch.zeros(19), torch.zeros(19)]
    assert_close(tensors, labels, {"temperature": temperature, "proj_weight": 0.1}, torch.float32, backend)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.parametrize("shape", [*SHAPES, *OTHERS])
def test_orders_of_threads_and_blocks_change_nothing(backend, shape, order):
    """Bit for bit, and so from run to run: neither does it matter who comes first, nor is anything added up in the
    order of arrival."""
    emulation.Settings.multiprocessors = 3
    tensors, labels = make_inputs(OTHERS.get(shape, shape))
    for options in (SUPERVISED, OPTIONS["per pixel"]):
        loss, inputs = run(emulation.projected_hakd_loss, tensors, labels, {"order": "forward", **options})
        again, others = run(emulation.projected_hakd_loss, tensors, labels, {"order": order, **options})
        assert torch.equal(loss, again)
        assert all(torch.equal(inputs[n].grad, others[n].grad) for n in NAMES)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5])
@pytest.mark.parametrize("shape", ["whole tiles", "odd", "two reads", "most classes"])
def test_blocks_of_several_tiles(backend, shape, multiprocessors):
    emulation.Settings.multiprocessors = multiprocessors
    for layout in (lambda x: x, LAYOUTS["channels_last"]):
        tensors, labels = make_inputs(OTHERS.get(shape, shape))
        assert_close(tensors, labels, SUPERVISED, torch.float32, backend, layout)


@pytest.mark.parametrize("shape", ["whole tiles", "two reads", "most classes"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_only_ignored_pixels_reach_contributes_nothing(backend, shape, channels_last):
    """Not even as 0 * NaN in the weights' gradient."""
    tensors, labels = make_inputs(OTHERS.get(shape, shape))
    layout = LAYOUTS["channels_last"] if channels_last else lambda x: x
    sampled = reference.sample_labels(labels, tensors[0].shape[2:])
    spoiled = [t.clone() for t in tensors]
    for features, value in zip(spoiled[:2], (float("nan"), float("-inf")), strict=True):
        features.movedim(1, -1)[sampled == 255] = value
    (loss, clean), (other, dirty) = (
        run(emulation.projected_hakd_loss, x, labels, SUPERVISED, layout) for x in (tensors, spoiled)
    )
    assert sampled.eq(255).any() and relative_l2(other, loss) <= 1e-6
    assert all(relative_l2(dirty[n].grad, clean[n].grad) <= 1e-6 for n in NAMES)


# With bits that a tensor core's 11 do not hold and no others, with all of them, and with the usual one.
NANS = (0x7F800001, 0x7FFFFFFF, 0x7FC00000)


@pytest.mark.parametrize("bits", NANS, ids=hex)
@pytest.mark.parametrize("name", NAMES[:4])
def test_a_nan_is_one_whatever_its_bits(backend, name, bits):
    """The loss, and each gradient that eager PyTorch's has there."""
    tensors, labels = make_inputs("odd")
    tensors[NAMES.index(name)].flatten()[0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    labels[:] = 1
    loss, inputs = run(emulation.projected_hakd_loss, tensors, labels, SUPERVISED)
    _, expected = run(reference.projected_hakd_loss, tensors, labels, SUPERVISED)
    assert loss.isnan()
    for other in NAMES:
        assert (inputs[other].grad.isnan() >= expected[other].grad.isnan()).all(), other


def padded_pixels(x):
    """Channels begin at multiples of 64 bytes, an image's last pixels are no whole run of 16."""
    b, c, h, w = x.shape
    room = (h * w + 31) // 32 * 32
    storage = torch.full((b, c, room), torch.nan, dtype=x.dtype)
    storage[..., : h * w] = x.flatten(2)
    return storage.as_strided(x.shape, (c * room, room, w, 1))


def padded_channels(x):
    """Pixels begin at multiples of 64 bytes, a pixel's last channels are no whole run."""
    b, c, h, w = x.shape
    room = (c + 31) // 32 * 32
    storage = torch.full((b, h, w, room), torch.nan, dtype=x.dtype)
    storage[..., :c] = x.movedim(1, -1)
    return storage[..., :c].movedim(-1, 1)


@pytest.mark.parametrize("layout", [padded_pixels, padded_channels])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["odd", "most classes"])
def test_runs_that_end_within(backend, shape, dtype, layout):
    tensors, labels = make_inputs(OTHERS.get(shape, shape), dtype)
    assert_close(tensors, labels, SUPERVISED, dtype, backend, layout)


@pytest.mark.parametrize("dtypes", [(0, 1), (1, 2), (2, 0)], ids=["fp32 bf16", "bf16 fp16", "fp16 fp32"])
@pytest.mark.parametrize("layouts", [(0, 1), (1, 0)], ids=["NCHW NHWC", "NHWC NCHW"])
def test_networks_differ(backend, dtypes, layouts):
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    tensors, labels = make_inputs("whole tiles")
    for i in range(2):
        tensors[i] = tensors[i].to(kinds[dtypes[i]])
        tensors[2 + i] = tensors[2 + i].to(kinds[dtypes[1 - i]])

    def layout(x):
        return LAYOUTS["channels_last"](x) if layouts[x.shape[1] == 128] else x

    assert_close(tensors, labels, SUPERVISED, torch.bfloat16, backend, layout)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_labels(backend, dtype):
    tensors, labels = make_inputs("odd")
    expected, _ = run(emulation.projected_hakd_loss, tensors, labels, {})
    strided = labels.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(emulation.projected_hakd_loss, tensors, strided, {})[0], expected)


def test_wrong_labels_make_the_loss_nan():
    tensors, labels = make_inputs("odd")
    labels[0, 0, 0] = 77
    assert emulation.projected_hakd_loss(*tensors[:4], labels, resolution="feature").isnan()


def test_offsets_beyond_32_bits(backend):
    """A view over memory that is never touched but where the view looks."""
    channels, step = 3, 1 << 30
    storage = torch.empty(channels * step + 64, dtype=torch.float16)
    features = storage.as_strided((1, channels, 2, 2), (1, step, 2, 1))
    values = torch.randn(1, channels, 2, 2).half()
    features.copy_(values)
    weight, labels = torch.randn(4, channels), torch.randint(0, 4, (1, 4, 4))
    losses = [
        emulation.projected_hakd_loss(x, values.flip(1), weight, weight, labels, resolution="feature")
        for x in (features, values)
    ]
    assert torch.equal(*losses)


def test_float16_under_a_scaler(backend):
    """1 / N alone underflows in float16; times the scaler's factor it does not."""
    torch.manual_seed(0)
    labels = make_labels(1, (48, 48), 3)
    features = [torch.randn(1, 16, 48, 48).half().requires_grad_() for _ in range(2)]
    weights = [torch.randn(3, 16) for _ in range(2)]
    (emulation.projected_hakd_loss(*features, *weights, labels, resolution="feature") * 65536.0).backward()
    exact = features[0].detach().double().requires_grad_()
    others = [t.detach().double() for t in (features[1], *weights)]
    (reference.projected_hakd_loss(exact, *others, labels, resolution="feature") * 65536.0).backward()
    assert relative_l2(features[0].grad, exact.grad) <= 5e-4


def launches(shape, options, trained=NAMES):
    tensors, labels = make_inputs(OTHERS.get(shape, shape))
    tensors = [t.requires_grad_(name in trained) for name, t in zip(NAMES, tensors, strict=True)]
    a, b, c, d, e, f = tensors
    emulation.take_traffic()
    emulation.projected_hakd_loss(
        a, b, c, d, labels, student_bias=e, teacher_bias=f, resolution="feature", **options
    ).backward()  # fmt: skip
    return [name.removesuffix("_kernel") for name in emulation.take_traffic()[3]]


def test_launches(backend):
    """The number of valid pixels, one pass, a small launch; the features' gradients in the backward. Weights that
    do not fit shared memory are packed before; more channels than a block can keep sums for: one more after."""
    back = ["project_back", "project_back"]
    assert launches("odd", SUPERVISED) == ["divisors", "projected_hakd", "finish_projected", *back]
    assert launches("odd", {**SUPERVISED, "reduction": "sum"}) == ["projected_hakd", "finish_projected", *back]
    assert launches("odd", SUPERVISED, NAMES[2:4]) == ["divisors", "projected_hakd", "finish_projected"]
    expected = ["divisors", "pack_weights", "projected_hakd", "weight_gradients", "finish_projected", *back]
    assert launches("two reads", SUPERVISED) == expected


def traffic(channels, classes, grid, proj_weight, multiprocessors, dtype=torch.float32, channels_last=False):
    """Bytes by buffer of forward and backward, all gradients but the teacher's features'; the features' own sizes."""
    emulation.Settings.multiprocessors = multiprocessors
    tensors, labels = make_inputs((1, *channels, classes, grid, grid), dtype)
    if channels_last:
        tensors[:2] = [LAYOUTS["channels_last"](t) for t in tensors[:2]]
    a, b, c, d = (t.requires_grad_(i != 1) for i, t in enumerate(tensors[:4]))
    emulation.take_traffic()
    emulation.projected_hakd_loss(a, b, c, d, labels, resolution="feature", proj_weight=proj_weight).backward()
    moved = emulation.take_traffic_by_buffer()
    return moved, a.nbytes, b.nbytes


def total(moved):
    return sum(read + written for read, written in moved.values())


@pytest.mark.parametrize(
    "classes, dtype, grid, channels_last",
    [
        (19, torch.float32, (32, 32), False),
        (32, torch.float32, (32, 64), True),
        (19, torch.bfloat16, (40, 64), False),
    ],
    ids=["K19", "K32", "bf16"],
)
def test_one_read_and_one_write(backend, classes, dtype, grid, channels_last):
    """At most 1.15 times both features and the student's gradient. The block has 1024 pixels and more here: its weights
    and its slot of their gradient, which count once for each block, are small beside that; so are packed weights (32
    classes do not fit shared memory), written once for all blocks."""
    moved, student, teacher = traffic((256, 512), classes, grid, 1.0, 1, dtype, channels_last)
    assert moved["student"] == (student, 0) and moved["teacher"] == (teacher, 0)
    assert moved["features_gradient"] == (0, student)
    least = 2 * student + teacher
    assert least <= total(moved) <= 1.15 * least, (total(moved) / least, moved)


def test_two_reads_and_one_write(backend):
    """Where the sums of the weights' gradient do not fit a block."""
    moved, student, teacher = traffic((512, 1024), 19, (24, 40), 1.0, 1)
    assert moved["student"] == (2 * student, 0) and moved["teacher"] == (2 * teacher, 0)
    least = 3 * student + 2 * teacher
    assert least <= total(moved) <= 1.15 * least, (total(moved) / least, moved)
