"""What the projection of both GPU backends must do, against float64 and against the CPU's: values, gradients, buffers,
the losses on what it gives. Tests that the emulation and Triton's interpreter inherit; shapes are a few tiles.
"""

import copy

import pytest
import torch
from cases import OPTIONS, TOLERANCE, leaves, make_labels, make_logits, pairwise, relative_l2
from gpu_cases import cancellation, make_case
from test_projection import LAYOUTS, by_torch, check_autocast, compare, make_projector, run

from hetero_kernels import HeteroAKDLoss, functional, reference
from hetero_kernels.ops import backends
from hetero_kernels.ops import projection as ops
from hetero_kernels.ops.library import pack_scalars

F32 = torch.float32
PROJECTORS = ("conv", "conv_bn", "conv_bn_relu")
# (B, C, h, w, K): one tile, several with rests of pixels and channels, two chunks of classes.
SHAPES = {"small": (2, 7, 5, 3, 4), "tiles": (2, 70, 9, 16, 19), "chunks": (1, 20, 3, 4, 170)}
LOSS_OPTIONS = OPTIONS | {"relu": ((False, False), (True, True), (True, False))}


def make(shape="small", mean=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    batch, channels, height, width, classes = SHAPES[shape]
    spread = torch.linspace(0.5, 1.5, channels)[:, None, None]
    return (torch.randn(batch, channels, height, width) * spread + mean * spread).to(dtype), classes


def raw_case(shape, kind, relu):
    """Raw logits of both networks whose meaning is what ``kind`` makes; scale and shift beside them."""
    student, teacher, labels = make_case(shape, kind)
    torch.manual_seed(5)
    out = []
    for y in (student, teacher):
        scale, shift = torch.rand(y.shape[1]) + 0.5, torch.randn(y.shape[1])
        out.append(((y - shift[:, None, None]) / scale[:, None, None], scale, shift))
    return (*out[0], *out[1]), relu, labels


def by_reference(tensors, relu, labels, options):
    networks = []
    for i in range(2):
        z, scale, shift = tensors[3 * i : 3 * i + 3]
        y = z * scale[:, None, None] + shift[:, None, None]
        networks.append(y.relu() if relu[i] else y)
    return reference.hakd_loss(*networks, labels, return_terms=True, **options)


class ProjectionTests:
    """An heir says which backend: what modules are told, and the name of its operators."""

    backend: str | None
    operators: str
    approximate_exponentials = False  # good to 2^-22: what is left of terms of either sign has their errors
    infinity_stays = True  # logits of an infinite feature are as in torch; else NaN may be among them

    def make_ours(self, features, classes, projector="conv_bn", **changes):
        module = make_projector(features.shape[1], classes, projector, **changes)
        module.backend = self.backend
        return module

    def loss(self, tensors, relu, labels, options):
        networks = [(*tensors[3 * i : 3 * i + 3], relu[i]) for i in range(2)]
        options = {"kmm": True, "kem": "class", "divergence": "kl", "resolution": "label", "align_corners": False,
                   "reduction": "mean", "temperature": 1.0, "normalizer": None, "hakd_weight": 1.0, "proj_weight": 0.0,
                   **options}  # fmt: skip
        return functional.hakd_loss_of_projections(
            *networks, labels, return_terms=True, backend=self.backend, **options
        )

    def check_loss(self, case, bound=TOLERANCE[F32], **options):
        tensors, relu, labels = case
        results = []
        for function, dtype in (
            (self.loss, torch.float32),
            (by_reference, torch.float64),
            (by_reference, torch.float32),
        ):
            given = leaves(*tensors, dtype=dtype)
            out = function(given, relu, labels, options)
            upstream = torch.linspace(0.5, 1.5, out.loss.numel()).view_as(out.loss).to(out.loss.dtype)
            out.loss.backward(upstream)
            results.append([*out, *(g.grad for g in given)])
        for i, (actual, exact, eager) in enumerate(zip(*results, strict=True)):
            # 1e-20: where both networks agree to 1e-30, "0" and "4e-127" are the same loss.
            error, allowed = (relative_l2(r.double() + 1e-20, exact + 1e-20) for r in (actual, eager))
            assert error <= max(bound, allowed), (i, error, allowed)

    @pytest.mark.parametrize("projector", PROJECTORS)
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_values_gradients_and_buffers(self, shape, projector, training):
        features, classes = make(shape)
        compare(self.make_ours(features, classes, projector).train(training), features)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout):
        features, classes = make("small")
        training = layout != "expanded"  # all values of a channel are the same
        compare(self.make_ours(features, classes).train(training), LAYOUTS[layout](features))

    @pytest.mark.parametrize(
        ("dtype", "layout", "training"),
        [(torch.bfloat16, "channels_last", True), (torch.bfloat16, "dense", False), (torch.float16, "dense", True)],
    )
    def test_dtypes(self, dtype, layout, training):
        features, classes = make("tiles", dtype=dtype)
        compare(self.make_ours(features, classes).train(training), LAYOUTS[layout](features))

    def test_channels_far_from_zero(self):
        """Mean 100, deviation 1: the logits are as right as at mean 0, and better than torch's."""
        features, classes = make("tiles", mean=100.0)
        module = self.make_ours(features, classes)
        exact = by_torch(copy.deepcopy(module).double(), features.double())
        assert relative_l2(module(features), exact) <= 6e-7 < relative_l2(by_torch(module, features), exact)
        compare(self.make_ours(features, classes), features)

    def test_the_pilot_is_the_cpus(self):
        """Of runs of which some hold a NaN or a pixel far from all others."""
        features, _ = make("tiles", mean=3.0)
        for channel, count in enumerate((0, 1, 2, 3, 4)):
            for at in ((0, 1, 2), (0, 3, 6), (1, 5, 10), (1, 7, 14))[:count]:
                features[at[0], channel, at[1], at[2]] = float("nan")
        features[0, 9, 1, 2] = 1e9
        theirs, ours = (ops.project(features, torch.zeros(1, 70), True, "none", b)[1] for b in ("cpu", self.operators))
        assert (theirs[:5] != 0).sum() == 4 and theirs[9].abs() < 10  # what was planted is there
        assert relative_l2(ours, theirs) <= 1e-6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("projector", PROJECTORS)
    def test_autocast_rounds_factors_as_torch(self, dtype, projector):
        features, classes = make("small", mean=1.0)
        check_autocast(self.make_ours(features, classes, projector), features, dtype)

    def test_features_that_no_gradient_reaches_count_for_nothing(self):
        features, classes = make("small")
        features[0, :, 0] = float("nan")
        features[1, 0, 2, 2] = float("inf")
        module = self.make_ours(features, classes, "conv")
        (x,) = leaves(features)
        y = module(x)
        clean = torch.isfinite(y).all(1, keepdim=True)
        torch.where(clean, y, 0.0).square().sum().backward()
        exact, finite = copy.deepcopy(module).double(), torch.where(clean, features, 0.0).double()
        exact.zero_grad()
        (z,) = leaves(finite)
        torch.where(clean, by_torch(exact, z), 0.0).square().sum().backward()
        assert relative_l2(module[0].weight.grad, exact[0].weight.grad) <= 2e-6
        assert relative_l2(x.grad, z.grad) <= 2e-6

    @pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", ["inf", "-inf", "3.4028e38"])
    def test_infinite_features(self, value, dtype):
        """And one that would round to infinity; the other pixels' logits are what they are without."""
        features, classes = make("tiles", dtype=dtype)
        features[1, 3, 2, 2] = float(value)
        module = self.make_ours(features, classes, "conv").eval()
        weight = module[0].weight
        with torch.no_grad():
            weight *= 0.1
            weight[0, 3], weight[1, 3] = 0.5, -0.13  # exact in a tensor core, and not
            y, exact = module(features), by_torch(copy.deepcopy(module).double(), features.double())
        at = y[1, :, 2, 2].clone(), exact[1, :, 2, 2].clone()
        y[1, :, 2, 2] = exact[1, :, 2, 2] = 0
        assert relative_l2(y, exact) <= (2e-6 if y.dtype == F32 else 1e-2)
        if not self.infinity_stays:
            assert not at[0].isfinite().any()
        elif at[1].isfinite().all():
            assert torch.allclose(at[0].double(), at[1].to(y.dtype).double(), rtol=2e-2)
        else:
            assert torch.equal(at[0].double(), at[1])

    @pytest.mark.parametrize("projector", PROJECTORS)
    def test_an_empty_batch_counts_and_no_more(self, projector):
        module = make_projector(7, 4, projector)
        module.backend = self.backend
        before = [b.clone() for b in module.buffers()]
        (x,) = leaves(torch.randn(0, 7, 3, 5))
        module(x).sum().backward()
        assert x.grad.shape == x.shape and not module[0].weight.grad.any()
        for i, (now, then) in enumerate(zip(module.buffers(), before, strict=True)):
            assert torch.equal(now, then + (i == 2))

    @pytest.mark.parametrize("frozen", ["0.weight", "features"])
    def test_parameters_and_features_freeze(self, frozen):
        """One gradient alone: other launches make it."""
        features, classes = make("small")
        module = self.make_ours(features, classes, "conv_bn_relu")
        expected = copy.deepcopy(module).double()
        results = []
        for m, x, forward in ((module, features, lambda m, x: m(x)), (expected, features.double(), by_torch)):
            for name, p in m.named_parameters():
                p.requires_grad_(frozen != name)
            x = x.clone().requires_grad_(frozen != "features")
            y = forward(m, x)  # not its square, on which batch norm leaves the weight next to no gradient
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            results.append([x.grad, *(p.grad for p in m.parameters())])
        for actual, wanted in zip(*results, strict=True):
            assert (actual is None) == (wanted is None)
            assert actual is None or relative_l2(actual, wanted) <= 2e-6

    @pytest.mark.parametrize("statistics", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_opcheck(self, statistics, dtype):
        for layout in ("dense", "channels_last"):
            features, classes = make("small", dtype=dtype)
            x, weight = leaves(LAYOUTS[layout](features), torch.randn(classes, features.shape[1]))
            op = getattr(torch.ops.hetero_kernels, f"project_{self.operators}").default
            torch.library.opcheck(op, (x, weight, statistics, "none", ""))

    @pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")
    def test_the_operators_give_what_the_cpus_do(self):
        features, classes = make("tiles", mean=3.0)
        weight = torch.randn(classes, features.shape[1])
        results = []
        for backend in ("cpu", self.operators):
            x, w = leaves(features, weight)
            z, pilot, statistics = ops.project(x, w, True, "none", backend)
            torch.manual_seed(3)
            upstream, by_statistics = torch.randn(z.shape), torch.randn(4, classes, dtype=torch.float64)
            torch.autograd.backward((z, statistics), (upstream, by_statistics))
            results.append((z, statistics[:3], pilot, statistics[3], x.grad, w.grad))
        for theirs, ours in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype and relative_l2(ours, theirs) <= 2e-6

    def test_runs_are_bit_identical(self):
        features, classes = make("tiles")
        upstream = torch.linspace(-1, 1, 2 * 19 * 9 * 16).view(2, 19, 9, 16)
        first, second = (
            run(lambda m, x: m(x), self.make_ours(features, classes, "conv_bn_relu"), features, upstream)
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("options", list(pairwise(LOSS_OPTIONS)), ids=lambda o: "-".join(map(str, o.values())))
    def test_normalized_options(self, options):
        options = dict(options)
        relu = options.pop("relu")
        self.check_loss(raw_case("equal heights", "trained", relu), proj_weight=0.5, **options)

    @pytest.mark.parametrize(
        ("shape", "resolution"),
        [("stride 4", "label"), ("narrow tiles", "label"), ("one class", "label"), ("same grid", "feature"),
         ("mixed strides", "feature")],
    )  # fmt: skip
    def test_normalized_shapes(self, shape, resolution):
        self.check_loss(
            raw_case(shape, "randn", (True, False)), temperature=2.0, proj_weight=0.5, resolution=resolution
        )

    def test_the_guard_looks_at_what_logits_mean(self):
        """Raw logits of 1e3 that mean 10, and of 1 that mean 1e3."""
        (s, s_scale, s_shift, t, t_scale, t_shift), relu, labels = raw_case("same grid", "trained", (False, False))
        self.check_loss(
            ((s * 1e3, s_scale / 1e3, s_shift, t * 1e3, t_scale / 1e3, t_shift), relu, labels), proj_weight=0.5
        )
        self.check_loss(((s, s_scale * 1e2, s_shift, t, t_scale * 1e2, t_shift), relu, labels), 1e-5, proj_weight=0.5)

    @pytest.mark.parametrize("relu", [False, True])
    def test_a_nan_that_only_ignored_pixels_reach_counts_for_nothing(self, relu):
        (s, *rest), _, labels = raw_case("stride 4", "randn", None)
        labels[:, :8] = 255
        s[:, :, 0] = float("nan")
        given = leaves(s, *rest)
        loss = self.loss(given, (relu, relu), labels, {"proj_weight": 0.5}).loss
        loss.backward()
        assert loss.isfinite() and all(g.grad.isfinite().all() for g in given) and not given[0].grad[:, :, 0].any()
        labels[0, 0, 0] = 1
        assert self.loss(given, (relu, relu), labels, {"proj_weight": 0.5}).loss.isnan()

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_opcheck_of_the_loss(self, reduction):
        """What tests/test_projection.py asks of the CPU's is registered by the same code: but for shapes and dtypes."""
        torch.manual_seed(0)
        s, t = leaves(torch.randn(2, 3, 1, 2), torch.randn(2, 3, 1, 1))
        scales = leaves(*(torch.rand(3) + 0.5 for _ in range(4)))
        wanted = (reduction != "none",) * 2
        arguments = (
            s, *scales[:2], t, *scales[2:], make_labels(2, (2, 3), 3), pack_scalars(2.0, 1.0, 0.5), None, None, None,
            True, False, True, "class", "kl", "label", False, 255, reduction, *wanted, "",
        )  # fmt: skip
        op = getattr(torch.ops.hetero_kernels, f"normalized_hakd_loss_{self.operators}").default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))

    @pytest.mark.parametrize(
        ("projector", "training", "resolution"),
        [
            ("conv", True, "label"),
            ("conv_bn", True, "label"),
            ("conv_bn", False, "label"),
            ("conv_bn_relu", True, "feature"),
        ],
    )
    def test_the_whole_loss(self, projector, training, resolution):
        torch.manual_seed(0)
        labels = make_labels(2, (5, 7), 5)
        features = torch.randn(2, 12, 3, 4), torch.randn(2, 20, 2, 3)
        logits = make_logits("randn", (2, 5, 3, 4), labels), make_logits("randn", (2, 5, 2, 2), labels)
        loss = HeteroAKDLoss(12, 20, 5, projector=projector, resolution=resolution, backend=self.backend).train(
            training
        )
        eager = copy.deepcopy(loss)
        eager.backend = eager.student_projector.backend = eager.teacher_projector.backend = "reference"
        projectors = copy.deepcopy(eager).double()
        with torch.no_grad():
            projected = (
                projectors.student_projector(features[0].double()), projectors.teacher_projector(features[1].double())
            )  # fmt: skip
        results = []
        for module, dtype in ((loss, F32), (copy.deepcopy(eager).double(), torch.float64), (eager, F32)):
            given = leaves(*features, *logits, dtype=dtype)
            out = module(given[0], given[1], labels, given[2], given[3].detach())
            out.loss.backward()
            results.append(
                [*out, *(g.grad for g in given[:3]), *(p.grad for p in module.parameters()), *module.buffers()]
            )
        for i, (actual, exact, plain) in enumerate(zip(*results, strict=True)):
            bound = 2e-6 if i == 3 else TOLERANCE[F32]  # hakd: pixels of either sign cancel, 0.0014 is left of them
            if i == 3 and self.approximate_exponentials:
                # Their errors times what cancels: by either way of splitting floats the sum is off by 4 to 6e-6 here.
                bound = 3e-6 * cancellation("hakd_loss", (*projected, labels), {"resolution": resolution})
            error = relative_l2(actual, exact)
            assert error <= max(bound, relative_l2(plain, exact)), (i, error)
