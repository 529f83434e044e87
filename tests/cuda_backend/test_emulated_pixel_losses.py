"""The CUDA pixel losses, run by the emulation, against the float64 reference: values and gradients of every option."""

import cases
import emulation
import pytest
import torch
from cases import OPTIONS, leaves, make_labels, make_logits, pairwise, relative_l2
from gpu_cases import SEGMENTATION_OPTIONS, SHAPES, compare_with_reference, make_case, run_hakd, run_segmentation

from hetero_kernels import reference


def compare(run, name, case, dtype=torch.float32, slack=1.0, **options):
    compare_with_reference(getattr(emulation, name), run, name, case, dtype, slack, **options)


@pytest.mark.parametrize("options", list(pairwise(OPTIONS)), ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("shape", ["stride 4", "mixed strides"])
def test_hakd_options(shape, options):
    for kind in ("randn", "trained"):
        compare(run_hakd, "hakd_loss", make_case(shape, kind), **options)


@pytest.mark.parametrize("options", list(pairwise(SEGMENTATION_OPTIONS)), ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("shape", ["stride 4", "mixed strides"])
def test_segmentation_options(shape, options):
    for kind in ("randn", "trained"):
        compare(run_segmentation, "segmentation_loss", make_case(shape, kind), **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_hakd_shapes(shape, resolution):
    compare(run_hakd, "hakd_loss", make_case(shape, "randn"), temperature=2.0, resolution=resolution)


@pytest.mark.parametrize("shape", SHAPES)
def test_segmentation_shapes(shape):
    compare(run_segmentation, "segmentation_loss", make_case(shape, "randn"), weighted=True, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["stride 4", "mixed strides", "same grid"])
def test_half_precision(shape, dtype):
    compare(run_hakd, "hakd_loss", make_case(shape, "trained"), dtype, temperature=2.0)
    compare(run_segmentation, "segmentation_loss", make_case(shape, "trained"), dtype)


@pytest.mark.parametrize("block", [4, 64], ids=["mixed", "sure everywhere"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_gradient_accuracy_is_absolute(temperature, block):
    """The bound of the project on confident logits, with no allowance for eager's errors. Blocks of 64 pixels: one
    class everywhere, and nothing but small differences of numbers near 1."""
    torch.manual_seed(1)
    labels = make_labels(1, (16, 64), 19, ignored=0.0, block=block)
    case = *(make_logits("trained", (1, 19, 4, 16), labels) for _ in range(2)), labels
    for name, run in (("hakd_loss", run_hakd), ("segmentation_loss", run_segmentation)):
        exact = run(getattr(reference, name), case, torch.float64, {"temperature": temperature})
        ours = getattr(emulation, name)
        fused = run(ours, case, torch.float32, {"temperature": temperature})
        assert relative_l2(fused["student"], exact["student"]) <= 1e-6, name


@pytest.mark.parametrize("kind", ["huge", "mixed"])
@pytest.mark.parametrize("kem", ["class", "spatial", "none"])
def test_large_logits(kind, kem):
    """The guarded mathematics, and tiles of both kinds in one call. A logit of 1e4 is itself uncertain by 5e-4 in
    float32: eager's error is the yardstick."""
    case = make_case("two tiles", kind)
    options = {"temperature": 2.0, "kem": kem}
    exact = run_hakd(reference.hakd_loss, case, torch.float64, options)
    ours = emulation.hakd_loss
    fused, eager = (run_hakd(f, case, torch.float32, options) for f in (ours, reference.hakd_loss))
    for name, expected in exact.items():
        assert fused[name].isfinite().all(), name
        # 1e-20: where both networks agree to 1e-30, "0" and "4e-127" are the same loss.
        error, allowed = (relative_l2(r[name].double() + 1e-20, expected + 1e-20) for r in (fused, eager))
        assert error <= max(1e-5, 8 * allowed), (name, error, allowed)
    if kem == "none":
        compare(run_segmentation, "segmentation_loss", case, temperature=2.0, label_smoothing=0.1)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_bounded_and_guarded_agree(temperature):
    """One huge logit in a corner sends the tile there through the guarded mathematics: the rest must not notice."""
    case = make_case("same grid", "trained")
    results = []
    for huge in (False, True):
        student, teacher, labels = (t.clone() for t in case)
        labels[:, 0] = 255  # whose row nobody counts
        if huge:
            student[:, :, 0] = 5000.0
        student.requires_grad_()
        emulation.hakd_loss(student, teacher, labels, temperature=temperature).backward()
        results.append(student.grad)
    assert relative_l2(results[1], results[0]) <= 1e-6


@pytest.mark.parametrize("temperature", [0.05, 0.02, 1e-3, 1e-6])
def test_low_temperatures(temperature):
    student, teacher, labels = make_case("stride 4", "randn")
    # L_hakd is then 1e-7, all of it cancellation, which the hardware's exponentials (2^-22) make no better.
    compare(run_hakd, "hakd_loss", (student * 1e-3, teacher * 1e-3, labels), temperature=temperature, slack=8.0)
    compare(run_hakd, "hakd_loss", (student, teacher, labels), temperature=temperature)


def test_spatial_on_confident_logits():
    for seed in (0, 1):
        compare(run_hakd, "hakd_loss", make_case("mixed strides", "trained", seed), temperature=2.0, kem="spatial")


def test_spatial_over_many_programs():
    """More programs than are combined at a time, the highest scores in the last of them."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 2, 70, 2), torch.randn(1, 2, 70, 2)
    student[:, :, 66:] *= 3
    compare(run_hakd, "hakd_loss", (student, teacher, torch.randint(0, 2, (1, 70, 2))), kem="spatial")


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
    weight = torch.rand(5)
    early[1] = "segmentation_kernel"
    assert launches(segmentation, student, labels, class_weight=weight) == early


@pytest.mark.parametrize("terms", [("hakd",), ("proj",), ("hakd", "proj")])
def test_normalizers(terms):
    normalizer = {term: torch.tensor(17, dtype=torch.int64) for term in terms}
    for kem in ("class", "spatial"):
        compare(run_hakd, "hakd_loss", make_case("stride 4", "randn"), normalizer=normalizer, kem=kem)
    normalizer = {{"hakd": "task", "proj": "kd"}[term]: torch.tensor(17.5) for term in terms}
    compare(run_segmentation, "segmentation_loss", make_case("stride 4", "randn"), normalizer=normalizer)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kem", ["class", "spatial"])
def test_no_valid_pixel(reduction, kem):
    student, teacher, labels = make_case("stride 4", "randn")
    student, teacher = leaves(student, teacher)
    labels = torch.full_like(labels, 255)
    loss = emulation.hakd_loss(student, teacher, labels, proj_weight=1.0, reduction=reduction, kem=kem)
    loss = loss + emulation.segmentation_loss(student, labels, teacher, reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and not student.grad.any() and not teacher.grad.any()


def test_a_nan_behind_ignored_pixels_counts_for_nothing():
    student, teacher, labels = make_case("stride 4", "randn")
    labels[:, :8] = 255
    student[:, :, 0] = float("nan")
    case = (student, teacher, labels)
    out = run_hakd(emulation.hakd_loss, case, torch.float32, {})
    assert out["loss"].isfinite() and out["student"].isfinite().all() and not out["student"][:, :, 0].any()
    labels[0, 0, 0] = 1
    out = run_hakd(emulation.hakd_loss, case, torch.float32, {})
    assert out["loss"].isnan()
    for name, run in (("hakd_loss", run_hakd), ("segmentation_loss", run_segmentation)):
        clean = make_case("stride 4", "randn")
        clean[2][:, :8] = 255
        compare(run, name, clean)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
def test_labels(dtype, ignore_index):
    student, teacher, labels = make_case("stride 4", "randn")
    labels = labels.masked_fill(labels == 255, 0 if ignore_index < 0 else ignore_index).to(dtype)
    compare(run_hakd, "hakd_loss", (student, teacher, labels), ignore_index=ignore_index, resolution="feature")
    compare(run_segmentation, "segmentation_loss", (student, teacher, labels), ignore_index=ignore_index)


def test_strides():
    torch.manual_seed(0)
    labels = make_labels(2, (12, 16), 5, block=2)
    wide = torch.randn(2, 9, 4, 6)[:, 2:7, 1:, ::2]
    last = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    expanded = torch.randn(1, 5, 3, 1).expand(2, 5, 3, 4)
    for student, teacher in ((wide, last), (last, expanded), (expanded, wide)):
        compare(run_hakd, "hakd_loss", (student, teacher, labels.mT.contiguous().mT))
        compare(run_segmentation, "segmentation_loss", (student, teacher, labels[:, :, ::2]))


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


def test_float64_is_refused():
    student, teacher, labels = make_case("stride 4", "randn")
    with pytest.raises(TypeError, match="teacher is float64, expected float32, bfloat16 or float16"):
        emulation.hakd_loss(student, teacher.double(), labels)


def test_empty_batch():
    student = torch.randn(0, 5, 3, 4, requires_grad=True)
    loss = emulation.hakd_loss(student, student.detach(), torch.zeros(0, 12, 16, dtype=torch.long))
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape
    maps = emulation.hakd_loss(student, student.detach(), torch.zeros(0, 12, 16, dtype=torch.long), reduction="none")
    assert maps.shape == (0, 12, 16)


def test_two_backwards_agree_and_a_second_derivative_is_an_error():
    student, teacher, labels = make_case("stride 4", "randn")
    student.requires_grad_()
    loss = emulation.hakd_loss(student, teacher, labels)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    gradient = torch.autograd.grad(loss, student, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_runs_are_bit_identical():
    """Slots are added up in a fixed order: no atomics on floats."""
    case = make_case("two tiles", "trained")
    ours = emulation.hakd_loss
    first, second = (run_hakd(ours, case, torch.float32, {}) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


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
    compare(run_hakd, "hakd_loss", case, resolution="feature")
    for align_corners in (False, True):
        compare(run_hakd, "hakd_loss", case, temperature=2.0, align_corners=align_corners)
        compare(run_segmentation, "segmentation_loss", case, align_corners=align_corners)


def test_little_shared_memory():
    """Tiles become narrow; where nothing fits, the message says what to do."""
    emulation.Settings.shared_per_block = 12 << 10
    compare(run_hakd, "hakd_loss", make_case("two tiles", "randn"), temperature=2.0)
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
        compare(run_hakd, "hakd_loss", case, temperature=2.0)
        compare(run_segmentation, "segmentation_loss", case, label_smoothing=0.1)


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
