"""However kernels are cut into programs, the results are right: every alternative, and the loop over many classes."""

import functools

import pytest
import torch
from cases import OPTIONS, leaves, pairwise, relative_l2
from gpu_cases import (
    LOWS,
    TRITON,
    compare_masked,
    make_case,
    masked,
    run_hakd,
    run_masked_segmentation,
    run_segmentation,
)

from hetero_kernels import functional, reference
from hetero_kernels.triton import tuning

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on what is masked later


@pytest.fixture
def looped(monkeypatch):
    """Any number of classes counts as many."""
    monkeypatch.setattr(tuning, "_TILES", {"nvidia": ()})
    tuning.tilings.cache_clear()
    yield
    tuning.tilings.cache_clear()


@pytest.mark.parametrize("options", list(pairwise(OPTIONS)), ids=lambda o: "-".join(map(str, o.values())))
def test_looped_hakd_options(looped, options):
    TRITON.compare(run_hakd, "hakd_loss", make_case("mixed strides", "trained"), **options)


@pytest.mark.parametrize("shape", ["stride 4", "two tiles", "same grid", "tall bands"])
def test_looped_shapes(looped, shape):
    TRITON.compare(run_hakd, "hakd_loss", make_case(shape, "randn"), temperature=2.0)
    TRITON.compare(run_segmentation, "segmentation_loss", make_case(shape, "randn"), weighted=True, temperature=2.0)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"with_teacher": False, "reduction": "none"}])
@pytest.mark.parametrize("kind", ["trained", "huge"])
def test_looped_segmentation_options(looped, kind, options):
    TRITON.compare(run_segmentation, "segmentation_loss", make_case("mixed strides", kind), **options)


def test_looped_masked_classes(looped):
    case = make_case("narrow tiles", "randn")
    compare_masked(TRITON.hakd_loss, run_hakd, case, "student", LOWS[1])
    compare_masked(TRITON.hakd_loss, run_hakd, case, "both", LOWS[0], part=True, divergence="ce")
    compare_masked(TRITON.segmentation_loss, run_masked_segmentation, case, "both", LOWS[0], label_smoothing=0.1)
    # The teacher's best class is one that the student excludes.
    student, teacher, labels = masked(make_case("mixed strides", "randn"), "student", LOWS[0])
    teacher[:, 2] += 20.0
    student.requires_grad_()
    loss = TRITON.hakd_loss(student, teacher, labels, kmm=False)
    loss.backward()
    assert loss == float("inf") and student.grad.isfinite().all()


def test_looped_maxima_that_rise(looped):
    """Every block has higher logits than the one before: sums are rescaled."""
    student, teacher, labels = make_case("narrow tiles", "randn")
    rising = torch.linspace(0, 30, 40)[:, None, None]
    for kem in ("class", "none"):
        TRITON.compare(run_hakd, "hakd_loss", (student + rising, teacher + rising.flip(0), labels), kem=kem)
        TRITON.compare(
            run_hakd, "hakd_loss", (student + rising.flip(0), teacher + rising, labels), kem=kem, divergence="ce"
        )


def test_looped_accuracy_is_absolute(looped):
    """Networks that are sure of one class everywhere: small differences of numbers near 1."""
    torch.manual_seed(1)
    labels = torch.full((1, 4, 32), 3)
    student, teacher = torch.randn(2, 1, 19, 2, 8).mul(2).sub(10).unbind()
    for logits in (student, teacher):
        logits[:, 3] += 20
    for function, run in (("hakd_loss", run_hakd), ("segmentation_loss", run_segmentation)):
        exact = run(getattr(reference, function), (student, teacher, labels), torch.float64, {"temperature": 2.0})
        ours = functools.partial(getattr(functional, function), backend="triton")
        fused = run(ours, (student, teacher, labels), torch.float32, {"temperature": 2.0})
        assert relative_l2(fused["student"], exact["student"]) <= 1e-6, function


def test_looped_half_precision(looped):
    TRITON.compare(run_hakd, "hakd_loss", make_case("stride 4", "trained"), torch.bfloat16, temperature=2.0)


