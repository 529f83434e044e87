"""A class switched off by a very low logit leaves everything as a merely low one does: 0 * (-inf) is 0."""

import pytest
import torch
import torch.nn.functional as F
from cases import OPTIONS, leaves, make_case, pairwise, relative_l2
from gpu_cases import LOWS, compare_masked, masked, run_hakd, run_masked_segmentation

from hetero_kernels import HeteroAKDLoss, functional, reference

LOWEST = torch.finfo(torch.float32).min


def of(backend):
    def call(name):
        return lambda *args, **options: getattr(functional, name)(*args, backend=backend, **options)

    return call


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("low", LOWS, ids=str)
def test_hakd(any_backend, low, who):
    options = {**OPTIONS, "temperature": (1.0, 2.0, 0.5)}
    for number, choice in enumerate(pairwise(options)):
        if who == "student" and not choice["kmm"]:
            continue  # the teacher's mass of a class that the student cannot name: an infinite divergence, see below
        shape = ("stride 8", "mixed strides", "same grid")[number % 3]
        case = make_case(shape, ("randn", "trained")[number % 2])
        compare_masked(of(any_backend)("hakd_loss"), run_hakd, case, who, low, part=number % 2 == 0, **choice)


@pytest.mark.parametrize("low", LOWS, ids=str)
def test_segmentation(any_backend, low):
    ours = of(any_backend)("segmentation_loss")
    for number, (who, smoothing, temperature, reduction) in enumerate(
        [
            ("teacher", 0.1, 1.0, "mean"),
            ("both", 0.0, 2.0, "none"),
            ("both", 0.1, 0.5, "sum"),
            ("student", 0.0, 1.0, "mean"),
        ]
    ):
        case = make_case(("stride 8", "mixed strides", "same grid")[number % 3], "randn")
        compare_masked(
            ours, run_masked_segmentation, case, who, low, part=number % 2 == 1, temperature=temperature,
            label_smoothing=smoothing, reduction=reduction, with_teacher=who != "student",
        )  # fmt: skip


def test_numbers_of_torch(any_backend):
    """Cross-entropy and KD as torch has them where it has them: F.kl_div takes probabilities, whose 0 log 0 is 0."""
    student, teacher, labels = masked(make_case("same grid", "randn"), "teacher", -float("inf"))
    out = functional.segmentation_loss(student, labels, teacher, return_terms=True, backend=any_backend)
    kept = (labels != 255)[:, None].expand_as(student)
    p, log_q = teacher.softmax(1)[kept], student.log_softmax(1)[kept]
    assert relative_l2(out.kd, F.kl_div(log_q, p, reduction="sum") / (labels != 255).sum()) <= 1e-6
    masked_student = masked((student, teacher, labels), "student", -float("inf"))[0]
    task = functional.segmentation_loss(masked_student, labels, backend=any_backend)
    assert relative_l2(task, F.cross_entropy(masked_student, labels, ignore_index=255)) <= 1e-6


@pytest.mark.parametrize("low", [LOWEST, -float("inf")])
def test_the_issues_numbers(any_backend, low):
    """What the finite logit of a class that both networks exclude gives is what its mask gives, and is positive."""
    student, teacher, labels = masked(make_case("same grid", "randn"), "teacher", low)
    for kem in ("class", "spatial"):
        loss = functional.hakd_loss(student, teacher, labels, kem=kem, backend=any_backend)
        dropped = masked((student, teacher, labels), "teacher", -300.0)
        assert relative_l2(loss, reference.hakd_loss(*(x.double() for x in dropped[:2]), labels, kem=kem)) <= 2e-6


@pytest.mark.parametrize("kem", ["class", "spatial", "none"])
def test_mass_that_the_student_excludes_is_an_infinite_divergence(any_backend, kem):
    """With gradients that are right all the same: they ask for no logarithm."""
    case = masked(make_case("same grid", "randn"), "student", -float("inf"))
    low = masked(make_case("same grid", "randn"), "student", -2e4)
    for name, run, options in (
        ("hakd_loss", run_hakd, {"kmm": False, "kem": kem}),
        ("segmentation_loss", run_masked_segmentation, {}),
    ):
        out = run(of(any_backend)(name), case, torch.float32, options)
        expected = run(getattr(reference, name), low, torch.float64, options)
        assert out["loss"] == float("inf")
        assert relative_l2(out["student"], expected["student"]) <= 1e-6


