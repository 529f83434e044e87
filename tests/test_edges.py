"""The edges of the specification's list, on the reference and on every backend present."""

import pytest
import torch
import torch.nn.functional as F
from cases import leaves, make_case, make_labels, relative_l2

from hetero_kernels import functional, reference


def hakd(student, teacher, labels, backend, **options):
    return functional.hakd_loss(student, teacher, labels, proj_weight=1.0, backend=backend, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kem", ["class", "spatial"])
def test_no_valid_pixel(any_backend, reduction, kem):
    student, teacher = leaves(*make_case("stride 8", "randn")[:2])
    labels = torch.full((2, 72, 96), 255)
    loss = hakd(student, teacher, labels, any_backend, reduction=reduction, kem=kem)
    loss = loss + functional.segmentation_loss(student, labels, teacher, reduction=reduction, backend=any_backend)
    loss.sum().backward()
    assert loss.count_nonzero() == 0
    assert student.grad.count_nonzero() == 0 and teacher.grad.count_nonzero() == 0


def test_one_image_without_a_valid_pixel(any_backend):
    """kem="spatial" divides by B K whatever the images hold: an empty image counts 0."""
    student, teacher, labels = make_case("stride 8", "randn")
    labels[1] = 255
    both = hakd(student, teacher, labels, any_backend, kem="spatial", hakd_weight=1.0)
    first = functional.hakd_loss(student[:1], teacher[:1], labels[:1], kem="spatial", backend=any_backend)
    supervised = functional.hakd_loss(
        student, teacher, labels, hakd_weight=0.0, proj_weight=1.0, kem="spatial", backend=any_backend
    )
    assert relative_l2(both - supervised, first / 2) <= 1e-5


def test_zero_class_weights(any_backend):
    student, _, labels = make_case("stride 8", "randn")
    (student,) = leaves(student)
    loss = functional.segmentation_loss(student, labels, class_weight=torch.zeros(5), backend=any_backend)
    loss.backward()
    assert loss == 0 and student.grad.count_nonzero() == 0


@pytest.mark.parametrize("wrong", [5, -1, 254, 2**40])
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_labels_out_of_range(any_backend, wrong, resolution):
    student, teacher, labels = make_case("stride 8", "randn")
    labels[1, 40, :] = wrong  # row 40 of 72 is sampled for row 5 of 9
    message = rf"labels\[1, 40, \d+\] is {wrong}, expected a class in \[0, 5\)"
    if any_backend == "reference" and resolution == "feature":
        message = rf"labels\[1, 5, \d+\] is {wrong}, expected a class in \[0, 5\)"  # of the sampled labels
    with pytest.raises(RuntimeError, match=message):
        hakd(student, teacher, labels, any_backend, resolution=resolution)
    with pytest.raises(RuntimeError, match="expected a class"):
        functional.segmentation_loss(student, labels, backend=any_backend)


def test_labels_that_are_not_sampled_are_not_validated(any_backend):
    student, teacher, labels = make_case("stride 8", "randn")
    expected = hakd(student, teacher, labels, any_backend, resolution="feature")
    labels[:, 1::8, :] = 99  # rows 0, 8, 16, ... are sampled
    assert hakd(student, teacher, labels, any_backend, resolution="feature") == expected


@pytest.mark.parametrize("ignore_index", [255, -100, 3, 2**40, 0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ignore_index_and_label_dtypes(any_backend, ignore_index, dtype):
    student, teacher, labels = make_case("stride 8", "randn")
    valid = labels != 255
    labels = labels.masked_fill(~valid, 3)
    if ignore_index <= torch.iinfo(dtype).max and ignore_index >= torch.iinfo(dtype).min:
        labels = labels.masked_fill(~valid, ignore_index)
    loss = hakd(student, teacher, labels.to(dtype), any_backend, ignore_index=ignore_index)
    task = functional.segmentation_loss(student, labels.to(dtype), ignore_index=ignore_index, backend=any_backend)
    expected = F.cross_entropy(
        F.interpolate(student, labels.shape[1:], mode="bilinear"), labels, ignore_index=ignore_index
    )
    assert relative_l2(task, expected) <= 1e-6
    same = hakd(student, teacher, labels.masked_fill(labels == ignore_index, 255), any_backend)
    assert relative_l2(loss, same) <= 1e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("kem", ["class", "spatial", "none"])
def test_poison_behind_ignored_pixels_counts_nothing(any_backend, poison, who, kem):
    student, teacher, labels = make_case("stride 8", "randn")
    labels[0, :, :32] = 255
    clean = [student.clone(), teacher.clone()]
    victim = student if who == "student" else teacher
    victim[0, :, :, :2] = poison  # reaches label columns below 20 by interpolation
    results = []
    for s, t in ((student, teacher), clean):
        s, t = leaves(s, t)
        loss = hakd(s, t, labels, any_backend, kem=kem) + functional.segmentation_loss(
            s, labels, t, backend=any_backend
        )
        loss.backward()
        results.append((loss, s.grad, t.grad))
    (loss, s_grad, t_grad), (expected, s_expected, t_expected) = results
    assert loss.isfinite() and relative_l2(loss, expected) <= 1e-6
    assert s_grad[0, :, :, :2].count_nonzero() == 0 and t_grad[0, :, :, :2].count_nonzero() == 0
    assert relative_l2(s_grad, s_expected) <= 2e-6 and relative_l2(t_grad, t_expected) <= 2e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("options", [{}, {"kem": "spatial"}, {"kem": "none"}, {"kmm": False}, {"divergence": "ce"}])
def test_poison_under_a_valid_pixel_propagates(any_backend, poison, who, options):
    student, teacher, labels = make_case("stride 8", "randn")
    labels[:] = 1
    victim = student if who == "student" else teacher
    victim[0, 2, 4, 5] = poison
    # -inf is a class without mass, unless the teacher alone says what mass it has.
    masked = poison == -float("inf") and (who == "teacher" or options.get("kmm", True))
    assert hakd(student, teacher, labels, any_backend, **options).isfinite() == masked
    if who == "student" and poison != -float("inf"):  # -inf is an ordinary logit of an impossible class there
        assert not functional.segmentation_loss(student, labels, backend=any_backend).isfinite()


@pytest.mark.parametrize("large", [30.0, 300.0, float("nan"), float("inf")])
@pytest.mark.parametrize("first", [False, True])
def test_spatial_rows_of_both_kinds_in_one_item(any_backend, large, first):
    """One row beyond the unguarded range (or behind ignored pixels, poisoned) beside rows within it."""
    student, teacher, labels = make_case("same grid", "randn")
    row = 4 if first else 6
    student[:, 1, row, 3:9] = large
    if not torch.tensor(large).isfinite():
        labels[:, row, 3:9] = 255
    results = []
    for dtype, backend in ((torch.float32, any_backend), (torch.float64, "reference")):
        s, t = leaves(student, teacher, dtype=dtype)
        loss = hakd(s, t, labels, backend, kem="spatial")
        loss.backward()
        results.append((loss, s.grad))
    assert relative_l2(results[0][0], results[1][0]) <= 2e-6
    assert relative_l2(results[0][1], results[1][1]) <= 2e-5  # |z| = 300 itself is uncertain by 1e-5


@pytest.mark.parametrize("temperature", [0.7, 0.5, 0.25, 0.1, 0.05, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.5, 0.95, 1.05])
@pytest.mark.parametrize("classes", [3, 19, 1000])
def test_temperatures_around_the_limit_of_the_unguarded_visit(any_backend, temperature, scale, classes):
    """Logits as large as the unguarded mathematics takes them, with opposite signs in the two networks, at any T."""
    torch.manual_seed(0)
    limit = min(24.0, 70 / (2 + 1 / temperature), 38 * temperature) * scale
    student = limit * (torch.rand(1, classes, 4, 16) * 2 - 1).sign() * (1 - 0.1 * torch.rand(1, classes, 4, 16))
    teacher = -student
    teacher[..., 8:] = student[..., 8:] - limit / 100
    labels = torch.randint(0, classes, (1, 4, 16))
    options = {"temperature": temperature}
    results = []
    for dtype, backend in ((torch.float32, any_backend), (torch.float64, "reference"), (torch.float32, "reference")):
        s, t = leaves(student, teacher, dtype=dtype)
        loss = functional.hakd_loss(s, t, labels, backend=backend, **options)
        kd = functional.segmentation_loss(s, labels, t, task_weight=0.0, kd_weight=1.0, backend=backend, **options)
        (loss + kd).backward()
        results.append((loss, kd, s.grad))
    for actual, expected, eager in zip(*results, strict=True):
        assert actual.isfinite().all()
        assert relative_l2(actual, expected) <= max(2e-5, 2 * relative_l2(eager, expected))


@pytest.mark.parametrize("temperature", [100.0, 1e4, 1e6])
def test_high_temperatures_cost_digits(any_backend, temperature):
    """What T^2 and T multiply is a difference of numbers near log K and 1: float32 rounds these, whoever computes."""
    torch.manual_seed(0)
    student, teacher, labels = 3 * torch.randn(2, 19, 5, 6), 3 * torch.randn(2, 19, 5, 6), make_labels(2, (20, 24), 19)
    options = {"temperature": temperature}
    results = []
    for dtype, backend in ((torch.float32, any_backend), (torch.float64, "reference")):
        s, t = leaves(student, teacher, dtype=dtype)
        kd = functional.segmentation_loss(s, labels, t, task_weight=0.0, kd_weight=1.0, backend=backend, **options)
        hakd = functional.hakd_loss(s, t, labels, kem="none", backend=backend, **options)
        results.append([(value.detach(), torch.autograd.grad(value, s)[0]) for value in (kd, hakd)])
    for (value, gradient), (expected, expected_gradient) in zip(*results, strict=True):
        assert (value - expected).abs() <= 2**-23 * temperature**2
        assert relative_l2(gradient, expected_gradient) <= 5e-8 * temperature


@pytest.mark.parametrize("magnitude", [20.0, 1e3, 1e4])
def test_a_teacher_that_is_very_sure(any_backend, magnitude):
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 19, 8, 16), torch.randn(1, 19, 8, 16) * magnitude
    labels = torch.randint(0, 19, (1, 8, 16))
    kwargs = {"task_weight": 0.0, "kd_weight": 1.0, "reduction": "none"}
    actual = functional.segmentation_loss(student, labels, teacher, backend=any_backend, **kwargs)
    expected = functional.segmentation_loss(student.double(), labels, teacher, backend="reference", **kwargs)
    assert relative_l2(actual, expected) <= 5e-6
    kwargs = {"kmm": False, "reduction": "none"}
    actual = functional.hakd_loss(student, teacher, labels, backend=any_backend, **kwargs)
    expected = functional.hakd_loss(student.double(), teacher, labels, backend="reference", **kwargs)
    assert relative_l2(actual, expected) <= 5e-6


@pytest.mark.parametrize(
    "options", [{}, {"divergence": "ce"}, {"kem": "none"}, {"kem": "spatial"}, {"temperature": 2.0}], ids=str
)
@pytest.mark.parametrize("classes", [19, 200])
def test_a_teacher_that_is_very_sure_of_the_label(any_backend, classes, options):
    """The mixed target has the label's logit of 1e4, the student none above 4: the loss of about 1 is no difference of
    numbers of that size."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, classes, 8, 16)
    labels = torch.randint(0, classes, (1, 8, 16))
    teacher.scatter_(1, labels[:, None], 1e4)
    results = []
    for dtype, backend in ((torch.float32, any_backend), (torch.float64, "reference")):
        (s,) = leaves(student, dtype=dtype)
        loss = functional.hakd_loss(s, teacher.to(dtype), labels, backend=backend, reduction="none", **options)
        loss.sum().backward()
        results.append((loss, s.grad))
    for actual, expected in zip(*results, strict=True):
        assert relative_l2(actual, expected) <= 5e-7


def test_empty_batch(any_backend):
    student, teacher = torch.randn(0, 3, 4, 5, requires_grad=True), torch.randn(0, 3, 2, 2, requires_grad=True)
    labels = torch.zeros(0, 16, 20, dtype=torch.long)
    for kem in ("class", "spatial"):
        loss = hakd(student, teacher, labels, any_backend, kem=kem)
        loss = loss + functional.segmentation_loss(student, labels, teacher, backend=any_backend)
        loss.backward()
        assert loss == 0 and student.grad.shape == student.shape


@pytest.mark.parametrize("classes", [1, 2, 37, 1000])
def test_numbers_of_classes(any_backend, classes):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, classes, 3, 4)
    labels = torch.randint(0, classes, (1, 12, 17))
    (fused,), (exact,) = leaves(student), leaves(student, dtype=torch.float64)
    loss = hakd(fused, teacher, labels, any_backend)
    loss.backward()
    expected = hakd(exact, teacher.double(), labels, "reference")
    expected.backward()
    assert relative_l2(loss, expected) <= 1e-6 and relative_l2(fused.grad, exact.grad) <= 1e-6


def strided(x, how):
    if how == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if how == "sliced":
        return torch.stack([x, -x], dim=-1)[..., 0]
    if how == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "offset":
        return F.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2]
    return x[:, :, :1].expand_as(x)


@pytest.mark.parametrize("how", ["channels_last", "sliced", "transposed", "offset", "expanded"])
@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_strides(any_backend, how, resolution):
    student, teacher, labels = make_case("mixed strides", "randn")
    inputs = [strided(student, how), strided(teacher, how)]
    labels = labels.transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for s, t in (inputs, [x.contiguous() for x in inputs]):
        s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
        loss = hakd(s, t, labels, any_backend, resolution=resolution)
        loss = loss + functional.segmentation_loss(s, labels, t, backend=any_backend)
        loss.backward()
        results.append((loss, s.grad, t.grad))
    for actual, expected in zip(*results, strict=True):
        assert relative_l2(actual, expected) <= 1e-6


def test_expanded_upstream_gradient(any_backend):
    student, teacher, labels = make_case("stride 8", "randn")
    (a,), (b,) = leaves(student), leaves(student)
    loss = hakd(a, teacher, labels, any_backend, reduction="none")
    loss.backward(torch.tensor(0.7).expand_as(loss))
    (0.7 * hakd(b, teacher, labels, any_backend, reduction="sum")).backward()
    assert relative_l2(a.grad, b.grad) <= 1e-6


@pytest.mark.parametrize(
    "student_dtype, teacher_dtype", [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)]
)
def test_mixed_dtypes(any_backend, student_dtype, teacher_dtype):
    student, teacher, labels = make_case("stride 8", "randn")
    (s,), (t,) = leaves(student, dtype=student_dtype), leaves(teacher, dtype=teacher_dtype)
    loss = hakd(s, t, labels, any_backend)
    loss.backward()
    assert loss.dtype == (torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32)
    assert s.grad.dtype == student_dtype and t.grad.dtype == teacher_dtype
    expected = hakd(s.detach().double(), t.detach().double(), labels, "reference")
    assert relative_l2(loss, expected) <= 1e-6


def test_teacher_gradient_without_supervision_is_exactly_zero(any_backend):
    student, teacher, labels = make_case("stride 8", "randn")
    student, teacher = leaves(student, teacher)
    functional.hakd_loss(student, teacher, labels, proj_weight=0.0, backend=any_backend).backward()
    assert student.grad.count_nonzero() > 0
    assert teacher.grad is None or teacher.grad.count_nonzero() == 0


def test_float16_gradients_survive_a_grad_scaler(any_backend):
    """1/N is 5e-6 here: scaled into float16 before the upstream gradient it would vanish."""
    torch.manual_seed(0)
    labels = make_labels(1, (384, 512), 5)
    student, teacher = torch.randn(2, 1, 5, 48, 64)
    (half,), (exact,) = leaves(student, dtype=torch.float16), leaves(student.half(), dtype=torch.float64)
    (functional.hakd_loss(half, teacher, labels, backend=any_backend) * 2.0**16).backward()
    (functional.hakd_loss(exact, teacher.double(), labels, backend="reference") * 2.0**16).backward()
    assert relative_l2(half.grad, exact.grad) <= 5e-4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retained_graph_gives_the_same_gradients(any_backend, reduction):
    student, teacher, labels = make_case("stride 8", "randn")
    student, teacher = leaves(student, teacher)
    loss = hakd(student, teacher, labels, any_backend, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    second = torch.autograd.grad(loss, (student, teacher))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("term", ["hakd", "proj", "task", "kd"])
def test_normalizer_replaces_its_divisor(any_backend, term):
    student, teacher, labels = make_case("stride 8", "randn")
    own = (labels != 255).sum()

    def run(normalizer):
        (s,) = leaves(student)
        if term in ("hakd", "proj"):
            out = hakd(s, teacher, labels, any_backend, normalizer=normalizer, return_terms=True)
        else:
            out = functional.segmentation_loss(
                s, labels, teacher, normalizer=normalizer, return_terms=True, backend=any_backend
            )
        out.loss.backward()
        return out, s.grad

    plain, gradient = run(None)
    mapped, _ = run({term: own * 2})
    for name, value in mapped._asdict().items():
        if name != "loss":
            expected = getattr(plain, name) / (2 if name == term else 1)
            assert relative_l2(value, expected) <= 1e-6, name
    halved, half_gradient = run((own * 2).to(torch.int32))
    assert relative_l2(halved.loss, plain.loss / 2) <= 1e-6
    assert relative_l2(half_gradient, gradient / 2) <= 1e-6
    zero, zero_gradient = run(own * 0)
    assert zero.loss == 0 and zero_gradient.count_nonzero() == 0


def test_huge_offsets(any_backend):
    """Views whose elements lie more than 2^31 apart in memory that was never touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.float16)  # virtual memory: only the touched pages exist
    student = storage.as_strided((1, 2, 4, 4), (1, 2**31, 4, 1))
    student.copy_(torch.randn(1, 2, 4, 4))
    teacher, labels = torch.randn(1, 2, 4, 4), torch.randint(0, 2, (1, 16, 16))
    expected = hakd(student.contiguous(), teacher, labels, any_backend)
    assert hakd(student, teacher, labels, any_backend) == expected


def test_more_than_two_to_the_31_elements_on_the_loss_grid():
    """H W K = 2.2e9 from a 2x2 grid: a constant image has the loss of one pixel. Once, on the automatic backend."""
    logits = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone().requires_grad_()
    labels = torch.ones(1, 1, 1, dtype=torch.uint8).expand(1, 27000, 27200)
    loss = functional.segmentation_loss(logits, labels)
    loss.backward()
    expected = F.cross_entropy(logits.detach()[:, :, 0, 0].double(), torch.tensor([1]))
    assert relative_l2(loss, expected) <= 1e-6
    assert relative_l2(logits.grad.sum((2, 3))[0], logits.detach()[0, :, 0, 0].softmax(0) - torch.eye(3)[1]) <= 1e-5


@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_a_normalizer_of_zero_means_nothing_to_average(any_backend, resolution):
    """The term vanishes, and with proj its gradients, written in full."""
    student, teacher, labels = make_case("same grid", "randn")
    student, teacher = leaves(student, teacher)
    terms = functional.hakd_loss(
        student, teacher, labels, proj_weight=1.0, hakd_weight=0.0, resolution=resolution, return_terms=True,
        normalizer={"proj": torch.tensor(0.0)}, backend=any_backend,
    )  # fmt: skip
    terms.loss.backward()
    assert terms.proj == 0 and (student.grad == 0).all() and (teacher.grad == 0).all()


def test_subnormal_results_are_flushed_and_torch_keeps_its_own():
    """Each costs an Intel processor some 150 cycles: sure networks took eight times as long."""
    student, teacher = (
        torch.tensor([0.0, *values]).view(1, 5, 1, 1).expand(1, 5, 4, 8).clone()
        for values in ((-40.0, -83.0, -85.0, -87.0), (-45.0, -84.0, -84.0, -88.0))
    )
    labels = torch.zeros(1, 4, 8, dtype=torch.long)
    options = {"resolution": "feature", "reduction": "sum"}
    exact, ours = student.double().requires_grad_(), student.clone().requires_grad_()
    reference.hakd_loss(exact, teacher.double(), labels, **options).backward()
    functional.hakd_loss(ours, teacher, labels, backend="cpu", **options).backward()
    tiny = torch.finfo(torch.float32).tiny
    assert (exact.grad[:, 3:] > 0).all() and (exact.grad[:, 3:] < tiny).all()
    assert (ours.grad[:, 3:] == 0).all() and (ours.grad[:, 2] > 0).all()
    assert (torch.full((1000,), tiny) / 2 > 0).all()
