"""The procedural street scenes."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from heteroakd.data import IGNORE_INDEX, DataConfig, build_data
from heteroakd.data.street import CLASSES, PALETTE, StreetScenes
from heteroakd.data.street.canvas import Camera, Canvas, Label, Surface

SIZE = (64, 96)


def digest(part: str, seed: int, indices: range, size: tuple[int, int] = SIZE) -> str:
    scenes = StreetScenes(part, 1000, size, seed)
    joined = hashlib.sha256()
    for index in indices:
        for tensor in scenes[index]:
            joined.update(tensor.numpy().tobytes())
    return joined.hexdigest()


def test_street_is_a_function_of_seed_part_and_index_in_every_process():
    here = digest("val", 3, range(2, 5))
    program = "from test_street import digest; print(digest('val', 3, range(2, 5)))"
    path = [str(Path(__file__).parent), *sys.path]
    there = processes.run("-c", f"import sys; sys.path[:0] = {path!r}; {program}", modules=processes.TRAINER)
    assert there.returncode == 0 and there.stdout.strip() == here
    assert digest("val", 3, range(2, 5)) == here  # whatever was drawn before


def test_street_pictures_are_all_different():
    seen = {digest(part, seed, range(i, i + 1)) for part in ("train", "val") for seed in (0, 1) for i in range(6)}
    assert len(seen) == 24


def test_street_pictures_have_the_documented_form():
    assert len(CLASSES) == len(PALETTE) == 12 == len(set(PALETTE))
    for size in ((64, 96), (96, 64), (33, 47)):
        image, label = StreetScenes("train", 1, size)[0]
        assert image.dtype == label.dtype == torch.uint8
        assert image.shape == (3, *size) and label.shape == size
        assert set(label.unique().tolist()) <= {*range(12), IGNORE_INDEX}


def test_street_has_the_class_frequencies_of_a_street():
    scenes = StreetScenes("train", 100, (96, 144), seed=0)
    counts = torch.stack([torch.bincount(scenes[i][1].flatten().long(), minlength=256) for i in range(80)])
    share = dict(zip(CLASSES, (counts.sum(0) / counts.sum()).tolist(), strict=False))
    present = dict(zip(CLASSES, (counts > 0).float().mean(0).tolist(), strict=False))
    assert 0.25 < share["road"] < 0.45 and 0.15 < share["building"] < 0.35 and 0.05 < share["sky"] < 0.2
    assert 0.04 < share["vegetation"] < 0.2 and 0.03 < share["vehicle"] < 0.15 and 0.02 < share["sidewalk"] < 0.1
    for thin in ("pole", "person", "fence", "traffic sign", "traffic light"):
        assert 0.0003 < share[thin] < 0.03, thin
    assert present["traffic light"] > 0.15 and min(present[name] for name in CLASSES if name != "traffic light") > 0.4
    ignored = float(counts[:, IGNORE_INDEX].sum() / counts.sum())
    assert 0.01 < ignored < 0.08
    assert counts[:, 12:IGNORE_INDEX].sum() == 0


def test_street_colour_alone_does_not_give_the_class_away():
    """The best guess from a pixel's colour, even one fitted to these very pictures, is often wrong."""
    scenes = StreetScenes("train", 40, (96, 144), seed=0)
    table = torch.zeros(512, 256)
    for index in range(40):
        image, label = scenes[index]
        bins = (image.long() // 32 * torch.tensor([64, 8, 1]).view(3, 1, 1)).sum(0)
        table += torch.bincount((bins * 256 + label.long()).flatten(), minlength=512 * 256).view(512, 256)
    table = table[:, :12]
    recall = torch.zeros(12)
    guess = table.argmax(1)
    for label in range(12):
        recall[label] = table[guess == label, label].sum() / table[:, label].sum()
    assert float(table.max(1).values.sum() / table.sum()) < 0.75
    assert float(recall.mean()) < 0.45


def empty_canvas() -> Canvas:
    camera = Camera(20, 20, focal=20, horizon=10, centre=10, eye=1.5, roll=0.0)
    return Canvas(camera, np.zeros((20, 20, 3), np.uint8))


def test_street_antialiases_colours_and_never_labels():
    canvas = empty_canvas()
    canvas.polygon([(3, 3), (17, 5), (9, 17)], (240, 240, 240), canvas.surface(Surface(Label.VEHICLE, 5.0)))
    colours, surfaces, _ = canvas.developed()
    assert set(np.unique(surfaces)) == {0, 1}
    assert len(np.unique(colours)) > 4


def test_street_shares_surfaces_on_a_crowded_canvas():
    canvas = empty_canvas()
    for number in range(400):
        surface = canvas.surface(Surface(Label.PERSON, 40.0 - 0.05 * number))
        assert [*canvas.surfaces][surface].label == Label.PERSON
    assert surface < 399
    bonnet = canvas.surface(Surface(IGNORE_INDEX, 1.0))
    assert [*canvas.surfaces][bonnet].label == IGNORE_INDEX
    assert len(canvas.surfaces) <= 256


def test_street_projects_like_a_pinhole():
    camera = Camera(100, 200, focal=150, horizon=40, centre=90, eye=1.5, roll=0.02)
    x, z = camera.ground()
    column, row = camera.project(2.0, 0.0, 8.0)
    u, v = int(column), int(row)
    assert z[v, u] == pytest.approx(8.0, rel=0.03) and x[v, u] == pytest.approx(2.0, abs=0.1)


def test_street_is_generated_once_per_process():
    config = DataConfig(image_size=SIZE, train_images=3, val_images=2, seed=11)
    first, second = build_data(config), build_data(config)
    assert first.train.source is second.train.source
    image, label = first.train.source[0]
    assert second.train.source[0][0] is image and image.dtype == label.dtype == torch.uint8
