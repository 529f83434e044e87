"""The benchmarks measure what they say, on shapes small enough for a test. No time is asserted."""

import json
from dataclasses import replace

import pytest
import torch
from cases import relative_l2

from benchmarks import bench_pixel_losses, memory, timing
from benchmarks.cases import PIXEL_LOSSES, make_step


def test_providers_of_a_case_compute_the_same_loss():
    for case in PIXEL_LOSSES.values():
        small = replace(case, shape=(*case.shape[:2], 4, 4), size=(32, 32))
        assert relative_l2(make_step(small, "cpu")(), make_step(small, "reference")()) <= 1e-5


def test_table_has_every_ratio(tmp_path, capsys):
    bench_pixel_losses.main(["--cases", "tiny", "--rounds", "3", "--json", str(tmp_path / "rows.json")])
    out = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    ms = row["milliseconds"]
    assert row["times_reference"] == pytest.approx(ms["reference"][0] / ms["cpu"][0])
    assert "| tiny |" in out and "x compile" in out and torch.__version__ in out


def test_measure_interleaves_and_counts():
    calls = []
    timing.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, minimum=0)
    assert calls == ["a", "a", "b", "b", "a", "b", "a", "b"]


def test_allocator_peak_sees_a_known_allocation():
    def step():
        kept = torch.empty(2**20, dtype=torch.uint8)
        torch.empty(2**21, dtype=torch.uint8)
        del kept

    assert memory.allocator_peak(step) == 2**20 + 2**21
