"""Batches of gradients, saved-tensor hooks and forward mode: what autograd has beside one backward."""

import pytest
import torch
import torch.nn.functional as F
from cases import leaves, relative_l2
from torch.autograd import forward_ad

from hetero_kernels import HeteroAKDLoss, functional


def make_inputs():
    torch.manual_seed(0)
    return leaves(torch.randn(2, 6, 3, 4), torch.randn(2, 5, 3, 4), torch.randn(4, 6), torch.randn(4, 5))


LABELS = torch.arange(96).view(2, 6, 8) * 7 // 3 % 5
LABELS[LABELS == 4] = 255


def calls(backend):
    """Every fused loss, of features and weights."""

    def logits(a, b, c, d):
        return torch.einsum("bchw,kc->bkhw", a, c), torch.einsum("bchw,kc->bkhw", b, d)

    def module(a, b, c, d, **options):
        loss = HeteroAKDLoss(6, 5, 4, backend=backend)
        weights = {"student_projector.0.weight": c[..., None, None], "teacher_projector.0.weight": d[..., None, None]}
        return torch.func.functional_call(loss, weights, (a, b, LABELS, *logits(a, b, c, d))).loss

    def hakd(*inputs, **options):
        return functional.hakd_loss(*logits(*inputs), LABELS, proj_weight=0.5, backend=backend, **options)

    def segmentation(*inputs, **options):
        student, teacher = logits(*inputs)
        return functional.segmentation_loss(student, LABELS, teacher, backend=backend, **options)

    def projected(*inputs, **options):
        return functional.projected_hakd_loss(
            *inputs, LABELS, proj_weight=0.5, resolution="feature", backend=backend, **options
        )

    return {"hakd": hakd, "segmentation": segmentation, "projected": projected, "module": module}


def gradients(loss, inputs, upstream, **options):
    return torch.autograd.grad(loss, inputs, upstream, retain_graph=True, allow_unused=True, **options)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["hakd", "segmentation", "projected", "module"])
def test_batched_gradients_are_those_of_a_loop(any_backend, name):
    loss = calls(any_backend)[name]
    for reduction in ("mean", "none") if name != "module" else ("mean",):
        inputs = make_inputs()
        out = loss(*inputs, reduction=reduction)
        upstream = torch.randn(3, *out.shape)
        batched = gradients(out, inputs, upstream, is_grads_batched=True)
        each = [gradients(out, inputs, one) for one in upstream]
        for i, ours in enumerate(batched):
            if ours is not None:
                assert relative_l2(ours, torch.stack([g[i] for g in each])) <= 1e-6, (reduction, i)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["hakd", "segmentation", "projected"])
def test_jacobians(any_backend, name):
    """Of a few pixels, vectorized and not, by both of torch's ways."""
    call = calls(any_backend)[name]
    student, *others = make_inputs()
    others = [x.detach() for x in others]

    def loss(x):
        return call(x, *others, reduction="none").flatten()[20:23]

    expected = torch.autograd.functional.jacobian(loss, student)
    assert expected.any()
    assert relative_l2(torch.autograd.functional.jacobian(loss, student, vectorize=True), expected) <= 1e-6
    assert relative_l2(torch.func.jacrev(loss)(student.detach()), expected) <= 1e-6


@pytest.mark.parametrize("name", ["hakd", "segmentation", "projected", "module"])
def test_buffers_that_hooks_hand_out_are_not_written(any_backend, name):
    """Twice the same buffer, as an offloading pool does: every backward gives what the first gave."""
    pool = []

    def pack(x):
        pool.append(x.detach().clone())
        return len(pool) - 1

    inputs = make_inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: pool[i]):
        loss = calls(any_backend)[name](*inputs) * 3.0
    before = [x.clone() for x in pool]
    first, last = gradients(loss, inputs, None), torch.autograd.grad(loss, inputs, allow_unused=True)
    assert pool and all(torch.equal(a, b) for a, b in zip(pool, before, strict=True))
    for a, b in zip(first, last, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    plain = torch.autograd.grad(calls(any_backend)[name](*inputs) * 3.0, inputs, allow_unused=True)
    for a, b in zip(first, plain, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_hooks_that_give_one_buffer_to_all(any_backend):
    """A pool of one buffer for every tensor of a shape, filled at unpacking: as torch's own cross-entropy under it."""
    saved, pool = [], {}

    def pack(x):
        saved.append(x.detach().clone())
        return len(saved) - 1

    def unpack(i):
        buffer = pool.setdefault((saved[i].shape, saved[i].dtype), saved[i].clone())
        buffer.copy_(saved[i])
        return buffer

    student, labels = torch.randn(2, 4, 6, 8), LABELS
    results = []
    for loss in (
        lambda s: functional.segmentation_loss(s, labels, backend=any_backend),
        lambda s: F.cross_entropy(s, labels, ignore_index=255),
    ):
        (s,) = leaves(student)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            total = 2.0 * loss(s) + 3.0 * loss(s * 0.5)
        results.append(torch.autograd.grad(total, s)[0])
    assert relative_l2(*results) <= 1e-6


@pytest.mark.parametrize("name", ["hakd", "segmentation", "projected"])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_raises(backend, name, grad):
    """It would be zero without a word."""
    call = calls(backend)[name]
    inputs = [x.detach() for x in make_inputs()]
    tangents = tuple(map(torch.ones_like, inputs))
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative; backend='reference'"):
                call(*dual)
            call(*inputs)  # without a tangent it is like any call
        with pytest.raises(NotImplementedError, match="forward"):
            torch.func.jvp(call, tuple(inputs), tangents)
