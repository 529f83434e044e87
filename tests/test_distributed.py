"""Several processes on gloo: the gradients of one, no sample counted twice, and a killed worker that comes back."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import processes
import pytest
import torch
from heteroakd.cli import main
from heteroakd.config.groups import EvaluationConfig, LossConfig, Method, OptimizerConfig, RuntimeConfig, ScheduleConfig
from heteroakd.data.batches import BatchSampler
from heteroakd.evaluation.inference import WHOLE
from heteroakd.evaluation.metrics import evaluate
from heteroakd.methods import Taps, build_distiller, objective_of
from heteroakd.system import distributed
from heteroakd.training.checkpoint import load_checkpoint
from heteroakd.training.log import read_metrics
from heteroakd.training.step import TrainingStep, build_optimizer
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
SIZE = (16, 24)
CLASSES = ("road", "sky", "car")
LOSSES: dict[str, tuple[Method, LossConfig]] = {
    "none": ("none", LossConfig(class_weight=[1.0, 2.0, 5.0], label_smoothing=0.1)),
    "kd": ("kd", LossConfig(kd_weight=2.0)),
    "cwd": ("cwd", LossConfig(cwd_weight=30.0)),
    "label": ("heteroakd", LossConfig(projector="conv", hakd_weight=3.0)),
    "feature": ("heteroakd", LossConfig(projector="conv", resolution="feature", hakd_weight=3.0)),
    "spatial": ("heteroakd", LossConfig(projector="conv", kem="spatial", hakd_weight=3.0)),
    "taps": ("heteroakd", LossConfig(projector="conv", resolution="feature", hakd_weight=3.0)),
}


class Plain(nn.Module):
    """A network without batch norm, whose gradient over a batch is the sum over its images."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 5, stride=4, padding=2), nn.GELU())
        self.encoder.output_stride = 4
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images))
        return logits


class TwoHeads(Plain):
    """A network with a head that nobody uses."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.second = nn.Conv2d(8, num_classes, 1)


def batch() -> tuple[Tensor, Tensor]:
    """Four images, of which the first two have a fifth of the labelled pixels that the others have."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, *SIZE, generator=generator)
    labels = torch.randint(0, 3, (4, *SIZE), generator=generator)
    ignored = torch.rand(4, *SIZE, generator=generator) < torch.tensor([0.8, 0.9, 0.1, 0.3])[:, None, None]
    labels[ignored] = 255
    return images, labels


def gradients(micro_batches: int = 1) -> dict[str, Tensor]:
    """One step of this process's part of the batch by every loss: gradients and mean loss over the processes."""
    part = 4 // distributed.world_size()
    own = slice(distributed.rank() * part, (distributed.rank() + 1) * part)
    images, labels = batch()
    found, sgd = {}, OptimizerConfig(name="sgd", lr=0.1)
    for name, (method, config) in LOSSES.items():
        torch.manual_seed(0)
        tap = ["encoder.0", "encoder"] if name == "taps" else "encoder"
        teacher, student, taps = Plain(3, 12), Plain(3), Taps(tap, tap, "encoder.0")
        auxiliary_weight = 0.4 if name == "taps" else 0.0
        distiller = build_distiller(student, teacher, method, config, 3, SIZE, taps, auxiliary_weight=auxiliary_weight)
        if objective_of(distiller).auxiliary is not None:
            objective_of(distiller).auxiliary.eval()  # its batch norm and dropout would make it differ
        schedule = ScheduleConfig(1, 4, micro_batches=micro_batches)
        step = TrainingStep(distiller, build_optimizer(distiller, sgd), sgd, schedule, RuntimeConfig())
        terms = step(0, images[own], labels[own])
        parameters = list(distiller.parameters())
        found[name] = torch.cat([parameter.grad.flatten() for parameter in parameters])
        found[f"{name} loss"] = distributed.sum_over_processes(terms.loss.detach()) / distributed.world_size()
        found[f"{name} updated"] = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return found


