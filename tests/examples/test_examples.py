"""Each file of `examples/` as its reader starts it: it learns, its projectors with it, and goes on where it stopped."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"huggingface_trainer": "transformers", "lightning_module": "lightning", "mmseg_segmentor": "mmseg"}
NEEDS |= {"accelerate_loop": "accelerate", "torchvision_loop": "torchvision"}
PROJECTOR = "criterion.student_projector.0.weight"


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


def tensors(path: Path, entry: str | None = None, prefix: str = "") -> dict[str, Tensor]:
    """A checkpoint's, without the names' prefix; the student's and the criterion's, and no teacher's."""
    if path.suffix == ".safetensors":
        found = importlib.import_module("safetensors.torch").load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=not entry)
        found = found[entry] if entry else found
    found = {name.removeprefix(prefix): value for name, value in found.items()}
    assert {name.split(".")[0] for name in found} == {"student", "criterion"}
    return found


def same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        assert torch.equal(value, others[name]), name


def learnt(losses: list[float], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert losses[-1] < 0.97 * losses[0], losses
    assert not torch.equal(before[PROJECTOR], after[PROJECTOR])


def printed(capsys: pytest.CaptureFixture[str]) -> list[float]:
    return [ast.literal_eval(line)["loss"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def student_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("student."): value for name, value in found.items() if name.startswith("student.")}


def test_huggingface(monkeypatch, tmp_path):
    example = load("huggingface_trainer", monkeypatch)
    run = ["--output", str(tmp_path), "--steps", "20", "--save-every", "10"]
    example.main(run)
    middle, last = (tensors(tmp_path / f"checkpoint-{n}/model.safetensors", prefix="distiller.") for n in (10, 20))
    log = json.loads((tmp_path / "checkpoint-20/trainer_state.json").read_text())["log_history"]
    assert all({"task", "kd", "hakd", "proj"} < entry.keys() for entry in log if "loss" in entry)
    learnt([entry["loss"] for entry in log if "loss" in entry], middle, last)
    shutil.rmtree(tmp_path / "checkpoint-20")
    example.main([*run, "--resume"])
    same(tensors(tmp_path / "checkpoint-20/model.safetensors", prefix="distiller."), last)
    alone = example.transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "student")
    same(alone.state_dict(), student_of(last))

    # Pretrained networks, by folders in place of names.
    student, teacher = example.make_networks(None)
    student.save_pretrained(tmp_path / "given/student")
    teacher.save_pretrained(tmp_path / "given/teacher")
    names = [str(tmp_path / "given/student"), str(tmp_path / "given/teacher")]
    loaded = example.make_networks(names)
    for ours, theirs in zip(loaded, (student, teacher), strict=True):
        same(ours.state_dict(), theirs.state_dict())
    example.main(["--output", str(tmp_path / "given"), "--steps", "1", "--pretrained", *names])


def test_torchvision(monkeypatch, tmp_path, capsys):
    example = load("torchvision_loop", monkeypatch)
    run = ["--output", str(tmp_path), "--epochs", "4", "--device", "cpu"]
    example.main(run)
    middle, last = (tensors(tmp_path / f"checkpoint-{n}.pt", "distiller") for n in (2, 4))
    losses = printed(capsys)
    learnt(losses, middle, last)
    example.main([*run, "--resume", str(tmp_path / "checkpoint-2.pt")])
    assert printed(capsys) == losses[2:]
    same(tensors(tmp_path / "checkpoint-4.pt", "distiller"), last)
    plain = example.lraspp_mobilenet_v3_large(**example.RANDOM, num_classes=3)
    plain.load_state_dict(torch.load(tmp_path / "student.pt"))
    same(plain.state_dict(), student_of(last))

    torch.manual_seed(7)
    teacher = example.deeplabv3_mobilenet_v3_large(**example.RANDOM, num_classes=3)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    given = ["--output", str(tmp_path / "given"), "--epochs", "1", "--device", "cpu"]
    example.main([*given, "--teacher", str(tmp_path / "teacher.pt")])
    assert printed(capsys)[0] != losses[0]  # another teacher, another loss


def test_accelerate(monkeypatch, tmp_path, capsys):
    example = load("accelerate_loop", monkeypatch)
    example.main(["--output", str(tmp_path / "whole"), "--epochs", "4"])
    last = tensors(tmp_path / "whole/state/model.safetensors")
    losses = printed(capsys)
    run = ["--output", str(tmp_path / "parts"), "--epochs"]
    example.main([*run, "2"])
    learnt(losses, tensors(tmp_path / "parts/state/model.safetensors"), last)
    example.main([*run, "4", "--resume"])
    assert printed(capsys) == losses
    same(tensors(tmp_path / "parts/state/model.safetensors"), last)
    same(torch.load(tmp_path / "parts/student.pt"), student_of(last))


def lightning_losses(folder: Path) -> list[float]:
    with open(folder / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.filterwarnings("ignore")  # Lightning's advice: workers, a tip, what it calls deprecated of torch's
def test_lightning(monkeypatch, tmp_path):
    example = load("lightning_module", monkeypatch)
    run = ["--output", str(tmp_path), "--epochs"]
    example.main([*run, "3"])
    middle = tensors(tmp_path / "last.ckpt", "state_dict", "distiller.")
    example.main([*run, "4", "--resume"])
    last = tensors(tmp_path / "last.ckpt", "state_dict", "distiller.")
    learnt(lightning_losses(tmp_path / "lightning_logs/version_0"), middle, last)
    assert len(lightning_losses(tmp_path / "lightning_logs/version_1")) == 4  # of the fourth epoch only
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 16
    same(torch.load(tmp_path / "student.pt"), student_of(last))


def test_mmseg(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # and not for the tests that come after
    example = load("mmseg_segmentor", monkeypatch)
    example.main(["--output", str(tmp_path), "--steps", "20"])
    middle, last = (tensors(tmp_path / f"iter_{n}.pth", "state_dict", "distiller.") for n in (10, 20))
    log = next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    learnt([json.loads(line)["loss"] for line in log], middle, last)
    (tmp_path / "iter_10.pth").unlink()
    example.main(["--output", str(tmp_path), "--steps", "22", "--resume"])
    assert {path.name for path in tmp_path.glob("*.pth")} == {"iter_20.pth", "iter_22.pth"}  # not from the beginning
    model = example.MODELS.build(example.make_config())
    model.distiller.load_state_dict(last)
    sample = example.SegDataSample(metainfo={"ori_shape": (64, 64), "img_shape": (64, 64)})
    predicted = model.eval().test_step({"inputs": [torch.zeros(3, 64, 64)], "data_samples": [sample]})
    assert predicted[0].pred_sem_seg.data.shape == (1, 64, 64)


def test_on_two_processes(tmp_path):
    """Each gathers its two processes in one DistributedDataParallel, and compares replicas at its end."""
    for name in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(name)
    command = [sys.executable, str(Path(__file__).with_name("under_torchrun.py")), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.count("'epoch': 3, 'loss'") == 1  # one process prints
    for process in (0, 1):
        assert (tmp_path / f"huggingface/checkpoint-20/rng_state_{process}.pth").exists()
        assert (tmp_path / f"accelerate/state/random_states_{process}.pkl").exists()
    log = json.loads((tmp_path / "huggingface/checkpoint-20/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    assert torch.load(tmp_path / "lightning/last.ckpt", weights_only=False)["global_step"] == 6  # of 12 in one process


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_have_help(path, monkeypatch, capsys):
    assert len(path.read_text().splitlines()) <= 90
    example = load(path.stem, monkeypatch)
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    assert f"python examples/{path.name}" in capsys.readouterr().out


def test_the_lines_that_matter_are_the_examples_own():
    """What docs/frameworks.md shows of an example stands in it."""
    sections = (ROOT / "docs/frameworks.md").read_text(encoding="utf-8").split("\n## ")[2:]
    names = [re.search(r"\(../examples/(\w+\.py)\)", section)[1] for section in sections]
    assert sorted(names) == [path.name for path in EXAMPLES]
    for name, section in zip(names, sections, strict=True):
        example = (ROOT / "examples" / name).read_text().splitlines()
        shown = "".join(re.findall(r"```python\n(.*?)```", section, re.S)).splitlines()
        assert shown and set(shown) <= set(example), set(shown) - set(example)
