"""The training loop: resuming exactly, the same batches for every method, schedule, metrics, divergence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heteroakd.commands.train import run_distill, run_teacher
from heteroakd.config.commands import DistillRun, TeacherRun
from heteroakd.config.groups import (
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
    ScheduleConfig,
    TeacherConfig,
)
from heteroakd.data import DataConfig, build_data
from heteroakd.data.batches import BatchSampler, SeededSamples, training_batches
from heteroakd.evaluation.metrics import Evaluation
from heteroakd.evaluation.visualize import load_maps
from heteroakd.methods import Taps, build_distiller
from heteroakd.networks.zoo import build_network
from heteroakd.system.distributed import choose_device
from heteroakd.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from heteroakd.training.keeper import DivergedError
from heteroakd.training.log import read_metrics
from heteroakd.training.step import build_optimizer, learning_rate_factor
from torch import Tensor
from torch.utils.data import Dataset

from hetero_kernels import Distiller

DATA = DataConfig(crop_size=(32, 64), image_size=(32, 64), train_images=5, val_images=2)
CNN = ModelConfig(architecture="fpn", encoder="tu-mobilenetv3_small_050")
TRANSFORMER = ModelConfig(encoder="mit_b0", options={"decoder_segmentation_channels": 16})
QUIET = RuntimeConfig(
    device="cpu", threads=1, pictures=0, progress="none", tensorboard=False, log_every=2, save_every=3
)
pytestmark = pytest.mark.usefixtures("one_block_in_each_stage")


@pytest.fixture(scope="module")
def teacher_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    run_teacher(
        TeacherRun(
            data=DATA, model=CNN, schedule=ScheduleConfig(steps=3, batch_size=2), runtime=QUIET, output=str(folder)
        )
    )
    return str(folder / "last.pt")


def distill_run(folder: Path, teacher: str, **changes: Any) -> DistillRun:
    run = DistillRun(
        data=DATA,
        student=TRANSFORMER,
        teacher=TeacherConfig(checkpoint=teacher),
        schedule=ScheduleConfig(steps=6, batch_size=2, seed=1),
        runtime=QUIET,
        output=str(folder),
    )
    return replace(run, **changes)


class Stop(Exception):
    """What ends a run in the middle, as a killed process would."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    forward: Callable[..., Any] = Distiller.forward
    calls = 0

    def counting(self: Distiller, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > steps:
            raise Stop
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Distiller, "forward", counting)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("adamw", {}), ("sgd", {}), ("sgd", {"precision": "bf16", "ema_decay": 0.5}), ("adamw", {"precision": "fp16"})],
)
def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(
    tmp_path: Path, teacher_checkpoint: str, monkeypatch: pytest.MonkeyPatch, optimizer: str, options: Any
) -> None:
    changes = {"optimizer": OptimizerConfig(name=optimizer, **options)}
    if options:  # and whatever else a run may do, with as many forward calls
        changes["schedule"] = ScheduleConfig(steps=6, batch_size=2, seed=1, distillation_warmup_steps=5)
    whole = distill_run(tmp_path / "whole", teacher_checkpoint, **changes)
    cut = distill_run(tmp_path / "cut", teacher_checkpoint, **changes)
    run_distill(whole)
    with monkeypatch.context() as context, pytest.raises(Stop):
        interrupt_after(context, 5)
        run_distill(cut)
    assert load_checkpoint(tmp_path / "cut" / "last.pt").step == 3  # steps 4 and 5 are lost and come again
    torch.manual_seed(99)
    run_distill(replace(cut, runtime=replace(QUIET, workers=1)), resume=True)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert a.step == b.step == 6 and a.metrics == b.metrics
    assert all(torch.equal(value, b.network[name]) for name, value in a.network.items())
    assert a.loss and all(torch.equal(value, b.loss[name]) for name, value in a.loss.items())
    assert torch.equal(a.random_states[0]["cpu"], b.random_states[0]["cpu"])
    assert a.scaler == b.scaler and bool(a.scaler) == (options.get("precision") == "fp16")
    assert a.updated.keys() == b.updated.keys() and bool(a.updated) == ("ema_decay" in options)
    assert all(torch.equal(value, b.updated[name]) for name, value in a.updated.items())
    for index, state in a.optimizer["state"].items():
        assert all(torch.equal(value, b.optimizer["state"][index][name]) for name, value in state.items())
    steps = [(line["event"], line["step"]) for line in read_metrics(tmp_path / "cut" / "metrics.jsonl")]
    assert steps == [("train", 2), ("train", 4), ("train", 6), ("evaluation", 6)]


