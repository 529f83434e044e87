"""`heteroakd report`: what stands in it of finished runs, cut-off ones and comparisons."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from heteroakd.cli import main
from heteroakd.commands import report
from heteroakd.config.commands import DistillRun, ReportRun
from heteroakd.config.groups import Method, ScheduleConfig, to_dict
from heteroakd.data import DataConfig
from heteroakd.evaluation.pictures import colorize, heatmap, overlay, panel
from heteroakd.evaluation.visualize import KnowledgeMaps, save_maps
from heteroakd.report.read_runs import read, read_groups
from PIL import Image
from test_report import Page

CLASSES = ("road", "sky", "car")


def run_folder(
    folder: Path, method: Method = "heteroakd", seed: int = 0, *, finished: bool = True, **summary: Any
) -> Path:
    """A run of 4 steps as `heteroakd distill` leaves it; its numbers depend on the seed."""
    config = DistillRun(
        data=DataConfig(crop_size=(64, 64)), method=method, schedule=ScheduleConfig(steps=4, batch_size=2, seed=seed)
    )
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    lines: list[dict[str, Any]] = []
    evaluation: dict[str, Any] = {}
    for step in (2, 4) if finished else (2,):
        terms = {"loss": 3.0 - step / 4, "task": 2.0 - step / 4 + seed, "kd": 0.5, "cwd": 0.0, "hakd": 0.1, "proj": 0.7}
        lines.append({"event": "train", "step": step, **terms})
        iou = {"road": 0.5 + step / 10 + seed / 100, "sky": None, "car": 0.125}
        evaluation = {
            "miou": 0.3 + step / 100 + seed / 10,
            "pixel_accuracy": 0.75,
            "iou": iou,
            "absent": ["sky"],
            "images": 2,
        }
        lines.append({"event": "evaluation", "step": step, "seconds": 1.0, **evaluation})
        Image.new("RGB", (20, 10), (step, 0, 0)).save(folder / "pictures" / f"step_{step:06d}_val_01.png")
        if method == "heteroakd":
            lines.append({"event": "knowledge", "step": step, "reliability": 1 - step / 8, "weight": 0.1 * step})
            maps = KnowledgeMaps(torch.full((10, 20), 1 - step / 8), torch.full((10, 20), 0.1 * step))
            save_maps(folder / "maps" / f"step_{step:06d}_val_01.npz", maps)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        numbers = {
            "memory_before_training_bytes": 2**30 - 2**23, "steps": 4,
            "seconds_per_step": 0.5, "images_per_second": 3.5, "peak_memory_bytes": 2**30, "device": "cpu",
            "machine": "M", "threads": 1, "precision": "fp32", "loss_backend": "cpu",
            "confusion": [[7 + seed, 0, 3], [0, 0, 0], [1, 0, 1]],
            **evaluation,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(numbers | summary))
    return folder


def test_report_of_a_finished_and_a_cut_off_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_folder(tmp_path / "a" / "heteroakd")
    second = run_folder(tmp_path / "b" / "none", "none", finished=False)
    assert main(["report", "--runs", f"[{first}, {second}]"]) == 0
    assert f"written: {first}/report.html" in capsys.readouterr().out
    text = (first / "report.html").read_text()
    page = Page(text)
    words = [word for word in page.text if word]
    assert {"Curves", "How trust moves from the teacher to the student", "IoU per class", "Confusion matrices"} <= set(
        words
    )
    assert {"34.00", "2 of 4", "90.00", "12.50", "–"} <= set(words)
    # cross-entropy, mIoU, terms of both, S, W, bars, one confusion matrix; a row of maps and each run's last panel
    assert page.tags.count("svg") == 8 and page.tags.count("img") == 3
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert [word for word in words if word.startswith("none, val image")] == ["none, val image 1, step 2"]
    assert "mIoU on the val part of street: whole images, scale 1." in text


def test_the_part_that_was_measured_is_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"name": "camvid", "root": "/data", "evaluation_part": "test", "image_size": [128, 192]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = report.run_report(ReportRun(runs=[str(run)])).read_text()
    assert "mIoU on the test part<" in text and "run, test image 1" in text
    assert "on the test part of camvid in /data" in text and "val image" not in text


def test_a_report_of_five_runs_is_below_5_mb(tmp_path: Path) -> None:
    """Of panels as a run on CamVid's 480x360 pictures writes them, of two val images, and maps of two evaluations; the
    photograph is noise that compresses no better than one."""
    generator, interpolate = torch.Generator().manual_seed(0), torch.nn.functional.interpolate
    photo = interpolate(torch.rand(1, 3, 72, 96, generator=generator), (360, 480), mode="bicubic")[0]
    photo = photo + 0.06 * torch.randn(photo.shape, generator=generator)
    shown = (255 * photo.clamp(0, 1)).to(torch.uint8)
    palette = torch.randint(0, 256, (11, 3), generator=generator, dtype=torch.uint8)
    label = interpolate(torch.randint(0, 11, (1, 1, 12, 16), generator=generator).float(), (360, 480))[0, 0].long()
    heat = heatmap(interpolate(torch.rand(1, 1, 12, 15, generator=generator), (360, 480), mode="bilinear")[0, 0])
    overlaid = overlay(shown, label, palette)
    tiles = {"input": shown, "label": colorize(label, palette), "teacher": overlaid, "student": overlaid}
    runs = [run_folder(tmp_path / str(number)) for number in range(5)]
    for image in (0, 1):
        panel([*tiles.items(), ("S", heat), ("W", heat)], tmp_path / f"{image}.png", columns=3)
    pngs = 0
    for run in runs:
        for image in (0, 1):
            file = run / "pictures" / f"step_000004_val_{image:02d}.png"
            file.write_bytes((tmp_path / f"{image}.png").read_bytes())
            pngs += file.stat().st_size
        for step in (2, 4):
            coarse = torch.rand(2, 1, 12, 15, generator=generator)  # as large as the positions of an encoder
            maps = KnowledgeMaps(*interpolate(coarse, (180, 240), mode="bilinear")[:, 0])
            save_maps(run / "maps" / f"step_{step:06d}_val_01.npz", maps)
    path = report.run_report(ReportRun(runs=[*map(str, runs)], output=str(tmp_path / "five.html")))
    assert pngs > 10e6 and path.stat().st_size <= 5e6


def test_a_page_that_cannot_be_written_is_named_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "report_sections", None)
    run = run_folder(tmp_path / "run")
    assert main(["report", "--runs", str(run), "--output", "/proc/nowhere/report.html"]) == 1
    assert "/proc/nowhere/report.html: cannot be written there" in capsys.readouterr().err


def test_report_of_a_comparison_averages_over_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    for method in ("none", "heteroakd"):
        for seed in (0, 1):
            run_folder(folder / f"{method}-seed{seed}", method, seed)  # type: ignore[arg-type]
    methods = {
        method: {"mean_miou": 0.39, "standard_deviation": 0.07, "runs": {"0": {}, "1": {}}}
        for method in ("none", "heteroakd")
    }
    pair = {
        "method": "heteroakd",
        "minus": "none",
        "mean": 0.0123,
        "standard_error": 0.002,
        "seeds": 2,
        "verdict": "better",
    }
    results = {"config": {}, "methods": methods, "paired_differences": [pair]}
    (folder / "comparison.json").write_text(json.dumps(results))
    groups, comparisons = read_groups([str(folder)])
    assert [group.name for group in groups] == ["none", "heteroakd"] and comparisons == [results]
    assert groups[0].series("train", "task") == [(2, 2.0), (4, 1.5)]  # seeds 0 and 1 differ by 1
    assert groups[0].iou() == {"road": pytest.approx(0.905), "sky": None, "car": 0.125}
    assert groups[1].confusion() == [[15, 0, 6], [0, 0, 0], [2, 0, 2]]
    path = report.run_report(ReportRun(runs=[str(folder)], output=str(tmp_path / "r.html")))
    words = [word for word in Page(path.read_text()).text if word]
    assert {"heteroakd minus none", "+1.23", "0.20", "better", "none-seed0", "heteroakd-seed1"} <= set(words)


def test_folders_without_a_run_and_broken_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    assert main(["report", "--runs", f"[{tmp_path}]"]) == 1
    assert f"{tmp_path}: no run (config.yaml, metrics.jsonl) and no comparison" in capsys.readouterr().err
    assert main(["report", "--runs", "[]"]) == 1
    assert "runs must name at least one folder, got none" in capsys.readouterr().err
    (run / "maps" / "step_000004_val_01.npz").write_text("no maps")
    assert main(["report", "--runs", f"[{run}]"]) == 1
    assert "step_000004_val_01.npz: not a file of maps" in capsys.readouterr().err
    for name, contents, message in (  # each is read before those above it
        ("summary.json", "{}", "lacks steps, miou, pixel_accuracy"),
        ("summary.json", "[", "no JSON object"),
        ("config.yaml", "a: [", "no YAML"),
    ):
        (run / name).write_text(contents)
        with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
            read(run)
    assert not (run / "report.html").exists()


def test_folders_of_the_same_name_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name / "compare" for name in "ab"]
    for number, folder in enumerate(folders):
        run_folder(folder / f"none-seed{number}", "none", number)
        results = {"methods": {"none": {"runs": {str(number): {}}}}, "paired_differences": []}
        (folder / "comparison.json").write_text(json.dumps(results))
    groups, _ = read_groups([str(folder) for folder in folders])
    assert [group.name for group in groups] == [f"{folder}, none" for folder in folders]
    assert groups[0].iou() != groups[1].iou()
    assert main(["report", "--runs", f"[{folders[0]}, {folders[0]}/]"]) == 1
    assert f"runs must name each folder once, got {folders[0]} twice" in capsys.readouterr().err


def test_results_of_no_comparison_are_named(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"methods": {}}')
    with pytest.raises(ValueError, match=r"comparison\.json: lacks paired_differences"):
        read_groups([str(tmp_path)])


def test_a_users_own_pictures_beside_the_runs_are_left_out(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    panels, maps = read(run).panels(), read(run).maps()
    for name in ("step_last_val_01.png", "step_000009_val_01_cut.png", "step_000009_val_01.png.tmp"):
        (run / "pictures" / name).write_bytes(b"")
    (run / "maps" / "step_4_val_x.npz").write_bytes(b"")
    assert (read(run).panels(), read(run).maps()) == (panels, maps)
    assert [path.name for path in panels.values()] == ["step_000004_val_01.png"]


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_folder(tmp_path / "mine"))
    assert [group.name for group in read_groups(["."])[0]] == ["mine"]


@pytest.mark.parametrize("contents", ["", "- 1\n", "data: 3\nschedule: {}\n", "data: {}\nschedule: {}\n"])
def test_configurations_of_no_run_are_named(tmp_path: Path, contents: str) -> None:
    run = run_folder(tmp_path / "run")
    (run / "config.yaml").write_text(contents)
    with pytest.raises(ValueError, match=r"config\.yaml: no configuration of a run"):
        read(run)


@pytest.mark.parametrize(
    ("line", "message"),
    [(b'{"step": 1}', "lacks event"), (b'{"event": "train"}', "lacks step"), (b"\xff\xfe", "not a JSON object")],
)
def test_damaged_lines_of_metrics_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    run = run_folder(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(b'{"event": "train", "step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2: {message}"):
        read(run)