def test_many_classes_are_looped_over(launches):
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(1, 200, 1, 2), torch.randn(1, 200, 2, 2), torch.randint(0, 200, (1, 2, 3))
    (student,) = leaves(student)
    functional.hakd_loss(student, teacher, labels, kem="spatial", backend="triton").backward()
    assert launches == ["scores_kernel", "combine_scores_kernel", "hakd_many_kernel", "finish_kernel"]
    launches.clear()
    functional.segmentation_loss(student, labels, teacher, backend="triton").backward()
    assert launches == ["segmentation_many_kernel", "finish_kernel"]


@pytest.mark.parametrize("shape", ["two tiles", "narrow tiles", "many classes"])
@pytest.mark.parametrize("alternative", [1, 2, 3])
def test_alternatives(monkeypatch, shape, alternative):
    student, teacher, labels = make_case(shape, "randn")
    offered = tuning.tilings(student.shape[1], "nvidia")
    chosen = offered[alternative]
    monkeypatch.setattr(tuning, "tilings", lambda classes, family: (chosen,))
    TRITON.compare(run_hakd, "hakd_loss", (student, teacher, labels), temperature=2.0)
    TRITON.compare(run_segmentation, "segmentation_loss", (student, teacher, labels))


def projected(tensors, labels):
    tensors = leaves(*tensors)
    loss = functional.projected_hakd_loss(*tensors, labels, resolution="feature", proj_weight=0.5, backend="triton")
    loss.backward()
    return [loss.detach(), *(t.grad for t in tensors)]


def test_searching(monkeypatch):
    """Each call's shapes are searched once; what is found gives what the table's entry gives."""
    torch.manual_seed(0)
    student, teacher, labels = make_case("stride 4", "randn")
    features = [torch.randn(2, c, 5, 6) for c in (20, 40)] + [torch.randn(5, c) for c in (20, 40)]
    expected = projected(features, labels), functional.hakd_loss(student, teacher, labels, backend="triton")
    monkeypatch.setenv("HETERO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_found", {})
    timed = []
    monkeypatch.setattr(
        tuning, "_milliseconds", lambda run, device: run() and 10.0 - len(timed) * (timed.append(1) or 1)
    )
    for _ in range(2):
        found = projected(features, labels), functional.hakd_loss(student, teacher, labels, backend="triton")
    assert all(relative_l2(a, e) <= 1e-6 for a, e in zip(found[0], expected[0], strict=True))
    assert relative_l2(found[1], expected[1]) <= 1e-6
    # The last alternative took the least: it was chosen, after as many were timed as are offered.
    looked_up = {key[0]: choice for key, choice in tuning._found.items()}
    pixels, device = 2 * 5 * 6, torch.device("cpu")
    offered = {
        "hakd_loss": tuning.tilings(5, "nvidia"),
        "projected_hakd_loss": tuning.feature_tilings(5, pixels, 4, device, "nvidia"),
    }
    assert looked_up == {name: choices[-1] for name, choices in offered.items()}
    assert len(timed) == sum(map(len, offered.values()))


def test_what_does_not_fit_is_passed_over(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def run(choice):
        if choice != "small":
            raise OutOfResources(300_000, 101_376, "shared memory")
        return choice

    assert tuning._fastest("key", ("large", "small", "larger"), run, torch.device("cpu")) == "small"


@pytest.mark.parametrize("family", ["nvidia", "amd"])
def test_tables(family):
    for classes in (1, 19, 32, 33, 96, 150, 192, 193, 1000):
        for tiling in tuning.tilings(classes, family):
            assert tiling.looped or sum(tiling.blocks) >= classes
            assert all(block & (block - 1) == 0 and block <= 128 for block in tiling.blocks)
        assert tuning.tilings(classes, family)[0].looped == (classes > 192)


def test_amd_entries(monkeypatch):
    monkeypatch.setattr(tuning, "family", lambda device: "amd")
    TRITON.compare(run_hakd, "hakd_loss", make_case("two tiles", "trained"), temperature=2.0)
    TRITON.compare(run_segmentation, "segmentation_loss", make_case("narrow tiles", "trained"))
