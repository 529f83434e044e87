"""`heteroakd check-data`: what is counted, what is named as broken, and the contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from heteroakd.cli import main
from heteroakd.commands.check_data import run_check_data
from heteroakd.config.commands import CheckDataRun
from heteroakd.data import DataConfig, DataError, build_data
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """5 training and 3 validation pairs of 24x32 JPEGs with the labels 0, 1, and 255 in a corner."""
    root = tmp_path / "set"
    for part, count in (("train", 5), ("val", 3)):
        for number in range(count):
            values = np.zeros((24, 32), np.uint8)
            values[:, 8 * (number % 4) :] = 1
            values[:2, :2] = 255
            for kind in ("images", "labels"):
                (root / kind / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / "labels" / part / f"{number}.png")
            Image.fromarray(values).convert("RGB").save(root / "images" / part / f"{number}.jpg")
    (root / "classes.txt").write_text("road #804080\ncar #00008e\nboat #ff0000\n")
    return root


def config_for(folder: Path, output: Path, **changes: object) -> CheckDataRun:
    data = DataConfig("folder", str(folder), crop_size=(32, 32))
    return replace(CheckDataRun(data=data, output=str(output), samples=2), **changes)


def test_counts_sizes_and_histogram(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = run_check_data(config_for(folder, tmp_path / "out"))
    train = reports["train"]
    assert (train.pairs, train.read, train.broken, train.published) == (5, 5, 0, None)
    assert train.sizes == {"32x24": 5}
    labels = [build_data(DataConfig("folder", str(folder))).train.source[index][1] for index in range(5)]
    expected = torch.bincount(torch.stack(labels).flatten(), minlength=256)
    assert train.pixels == [int(expected[0]), int(expected[1]), 0, int(expected[255])]
    assert train.images == [3, 5, 0, 5]  # in pairs 0 and 4 class 1 is everywhere but in the ignored corner
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert written["parts"]["val"]["pairs"] == 3 and written["parts"]["train"]["sizes"] == {"32x24": 5}
    assert written["parts"]["train"]["pixels"]["car"] == int(expected[1])
    printed = capsys.readouterr().out
    assert "train: 5 pairs; 32x24 (5); 0.5 % of the pixels ignored; 0 broken" in printed
    assert "labelled nowhere: boat" in printed


def test_contact_sheet_shows_pictures_and_labels_in_the_classes_colours(folder: Path, tmp_path: Path) -> None:
    run_check_data(config_for(folder, tmp_path / "out"))
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 4 * 288
        colours = {tuple(colour) for colour in np.unique(np.asarray(sheet).reshape(-1, 3), axis=0).tolist()}
    assert {(0x80, 0x40, 0x80), (0, 0, 0x8E), (96, 96, 96)} <= colours
    assert (255, 0, 0) not in colours  # the legend has what is shown
    assert run_check_data(config_for(folder, tmp_path / "none", samples=0))
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["check.json"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def wrong_size(path: Path) -> None:
    Image.fromarray(np.zeros((20, 32), np.uint8)).save(path)


def wrong_value(path: Path) -> None:
    Image.fromarray(np.full((24, 32), 3, np.uint8)).save(path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("broken", "damage", "message"),
    [
        ("images/train/1.jpg", truncate, r"images/train/1\.jpg: not a readable picture: .*[Tt]runcated"),
        ("labels/train/1.png", truncate, r"labels/train/1\.png: not a readable picture"),
        (
            "labels/train/1.png",
            wrong_size,
            r"labels/train/1\.png: 32x20 pixels .* expected 32x24, the size of .*1\.jpg",
        ),
        ("labels/train/1.png", wrong_value, r"labels/train/1\.png: label 3 at row 0, column 0; expected 0 to 2 or 255"),
    ],
    ids=["truncated image", "truncated label", "sizes differ", "label out of range"],
)
def test_first_broken_file_is_named_after_everything_is_counted(
    folder: Path, tmp_path: Path, workers: int, broken: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder / broken)
    (folder / "images" / "val" / "2.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=f"^2 of 8 pairs are broken; the first: .*{message}"):
        run_check_data(config_for(folder, tmp_path / "out", workers=workers))
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert written["parts"]["train"]["broken"] == 1 and written["parts"]["train"]["read"] == 5
    assert "val/2.jpg" in written["parts"]["val"]["errors"][0]
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_missing_files_are_named_at_once(folder: Path, tmp_path: Path) -> None:
    (folder / "labels" / "val" / "1.png").unlink()
    with pytest.raises(DataError, match=r"val/1\.jpg: no label for it; expected .*labels/val/1\.png"):
        run_check_data(config_for(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_readable_leaves_no_sheet(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("images/*/*.jpg"):
        truncate(path)
    with pytest.raises(DataError, match="8 of 8 pairs are broken"):
        run_check_data(config_for(folder, tmp_path / "out"))
    assert not (tmp_path / "out" / "contact_sheet.png").exists()


def test_limit_reads_the_first_pairs_of_each_part(folder: Path, tmp_path: Path) -> None:
    truncate(folder / "images" / "train" / "4.jpg")
    with pytest.raises(DataError):
        run_check_data(config_for(folder, tmp_path / "all"))
    reports = run_check_data(config_for(folder, tmp_path / "some", limit=2, samples=0))
    assert [(report.pairs, report.read) for report in reports.values()] == [(5, 2), (3, 2)]
    Image.fromarray(np.full((24, 32), 255, np.uint8)).save(folder / "labels" / "train" / "0.png")
    run_check_data(config_for(folder, tmp_path / "one", limit=1, samples=0))  # one label of five says nothing of them


def test_public_sets_are_compared_with_what_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for place in (part, f"{part}annot"):
            (tmp_path / "camvid" / place).mkdir(parents=True)
            Image.fromarray(np.zeros((24, 32), np.uint8)).save(tmp_path / "camvid" / place / "a.png")
    data = DataConfig("camvid", str(tmp_path / "camvid"), crop_size=(32, 32), cache=True)
    run_check_data(CheckDataRun(data=data, output=str(tmp_path / "check-{name}")))
    assert (tmp_path / "check-camvid" / "contact_sheet.png").is_file()
    printed = capsys.readouterr().out
    assert "train: 1 pairs (published: 367)" in printed and "val: 1 pairs (published: 101)" in printed


def test_own_sets_are_told_apart_by_their_folders(folder: Path, tmp_path: Path) -> None:
    run_check_data(config_for(folder, tmp_path / "check-{name}"))
    assert (tmp_path / "check-folder-set" / "check.json").is_file()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.image_size", "[32,48]", "--data.crop_size", "[32,32]", "--data.train_images", "3"]
    small += ["--data.val_images", "2"]
    assert main(["check-data", *small, "--output", str(tmp_path / "{name}"), "--workers", "1"]) == 0
    assert "street: 12 classes" in capsys.readouterr().out and (tmp_path / "street" / "check.json").is_file()
    assert main(["check-data", "--data.name", "voc", "--data.root", str(tmp_path)]) == 1
    assert "JPEGImages: no such folder; expected the contents of VOCtrainval" in capsys.readouterr().err
