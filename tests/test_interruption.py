"""What ends a run from outside: Ctrl-C, SIGTERM, kill -9 at any moment, a full disk. Nothing is lost but steps."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from heteroakd.cli import main
from heteroakd.evaluation import metrics as evaluation
from heteroakd.system.signals import StopRequest
from heteroakd.training import validation
from heteroakd.training.checkpoint import load_checkpoint, load_latest, save_checkpoint
from heteroakd.training.log import read_metrics

from hetero_kernels import Distiller

CONFIG = """
data: {crop_size: [32, 32], image_size: [32, 32], train_images: 5, val_images: 1}
model: {architecture: fpn, encoder: tu-mobilenetv3_small_050, weights: null}
schedule: {steps: 6, batch_size: 2}
runtime: {device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 0, save_every: 2, log_every: 1}
"""


@pytest.fixture(autouse=True)
def as_on_a_terminal() -> Iterator[None]:
    """A background job's SIGINT is ignored, and its children's; under nohup SIGHUP is."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(output: Path, *options: str) -> list[str]:
    config = output.parent / "config.yaml"
    config.write_text(CONFIG)
    return ["teacher", "--config", str(config), "--output", str(output), *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(output)) == 0
    return output


def resume_and_compare(output: Path, whole: Path) -> None:
    assert main(arguments(output, "--resume")) == 0
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (output, whole))
    assert ours.step == theirs.step == 6 and ours.metrics == theirs.metrics
    assert all(torch.equal(value, ours.network[name]) for name, value in theirs.network.items())
    assert torch.equal(ours.random_states[0]["cpu"], theirs.random_states[0]["cpu"])
    train, expected = (
        [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "train"]
        for folder in (output, whole)
    )
    assert train == expected
    assert not list(output.glob(".*"))  # nothing half-written is left


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something in the middle of a step."""
    forward: Callable[..., Any] = Distiller.forward
    calls = 0

    def acting(self: Distiller, *inputs: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            act()
        return forward(self, *inputs, **options)

    monkeypatch.setattr(Distiller, "forward", acting)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    number: signal.Signals, status: int,
) -> None:  # fmt: skip
    before = signal.getsignal(number)
    with monkeypatch.context() as context:
        at_step(context, 3, lambda: signal.raise_signal(number))
        assert main(arguments(tmp_path / "run")) == status
    assert signal.getsignal(number) is before
    errors = capfd.readouterr().err
    assert "stopping after this step" in errors
    stopped = f"stopped at step 3 of 6; the same command with --resume continues from {tmp_path}/run/last.pt"
    assert f"heteroakd teacher: {stopped}" in errors
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 3
    resume_and_compare(tmp_path / "run", whole)


def test_second_signal_stops_at_once(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as context:
        at_step(context, 4, twice)
        assert main(arguments(tmp_path / "run")) == 130
    assert "heteroakd teacher: interrupted" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 2
    resume_and_compare(tmp_path / "run", whole)


def test_sigterm_that_comes_twice_is_one_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends it to its child and to the group that this is in."""

    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    at_step(monkeypatch, 3, twice)
    assert main(arguments(tmp_path / "run")) == 143
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 3


