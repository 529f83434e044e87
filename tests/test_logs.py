"""What a run's log says on the terminal, in metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from heteroakd.evaluation.metrics import Evaluation
from heteroakd.system.distributed import say
from heteroakd.training.log import RunLog, read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TRAIN = {"loss": 1.5, "task": 1.25, "kd": 0.0, "seconds_per_step": 0.5, "images_per_second": 7.5, "lr": 0.01}


def write(folder: Path, progress: str, tensorboard: bool = False) -> None:
    evaluation = Evaluation(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), ("road", "sky", "car"), 2)
    with RunLog(folder, first_step=0, steps=2, progress=progress, tensorboard=tensorboard) as log:  # type: ignore[arg-type]
        log.advance()
        log.train(1, TRAIN)
        log.advance()
        log.train(2, TRAIN)
        log.evaluation(2, evaluation, 0.1)
        log.knowledge(2, 0.75, 0.125)
        log.picture("val_00/input", 2, torch.zeros(3, 4, 5, dtype=torch.uint8))


def test_bar_and_lines_say_how_fast_and_how_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "bar", "bar")
    bar = capsys.readouterr().err
    assert "2/2" in bar and "images/s=7.5" in bar and "loss=1.500" in bar and "kd=" not in bar
    write(tmp_path / "lines", "lines")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/2  loss 1.500 task 1.250  0.500 s/step  7.5 images/s  ETA 00:")
    assert lines[-1].startswith("step 2/2  mIoU 0.7750")


@pytest.mark.parametrize("progress", ["bar", "lines"])
def test_reader_that_left_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: str) -> None:
    readers = []
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        readers.append(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w", buffering=1))
    with RunLog(tmp_path, first_step=0, steps=2, progress=progress, tensorboard=False) as log:  # type: ignore[arg-type]
        log._bar.mininterval = 0
        for reader in readers:
            os.close(reader)
        for step in (1, 2):
            log.advance()
            log.train(step, TRAIN)
            log.say("a line")
            say("another")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    sys.stdout.flush()  # what was buffered is gone, too
    sys.stderr.flush()


def test_lines_and_tensorboard_hold_the_same(tmp_path: Path) -> None:
    write(tmp_path, "none", tensorboard=True)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["event"], line["step"]) for line in metrics] == [
        ("train", 1), ("train", 2), ("evaluation", 2), ("knowledge", 2),
    ]  # fmt: skip
    assert metrics[2]["iou"] == {"road": 0.75, "sky": 0.8, "car": None} and metrics[2]["absent"] == ["car"]
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars["train/loss"] == [1.5, 1.5] and scalars["train/images_per_second"] == [7.5, 7.5]
    assert scalars["val/miou"] == pytest.approx([0.775]) and "val_iou/car" not in scalars
    assert scalars["knowledge/reliability"] == [0.75] and scalars["knowledge/weight"] == [0.125]
    assert events.Tags()["images"] == ["val_00/input"]