def test_another_teacher_at_the_same_place_is_noticed(tmp_path: Path, teacher_checkpoint: str) -> None:
    path = tmp_path / "teacher.pt"
    teacher = load_checkpoint(teacher_checkpoint)
    save_checkpoint(path, teacher)
    run = distill_run(tmp_path / "run", str(path), method="kd", schedule=ScheduleConfig(steps=1, batch_size=2))
    run_distill(run)
    run_distill(run, resume=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher"] == load_checkpoint(tmp_path / "run" / "last.pt").teacher != ""
    next(iter(teacher.network.values())).view(-1)[0] += 1
    save_checkpoint(path, teacher)
    with pytest.raises(CheckpointError, match=r"last\.pt: has another teacher than the one that is there now"):
        run_distill(run, resume=True)


def test_resume_refuses_another_run(tmp_path: Path, teacher_checkpoint: str) -> None:
    run = distill_run(tmp_path, teacher_checkpoint, method="none")
    with pytest.raises(CheckpointError, match=r"last\.pt: no such checkpoint"):
        run_distill(run, resume=True)
    run_distill(run)
    with pytest.raises(CheckpointError, match=r"schedule\.steps \(6 there, 9 now\)"):
        run_distill(replace(run, schedule=replace(run.schedule, steps=9)), resume=True)
    with pytest.raises(CheckpointError, match=r"method \('none' there, 'kd' now\)"):
        run_distill(replace(run, method="kd"), resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        run_distill(run)
    run_distill(run, overwrite=True)
    with pytest.raises(CheckpointError, match=r"evaluation\.flip \(False there, True now\)"):
        run_distill(replace(run, evaluation=EvaluationConfig(flip=True)), resume=True)


def test_all_methods_see_the_same_batches_and_dropout(
    tmp_path: Path, teacher_checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    forward: Callable[..., Any] = Distiller.forward
    for method in ("none", "kd", "heteroakd"):
        batches = seen.setdefault(method, [])

        def recording(self: Distiller, images: Tensor, labels: Tensor, into: Any = batches, **others: Any) -> Any:
            into.append((images.clone(), labels.clone(), torch.get_rng_state()))
            return forward(self, images, labels, **others)

        monkeypatch.setattr(Distiller, "forward", recording)
        run_distill(distill_run(tmp_path / method, teacher_checkpoint, method=method))
    assert len(seen["none"]) == 6
    assert not torch.equal(seen["none"][0][0], seen["none"][1][0])
    for method in ("kd", "heteroakd"):
        for ours, theirs in zip(seen["none"], seen[method], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_batches_do_not_depend_on_workers_or_the_generator() -> None:
    data = build_data(DATA)
    batches = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        before = torch.get_rng_state()
        batches.append(list(training_batches(data.train, batch_size=2, steps=4, seed=3, workers=workers)))
        assert torch.equal(torch.get_rng_state(), before)
    later = list(training_batches(data.train, batch_size=2, steps=4, seed=3, first_step=2))
    for a, b in [*zip(batches[0], batches[1], strict=True), *zip(batches[0][2:], later, strict=True)]:
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_every_epoch_is_a_permutation_and_batches_are_full() -> None:
    batches = list(BatchSampler(dataset_size=5, batch_size=3, steps=10, seed=0))
    images = [key.image for batch in batches for key in batch]
    assert all(len(batch) == 3 for batch in batches)
    epochs = [images[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len({key.seed for batch in batches for key in batch}) == 30
    with pytest.raises(ValueError, match="at least one image, got 0 and 3"):
        BatchSampler(0, 3, 10, 0)


class Draws(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.rand(2), torch.tensor(index)


def test_augmentation_is_a_function_of_the_key() -> None:
    samples = SeededSamples(Draws())
    first, second = list(BatchSampler(4, 2, 2, seed=0))
    assert torch.equal(samples[first[0]][0], samples[first[0]][0])
    assert not torch.equal(samples[first[0]][0], samples[second[0]][0])


def test_schedule_decays_polynomially_after_the_warm_up() -> None:
    schedule = ScheduleConfig(steps=100, power=0.9)
    assert learning_rate_factor(0, schedule) == 1
    assert learning_rate_factor(50, schedule) == pytest.approx(0.5**0.9)
    warm = ScheduleConfig(steps=100, power=0.9, warmup_steps=10)
    assert learning_rate_factor(0, warm) == pytest.approx(0.1)
    assert learning_rate_factor(9, warm) == pytest.approx(0.91**0.9)


def test_parameter_groups_cover_everything_once_with_their_rates() -> None:
    student, _ = build_network(TRANSFORMER, 4)
    module = build_distiller(student, None, "none", LossConfig(), 4, (32, 32), Taps("encoder"))
    config = OptimizerConfig(lr=0.1, head_lr_multiplier=10.0, weight_decay=0.5)
    optimizer = build_optimizer(module, config)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(module.parameters()))
    encoder = {id(p) for p in student.encoder.parameters()}
    for group in optimizer.param_groups:
        ids = {id(parameter) for parameter in group["params"]}
        assert ids <= encoder or not ids & encoder
        assert group["peak_lr"] == pytest.approx(0.1 if ids <= encoder else 1.0)
        assert group["weight_decay"] == (0.5 if group["params"][0].ndim > 1 else 0.0)
    with pytest.raises(ValueError, match="name must be one of sgd, adamw, got 'lion'"):
        OptimizerConfig(name="lion")  # type: ignore[arg-type]


def test_diverged_run_stops_and_says_so(tmp_path: Path, teacher_checkpoint: str) -> None:
    run = distill_run(tmp_path, teacher_checkpoint, method="none", optimizer=OptimizerConfig(name="sgd"))
    run.optimizer.lr = 1e20  # beyond what an option may be
    with pytest.raises(DivergedError, match=r"not finite at step [246] \(loss .*optimizer\.lr"):
        run_distill(run)


def test_network_that_is_not_finite_is_never_saved(
    tmp_path: Path, teacher_checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward: Callable[..., Any] = Distiller.forward
    calls = 0

    def breaking(self: Distiller, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        output = forward(self, *arguments, **options)
        if calls != 3:
            return output
        return output._replace(terms=output.terms._replace(loss=output.loss * float("nan")))

    monkeypatch.setattr(Distiller, "forward", breaking)
    seldom = replace(QUIET, log_every=6, save_every=1)  # the next look at the loss would come after three checkpoints
    with pytest.raises(DivergedError) as caught:
        run_distill(distill_run(tmp_path, teacher_checkpoint, method="none", runtime=seldom))
    message = str(caught.value)
    assert "not finite after step 3" in message and "tensors hold NaN or inf, the first is student." in message
    assert f"last good checkpoint: {tmp_path}/last.pt, step 2" in message
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved.step == 2 and all(value.isfinite().all() for value in saved.network.values())


def test_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    tmp_path: Path, teacher_checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = replace(QUIET, save_every=2)
    whole, cut = (distill_run(tmp_path / name, teacher_checkpoint, runtime=runtime) for name in ("whole", "cut"))
    run_distill(whole)
    with monkeypatch.context() as context, pytest.raises(Stop):
        interrupt_after(context, 5)
        run_distill(cut)
    last = tmp_path / "cut" / "last.pt"
    last.write_bytes(last.read_bytes()[:100_000])
    with monkeypatch.context() as context, pytest.raises(Stop):
        interrupt_after(context, 1)  # killed again before it has written anything
        run_distill(cut, resume=True)
    printed = capsys.readouterr().out
    assert f"passed over: {last}: truncated" in printed and "last.1.pt, step 2" in printed
    assert load_checkpoint(last).step == 2
    run_distill(cut, resume=True)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(value, b.network[name]) for name, value in a.network.items())


def test_summary_metrics_and_best_checkpoint(tmp_path: Path, teacher_checkpoint: str) -> None:
    runtime = replace(QUIET, evaluate_every=2, tensorboard=True, pictures=1)
    run_distill(distill_run(tmp_path, teacher_checkpoint, runtime=runtime))
    summary = json.loads((tmp_path / "summary.json").read_text())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    assert summary["miou"] == evaluations[-1]["miou"]
    assert summary["seconds_waiting_for_data"] > 0 and summary["workers"] == 0
    seconds = summary["seconds_waiting_for_data"] + summary["seconds_per_step"]
    assert 0 < summary["images_per_second"] < 4 * 2 / seconds  # of 2 images per step; mean and median differ
    for line in lines[:1]:
        assert line["images_per_second"] == pytest.approx(
            2 / (line["seconds_per_step"] + line["seconds_waiting_for_data"])
        )
    assert summary["seconds_per_step"] > 0 and summary["loss_backend"] in ("cpu", "reference")
    assert summary["peak_memory_bytes"] >= summary["memory_before_training_bytes"] > 0
    knowledge = [line for line in lines if line["event"] == "knowledge"]
    assert [line["step"] for line in knowledge] == [2, 4, 6]
    maps = load_maps(tmp_path / "maps" / "step_000006_val_00.npz")
    assert float(maps.reliability.nanmean()) == pytest.approx(knowledge[-1]["reliability"], rel=1e-5)
    assert float(maps.weight.nanmean()) == pytest.approx(knowledge[-1]["weight"], rel=1e-5)
    assert (
        maps.weight.shape == (32, 64)
        and 0 <= maps.reliability.nan_to_num(0.5).min() <= maps.reliability.nan_to_num().max() <= 1
    )
    assert summary["measured"] == {
        "data": "street", "root": None, "part": "val", "window": None, "window_stride": None, "scales": [1.0],
        "flip": False,
    }  # fmt: skip
    confusion = torch.tensor(summary["confusion"])
    assert Evaluation(confusion, tuple(summary["iou"]), 2).to_dict() == {
        key: summary[key] for key in evaluations[-1] if key in summary
    }
    best = load_checkpoint(tmp_path / "best.pt")
    assert best.metrics["miou"] == max(line["miou"] for line in evaluations)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        f"step_{step:06d}_val_00.png" for step in (2, 4, 6)
    ]


def test_cut_off_metrics_line_is_dropped_and_a_broken_one_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n{"event": "tr')
    assert read_metrics(path) == [{"event": "train", "step": 1}]
    path.write_text('nonsense\n{"event": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not a JSON object"):
        read_metrics(path)


def test_devices_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="device 'warp' cannot be used here"):
        choose_device("warp", None)