@pytest.mark.parametrize(("zero_weight", "smoothing"), [(False, 0.0), (False, 0.1), (True, 0.0)])
def test_a_label_without_mass(any_backend, zero_weight, smoothing):
    """Infinite, as F.cross_entropy has it, unless the class's weight is 0: then nothing of it counts."""
    student, _, labels = make_case("same grid", "randn")
    student[:, 2] = -float("inf")
    (student,) = leaves(student)
    weight = torch.tensor([1.0, 2.0, 0.0 if zero_weight else 1.0, 0.5, 1.0, 1.0])
    options = {"label_smoothing": smoothing}
    loss = functional.segmentation_loss(student, labels, class_weight=weight, backend=any_backend, **options)
    loss.backward()
    assert student.grad.isfinite().all()
    if zero_weight:
        others = labels.masked_fill(labels == 2, 255)
        assert relative_l2(loss, F.cross_entropy(student, others, weight=weight, ignore_index=255)) <= 1e-6
    else:
        assert loss == float("inf") == F.cross_entropy(student, labels, weight=weight, ignore_index=255, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(any_backend, dtype):
    for low in (-float("inf"), torch.finfo(dtype).min):
        for who in ("teacher", "both"):
            student, teacher, labels = make_case("mixed strides", "randn")
            case = (student.to(dtype), teacher.to(dtype), labels)
            compare_masked(of(any_backend)("hakd_loss"), run_hakd, case, who, low, dtype, temperature=2.0)
            compare_masked(of(any_backend)("segmentation_loss"), run_masked_segmentation, case, who, low, dtype)


@pytest.mark.parametrize("low", LOWS, ids=str)
def test_features(any_backend, low):
    """A class that a projection's bias masks, where the logits are interpolated or all of them needed first."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 4, 5), torch.randn(2, 6, 4, 5)
    weights = torch.randn(5, 8), torch.randn(5, 6)
    labels = torch.randint(0, 2, (2, 12, 15))
    results = []
    for dtype, backend, mask in ((torch.float32, any_backend, low), (torch.float64, "reference", -2e4)):
        for resolution, kem in (("label", "class"), ("feature", "spatial")):
            bias = torch.zeros(5, dtype=dtype)
            bias[3] = mask
            inputs = leaves(student, teacher, *weights, dtype=dtype)
            loss = functional.projected_hakd_loss(
                *inputs,
                labels,
                student_bias=bias,
                teacher_bias=bias,
                resolution=resolution,
                proj_weight=0.5,
                kem=kem,
                backend=backend,
            )
            results.append((loss, *torch.autograd.grad(loss, inputs)))
    for ours, exact in zip(results[:2], results[2:], strict=True):
        assert all(relative_l2(a, e) <= 2e-6 for a, e in zip(ours, exact, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_module(training):
    """Projectors of backends of their own, which fold a batch norm whose shift masks a class."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 8, 4, 5), torch.randn(2, 6, 2, 3), torch.randint(0, 2, (2, 12, 15))
    results = []
    for low in (-float("inf"), -2e4):
        torch.manual_seed(1)
        module = HeteroAKDLoss(8, 6, 5).train(training)
        with torch.no_grad():
            for projector in (module.student_projector, module.teacher_projector):
                projector[1].bias[3] = low
        loss = module(*inputs).loss
        results.append((loss, *torch.autograd.grad(loss, [p for p in module.parameters() if p.dim() > 1])))
    assert all(relative_l2(a, e) <= 2e-6 for a, e in zip(*results, strict=True))


def test_maps():
    """Of a masked class z^h is -inf, and W what a low logit has."""
    case = make_case("mixed strides", "randn")
    maps, expected = (functional.hakd_maps(*masked(case, "both", low)) for low in (-float("inf"), -2e4))
    valid = (masked(case, "both", 0.0)[2] != 255)[:, None]
    assert (maps[1][:, 2:3][valid] == -float("inf")).all()
    for ours, theirs in zip((maps[0], maps[2]), (expected[0], expected[2]), strict=True):
        assert relative_l2(ours, theirs) <= 1e-6
