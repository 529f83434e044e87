"""The benchmarks measure what they say, on shapes small enough for a test. No time is asserted."""

import functools
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import relative_l2

from benchmarks import equal_time, memory, report, run, timing
from benchmarks.cases import (
    CASES,
    PAPER_SIZES,
    PIXEL_LOSSES,
    PROJECTED_LOSSES,
    PROJECTIONS,
    SERIES,
    VARIANTS,
    WHOLE_LOSSES,
    DistillationCase,
    Series,
    shrink,
)
from benchmarks.results import COMPARED as COMPARED_PARTS
from benchmarks.steps import INSTRUCTION_SET, Step, fused_backends, make_step, providers

ROOT = Path(__file__).parent.parent
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}
COMPARED = {**WHOLE_LOSSES, **PIXEL_LOSSES, **PROJECTIONS, **PROJECTED_LOSSES}
VARIANT_CASES = {f"{group}: {v.label}": v.case for group, variants in VARIANTS.items() for v in variants}


@pytest.fixture(scope="module", autouse=True)
def processes():
    """Started before the first test, so that they import torch while others run."""
    collect = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider"]
    started = {
        "memory": memory.start(["CE tiny", "K=2"], "cpu", threads=1),
        "collect": subprocess.Popen(collect, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def outcome(case, provider):
    """Loss and gradients of one step."""
    step = make_step(case, provider)
    loss = step()
    return [loss, *(leaf.grad for leaf in step.leaves)]


def assert_same(case, provider, expected):
    for actual, wanted in zip(outcome(case, provider), expected, strict=True):
        assert wanted.norm() > 0
        assert relative_l2(actual, wanted) <= TOLERANCE[getattr(case, "dtype", "float32")], provider


@pytest.mark.parametrize("name", CASES)
def test_providers_of_a_case_compute_the_same_loss_and_gradients(name):
    case = shrink(CASES[name])
    expected = outcome(case, "reference")
    for provider in providers(case):
        if provider not in ("reference", "compile"):
            assert_same(case, provider, expected)


# Of the whole losses two grids, and the feature resolution: tracing one takes seconds.
TRACED = [n for n, c in COMPARED.items() if "compile" in providers(c) and not n.startswith("R101 -> R18, K")]


@pytest.mark.parametrize("name", TRACED)
def test_compiled_provider_computes_the_same_loss_and_gradients(name, monkeypatch):
    """One case as it is timed; the others are traced and differentiated, which is quick, but not translated."""
    case = shrink(COMPARED[name])
    if name != "CE tiny":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    assert_same(case, "compile", outcome(case, "reference"))


@pytest.mark.parametrize("name", VARIANT_CASES)
def test_variants_compute_the_reference(name):
    case = shrink(VARIANT_CASES[name])
    threads = torch.get_num_threads()
    for backend in fused_backends():
        try:
            assert_same(case, backend, outcome(case, "reference"))
        except RuntimeError as error:  # an instruction set that this machine lacks
            assert INSTRUCTION_SET in str(error)
    assert torch.get_num_threads() == threads


def test_linear_cross_entropy_stands_only_where_it_computes_the_same():
    assert [name for name, case in CASES.items() if "linear_cross_entropy" in providers(case)] == [
        "CE of projected features"
    ]


class Recorder:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def forward(self):
        self.calls.append(self.name)

    def backward(self):
        self.calls.append(self.name.upper())


def test_measure_interleaves_and_counts():
    calls = []
    times = timing.measure({n: Recorder(n, calls) for n in "ab"}, seconds=0, rounds=(2, 5), minimum=0)
    assert "".join(calls) == "aAaA" + "bBbB" + 2 * "aAbB"
    assert times["a"]["rounds"] == 2 and set(times["b"]) == {"fwd", "bwd", "both", "rounds"}


def test_rounds_follow_the_budget():
    calls = []
    assert timing.measure({"a": Recorder("a", calls)}, seconds=1e9, rounds=(3, 7), minimum=0)["a"]["rounds"] == 7


def test_a_step_keeps_no_gradient_of_the_call_before():
    leaf = torch.ones(2, requires_grad=True)
    step = Step(lambda: (leaf * 3).sum(), [leaf])
    assert step() == 6 and step() == 6 and leaf.grad.tolist() == [3, 3]
    step.release()
    assert leaf.grad is None and step.loss is None


# Memory -----------------------------------------------------------------------------------------------------------


def test_allocator_peak_sees_a_known_allocation():
    def step():
        kept = torch.empty(2**20, dtype=torch.uint8)
        torch.empty(2**21, dtype=torch.uint8)
        del kept

    assert memory.allocator_peak(step) == 2**20 + 2**21


def test_live_bytes_counts_storages_once_and_forgets_the_dead():
    with memory.LiveBytes() as counted:
        kept = torch.empty(1000, dtype=torch.uint8)
        view = kept[10:]
        torch.empty(500, dtype=torch.uint8)
        view.add_(1)
    assert (counted.peak, counted.live) == (1500, 1000)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_predicted_peak_is_the_measured_one(backend):
    """Fake and real tensors agree to the byte; the allocator also sees what operators need inside: of eager's a trifle,
    of ours the packed logits and torch's convolutions."""
    whole = PAPER_SIZES["Cityscapes, 512x1024, batch 8"]
    small = replace(whole, batch=2, num_classes=7, size=(128, 192), student_channels=24, teacher_channels=40)
    step = make_step(small, backend)
    step()
    step.release()
    predicted, measured = memory.predict(small, backend), memory.allocator_peak(step)
    step.release()
    with memory.LiveBytes(fake=False) as real:
        step()
    assert predicted == pytest.approx(real.peak, rel=0.001)
    assert 0.97 * measured <= predicted <= measured if backend == "reference" else measured / 2 <= predicted <= measured


def test_predicted_peaks_at_the_papers_sizes():
    for whole in PAPER_SIZES.values():
        eager, fused = memory.predict(whole, "reference"), memory.predict(whole, "cpu")
        full = 4 * whole.batch * whole.num_classes * whole.size[0] * whole.size[1]  # one float32 map at the labels
        assert eager > 5 * full and fused < full


def test_measured_memory_in_a_fresh_process(processes):
    peaks = memory.finish(processes["memory"])
    assert set(peaks) == {"CE tiny", "K=2"}
    assert peaks["CE tiny"]["gradients"] == 4 * 2 * 8 * 8 <= peaks["CE tiny"]["allocator"]


def test_a_failed_measurement_says_why():
    failed = subprocess.Popen(
        [sys.executable, "-c", "raise ValueError('out of luck')"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="out of luck"):
        memory.finish(failed)
    with pytest.raises(ValueError, match="provider is 'nobody'"):
        make_step(shrink(CASES["CE tiny"]), "nobody")


# The run and its report --------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_suite(monkeypatch):
    """Every part of the run on shapes of a few pixels, without torch.compile."""
    chosen = {
        "WHOLE_LOSSES": {n: shrink(c) for n, c in list(WHOLE_LOSSES.items())[:2]},
        "PIXEL_LOSSES": {n: shrink(PIXEL_LOSSES[n]) for n in ("hakd K=19", "CE", "CE tiny")},
        "PROJECTED_LOSSES": {n: replace(shrink(c), compiled=False) for n, c in PROJECTED_LOSSES.items()},
        "PROJECTIONS": {n: shrink(c) for n, c in list(PROJECTIONS.items())[:2]},
        "VARIANTS": {
            group: tuple(replace(v, case=shrink(v.case)) for v in VARIANTS[group])
            for group in ("temperature", "threads", "instruction set")
        },
        "SERIES": {
            name: Series(name, series.quantity, series.points[:1]) for name, series in list(SERIES.items())[1:2]
        },
        "TRAIN_STEPS": {"tiny": DistillationCase("tiny", num_classes=3, batch=2, crop=(32, 32))},
    }
    for name, value in chosen.items():
        monkeypatch.setattr(run, name, value)
    everyone = run.providers
    monkeypatch.setattr(run, "providers", lambda *case: [p for p in everyone(*case) if p != "compile"])
    peaks = {"allocator": 300, "resident": 4096, "gradients": 100}  # measured in fresh processes, by a test above
    monkeypatch.setattr(memory, "start", lambda names, provider, threads: names)
    monkeypatch.setattr(memory, "finish", lambda names: dict.fromkeys(names, peaks))


def test_run_and_report_end_to_end(tiny_suite, tmp_path, monkeypatch):
    monkeypatch.setattr(timing.measure, "__defaults__", (0.0, (3, 3), 0.0))
    threads = torch.get_num_threads()
    json_file, page_file = tmp_path / "results.json", tmp_path / "docs" / "performance.md"
    try:
        run.main(["--output", str(json_file), "--seconds", "0", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    results = json.loads(json_file.read_text())
    assert set(results) == {"machine", *run.PARTS}
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["threads"] == 1
    for row in (row for part in COMPARED_PARTS for row in results[part]):
        assert all(t["rounds"] >= 3 and t["both"][1] <= t["both"][0] <= t["both"][2] for t in row["times"].values())

    report.main([str(json_file), "--output", str(page_file)])
    page = page_file.read_text()
    for part in (
        "The whole loss",
        "Losses on logits",
        "The projections alone",
        "Losses on features",
        "distillation step",
        "Memory at the paper's sizes",
        "temper",
    ):
        assert part in page
    assert "Predicted" in page and "asked within 150 us" in page and "None" not in page and "nan" not in page
    pictures = re.findall(r"\]\((pictures/[^)]+\.svg)\)", page)
    assert len(pictures) == 3
    drawn = {name: (page_file.parent / name).read_text() for name in pictures}
    for svg in drawn.values():
        ElementTree.fromstring(svg)
        assert "<dc:date>" not in svg
    report.main([str(json_file), "--output", str(page_file)])
    assert page == page_file.read_text()
    assert drawn == {name: (page_file.parent / name).read_text() for name in pictures}


def comparison(eager, compiled, mine, **more):
    times = {
        name: {"fwd": [s / 2] * 3, "bwd": [s / 2] * 3, "both": [s, 0.9 * s, 1.2 * s], "rounds": 3}
        for name, s in (("reference", eager), ("compile", compiled), ("cpu", mine))
    }
    return {"case": "hakd", "elements": 10**6, "times": times, "asked": {}, **more}


def test_report_marks_a_loss_as_a_loss():
    row = comparison(2.0, 0.5, 1.0)
    table = report.comparison_table([row])
    assert "| 2x | 0.5x, **slower** |" in table and "1000.00" in table
    assert report.losses([row]) == ["hakd: 2x the time of torch.compile (cpu)"]
    page = report.page({"machine": timing.machine(), "pixel_losses": [row]}, {})
    assert "- hakd: 2x the time of torch.compile (cpu)" in page
    won = report.page({"machine": timing.machine(), "pixel_losses": [comparison(2.0, 2.0, 1.0)]}, {})
    assert "No case" in won and "**slower**" not in won.split("## ", 1)[1]


def test_report_judges_what_is_asked():
    asked = {"reference": (4, 3), "compile": (4, 3)}
    for seconds, words in ((4.0, "asked 4x (3x): met"), (3.5, "acceptable"), (2.0, "**missed**")):
        assert words in report.comparison_table([comparison(seconds, 9.0, 1.0, asked=asked)])
    slow = comparison(1.0, 1.0, 1.1, allowance=0.05)
    assert "asked within 50000 us: **missed**" in report.comparison_table([slow])
    times = {"both": [1.0, 1.0, 1.0]}
    rows = [
        {"label": "a", "elements": 1, "limit": None, "times": times},
        {"label": "b", "elements": 1, "limit": ("<=", 1.1), "times": {"both": [1.2, 1.0, 1.3]}},
        {"label": "c", "elements": 2, "limit": ("<=", 1.1), "times": {"both": [2.0, 2.0, 2.0]}},
        {"label": "d", "elements": 1, "limit": (">=", 1.8), "times": {"both": [1.9, 1.9, 1.9]}},
    ]
    table = report.variants_table([{"group": "g", "backend": "cpu", "rows": rows, "missing": {"e": "not here"}}])
    assert "<= 1.1: **missed**" in table and "<= 1.1: met" in table and ">= 1.8: met" in table and "not here" in table
    peaks = {
        "reference": {"allocator": 1100, "resident": 1100, "gradients": 100},
        "cpu": {"allocator": 120, "resident": 120, "gradients": 100},
    }
    memory_row = {"case": "hakd", "peaks": peaks}
    assert "2 %; asked 1 %: **missed**" in report.memory_table([memory_row], {"hakd": 0.01})


def test_earlier_parts_stay_only_on_the_same_machine(tmp_path):
    output = tmp_path / "results.json"
    runner = run.Runner("cpu", torch.get_num_threads(), 0.0)
    output.write_text(json.dumps({"machine": timing.machine(), "memory": ["kept"]}))
    assert run.measure_parts(runner, [], output)["memory"] == ["kept"]
    output.write_text(json.dumps({"machine": {"processor": "another"}, "memory": ["old"]}))
    assert "memory" not in run.measure_parts(runner, [], output)


def test_quick_table(tiny_suite, monkeypatch):
    monkeypatch.setattr(timing.measure, "__defaults__", (0.0, (3, 3), 0.0))
    monkeypatch.setattr(run, "QUICK", ("CE", "projected K=19"))
    monkeypatch.setattr(
        run, "make_step", lambda case, name, device: make_step(case, name.replace("compile", "reference"))
    )
    table = run.quick(run.Runner("cpu", torch.get_num_threads(), 0.0))
    assert "| CE |" in table and "| projected K=19 |" in table and "against torch.compile" in table


def test_equal_time_gives_each_backend_the_steps_that_fit(tmp_path, monkeypatch):
    calls = []

    def distill(output, config, steps, options):
        of = dict(zip(options[::2], options[1::2], strict=True))
        calls.append((output.name, steps))
        seconds = 0.5 if of["--loss.backend"] == "reference" else 0.25
        every = int(of.get("--runtime.evaluate_every", steps))
        losses = [{"event": "train", "step": s, "seconds_per_step": seconds * (1 + 9 * (s < 5))} for s in range(1, 11)]
        return losses + [{"event": "evaluation", "step": s, "miou": 0.1} for s in range(every, steps + 1, every)]

    monkeypatch.setattr(equal_time, "distill", distill)
    arguments = ["--minutes", "2", "--seeds", "3", "--evaluations", "4", "--output", str(tmp_path / "runs")]
    equal_time.main([*arguments, "--picture", str(tmp_path / "p.svg"), "--", "--data.root", "there"])
    timed = [("timed-reference-0", 40), ("timed-cpu-0", 40), ("timed-reference-1", 40), ("timed-cpu-1", 40)]
    assert calls == [*timed, ("reference-seed3", 240), ("cpu-seed3", 480)]
    found = json.loads((tmp_path / "runs" / "equal-time.json").read_text())
    assert found["seconds"] == {"reference": 0.5, "cpu": 0.25}
    assert all(row["minutes"] == [0.5, 1.0, 1.5, 2.0] for row in found["runs"])
    assert "minutes of training" in (tmp_path / "p.svg").read_text()
    calls.clear()
    equal_time.main(arguments)
    assert not [name for name, _ in calls if name.startswith("timed")]


@pytest.mark.parametrize(
    "options", [("--evaluations", "0"), ("--minutes", "nan"), ("--seeds", "-1"), ("--config", "none.yaml")]
)
def test_equal_time_refuses_before_it_times(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        equal_time.main([*options, "--output", str(tmp_path / "runs")])
    assert ended.value.code == 2 and options[0] in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_equal_time_takes_no_run_of_another_length(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 10}\n{"event": "evaluation", "step": 20}\n')
    assert len(equal_time.distill(tmp_path, Path("any.yaml"), 20, [])) == 2
    with pytest.raises(SystemExit, match="holds a run of 20 steps, not of 40"):
        equal_time.distill(tmp_path, Path("any.yaml"), 40, [])


def test_suites_collect(processes):
    out, _ = processes["collect"].communicate()
    assert processes["collect"].returncode == 0, out
    for stem in (*COMPARED_PARTS, "train_step"):
        assert f"bench_{stem}.py::bench_{stem}[" in out


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_rates_still_compile():
    options = ["-std=c++20", "-march=native", "-w", "-fsyntax-only"]
    done = subprocess.run(["g++", *options, "benchmarks/rates.cpp"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
