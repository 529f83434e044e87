"""``make gpu-check`` as far as it goes without a GPU. Every run is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def gpu_check(output, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", "--output", str(output), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    results = json.loads(output.with_suffix(".json").read_text())["results"]
    return done.returncode, {r["name"]: r for r in results}, output.with_suffix(".md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    code, results, text = gpu_check(tmp_path / "gpu")
    assert code == 1 and len(results) == 8
    assert all(r["status"] == "did not run" and r["detail"] == "torch sees no GPU" for r in results.values())
    assert "| correctness | **did not run** | torch sees no GPU |" in text
    assert gpu_check(tmp_path / "gpu", "--allow-no-gpu")[0] == 0


def test_interpreted(tmp_path):
    code, results, _ = gpu_check(tmp_path / "gpu", "--interpreted", "--allow-no-gpu")
    assert code == 0, results
    assert {r["name"] for r in results.values() if r["status"] == "passed"} == {
        "triton correctness", "triton features", "triton accuracy", "triton identical_runs",
    }  # fmt: skip


def test_a_failed_check_fails_the_run(tmp_path, monkeypatch):
    from benchmarks import gpu_check as module

    def broken():
        raise AssertionError("worse than allowed")

    result = module.check("triton correctness", broken)
    assert result.status == "failed" and "worse than allowed" in result.detail
    monkeypatch.setattr(module, "run_checks", lambda interpreted: [result])
    assert module.main(["--output", str(tmp_path / "gpu"), "--allow-no-gpu"]) == 1
    assert "**failed**" in (tmp_path / "gpu.md").read_text()
