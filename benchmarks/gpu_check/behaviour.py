"""What a training step asks beside right numbers: streams, graphs, compilation, wrong labels, memory that holds NaN,
runs that are all the same."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from .calls import CALLS, MODULES, PROBLEMS, make_step
from .case import LIMITS, Case, Data
from .compare import judge
from .device import Device, count
from .problems import Inputs, Problem, Results, call, make_inputs, run

LOSSES = ("hakd", "segmentation", "projected")
RUNS = 20
NAN = float("nan")


def _prepared(name: str, backend: str, device: Device, **changes: Any) -> tuple[Problem, Inputs, Callable]:
    from hetero_kernels import functional

    problem = replace(PROBLEMS[name], **changes)
    function = functools.partial(getattr(functional, problem.loss), backend=device.backend(backend))
    return problem, make_inputs(problem, device.device), function


def assert_same(ours: Results, expected: Results, what: str) -> None:
    """Bit for bit, NaN included."""
    differ = [
        k for k, e in expected.items()
        if not (torch.equal(ours[k].isnan(), e.isnan()) and torch.equal(ours[k].nan_to_num(), e.nan_to_num()))
    ]  # fmt: skip
    assert not differ and ours.keys() == expected.keys(), f"{what}: {', '.join(differ)} differ"


def without_synchronisation(name: str, backend: str, device: Device) -> None:
    step = make_step(name, device.device, device.backend(backend))
    step()  # compiles
    with device.without_synchronisation():
        step()


def identical_runs(name: str, backend: str, device: Device) -> Data:
    step = make_step(name, device.device, device.backend(backend))

    def results() -> Results:  # without statistics, which move on from run to run
        return {k: v for k, v in step().items() if "running" not in k}

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # of what torch computes
        first = results()
        for i in range(1, RUNS):
            assert_same(results(), first, f"run {i + 1}")
    return {"detail": f"{RUNS} runs are bit-identical"}


def on_a_side_stream(name: str, backend: str, device: Device) -> None:
    """Inputs that another stream is still writing, results that this one reads."""
    problem, inputs, function = _prepared(name, backend, device)
    expected = run(function, problem, inputs)
    late = {k: torch.zeros_like(x) for k, x in inputs.leaves.items()}
    busy = torch.ones(512, 512, device=device.device)
    with device.side_stream():
        for _ in range(20):
            busy = busy @ busy * 1e-3
        for k, x in inputs.leaves.items():
            late[k].copy_(x)
        actual = run(function, problem, Inputs(late, inputs.labels, inputs.fixed))
    assert_same(actual, expected, "on a side stream")


def on_another_device(name: str, backend: str, device: Device) -> Data:
    """Tensors of a device that is not the current one."""
    problem, inputs, function = _prepared(name, backend, device)
    there = make_inputs(problem, device.others()[0])
    expected, actual = run(function, problem, inputs), run(function, problem, there)
    assert all(x.device == there.labels.device for x in actual.values()), "results are on the wrong device"
    here = {k: x.to(device.device) for k, x in actual.items()}
    return judge(here, expected, expected)


def checkpointed(name: str, backend: str, device: Device) -> None:
    problem, inputs, function = _prepared(name, backend, device)
    expected = run(function, problem, inputs)

    def again(*arguments: Any, **options: Any) -> Any:
        return checkpoint.checkpoint(function, *arguments, use_reentrant=False, **options)

    assert_same(run(again, problem, inputs), expected, "checkpointed")


def wrong_label(name: str, backend: str, device: Device) -> None:
    """NaN, without waiting; an error where that is asked for."""
    problem, inputs, function = _prepared(name, backend, device)
    run(function, problem, inputs)  # compiles
    inputs.labels[-1, -1, -1] = inputs.labels[-1, 0, 0] = 77
    try:
        with device.without_synchronisation():
            loss = run(function, problem, inputs)["loss"]
        assert device.kind != "cpu", "a wrong label on the CPU raised nothing"
        assert loss.isnan().all(), f"a wrong label gave a loss of {float(loss)}, expected NaN"
    except RuntimeError as error:
        assert device.kind == "cpu" and "77" in str(error), error
    with environment("HETERO_KERNELS_CHECK_LABELS", "1"):
        try:
            run(function, problem, inputs)
        except RuntimeError as error:
            assert "77" in str(error), error
        else:
            raise AssertionError("HETERO_KERNELS_CHECK_LABELS=1 raised nothing for a wrong label")


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def nan_below_ignored_pixels(name: str, backend: str, device: Device) -> Data:
    """The upper half of the labels is ignored, NaN in the topmost row of both networks: nothing changes. One of these
    pixels counts: the loss is NaN."""
    problem, inputs, function = _prepared(name, backend, device)
    inputs.labels[:, : inputs.labels.shape[1] // 2] = 255
    clean = run(function, problem, inputs)
    for x in inputs.leaves.values():
        if x.dim() == 4:
            x[:, :, 0] = NAN
    dirty = run(function, problem, inputs)
    # The guarded mathematics where the bounded was: not the same bits.
    data = judge(dirty, clean, {k: v.double() for k, v in clean.items()})
    inputs.labels[0, 0, 0] = 1
    assert run(function, problem, inputs)["loss"].isnan(), "a NaN that counts vanished"
    return data


def nothing_to_average(name: str, backend: str, device: Device) -> None:
    for batch in (2, 0):
        problem, inputs, function = _prepared(name, backend, device, batch=batch)
        inputs.labels.fill_(255)
        results = run(function, problem, inputs)
        for key, x in results.items():
            assert not x.any(), f"{key} is not 0 with {batch} images and no valid pixel"
        maps = run(function, problem, inputs, reduction="none")["loss"]
        assert maps.shape[0] == batch and not maps.any()


def differentiated_again(name: str, backend: str, device: Device) -> None:
    problem, inputs, function = _prepared(name, backend, device)
    leaves = {k: x.detach().clone().requires_grad_() for k, x in inputs.leaves.items()}
    loss = call(function, problem, leaves, inputs)
    student = next(iter(leaves.values()))
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second), "two backwards of one graph differ"
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        assert "second derivatives" in str(error), error
    else:
        raise AssertionError("a second derivative raised nothing")


def deterministic(name: str, backend: str, device: Device) -> Data:
    """torch's deterministic mode, which fills memory that nobody has written with NaN."""
    step = make_step(name, device.device, device.backend(backend))
    expected = step()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        actual = make_step(name, device.device, device.backend(backend))()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(False)
    missing = [k for k, x in actual.items() if not x.isfinite().all()]
    assert not missing, f"memory that nobody wrote is in {', '.join(missing)}"
    if name in MODULES:  # torch's own parts may take other algorithms
        return judge(actual, expected, {k: v.double() for k, v in expected.items()}, least=1e-5)
    assert_same(actual, expected, "in deterministic mode")
    return {}


