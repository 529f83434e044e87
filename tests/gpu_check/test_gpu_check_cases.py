"""The cases: what they cover, that they pass where everything is right (on the CPU's kernels), and that they notice."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check import accuracy, behaviour, calls, compare, modules, paper, plan, predicted, tilings, worker
from benchmarks.gpu_check.case import Case, Wrong, load
from benchmarks.gpu_check.device import open_device
from benchmarks.gpu_check.problems import LAYOUTS, Problem, make_inputs, run
from benchmarks.gpu_check.records import PASSED
from hetero_kernels import functional, reference

SLOW = ("compiled", "reduced overhead", "a crop", "K=600", "K=1000")  # `make gpu-check` rehearses them


@pytest.fixture(scope="module")
def device():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_device("cpu")
    torch.set_num_threads(threads)


def test_every_case_has_a_name_of_its_own():
    names = [case.name for wave in plan.WAVES for stage in wave for case in load(stage.source)]
    assert len(names) == len(set(names)) > 500
    twice = [Case("same", print)] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "twice", lambda: twice, raising=False)
        with pytest.raises(ValueError, match="several cases named same"):
            load("benchmarks.gpu_check.modules:twice")


@pytest.mark.parametrize("name", ["HAKD", "SEGMENTATION", "PROJECTED"])
def test_every_two_options_meet(name):
    options, met = getattr(accuracy, name), set()
    for chosen in accuracy.pairwise(options):
        assert chosen.keys() == options.keys()
        met |= set(itertools.combinations(chosen.items(), 2))
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(options, 2) for x in options[a] for y in options[b]}
    assert wanted <= met


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def test_tools_are_shown_every_operator(device):
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    defined = {name for name in names if name.startswith("hetero_kernels::") and f"{name}_triton" in names}
    with Operators() as operators:
        for name in calls.CALLS:
            calls.make_step(name, device.device, "cpu")()
    assert defined and defined <= {name.partition(".")[0] for name in operators.seen}


@pytest.mark.parametrize("source", ["suite:cuda_cases", "times:cases", "machine:cases"])
def test_cases_pass_where_everything_is_right(device, source, monkeypatch):
    for case in load(f"benchmarks.gpu_check.{source}"):
        if not case.rehearse or case.backend == "triton" or any(word in case.name for word in SLOW):
            continue
        outcome = worker.perform(case, device)
        assert outcome["status"] == PASSED, (case.name, outcome)


def check_with(monkeypatch, change, problem):
    """The check of a problem whose loss or gradients are changed."""
    plain = functional.hakd_loss

    def changed(*arguments, **options):
        out = plain(*arguments, **options)
        return out._replace(loss=change(out.loss))

    monkeypatch.setattr(functional, "hakd_loss", changed)
    return compare.check(problem, "cuda", open_device("cpu"))


def test_a_wrong_value_or_gradient_is_noticed(monkeypatch):
    assert compare.check(calls.PROBLEMS["hakd"], "cuda", open_device("cpu"))["worst"] < 1
    for change, what in (
        (lambda loss: loss + 2e-6 * loss.detach().abs(), "loss"),
        (lambda loss: loss + 2e-6 * (loss - loss.detach()), "d student_logits"),
        (lambda loss: loss * float("nan"), "loss"),
    ):
        problem = Problem("hakd_loss", 2, 3, calls.GRIDS, kind="trained", options={"divergence": "ce"})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Wrong) as raised:
            check_with(patch, change, problem)
        assert what in str(raised.value) and raised.value.data["results"]["loss"]["bound"] == 1e-6


def test_a_bound_gives_way_only_where_eager_is_beyond_it():
    exact = {"d x": torch.ones(1000, dtype=torch.float64)}
    near, far, farther = ({"d x": torch.full((1000,), 1 + e)} for e in (5e-7, 3e-6, 9e-6))
    assert compare.judge(near, far, exact)["results"]["d x"]["relaxed"] is False
    data = compare.judge(far, far, exact)
    assert data["results"]["d x"]["relaxed"] and "beyond it, as eager is: d x" in data["detail"]
    for ours, eager in ((far, near), (farther, far)):
        with pytest.raises(Wrong, match="d x"):
            compare.judge(ours, eager, exact)
    with pytest.raises(Wrong, match="eager's"):
        compare.judge({"d x": near["d x"].double()}, near, exact)


def test_behaviour_is_noticed(monkeypatch, device):
    """A loss with a run-to-run difference, uninitialised memory, a temperature that is frozen, a silent wrong label."""
    plain, runs = functional.hakd_loss, itertools.count()

    def changed(change):
        def loss(*arguments, **options):
            out = plain(*arguments, **options)
            return out._replace(loss=change(out.loss)) if isinstance(out, tuple) else change(out)

        return loss

    for change, what, words in (
        (lambda loss: loss * (1 + 1e-6 * next(runs)), behaviour.identical_runs, "run 2: .* differ"),
        (lambda loss: loss + torch.empty(10)[3], behaviour.deterministic, "memory that nobody wrote|differ"),
        (lambda loss: loss.nan_to_num() + 1, behaviour.nothing_to_average, "loss is not 0"),
        (lambda loss: loss.nan_to_num(), behaviour.nan_below_ignored_pixels, "a NaN that counts vanished"),
    ):
        monkeypatch.setattr(functional, "hakd_loss", changed(change))
        with pytest.raises(AssertionError, match=words):
            what("hakd", "cuda", device)


def test_a_frozen_temperature_is_noticed(device):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="T="):
        patch.setattr(behaviour, "_compiled", lambda step, device, **_: lambda temperature, *a: step(2.0, *a))
        behaviour.reduced_overhead("hakd", "cuda", device)


def test_layouts_are_what_they_say(device):
    x = torch.randn(2, 3, 4, 5)
    for name, layout in LAYOUTS.items():
        assert torch.equal(layout(x), x), name
    assert LAYOUTS["misaligned"](x).data_ptr() % 8 == 4
    assert not LAYOUTS["sliced"](x).is_contiguous() and not LAYOUTS["transposed"](x).is_contiguous()


def test_least_bytes():
    what = Problem("hakd_loss", 1, 3, ((2, 2), (2, 2), (8, 8)), wanted="student")
    given = make_inputs(what, torch.device("cpu"))
    assert paper.least_bytes(what, given) == 3 * 12 * 4 + 64 * 8


def test_names_of_predictions_are_names_of_sizes():
    assert {*predicted.NAMES.values(), *predicted.PROJECTED.values()} <= set(paper.SIZES)
    assert set(tilings.TUNED) <= set(paper.SIZES)


def test_uneven_upstream_gradients_reach_every_pixel():
    problem = calls.PROBLEMS["hakd none"]
    given = make_inputs(problem, torch.device("cpu"))
    uneven, even = (run(reference.hakd_loss, problem, given, even=e)["d student_logits"] for e in (False, True))
    assert compare.relative_l2(uneven, even) > 0.1