EVALUATED = ("--runtime.evaluate_every", "2", "--runtime.save_every", "0", "--data.val_images", "2")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `whole`, with evaluations."""
    output = tmp_path_factory.mktemp("evaluated") / "run"
    assert main(arguments(output, *EVALUATED)) == 0
    return output


@pytest.mark.parametrize(("at", "step"), [(1, 2), (2, 4), (3, 6)])
def test_signal_during_an_evaluation_leaves_it_for_later(
    tmp_path: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch, at: int, step: int
) -> None:
    predicted: Callable[..., Any] = evaluation.predict
    images = 0

    def predict(*inputs: Any, **named: Any) -> Any:
        nonlocal images
        images += 1
        if images == 2 * at - 1:  # the first image of two
            signal.raise_signal(signal.SIGTERM)
        return predicted(*inputs, **named)

    with monkeypatch.context() as context:
        context.setattr(evaluation, "predict", predict)
        assert main(arguments(tmp_path / "cut", *EVALUATED)) == 143
    assert images == 2 * at - 1 and load_checkpoint(tmp_path / "cut" / "last.pt").step == step
    resume_and_compare_evaluations(tmp_path / "cut", evaluated)


def test_evaluation_whose_result_was_not_saved_is_done_again(
    tmp_path: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had been killed between its line in the metrics and its checkpoint."""

    def killed(*inputs: Any, **named: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as context:
        context.setattr(validation.Validation, "_write_pictures", killed)
        assert main(arguments(tmp_path / "cut", *EVALUATED)) == 1
    assert read_metrics(tmp_path / "cut" / "metrics.jsonl")[-1]["event"] == "evaluation"
    resume_and_compare_evaluations(tmp_path / "cut", evaluated)


def resume_and_compare_evaluations(output: Path, whole: Path) -> None:
    assert main(arguments(output, *EVALUATED, "--resume")) == 0
    ours, theirs = (
        [
            {key: value for key, value in line.items() if not key.startswith(("seconds", "images"))}
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (output, whole)
    )
    assert ours == theirs and [line["step"] for line in ours if line["event"] == "evaluation"] == [2, 4, 6]
    for name in ("last.pt", "best.pt"):
        ours, theirs = (load_checkpoint(folder / name) for folder in (output, whole))
        assert (ours.step, ours.metrics) == (theirs.step, theirs.metrics)
        assert all(torch.equal(value, ours.network[key]) for key, value in theirs.network.items())


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.signal_number is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_the_handlers_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def body() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.signal_number))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


@contextmanager
def command(
    arguments: list[str], fresh: bool = False, **files: Path
) -> Iterator[subprocess.Popen[str] | processes.Process]:
    """The command in a process group of its own, as a terminal starts it; killed if it is still there afterwards."""
    if fresh:
        process = subprocess.Popen(
            [sys.executable, "-m", "heteroakd", *arguments], start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    else:
        process = processes.Process("-m", "heteroakd", *arguments, modules=processes.TRAINER, **files)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str] | processes.Process) -> None:
    deadline = time.monotonic() + 120
    while True:
        ended = process.poll() is not None  # before the look at the file: it may end in between
        if any(line["step"] >= step for line in read_metrics(output / "metrics.jsonl")):
            return
        assert not ended, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG = ("--schedule.steps", "100000", "--runtime.save_every", "1", "--runtime.workers", "1")


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_signal_to_the_process_group_leaves_the_workers_alone(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """As a terminal sends Ctrl-C, and torchrun SIGTERM."""
    with command(arguments(tmp_path / "run", *LONG), fresh=number == signal.SIGINT) as process:
        wait_for_step(tmp_path / "run", 2, process)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors
    assert errors.count("stopping after this step") == 1  # the workers have nothing to say
    step = load_checkpoint(tmp_path / "run" / "last.pt").step
    assert step >= 2 and f"stopped at step {step} of 100000" in errors


@pytest.mark.parametrize("progress", ["none", "lines"])
def test_reader_of_the_output_that_is_gone_costs_no_checkpoint(tmp_path: Path, progress: str) -> None:
    """As of `2>&1 | tee log` on a terminal, where Ctrl-C ends tee at once."""
    options = (*LONG, "--runtime.save_every", "0", "--runtime.progress", progress)
    files = {name: tmp_path / name for name in ("stdout", "stderr")}
    for path in files.values():
        os.mkfifo(path)
    readers = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in files.values()]
    with command(arguments(tmp_path / "run", *options), **files) as process:
        wait_for_step(tmp_path / "run", 2, process)
        for reader in readers:
            os.close(reader)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert load_checkpoint(tmp_path / "run" / "last.pt").step >= 2


