"""What the pixel losses of both GPU backends must do: tests that the emulation and Triton's interpreter inherit."""

import pytest
import torch
from cases import OPTIONS, leaves, make_labels, make_logits, other_defaults, pairwise, relative_l2
from gpu_cases import (
    LOWS,
    SEGMENTATION_OPTIONS,
    SHAPES,
    Losses,
    compare_masked,
    make_case,
    run_hakd,
    run_masked_segmentation,
    run_segmentation,
)

from hetero_kernels import reference

CASES = {"shape": ("stride 4", "mixed strides"), "kind": ("randn", "trained")}


def identify(options):
    return "-".join(map(str, options.values()))


def case_of(options):
    """The inputs that CASES's values name, and the other options."""
    options = dict(options)
    return make_case(options.pop("shape"), options.pop("kind")), options


class PixelLossTests:
    """Values and gradients of every option against the float64 reference; then the edges of spec.md.

    An heir says whose functions they are.
    """

    losses: Losses
    cancellation_slack = 1.0  # of the bound, for a loss of 1e-7 that is all cancellation

    @pytest.mark.parametrize("options", list(pairwise(OPTIONS | CASES)), ids=identify)
    def test_hakd_options(self, options):
        case, options = case_of(options)
        self.losses.compare(run_hakd, "hakd_loss", case, **options)

    @pytest.mark.parametrize("options", list(pairwise(SEGMENTATION_OPTIONS | CASES)), ids=identify)
    def test_segmentation_options(self, options):
        case, options = case_of(options)
        self.losses.compare(run_segmentation, "segmentation_loss", case, **options)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("resolution", ["label", "feature"])
    def test_hakd_shapes(self, shape, resolution):
        self.losses.compare(run_hakd, "hakd_loss", make_case(shape, "randn"), temperature=2.0, resolution=resolution)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_segmentation_shapes(self, shape):
        self.losses.compare(
            run_segmentation, "segmentation_loss", make_case(shape, "randn"), weighted=True, temperature=2.0
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", ["stride 4", "mixed strides", "same grid"])
    def test_half_precision(self, shape, dtype):
        self.losses.compare(run_hakd, "hakd_loss", make_case(shape, "trained"), dtype, temperature=2.0)
        self.losses.compare(run_segmentation, "segmentation_loss", make_case(shape, "trained"), dtype)

    @pytest.mark.parametrize("block", [4, 64], ids=["mixed", "sure everywhere"])
    @pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
    def test_gradient_accuracy_is_absolute(self, temperature, block):
        """The bound of the project on confident logits, with no allowance for eager's errors. Blocks of 64 pixels: one
        class everywhere, and nothing but small differences of numbers near 1."""
        torch.manual_seed(1)
        labels = make_labels(1, (16, 64), 19, ignored=0.0, block=block)
        case = *(make_logits("trained", (1, 19, 4, 16), labels) for _ in range(2)), labels
        for name, run in (("hakd_loss", run_hakd), ("segmentation_loss", run_segmentation)):
            exact = run(getattr(reference, name), case, torch.float64, {"temperature": temperature})
            fused = run(getattr(self.losses, name), case, torch.float32, {"temperature": temperature})
            assert relative_l2(fused["student"], exact["student"]) <= 1e-6, name

    @pytest.mark.parametrize("kind", ["huge", "mixed"])
    @pytest.mark.parametrize("kem", ["class", "spatial", "none"])
    def test_large_logits(self, kind, kem):
        """The guarded mathematics, and tiles of both kinds in one call. A logit of 1e4 is itself uncertain by 5e-4 in
        float32: eager's error is the yardstick."""
        case = make_case("two tiles", kind)
        options = {"temperature": 2.0, "kem": kem}
        exact = run_hakd(reference.hakd_loss, case, torch.float64, options)
        fused, eager = (run_hakd(f, case, torch.float32, options) for f in (self.losses.hakd_loss, reference.hakd_loss))
        for name, expected in exact.items():
            assert fused[name].isfinite().all(), name
            # 1e-20: where both networks agree to 1e-30, "0" and "4e-127" are the same loss.
            error, allowed = (relative_l2(r[name].double() + 1e-20, expected + 1e-20) for r in (fused, eager))
            assert error <= max(1e-5, 8 * allowed), (name, error, allowed)
        if kem == "none":
            self.losses.compare(run_segmentation, "segmentation_loss", case, temperature=2.0, label_smoothing=0.1)

    @pytest.mark.parametrize("divergence", ["kl", "ce"])
    @pytest.mark.parametrize("classes", [7, 200])
    def test_a_teacher_that_is_very_sure_of_the_label(self, classes, divergence):
        """As tests/test_edges.py has it: a loss of about 1 from logits of 1e4."""
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 1, classes, 3, 4)
        labels = torch.randint(0, classes, (1, 3, 4))
        teacher.scatter_(1, labels[:, None], 1e4)
        for kem in ("class", "spatial", "none"):
            options = {"divergence": divergence, "kem": kem, "reduction": "none", "proj_weight": 0.0}
            exact = run_hakd(reference.hakd_loss, (student, teacher, labels), torch.float64, options)
            fused = run_hakd(self.losses.hakd_loss, (student, teacher, labels), torch.float32, options)
            for name in ("loss", "student"):
                assert relative_l2(fused[name], exact[name]) <= 5e-7, (name, kem)

    @pytest.mark.parametrize(
        "who, low, shape, options",
        [
            ("student", LOWS[0], "mixed strides", {}),
            ("student", LOWS[1], "same grid", {"kem": "spatial", "divergence": "ce", "temperature": 2.0}),
            ("teacher", LOWS[0], "same grid", {"kem": "none", "temperature": 0.5, "reduction": "none"}),
            ("teacher", LOWS[1], "mixed strides", {"kmm": False, "resolution": "feature"}),
            ("both", LOWS[0], "equal heights", {"kem": "spatial"}),
            ("both", LOWS[1], "mixed strides", {"divergence": "ce", "align_corners": True}),
        ],
        ids=str,
    )
    def test_masked_classes(self, who, low, shape, options):
        """As tests/test_masked_classes.py has it; in half of the image and in all of it."""
        case = make_case(shape, "randn")
        part = low == LOWS[0]
        compare_masked(self.losses.hakd_loss, run_hakd, case, who, low, part=part, proj_weight=0.5, **options)
        options = {"temperature": options.get("temperature", 1.0), "label_smoothing": 0.0 if who == "both" else 0.1}
        options["with_teacher"] = who != "student"  # whose divergence would be infinite
        compare_masked(self.losses.segmentation_loss, run_masked_segmentation, case, who, low, part=not part, **options)

    def test_a_label_without_mass(self):
        """Infinite, as F.cross_entropy has it with label smoothing, too; its gradient is a number."""
        case = make_case("same grid", "randn")
        case[0][:, 2] = -float("inf")
        options = {"label_smoothing": 0.1, "with_teacher": False}
        out = run_segmentation(self.losses.segmentation_loss, case, torch.float32, options)
        assert out["loss"] == float("inf") and out["student"].isfinite().all()

    @pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
    def test_bounded_and_guarded_agree(self, temperature):
        """One huge logit in a corner sends the tile there through the guarded mathematics: the rest must not notice."""
        case = make_case("same grid", "trained")
        results = []
        for huge in (False, True):
            student, teacher, labels = (t.clone() for t in case)
            labels[:, 0] = 255  # whose row nobody counts
            if huge:
                student[:, :, 0] = 5000.0
            student.requires_grad_()
            self.losses.hakd_loss(student, teacher, labels, temperature=temperature).backward()
            results.append(student.grad)
        assert relative_l2(results[1], results[0]) <= 1e-6

    @pytest.mark.parametrize("temperature", [0.05, 0.02, 1e-3, 1e-6])
    def test_low_temperatures(self, temperature):
        """Classes that the unguarded mathematics takes out must add nothing: at a low T they would."""
        student, teacher, labels = make_case("stride 4", "randn")
        case = (student * 1e-3, teacher * 1e-3, labels)
        self.losses.compare(run_hakd, "hakd_loss", case, temperature=temperature, slack=self.cancellation_slack)
        self.losses.compare(run_hakd, "hakd_loss", (student, teacher, labels), temperature=temperature)

    def test_spatial_on_confident_logits(self):
        for seed in (0, 1):
            self.losses.compare(
                run_hakd, "hakd_loss", make_case("mixed strides", "trained", seed), temperature=2.0, kem="spatial"
            )

    def test_spatial_over_many_programs(self):
        """More programs than are combined at a time, the highest scores in the last of them."""
        torch.manual_seed(0)
        student, teacher = torch.randn(1, 2, 70, 2), torch.randn(1, 2, 70, 2)
        student[:, :, 66:] *= 3
        self.losses.compare(run_hakd, "hakd_loss", (student, teacher, torch.randint(0, 2, (1, 70, 2))), kem="spatial")

    @pytest.mark.parametrize("terms", [("hakd",), ("proj",), ("hakd", "proj")])
    def test_normalizers(self, terms):
        normalizer = {term: torch.tensor(17, dtype=torch.int64) for term in terms}
        case = make_case("stride 4", "randn")
        for kem in ("class", "spatial"):
            self.losses.compare(run_hakd, "hakd_loss", case, normalizer=normalizer, kem=kem)
        normalizer = {{"hakd": "task", "proj": "kd"}[term]: torch.tensor(17.5) for term in terms}
        self.losses.compare(
            run_segmentation, "segmentation_loss", make_case("stride 4", "randn"), normalizer=normalizer
        )

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("kem", ["class", "spatial"])
    def test_no_valid_pixel(self, reduction, kem):
        student, teacher, labels = make_case("stride 4", "randn")
        student, teacher = leaves(student, teacher)
        labels = torch.full_like(labels, 255)
        loss = self.losses.hakd_loss(student, teacher, labels, proj_weight=1.0, reduction=reduction, kem=kem)
        loss = loss + self.losses.segmentation_loss(student, labels, teacher, reduction=reduction)
        loss.sum().backward()
        assert not loss.any() and not student.grad.any() and not teacher.grad.any()

    def test_a_nan_behind_ignored_pixels_counts_for_nothing(self):
        student, teacher, labels = make_case("stride 4", "randn")
        labels[:, :8] = 255
        student[:, :, 0] = float("nan")
        case = (student, teacher, labels)
        out = run_hakd(self.losses.hakd_loss, case, torch.float32, {})
        assert out["loss"].isfinite() and out["student"].isfinite().all() and not out["student"][:, :, 0].any()
        labels[0, 0, 0] = 1
        out = run_hakd(self.losses.hakd_loss, case, torch.float32, {})
        assert out["loss"].isnan()
        for name, run in (("hakd_loss", run_hakd), ("segmentation_loss", run_segmentation)):
            clean = make_case("stride 4", "randn")
            clean[2][:, :8] = 255
            self.losses.compare(run, name, clean)

    def test_another_default_device_and_dtype(self):
        """Every tensor that is made inside names its own."""
        sampled, smoothed = {"resolution": "feature", "kem": "spatial"}, {"reduction": "none", "label_smoothing": 0.1}
        for function, run, shape, options in (
            (self.losses.hakd_loss, run_hakd, "one coarse pixel", sampled),
            (self.losses.segmentation_loss, run_segmentation, "one pixel", smoothed),
        ):
            case = make_case(shape, "randn")
            expected = run(function, case, torch.float32, options)
            with other_defaults(torch.float64):
                actual = run(function, case, torch.float32, options)
            assert all(torch.equal(actual[k], expected[k]) for k in expected)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
    @pytest.mark.parametrize("ignore_index", [-100, 2, 255])
    def test_labels(self, dtype, ignore_index):
        student, teacher, labels = make_case("stride 4", "randn")
        labels = labels.masked_fill(labels == 255, 0 if ignore_index < 0 else ignore_index).to(dtype)
        self.losses.compare(
            run_hakd, "hakd_loss", (student, teacher, labels), ignore_index=ignore_index, resolution="feature"
        )
        self.losses.compare(
            run_segmentation, "segmentation_loss", (student, teacher, labels), ignore_index=ignore_index
        )

    def test_strides(self):
        torch.manual_seed(0)
        labels = make_labels(2, (12, 16), 5, block=2)
        wide = torch.randn(2, 9, 4, 6)[:, 2:7, 1:, ::2]
        last = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
        expanded = torch.randn(1, 5, 3, 1).expand(2, 5, 3, 4)
        for student, teacher in ((wide, last), (last, expanded), (expanded, wide)):
            self.losses.compare(run_hakd, "hakd_loss", (student, teacher, labels.mT.contiguous().mT))
            self.losses.compare(run_segmentation, "segmentation_loss", (student, teacher, labels[:, :, ::2]))

    def test_float64_is_refused(self):
        student, teacher, labels = make_case("stride 4", "randn")
        with pytest.raises(TypeError, match="teacher(_logits)? is float64, expected float32, bfloat16 or float16"):
            self.losses.hakd_loss(student, teacher.double(), labels)

    def test_empty_batch(self):
        student, labels = torch.randn(0, 5, 3, 4, requires_grad=True), torch.zeros(0, 12, 16, dtype=torch.long)
        loss = self.losses.hakd_loss(student, student.detach(), labels)
        loss.backward()
        assert loss == 0 and student.grad.shape == student.shape
        maps = self.losses.hakd_loss(student, student.detach(), labels, reduction="none")
        assert maps.shape == (0, 12, 16)

    def test_two_backwards_agree_and_a_second_derivative_is_an_error(self):
        student, teacher, labels = make_case("stride 4", "randn")
        student.requires_grad_()
        loss = self.losses.hakd_loss(student, teacher, labels)
        first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        gradient = torch.autograd.grad(loss, student, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="second derivatives"):
            gradient.sum().backward()

    def test_runs_are_bit_identical(self):
        """Slots are added up in a fixed order: no atomics on floats."""
        case = make_case("two tiles", "trained")
        first, second = (run_hakd(self.losses.hakd_loss, case, torch.float32, {}) for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)