def unused_head() -> list[str]:
    """What becomes of a step of a network with two heads, without and with the search for those without a gradient."""
    images, labels = batch()
    sgd, outcomes = OptimizerConfig(name="sgd", lr=0.1), []
    for search in (False, True):
        distiller = build_distiller(TwoHeads(3), None, "none", LossConfig(), 3, SIZE, Taps("encoder"))
        before = distiller.student.second.weight.clone()
        runtime = RuntimeConfig(find_unused_parameters=search)
        step = TrainingStep(distiller, build_optimizer(distiller, sgd), sgd, ScheduleConfig(1, 8), runtime)
        try:
            for number in range(2):
                step(number, images, labels)
            outcomes.append(f"trained, second head as it was: {torch.equal(before, distiller.student.second.weight)}")
        except ValueError as error:
            outcomes.append(str(error))
    return outcomes


def confusion() -> Tensor:
    """Five images: one more for the first of two processes."""
    torch.manual_seed(0)
    network = Plain(3)
    images, labels = batch()
    samples = [*zip(images, labels, strict=True), (images[0], labels[3])]
    options = EvaluationConfig(window=(8, 16), scales=[1.0, 1.5], flip=True)
    alone, several = (evaluate(network, samples, CLASSES, chosen).confusion for chosen in (WHOLE, options))  # type: ignore[arg-type]
    return torch.stack([alone, several])


def agreements() -> list[object]:
    """What the processes tell each other."""

    def fail() -> None:
        raise ValueError(f"from {distributed.rank()}")

    try:
        distributed.on_main(fail)
        error = "none"
    except ValueError as raised:
        error = str(raised)
    number = distributed.rank()
    with distributed.main_first():
        pass
    return [
        distributed.gather(number),
        distributed.largest_over_processes(number * 7),
        distributed.on_main(lambda: f"main {distributed.rank()}"),
        error,
    ]


PROGRAM = """
import sys
import torch
from test_distributed import agreements, confusion, gradients, unused_head
from heteroakd.system import distributed
with distributed.process_group(torch.device("cpu")):
    results = {"global": gradients(), "parts": gradients(2)}
    results |= {"confusion": confusion(), "told": agreements(), "unused": unused_head()}
    torch.save(results, f"{sys.argv[1]}.{distributed.rank()}")
"""
# torchrun without its command line: its agent, whose processes begin with what this one has imported.
AGENT = """
import runpy, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
def worker(kind, what, *arguments):
    sys.argv = [what, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {})
restarts, *command = sys.argv[1:]
config = LaunchConfig(
    1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=int(restarts),
    start_method="fork", monitor_interval=0.02,
)
elastic_launch(config, worker)(*command)
"""


