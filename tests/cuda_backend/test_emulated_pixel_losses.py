"""The CUDA pixel losses, run by the emulation, against the float64 reference: values and gradients of every option."""

import cases
import emulation
import pytest
import torch
from cases import leaves, make_labels, relative_l2
from gpu_cases import Losses, make_case, run_hakd, run_segmentation
from gpu_pixel_losses import PixelLossTests

from hetero_kernels import reference

LOSSES = Losses(emulation.hakd_loss, emulation.segmentation_loss)


class TestEmulated(PixelLossTests):
    losses = LOSSES
    cancellation_slack = 8.0  # the hardware's exponentials are good to 2^-22


def test_launches():
    """One launch of the loss and a small one after it; "spatial" two before it. Nothing else does the work."""
    student, teacher, labels = make_case("stride 4", "randn")
    student.requires_grad_()

    def launches(function, *args, **options):
        emulation.take_traffic()
        function(*args, **options).backward()
        return emulation.take_traffic()[3]

    hakd, segmentation = emulation.hakd_loss, emulation.segmentation_loss
    assert launches(hakd, student, teacher, labels) == ["hakd_kernel", "finish_kernel"]
    assert launches(segmentation, student, labels, teacher) == ["segmentation_kernel", "finish_kernel"]
    spatial = ["hakd_scores_kernel", "hakd_combine_scores_kernel", "hakd_kernel", "finish_kernel"]
    assert launches(hakd, student, teacher, labels, kem="spatial") == spatial
    # Different divisors that the gradient needs at once: they are counted first.
    normalizer = {"hakd": torch.tensor(7.0)}
    early = ["divisors_kernel", "hakd_kernel", "finish_kernel"]
    assert launches(hakd, student, teacher, labels, proj_weight=1.0, normalizer=normalizer) == early
    assert launches(hakd, student, teacher, labels, resolution="feature") == early  # a gradient in place is whole
    weight = torch.rand(5)
    early[1] = "segmentation_kernel"
    assert launches(segmentation, student, labels, class_weight=weight) == early


@pytest.mark.parametrize(
    "axis, align_corners, coarse, fine",
    [(2, False, 28_000, 39_000), (3, True, 40_000, 55_000)],
    ids=["rows", "columns, corners aligned"],
)
def test_positions_beyond_32_bits(axis, align_corners, coarse, fine):
    """Twice the product of a coarse and a fine length, or the product, is more than 2^31: there torch's positions on
    aligned corners are float32's, so that these are compared with exact ones."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 2, 1, coarse).transpose(4, axis + 1).contiguous()
    labels = make_labels(1, (1, fine), 2).transpose(2, axis - 1)
    step, offset, unit = (coarse - 1, 0, fine - 1) if align_corners else (2 * coarse, coarse - fine, 2 * fine)
    at = (torch.arange(fine) * step + offset).clamp(min=0)
    lower, part = at // unit, (at % unit / unit).double().unsqueeze(3 - axis)

    def sampled(x):
        upper = x.index_select(axis, (lower + 1).clamp(max=coarse - 1))
        return x.index_select(axis, lower).lerp(upper, part)

    ours, theirs = leaves(student, student.double())
    emulation.hakd_loss(ours, teacher, labels, align_corners=align_corners).backward()
    reference.hakd_loss(sampled(theirs), sampled(teacher.double()), labels).backward()
    assert relative_l2(ours.grad, theirs.grad) <= 1e-6


@pytest.mark.parametrize("wrong", [77, -1, 5])
def test_wrong_labels_make_the_loss_nan(wrong):
    student, teacher, labels = make_case("stride 4", "randn")
    student.requires_grad_()
    labels[1, 3, 2] = wrong
    for loss in (emulation.hakd_loss(student, teacher, labels), emulation.segmentation_loss(student, labels, teacher)):
        assert loss.isnan()
    maps = emulation.hakd_loss(student, teacher, labels, reduction="none")
    assert maps[1, 3, 2].isnan() and maps.isnan().sum() == 1
    # At feature resolution only the labels that are sampled are looked at.
    assert emulation.hakd_loss(student, teacher, labels, resolution="feature").isfinite()


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.parametrize("shape", ["mixed strides", "two tiles", "narrow tiles", "many classes"])
def test_orders_of_threads_and_blocks_change_nothing(shape, order):
    """Bit for bit: neither does it matter who comes first, nor is anything added up in the order of arrival."""
    case = make_case(shape, "trained")
    for options in ({"temperature": 2.0}, {"kem": "spatial"}, {"reduction": "none", "kmm": False}):
        first = run_hakd(emulation.hakd_loss, case, torch.float32, {"order": "forward", **options})
        other = run_hakd(emulation.hakd_loss, case, torch.float32, {"order": order, **options})
        assert all(torch.equal(first[k], other[k]) for k in first), options
    weighted = {"weighted": True, "label_smoothing": 0.1}
    first = run_segmentation(emulation.segmentation_loss, case, torch.float32, {"order": "forward", **weighted})
    other = run_segmentation(emulation.segmentation_loss, case, torch.float32, {"order": order, **weighted})
    assert all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("multiprocessors", [1, 8, 1000])
@pytest.mark.parametrize("shape", ["stride 8", "mixed strides", "non-integer", "downsampled", "same grid"])
def test_tiles_of_every_height(shape, multiprocessors):
    """A card with few multiprocessors gets tall tiles, whose walk passes coarse rows; one with many, short."""
    emulation.Settings.multiprocessors = multiprocessors
    case = cases.make_case(shape, "randn")
    LOSSES.compare(run_hakd, "hakd_loss", case, resolution="feature")
    for align_corners in (False, True):
        LOSSES.compare(run_hakd, "hakd_loss", case, temperature=2.0, align_corners=align_corners)
        LOSSES.compare(run_segmentation, "segmentation_loss", case, align_corners=align_corners)


def test_little_shared_memory():
    """Tiles become narrow; where nothing fits, the message says what to do."""
    emulation.Settings.shared_per_block = 12 << 10
    LOSSES.compare(run_hakd, "hakd_loss", make_case("two tiles", "randn"), temperature=2.0)
    emulation.Settings.shared_per_block = 4 << 10
    student, teacher, labels = make_case("many classes", "randn")
    with pytest.raises(RuntimeError, match="150 classes need .* bytes of shared memory and this card has 4096"):
        emulation.hakd_loss(student, teacher, labels)


def test_classes_beyond_the_registers():
    """More than 640 classes are left to the guarded mathematics; so are a pixel's 32 lanes with few classes each."""
    torch.manual_seed(0)
    for classes in (641, 1200):
        labels = torch.randint(0, classes, (1, 4, 5))
        case = (torch.randn(1, classes, 2, 3), torch.randn(1, classes, 2, 2), labels)
        LOSSES.compare(run_hakd, "hakd_loss", case, temperature=2.0)
        LOSSES.compare(run_segmentation, "segmentation_loss", case, label_smoothing=0.1)