def captured(name: str, backend: str, device: Device) -> None:
    """A CUDA graph of forward and backward, replayed on other inputs."""
    problem, inputs, function = _prepared(name, backend, device)
    other = make_inputs(problem, device.device, seed=1)

    def step() -> list[Tensor]:
        return list(run(function, problem, inputs).values())

    replay, results = device.capture(step)
    for k, x in inputs.leaves.items():
        x.copy_(other.leaves[k])
    inputs.labels.copy_(other.labels)
    replay()
    device.synchronize()
    expected = run(function, problem, other)
    assert_same(dict(zip(expected, results, strict=True)), expected, "a replayed graph")


def _compiled(function: Callable, device: Device, **options: Any) -> Callable:
    torch._dynamo.reset()
    if device.kind == "cpu":  # no code is generated in a rehearsal
        return torch.compile(function, fullgraph=True, backend="aot_eager")
    return torch.compile(function, fullgraph=True, **options)


def _loss_and_gradients(loss: Tensor, leaves: dict[str, Tensor]) -> Results:
    gradients = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, 3.0))
    return {"loss": loss.detach(), **{f"d {k}": g for k, g in zip(leaves, gradients, strict=True)}}


def compiled(name: str, backend: str, device: Device) -> None:
    """``torch.compile(fullgraph=True)``."""
    problem, inputs, function = _prepared(name, backend, device)
    student = [k for k in inputs.leaves if problem.loss != "segmentation_loss" or k.startswith("student")]
    leaves = {k: x.detach().clone().requires_grad_(k in student) for k, x in inputs.leaves.items()}
    learned = {k: leaves[k] for k in student}

    def step(temperature: float) -> Tensor:
        return call(function, problem, leaves, inputs, temperature=temperature)

    fast = _compiled(step, device)
    for temperature in (1.0, 2.0):
        expected = _loss_and_gradients(step(temperature), learned)
        assert_same(_loss_and_gradients(fast(temperature), learned), expected, f"compiled, T={temperature}")


def reduced_overhead(name: str, backend: str, device: Device) -> None:
    """``mode="reduce-overhead"`` under a temperature that changes: no graph may keep an old one."""
    problem, inputs, function = _prepared(name, backend, device)
    learned = {k: x.detach().clone().requires_grad_() for k, x in inputs.leaves.items() if k.startswith("student")}

    def step(temperature: float, *students: Tensor) -> Tensor:
        leaves = {**inputs.leaves, **dict(zip(learned, students, strict=True))}
        return call(function, problem, leaves, inputs, temperature=temperature)

    fast = _compiled(step, device, mode="reduce-overhead")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for temperature in (2.0, 2.0, 2.0, 1.0, 4.0, 1.5, 2.0):
            torch.compiler.cudagraph_mark_step_begin()
            actual = _loss_and_gradients(fast(temperature, *learned.values()), learned)
            actual = {k: v.clone() for k, v in actual.items()}
            expected = _loss_and_gradients(step(temperature, *learned.values()), learned)
            assert_same(actual, expected, f"reduce-overhead, T={temperature}")


def float64_is_refused(name: str, backend: str, device: Device) -> None:
    problem, inputs, function = _prepared(name, backend, device)
    if device.kind == "cpu" and device.backend(backend) == "cpu":
        return  # which computes in it
    try:
        run(function, problem, inputs, torch.float64)
    except TypeError as error:
        assert "float64" in str(error), error
    else:
        raise AssertionError("float64 was taken")


WITH_EVERY_CALL: tuple[Callable, ...] = (without_synchronisation, identical_runs, deterministic)
WITH_EVERY_LOSS: tuple[Callable, ...] = (
    on_a_side_stream, on_another_device, checkpointed, wrong_label, nan_below_ignored_pixels, nothing_to_average,
    differentiated_again, captured, float64_is_refused, compiled, reduced_overhead,
)  # fmt: skip


def cases(backend: str) -> list[Case]:
    tried = [(what, name) for what in WITH_EVERY_CALL for name in CALLS]
    tried += [(what, name) for what in WITH_EVERY_LOSS for name in LOSSES]
    if count() < 2:
        tried = [one for one in tried if one[0] is not on_another_device]
    slow = (compiled, reduced_overhead)  # whose code torch generates
    return [
        Case(
            f"{backend}/{what.__name__.replace('_', ' ')}: {name}", functools.partial(what, name, backend), backend,
            rehearse=backend == "cuda", limit=LIMITS["triton" if what in slow else backend],
        )
        for what, name in tried
    ]  # fmt: skip