def environment() -> dict[str, str]:
    """Of a process that imports what this one does."""
    path = [str(Path(__file__).parent), str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def on_two_processes(*arguments: str, folder: Path, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """`python *arguments` on two processes of torchrun's agent, to the end."""
    command = ("-c", AGENT, str(restarts), *arguments)
    return processes.run(*command, cwd=folder, env=environment(), modules=processes.TRAINER)


def start_torchrun(*arguments: str, folder: Path) -> processes.Process:
    """Two fresh processes on this machine, as the command starts them."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments)
    return processes.Process(*command, cwd=folder, env=environment(), modules=processes.TRAINER)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("two")
    finished = on_two_processes("-c", PROGRAM, "result", folder=folder)
    assert finished.returncode == 0, finished.stderr
    return [torch.load(folder / f"result.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_two_processes_are_those_of_one_with_the_joint_batch(
    two_processes: list[dict[str, object]], name: str
) -> None:
    joint = gradients()
    for result in two_processes:
        ours, parts = result["global"], result["parts"]
        assert (ours[name] - joint[name]).norm() <= 1e-6 * joint[name].norm()
        assert (parts[name] - joint[name]).norm() <= 1e-6 * joint[name].norm()  # two micro-batches on each
        torch.testing.assert_close(ours[f"{name} loss"], joint[f"{name} loss"])
    assert torch.equal(two_processes[0]["global"][f"{name} updated"], two_processes[1]["global"][f"{name} updated"])


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_micro_batches_are_those_of_the_joint_batch(name: str) -> None:
    joint = gradients()
    for parts in (2, 4):
        ours = gradients(parts)
        assert (ours[name] - joint[name]).norm() <= 1e-6 * joint[name].norm()
        torch.testing.assert_close(ours[f"{name} loss"], joint[f"{name} loss"])


def test_parameters_without_a_gradient_are_named_before_torch_waits_for_them(
    two_processes: list[dict[str, object]],
) -> None:
    for results in two_processes:
        error, searched = results["unused"]
        assert "no gradient reaches student.second: " in error
        assert "runtime.find_unused_parameters: true" in error
        assert searched == "trained, second head as it was: True"


def test_evaluation_counts_every_sample_once(two_processes: list[dict[str, object]]) -> None:
    alone = confusion()
    for result in two_processes:
        assert result["confusion"].dtype == torch.int64 and torch.equal(result["confusion"], alone)


def test_processes_agree(two_processes: list[dict[str, object]]) -> None:
    for result in two_processes:
        assert result["told"] == [[0, 1], 7, "main 0", "from 0"]
    assert agreements() == [[0], 0, "main 0", "from 0"]


def test_batches_of_several_processes_are_the_parts_of_one() -> None:
    whole = list(BatchSampler(5, 6, steps=4, seed=3, first_step=1))
    parts = [list(BatchSampler(5, 6, steps=4, seed=3, first_step=1, rank=rank, world_size=3)) for rank in range(3)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


CONFIG = """
data: {crop_size: [32, 32], image_size: [32, 32], train_images: 5, val_images: 3}
model: {architecture: "fragile:build", tap: encoder, weights: null, options: {}}
optimizer: {ema_decay: 0.5}
schedule: {steps: 6, batch_size: 4}
runtime: {device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 1, save_every: 2, log_every: 1}
"""
FRAGILE = """
import os, signal
from test_distributed import Plain
class Fragile(Plain):
    steps = 0
    def forward(self, images):
        self.steps += self.training
        first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if self.steps == 5 and first_try and os.environ["RANK"] == "1" and "FRAGILE" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)
def build(num_classes):
    return Fragile(num_classes)
"""


def test_torchrun_restarts_a_killed_worker_from_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = ["teacher", "--config", "config.yaml", "--resume_or_start", "--output"]
    whole = on_two_processes("-m", "heteroakd", *command, "whole", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("written: ") == 1  # one process prints
    monkeypatch.setenv("FRAGILE", "1")
    killed = on_two_processes("-m", "heteroakd", *command, "killed", folder=tmp_path, restarts=1)
    assert killed.returncode == 0, killed.stdout + killed.stderr
    assert "resuming from killed/last.pt, step 4" in killed.stdout
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert a.step == b.step == 6 and len(a.random_states) == 2
    assert all(torch.equal(value, b.network[name]) for name, value in a.network.items())
    assert a.updated and all(torch.equal(value, b.updated[name]) for name, value in a.updated.items())
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    losses = [line["loss"] for line in first if line["event"] == "train"]
    assert losses == [line["loss"] for line in second if line["event"] == "train"] and len(losses) == 6
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["images"] == 3
    # One process goes the same way: the same images in every step, each pixel with the same weight.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([*command, "alone"]) == 0
    alone = [line["loss"] for line in read_metrics(tmp_path / "alone" / "metrics.jsonl") if line["event"] == "train"]
    assert alone == pytest.approx(losses, rel=1e-4)


def test_resume_or_start_replaces_what_died_before_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n')
    command = ["teacher", "--config", "config.yaml", "--output", "run"]
    assert main(command) == 1 and "holds a run already" in capsys.readouterr().err
    assert main([*command, "--resume_or_start", "--resume"]) == 1
    assert "--resume, --resume_or_start and --overwrite exclude each other" in capsys.readouterr().err
    assert main([*command, "--resume_or_start"]) == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"] > 0
    (tmp_path / "run" / "last.pt").write_text("no checkpoint")
    (tmp_path / "run" / "last.1.pt").unlink(missing_ok=True)
    assert main([*command, "--resume_or_start"]) == 1  # never in silence from the beginning
    assert "truncated or not a checkpoint" in capsys.readouterr().err
