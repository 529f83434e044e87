"""The commands under torchrun, as the documentation starts them: a comparison, its evaluation, a notice to stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from heteroakd.cli import main
from heteroakd.training.checkpoint import load_checkpoint
from test_distributed import on_two_processes, start_torchrun
from test_interruption import wait_for_step

CONFIG = """
data: {crop_size: [32, 32], image_size: [32, 32], train_images: 6, val_images: 3}
student: {architecture: fpn, encoder: tu-mobilenetv3_small_050, weights: null}
teacher: {checkpoint: teacher/last.pt}
optimizer: {precision: bf16, ema_decay: 0.5}
schedule: {steps: 2, batch_size: 4}
runtime: {device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 1, workers: 1, log_every: 1}
"""
TEACHER = CONFIG.replace("student:", "model:").replace("teacher: {checkpoint: teacher/last.pt}\n", "")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and config.yaml."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "teacher.yaml").write_text(TEACHER)
    options = ["--runtime.workers", "0", "--output", str(folder / "teacher")]
    assert main(["teacher", "--config", str(folder / "teacher.yaml"), *options]) == 0
    return folder


def test_comparison_on_two_processes_and_its_evaluation(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    compare = ["compare", "--config", "config.yaml", "--methods", "[heteroakd]", "--seeds", "[5]", "--output", "runs"]
    assert main([*compare, "--processes", "2"]) == 0
    run = Path("runs/heteroakd-seed5")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["steps"] == 2 and summary["images"] == 3
    checkpoint = load_checkpoint(run / "last.pt")
    assert checkpoint.updated and checkpoint.teacher and len(checkpoint.random_states) == 2
    evaluate = ["evaluate", "--checkpoint", str(run / "last.pt"), "--projections", "true", "--threads", "1", "--output"]
    assert main([*evaluate, "alone.json"]) == 0
    together = on_two_processes("-m", "heteroakd", *evaluate, "together.json", folder=workplace)
    assert together.returncode == 0, together.stderr
    alone = json.loads(Path("alone.json").read_text())
    assert alone == json.loads(Path("together.json").read_text())
    assert alone["miou"] == summary["miou"] and len(alone["projections"]) == 3
    assert together.stdout.count("(mIoU over 3 images)") == 1  # one process prints


def test_notice_to_torchrun_is_followed_by_a_checkpoint(workplace: Path) -> None:
    """It passes SIGTERM on to each process's group, with the workers in it."""
    command = ["-m", "heteroakd", "distill", "--config", "config.yaml", "--method", "heteroakd", "--resume_or_start"]
    command += ["--schedule.steps", "100000", "--runtime.save_every", "0", "--output", "noticed"]
    process = start_torchrun(*command, folder=workplace)
    try:
        wait_for_step(workplace / "noticed", 2, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # torchrun alone can end its processes
            process.communicate(timeout=120)
    assert process.returncode != 0 and "DataLoader worker" not in errors
    checkpoint = load_checkpoint(workplace / "noticed" / "last.pt")
    assert checkpoint.step >= 2 and f"stopped at step {checkpoint.step} of 100000" in errors
    assert all(value.isfinite().all() for value in checkpoint.updated.values() if torch.is_floating_point(value))
