"""The operators as PyTorch sees them: opcheck, compilation, autograd's corners, autocast, threads, memory."""

import subprocess
import sys

import pytest
import torch
from cases import leaves, make_case, relative_l2
from torch._dynamo.testing import CompileCounterWithBackend

from hetero_kernels import available_backends, functional
from hetero_kernels.ops import backends, pixel_losses
from hetero_kernels.ops.library import pack_scalars, scale_gradient_op

HAKD_OPTIONS = (True, "class", "kl", "label", False, 255)


@pytest.fixture
def case():
    return make_case("mixed strides", "randn")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("double", [False, True])
def test_opcheck(case, reduction, double):
    student, teacher, labels = case
    if double:
        teacher = teacher.double()
    student, teacher = leaves(student, teacher)
    scalars, normalizer = pack_scalars(2.0, 1.0, 0.5), torch.tensor(100.0)
    wanted = (reduction != "none",) * 2
    torch.library.opcheck(
        pixel_losses.hakd_op,
        (student, teacher, labels, scalars, normalizer, None, None, *HAKD_OPTIONS, reduction, *wanted, ""),
    )
    torch.library.opcheck(
        pixel_losses.segmentation_op,
        (student, teacher.detach(), labels, torch.ones(7), pack_scalars(2.0, 1.0, 0.1, 0.0), None, normalizer, None,
         False, 255, reduction, wanted[0], ""),
    )  # fmt: skip
    gradient = torch.randn(student.shape)
    for factor in (torch.tensor(2.0), None):
        # Not test_autograd_registration's backward: differentiating it is an error on purpose.
        torch.library.opcheck(scale_gradient_op, (gradient, factor, student.detach().half(), ""))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(dynamic, reduction):
    def step(student, teacher, labels):
        loss = functional.hakd_loss(student, teacher, labels, proj_weight=0.5, reduction=reduction)
        return loss + functional.segmentation_loss(student, labels, teacher, reduction=reduction)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for shape in ("mixed strides", "stride 8") if dynamic else ("mixed strides",):
        student, teacher, labels = make_case(shape, "randn")
        a, b, c, d = leaves(student, teacher, student, teacher)
        actual, expected = compiled(a, b, labels), step(c, d, labels)
        actual.sum().backward()
        expected.sum().backward()
        assert torch.equal(actual, expected) or relative_l2(actual, expected) <= 1e-7
        assert relative_l2(a.grad, c.grad) <= 1e-7 and relative_l2(b.grad, d.grad) <= 1e-7
    assert counter.frame_count == 1 or dynamic


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_changing_weights_do_not_recompile(case, backend):
    from hetero_kernels import HeteroAKDLoss

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager" if backend == "reference" else "inductor")
    module = HeteroAKDLoss(7, 7, 7, backend=backend)
    plain = HeteroAKDLoss(7, 7, 7, backend=backend)
    plain.load_state_dict(module.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    student, teacher, labels = case
    frames = []
    for step in range(6):
        for m in (module, plain):
            m.hakd_weight, m.proj_weight = 0.1 + 0.1 * step, 1.0 - 0.1 * step
            m.kd_weight, m.task_weight, m.temperature = 0.3 * step, 1.5 - 0.2 * step, 1.0 + 0.25 * step
        loss = compiled(student, teacher, labels, student, teacher).loss
        assert relative_l2(loss, plain(student, teacher, labels, student, teacher).loss) <= 1e-6
        frames.append(counter.frame_count)
    assert frames[-1] == frames[1] <= 2  # at most one more when numbers are first seen to change


def test_second_derivative_is_a_clear_error(backend, case):
    for reduction in ("mean", "none"):
        student, teacher, labels = case
        (student,) = leaves(student)
        loss = functional.hakd_loss(student, teacher, labels, reduction=reduction, backend=backend).sum()
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives of the fused losses are not implemented"):
            gradient.square().sum().backward()
        loss = functional.segmentation_loss(student, labels, reduction=reduction, backend=backend).sum()
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            gradient.square().sum().backward()


def gradient_elements(call):
    """How many elements the gradient outputs of hakd_loss have while ``call`` runs."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is pixel_losses.hakd_op:
                seen.append((out[3].numel(), out[4].numel()))
            return out

    with Spy():
        call()
    return seen


def test_no_work_for_inputs_without_gradient(case):
    student, teacher, labels = case
    n_s, n_t = student.numel(), teacher.numel()
    for s_grad, t_grad in ((False, False), (True, False), (False, True), (True, True)):
        s, t = student.clone().requires_grad_(s_grad), teacher.clone().requires_grad_(t_grad)
        seen = gradient_elements(lambda s=s, t=t: functional.hakd_loss(s, t, labels, proj_weight=1.0))
        assert seen == [(n_s * s_grad, n_t * t_grad)]
    s = student.clone().requires_grad_()
    with torch.no_grad():
        assert gradient_elements(lambda: functional.hakd_loss(s, s, labels)) == [(0, 0)]
    # reduction="none": nothing in the forward, one pass in the backward, for the inputs that need it only
    seen = gradient_elements(lambda: functional.hakd_loss(s, teacher, labels, reduction="none").sum().backward())
    assert seen == [(0, 0), (n_s, 0)]


def test_unrequested_gradients_are_computed_in_backward(case):
    """The operator called without its hint still differentiates."""
    student, teacher, labels = case
    (a,), (b,) = leaves(student), leaves(student)
    options = (*HAKD_OPTIONS, "mean", False, False, "")
    arguments = (teacher, labels, pack_scalars(1.0, 1.0, 0.0), None, None, None, *options)
    pixel_losses.hakd_op(a, *arguments)[0].backward()
    functional.hakd_loss(b, teacher, labels).backward()
    assert torch.equal(a.grad, b.grad)


def test_autocast_changes_nothing(any_backend, case):
    student, teacher, labels = case
    results = []
    for enabled in (False, True):
        s, t = leaves(student.bfloat16(), teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = functional.hakd_loss(s, t, labels, proj_weight=1.0, backend=any_backend)
            loss = loss + functional.segmentation_loss(s, labels, t, backend=any_backend)
        loss.backward()
        results.append((loss, s.grad, t.grad))
    assert results[0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inputs_and_saved_gradients_are_not_written(backend, case):
    student, teacher, labels = case
    (s,) = leaves(student)
    loss = functional.hakd_loss(s, teacher, labels, backend=backend)
    (first,) = torch.autograd.grad(loss, s, retain_graph=True)
    kept = first.clone()
    first.zero_()  # a user clipping in place
    assert torch.equal(torch.autograd.grad(loss, s)[0], kept)
    assert torch.equal(s, student)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_last_backward_takes_the_saved_gradient_itself(case, upstream):
    """Without a copy where the graph is freed, with one where it is kept, or where a caller holds the outputs."""
    student, teacher, labels = case
    (s,) = leaves(student)
    loss = functional.hakd_loss(s, teacher, labels)
    saved = {x.untyped_storage().data_ptr() for x in loss.grad_fn.saved_tensors if x is not None}
    (kept,) = torch.autograd.grad(loss * upstream, s, retain_graph=True)
    assert kept.untyped_storage().data_ptr() not in saved
    (last,) = torch.autograd.grad(loss * upstream, s)
    assert last.untyped_storage().data_ptr() in saved and torch.equal(last, kept)

    arguments = (teacher, labels, pack_scalars(1.0, 1.0, 0.0), None, None, None, *HAKD_OPTIONS, "mean", True, False, "")
    loss, _, _, output, _ = pixel_losses.hakd_op(s, *arguments)
    before = output.clone()
    (gradient,) = torch.autograd.grad(loss * upstream, s)
    assert torch.equal(gradient, kept) and torch.equal(output, before)


@pytest.mark.parametrize("kem", ["class", "spatial"])
def test_bit_identical_for_any_number_of_threads(backend, kem):
    student, teacher, labels = make_case("stride 8", "randn")
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            s, t = leaves(student, teacher)
            out = functional.hakd_loss(s, t, labels, kem=kem, proj_weight=1.0, return_terms=True, backend=backend)
            out.loss.backward()
            results.append((*out, s.grad, t.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


MEMORY = """
import resource, sys, torch
from hetero_kernels import functional
K, h, w, s = 19, 32, 64, 16
student, teacher = torch.randn(1, K, h, w, requires_grad=True), torch.randn(1, K, h, w)
labels = torch.randint(0, K, (1, h * s, w * s))
small = [t[..., :2, :2].detach().clone().requires_grad_() for t in (student, teacher)]
functional.hakd_loss(*small, labels[:, :32, :32]).backward()  # threads, autograd and the library are warm
functional.segmentation_loss(small[0], labels[:, :32, :32], small[1]).backward()
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = resident()
with torch.profiler.profile(profile_memory=True) as prof:
    for reduction in ("mean", "none"):
        functional.hakd_loss(student, teacher, labels, reduction=reduction).sum().backward()
        functional.segmentation_loss(student, labels, teacher, reduction=reduction).sum().backward()
sizes = [e.cpu_memory_usage for e in prof.events() if e.name == "[memory]"]
largest = max([e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"] + sizes)
print(largest, resident() - before, K * h * s * w * s * 4)
"""


def test_no_tensor_of_the_loss_grid_times_classes(case):
    """Neither torch's allocator nor the process sees anything near B x K x H x W."""
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    largest, resident, full = map(int, out.stdout.split())
    assert 0 < largest < full / 8
    assert resident < full / 2


def test_operators_that_a_backend_lacks_go_to_the_next_that_has_them(monkeypatch):
    """Unless the user chose: then torch does what the chosen backend lacks."""
    monkeypatch.setattr(backends, "unavailable", lambda backend, device=None: None)
    monkeypatch.delenv("HETERO_KERNELS_BACKEND", raising=False)
    backends._automatic.cache_clear()
    try:
        assert available_backends("cuda") == available_backends("cuda:1") == ("cuda", "triton", "reference")
        assert backends.select_among(("cpu", "triton"), None, "cuda") == "triton"
        assert backends.select_among(("cpu",), None, "cuda") == "cuda"
        assert backends.select_among(("cpu", "triton"), "cuda", "cuda") == "cuda"
        monkeypatch.setenv("HETERO_KERNELS_BACKEND", "cuda")
        assert backends.select_among(("cpu", "triton"), None, "cuda") == "cuda"
    finally:
        backends._automatic.cache_clear()


def test_a_replayed_graph_cannot_keep_scalars():
    """The host reads ``scalars`` to choose launches: whoever captures CUDA graphs (mode="reduce-overhead") must leave
    the operators that have them out, or a ramp of weights or temperature would go unseen."""
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("hetero_kernels::")}
    operators = [getattr(torch.ops.hetero_kernels, name.partition("::")[2]).default for name in names]
    unsafe = {op.name() for op in operators if torch.Tag.cudagraph_unsafe in op.tags}
    assert unsafe == {op.name() for op in operators if any(a.name == "scalars" for a in op._schema.arguments)}
    assert {f"hetero_kernels::{loss}{twin}" for loss in ("hakd_loss", "segmentation_loss", "projected_hakd_loss")
            for twin in ("", "_triton")} <= unsafe  # fmt: skip


def test_a_ramp_under_reduce_overhead(case):
    student, teacher, labels = case

    def loss(temperature):
        return functional.hakd_loss(student, teacher, labels, temperature=temperature)

    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for temperature in (1.0, 2.0, 3.5):
        torch.testing.assert_close(compiled(temperature), loss(temperature))