def test_offsets_beyond_32_bits():
    """Views over memory that is never touched but where the view looks."""
    classes, step = 3, 1 << 30
    storage = torch.empty(classes * step + 64, dtype=torch.float16)
    student = storage.as_strided((1, classes, 2, 2), (1, step, 2, 1))
    values = torch.randn(1, classes, 2, 2).half()
    student.copy_(values)
    labels = torch.randint(0, classes, (1, 4, 4))
    expected = emulation.hakd_loss(values, values.flip(1), labels)
    assert torch.equal(emulation.hakd_loss(student, values.flip(1), labels), expected)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_a_pixels_nan_stays_where_it_is(multiprocessors):
    """At equal grids neighbours' weights are 0, and 0 * NaN must not be formed: not in values, not in gradients. Tiles
    of many rows and of one."""
    emulation.Settings.multiprocessors = multiprocessors
    student, teacher, labels = make_case("same grid", "randn")
    labels[:] = labels.clamp(max=5)
    student[0, 2, 2, 3] = float("nan")
    student.requires_grad_()
    maps = emulation.hakd_loss(student, teacher, labels, proj_weight=1.0, reduction="none")
    assert maps.isnan().sum() == 1 and maps[0, 2, 3].isnan()
    emulation.hakd_loss(student, teacher, labels, proj_weight=1.0, reduction="sum").backward()
    assert student.grad.isnan().any(1).sum() == 1 and student.grad[0, :, 2, 3].isnan().any()


def test_float16_under_a_scaler():
    """1 / N alone underflows in float16; times the scaler's factor it does not."""
    torch.manual_seed(0)
    labels = make_labels(1, (96, 96), 3)
    student, teacher = (torch.randn(1, 3, 12, 12).half().requires_grad_() for _ in range(2))
    (emulation.hakd_loss(student, teacher, labels) * 65536.0).backward()
    exact = student.detach().double().requires_grad_()
    (reference.hakd_loss(exact, teacher.detach().double(), labels) * 65536.0).backward()
    assert relative_l2(student.grad, exact.grad) <= 5e-4


@pytest.mark.parametrize("name", ["hakd_loss", "segmentation_loss"])
def test_global_traffic(name):
    """At most 1.3 times both coarse grids, the gradient and the labels: halos and slots are the rest. Tiles are those
    of an H100 at the paper's sizes."""
    emulation.Settings.multiprocessors = 4
    torch.manual_seed(0)
    labels = make_labels(2, (512, 512), 7, block=16)
    student, teacher = (torch.randn(2, 7, 64, 64) for _ in range(2))
    student.requires_grad_()
    emulation.take_traffic()
    if name == "hakd_loss":
        emulation.hakd_loss(student, teacher, labels).backward()
    else:
        emulation.segmentation_loss(student, labels, teacher).backward()
    read, written, _, _ = emulation.take_traffic()
    grids = 3 * student.numel() * 4 + labels.numel() * 8
    assert grids <= read + written <= 1.3 * grids, (read + written) / grids


def test_a_gradient_in_place_is_written_once():
    """At most 1.1 times both grids and the gradient: labels, which are read twice, and each tile's 1 KB of divisors are
    the rest."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 19, 32, 128)
    (student,) = leaves(student)
    labels = make_labels(1, (32, 128), 19).to(torch.uint8)
    emulation.take_traffic()
    emulation.hakd_loss(student, teacher, labels, resolution="feature").backward()
    read, written, _, _ = emulation.take_traffic()
    assert 3 * student.nbytes <= read + written <= 1.1 * 3 * student.nbytes, (read + written) / student.nbytes


def test_halves_are_read_as_halves():
    """Every float16 there is, NaN and inf included, and as many bfloat16."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        student = values.view(1, 1, 256, 256)
        # One class: L_proj alone, softplus(-z) at every pixel.
        options = {"proj_weight": 1.0, "hakd_weight": 0.0, "reduction": "none", "return_terms": True}
        labels = torch.zeros(1, 256, 256, dtype=torch.uint8)
        zero = torch.zeros_like(student)
        half = emulation.hakd_loss(student, zero, labels, **options).proj
        full = emulation.hakd_loss(student.float(), zero.float(), labels, **options).proj
        assert torch.equal(half.nan_to_num(nan=-1.0), full.nan_to_num(nan=-1.0))