def test_folder_belongs_to_one_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with command(arguments(tmp_path / "run", *LONG)) as process:
        wait_for_step(tmp_path / "run", 2, process)
        for flag in ("--resume_or_start", "--overwrite"):
            assert main(arguments(tmp_path / "run", *LONG, flag)) == 1
            assert f"{tmp_path}/run: another process is training into this folder" in capsys.readouterr().err
        process.kill()
        process.wait()
    assert load_checkpoint(tmp_path / "run" / "last.pt").step >= 2
    assert main(arguments(tmp_path / "run", "--overwrite")) == 0  # a lock does not outlive its process


def test_killed_run_continues_from_its_last_checkpoint(tmp_path: Path, whole: Path) -> None:
    """kill -9 while it writes a checkpoint after every step, so that it is likely to hit one."""
    output = tmp_path / "run"
    slow = ("--runtime.save_every", "1")
    for resume in ((), ("--resume",)):
        with command(arguments(output, *slow, *resume)) as process:
            wait_for_step(output, 2 if not resume else 4, process)
            process.kill()
            process.wait()
        used, _ = load_latest(output / "last.pt", lambda error: pytest.fail(error))
        assert used.name == "last.pt"
    resume_and_compare(output, whole)


def write_and_die(path: Path, moment: str) -> None:
    """Checkpoints of steps 2 and 3, during the second of which this process is killed."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    replace, renamed = os.replace, []

    def counting(*names: Any) -> None:
        if len(renamed) == {"before the renames": 0, "between the renames": 1}.get(moment):
            die()
        renamed.append(names)
        replace(*names)

    state = load_checkpoint(path)
    state.step = 2
    save_checkpoint(path, state, keep=2)
    state.step = 3
    os.replace = counting
    if moment == "half written":
        torch.save = lambda contents, file: (file.write(b"PK half of it"), file.flush(), die())
    save_checkpoint(path, state, keep=2)
    die()


@pytest.mark.parametrize(
    ("moment", "step", "complaints"),
    [("half written", 2, 0), ("before the renames", 2, 0), ("between the renames", 2, 1), ("afterwards", 3, 0)],
)
def test_kill_at_any_moment_of_writing_leaves_a_loadable_checkpoint(
    tmp_path: Path, whole: Path, moment: str, step: int, complaints: int
) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes((whole / "last.pt").read_bytes())
    child = multiprocessing.get_context("fork").Process(target=write_and_die, args=(path, moment), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL  # None: it hangs
    said: list[str] = []
    _, found = load_latest(path, said.append)
    assert found.step == step and len(said) == complaints


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full once a file has `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_named_and_the_checkpoint_before_it_stays(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with largest_file(100_000):
        assert main(arguments(output)) == 1
    message = capsys.readouterr().err
    assert f"{output}/last.pt: the checkpoint of step 2 cannot be written ([Errno 27] File too large" in message
    assert "there is none before it" in message and message.count("\n") == 1
    assert not (output / "last.pt").exists() and not list(output.glob(".*"))
    with monkeypatch.context() as context:
        at_step(context, 3, lambda: signal.raise_signal(signal.SIGTERM))
        assert main(arguments(output, "--overwrite")) == 143
    capsys.readouterr()
    with largest_file(100_000):
        assert main(arguments(output, "--resume")) == 1
    assert "the checkpoint of step 4 cannot be written" in (message := capsys.readouterr().err)
    assert "the one before it is intact" in message
    assert load_checkpoint(output / "last.pt").step == 3
    resume_and_compare(output, whole)


def test_full_disk_is_named_for_metrics_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with largest_file(1200):  # config.yaml fits, a few lines of metrics do
        assert main(arguments(tmp_path / "run", "--runtime.save_every", "0")) == 1
    message = capsys.readouterr().err
    assert f"File too large: '{tmp_path}/run/" in message and message.count("\n") == 1


def test_output_folder_that_vanishes_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "run"))
    assert main(arguments(tmp_path / "run")) == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 6 and (tmp_path / "run" / "summary.json").is_file()


def test_output_that_cannot_be_a_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["teacher", "--config", arguments(tmp_path / "x")[2], "--output", str(tmp_path / "file" / "run")]) == 1
    assert f"'{tmp_path}/file/run'" in capsys.readouterr().err
