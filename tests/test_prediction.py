"""`heteroakd predict`: pictures of every kind, broken ones among them, overlays, labels and evaluation options."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heteroakd.cli import main
from heteroakd.commands.predict import read_image, write_labels
from heteroakd.config.commands import EvaluateRun
from heteroakd.config.groups import EvaluationConfig, ModelConfig, to_dict
from heteroakd.data import DataConfig, class_palette
from heteroakd.data.published import PUBLISHED
from heteroakd.evaluation.inference import bounded, predict
from heteroakd.networks.zoo import build_network
from heteroakd.training.checkpoint import load_checkpoint, save_checkpoint
from heteroakd.training.trained import choose_evaluation, load_trained, saved_data
from PIL import Image
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("prediction")
    options = "{crop_size: [32, 64], image_size: [32, 64], train_images: 2, val_images: 2}"
    arguments = ["teacher", "--data", options, "--output", str(folder / "teacher"), "--optimizer.lr", "0.01"]
    arguments += ["--model", "{architecture: fpn, encoder: tu-mobilenetv3_small_050, weights: null}"]
    arguments += ["--schedule", "{steps: 2, batch_size: 2}", "--evaluation.flip", "true"]
    arguments += ["--runtime", "{device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 0}"]
    assert main(arguments) == 0
    return str(folder / "teacher" / "last.pt")


def picture(path: Path, mode: str, size: tuple[int, int] = (50, 30)) -> np.ndarray:
    """A random picture of a mode, written; 16 bit gray as "I;16"."""
    random = np.random.default_rng(0)
    channels = {"RGB": 3, "RGBA": 4, "LA": 2}.get(mode)
    shape = (size[1], size[0]) if channels is None else (size[1], size[0], channels)
    values = random.integers(0, 256, shape).astype(np.uint8)
    if mode == "I;16":
        values = random.integers(0, 2**16, shape).astype(np.uint16)
    image = Image.fromarray(values)
    if mode == "P":
        image = image.convert("P")
    image.save(path)
    return values


def test_pixels_of_every_mode_are_read_as_rgb(tmp_path: Path) -> None:
    for mode in ("RGB", "RGBA", "L", "I;16", "P"):
        values = picture(tmp_path / "a.png", mode)
        with Image.open(tmp_path / "a.png") as opened:
            assert opened.mode == mode
            shown = np.asarray(opened.convert("RGB"))
        image = (read_image(tmp_path / "a.png") * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)).permute(1, 2, 0).numpy()
        assert image.shape == (30, 50, 3) and image.dtype == np.float32
        if mode == "I;16":
            expected = np.repeat(values[..., None] / 65535, 3, 2)
        else:
            expected = (values[..., :3] if mode == "RGBA" else shown) / 255
        np.testing.assert_allclose(image, expected, atol=1e-6)


def test_orientation_of_a_camera_is_followed(tmp_path: Path) -> None:
    image = Image.new("RGB", (50, 30), (10, 20, 30))
    marks = Image.Exif()
    marks[274] = 6  # turn by 90 degrees
    image.save(tmp_path / "a.jpg", exif=marks)
    assert read_image(tmp_path / "a.jpg").shape == (3, 50, 30)


def test_broken_pictures_are_named_and_the_others_predicted(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, mode, size in (
        ("a", "RGB", (33, 47)),
        ("c", "L", (1, 1)),
        ("d", "RGBA", (65, 20)),
        ("e", "I;16", (9, 9)),
    ):
        picture(folder / f"{name}.png", mode, size)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:400])
    (folder / "f.jpg").write_text("no picture")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "g.tiff")
    (folder / "._a.png").write_bytes(b"what macOS leaves")
    arguments = ["predict", "--checkpoint", checkpoint, "--images", f"[{folder}]", "--output", str(output)]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "4 overlays in" in printed.out
    assert f"3 of 7 images cannot be read; the first: {folder}/b.png: not a readable picture" in printed.err
    sizes = {}
    for path in output.iterdir():
        with Image.open(path) as opened:
            sizes[path.name] = opened.size
    assert sizes == {"a.png": (33, 47), "c.png": (1, 1), "d.png": (65, 20), "e.png": (9, 9)}


def test_labels_are_the_predicted_indices_in_the_classes_colours(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "a_labels"):
        picture(tmp_path / "in" / f"{name}.png", "RGB", (70, 45))
    output = tmp_path / "out"
    options = ["--labels", "true", "--evaluation", "{window: [32, 32], scales: [0.5, 1.0], flip: true}"]
    arguments = ["predict", "--checkpoint", checkpoint, "--images", f"[{tmp_path / 'in'}]", "--output", str(output)]
    assert main([*arguments, *options]) == 0
    written = {path.name for path in output.iterdir()}
    assert written == {"a.png", "a_labels.png", "a_labels_2.png", "a_labels_2_labels.png"}
    trained = load_trained(EvaluateRun(checkpoint, threads=1), "cpu")
    network, data = trained.network, trained.build_data()
    image = read_image(tmp_path / "in" / "a.png")
    expected = predict(network, image, EvaluationConfig(window=(32, 32), scales=[0.5, 1.0], flip=True))
    with Image.open(output / "a_labels.png") as labels:
        assert labels.mode == "P"
        np.testing.assert_array_equal(np.asarray(labels), expected.numpy())
        colours = np.asarray(labels.convert("RGB"))
    np.testing.assert_array_equal(colours, data.palette[expected].numpy())


def test_own_images_need_no_data_set(checkpoint: str, tmp_path: Path) -> None:
    saved = load_checkpoint(checkpoint)
    picture(tmp_path / "a.png", "RGB", (40, 30))
    saved.config["data"] = to_dict(DataConfig("folder", str(tmp_path / "nowhere")))
    save_checkpoint(tmp_path / "last.pt", saved)
    arguments = ["predict", "--checkpoint", str(tmp_path / "last.pt"), "--images", f"[{tmp_path / 'a.png'}]"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "a.png").is_file()
    assert main([*arguments[:3], "--output", str(tmp_path / "out")]) == 1  # its val images are another matter


def test_colours_of_classes_without_their_images(tmp_path: Path) -> None:
    names, colours = PUBLISHED["camvid"].classes()
    assert class_palette(DataConfig(name="camvid", root="nowhere"), names).tolist() == [
        list(colour) for colour in colours
    ]
    series = class_palette(DataConfig(name="folder", root=str(tmp_path)), ("a", "b"))
    assert len({tuple(colour) for colour in series.tolist()}) == 2
    (tmp_path / "classes.txt").write_text("a #010203\nb #040506\n")
    assert class_palette(DataConfig(name="folder", root=str(tmp_path)), ("a", "b")).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert torch.equal(class_palette(DataConfig(name="folder", root=str(tmp_path)), ("a", "c")), series)


def test_labels_of_256_classes(tmp_path: Path) -> None:
    palette = torch.randint(0, 256, (256, 3), dtype=torch.uint8)
    labels = torch.arange(256).view(16, 16)
    write_labels(tmp_path / "new" / "labels.png", labels, palette)
    with Image.open(tmp_path / "new" / "labels.png") as written:
        np.testing.assert_array_equal(np.asarray(written), labels.numpy())
        np.testing.assert_array_equal(np.asarray(written.convert("RGB")), palette[labels].numpy())


def test_evaluation_options_come_from_the_run_unless_given(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_checkpoint(checkpoint).config["evaluation"]["flip"] is True
    tables = []
    for options in (
        [],
        ["--evaluation.flip", "true"],
        ["--evaluation.flip", "false", "--evaluation.window", "[32, 32]"],
    ):
        capsys.readouterr()
        assert main(["evaluate", "--checkpoint", checkpoint, *options]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
    assert ["the run's own evaluations" in table for table in tables] == [False, False, True]
    assert f"{100 * load_checkpoint(checkpoint).metrics['miou']:.2f} %" in tables[0]


def test_options_that_are_not_given_stay_the_runs_own(checkpoint: str, tmp_path: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    assert choose_evaluation({"scales": [0.5]}, loaded) == EvaluationConfig(scales=[0.5], flip=True)
    assert choose_evaluation({}, loaded) == choose_evaluation(None, loaded) == EvaluationConfig(flip=True)
    data = saved_data(checkpoint, loaded, None, {"val_images": 1})
    assert data == DataConfig(crop_size=(32, 64), image_size=(32, 64), train_images=2, val_images=1)
    other = saved_data(checkpoint, loaded, str(tmp_path), {"name": "camvid", "evaluation_part": "test"})
    assert other == DataConfig(name="camvid", root=str(tmp_path), evaluation_part="test")
    output = tmp_path / "evaluation.json"
    arguments = ["--data.val_images", "1", "--evaluation.flip", "false", "--output", str(output)]
    assert main(["evaluate", "--checkpoint", checkpoint, *arguments]) == 0
    assert json.loads(output.read_text())["images"] == 1


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{scales: []}", "evaluation: not a valid EvaluationConfig: scales must be one or more numbers"),
        ("{window: [5]}", "evaluation: not a valid EvaluationConfig: "),
        ("{flop: true}", "evaluation: not a valid EvaluationConfig"),
        ("{flip: maybe}", "evaluation: not a valid EvaluationConfig"),
    ],
)
def test_wrong_options_are_one_message(
    checkpoint: str, command: str, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--checkpoint", checkpoint, "--evaluation", options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"heteroakd {command}: error: {message}")


def test_images_that_fail_are_named_and_the_others_predicted(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For want of memory, and for a name to which nothing can be added; one of 244 bytes is no trouble."""
    for name in ("a", "b" * 240, "c" * 251, "d"):
        picture(tmp_path / f"{name}.png", "RGB")
    (tmp_path / "e.png").symlink_to("nowhere")

    def short_of_memory(
        network: torch.nn.Module, image: torch.Tensor, *rest: object, **options: object
    ) -> torch.Tensor:
        if not calls:
            calls.append(1)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 36700000000 bytes")
        return predict(network, image, *rest, **options)  # type: ignore[arg-type]

    calls: list[int] = []
    monkeypatch.setattr("heteroakd.commands.predict.predict", short_of_memory)
    arguments = ["predict", "--checkpoint", checkpoint, "--images", str(tmp_path), "--labels", "true"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert f"3 of 5 images failed; the first: {tmp_path / 'a.png'}: DefaultCPUAllocator" in printed.err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{'b' * 240}.png", f"{'b' * 240}_labels.png", f"{'c' * 251}.png", "d.png", "d_labels.png"}


def test_large_images_are_predicted_in_windows_and_a_line_says_so(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("inference.LARGEST_WHOLE", "inference.WINDOW"):
        monkeypatch.setattr(f"heteroakd.evaluation.{name}", (32, 32))
    picture(tmp_path / "a.png", "RGB", (70, 45))
    picture(tmp_path / "b.png", "RGB", (32, 32))
    arguments = ["predict", "--checkpoint", checkpoint, "--images", str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    arguments += ["--labels", "true", "--evaluation.flip", "false"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("predicted in windows") == 1
    network = load_trained(EvaluateRun(checkpoint, threads=1), "cpu").network
    expected = predict(network, read_image(tmp_path / "a.png"), EvaluationConfig(window=(32, 32)))
    with Image.open(tmp_path / "out" / "a_labels.png") as labels:
        np.testing.assert_array_equal(np.asarray(labels), expected.numpy())
    assert main([*arguments, "--output", str(tmp_path / "out"), "--evaluation.window", "[45,70]"]) == 0
    assert "predicted in windows" not in capsys.readouterr().out


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it and still there, and the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.storages = {storage: size for storage, size in self.storages.items() if not storage.expired()}
        self.most = max(self.most, sum(self.storages.values()))
        return result


@pytest.mark.usefixtures("one_block_in_each_stage")
def test_a_photograph_of_12_megapixels_takes_less_than_4_gib() -> None:
    """The default student, on tensors that have sizes and no values. A stage's second block holds what its first does;
    mirrored images are the most that is held."""
    network = build_network(ModelConfig(), 19)[0].eval()
    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        image = torch.empty(3, 3024, 4032)
        options = bounded(EvaluationConfig(flip=True), image)
        assert options.window is not None and predict(network, image, options).shape == (3024, 4032)
        largest = bounded(EvaluationConfig(), torch.empty(3, 1024, 2048))
        assert largest.window is None and predict(network, torch.empty(3, 1024, 2048), largest).shape == (1024, 2048)
    assert 2**28 < held.most < 2**32


@pytest.mark.parametrize(("scales", "flip", "gib"), [([1.0], True, 2.0), ([0.5, 1.0, 1.5], False, 3.0)])
def test_several_views_in_windows_hold_no_scores_of_a_whole_photograph(
    scales: list[float], flip: bool, gib: float
) -> None:
    """Of a network that holds nothing itself: the images of all views, and a row of windows of each."""
    network = nn.Sequential(OrderedDict(encoder=nn.Conv2d(3, 19, 32, stride=32)))
    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        image = torch.empty(3, 3024, 4032)
        options = bounded(EvaluationConfig(scales=scales, flip=flip), image)
        assert predict(network, image, options).shape == (3024, 4032)
    assert 2**28 < held.most < gib * 2**30


def test_val_pictures_keep_their_names_and_a_folder_is_its_last_checkpoint(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_checkpoint(Path(checkpoint).parent)
    (tmp_path / "classes.txt").write_text("\n".join(saved.classes))
    for kind, mode in (("images", "RGB"), ("labels", "L")):
        for part in ("train", "val"):
            (tmp_path / kind / part).mkdir(parents=True)
            values = np.zeros((32, 32, 3) if mode == "RGB" else (32, 32), np.uint8)
            Image.fromarray(values).save(tmp_path / kind / part / f"{part} 7.png")
    saved.config["data"] = to_dict(DataConfig("folder", str(tmp_path)))
    save_checkpoint(tmp_path / "last.pt", saved)
    arguments = ["predict", "--checkpoint", str(tmp_path), "--output"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val 7.png"]
    for kind in ("images", "labels"):  # neither is replaced by an overlay of its name
        before = (tmp_path / kind / "val" / "val 7.png").read_bytes()
        assert main([*arguments, str(tmp_path / kind / "val")]) == 1
        assert f"{kind}/val/val 7.png is one of the images and would be replaced" in capsys.readouterr().err
        assert (tmp_path / kind / "val" / "val 7.png").read_bytes() == before


def test_how_miou_was_measured_is_on_record(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--evaluation", "{window: [32, 48], scales: [0.5, 1.0]}", "--output", str(tmp_path / "e.json")]
    assert main(["evaluate", "--checkpoint", checkpoint, *options]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["measured"] == {
        "data": "street", "root": None, "part": "val", "window": [32, 48], "window_stride": [21, 32],
        "scales": [0.5, 1.0], "flip": True,
    }  # fmt: skip
    line = "on the val part of street: windows of 32x48 every 21x32, mean of the scales 0.5, 1, mirrored too"
    assert line in capsys.readouterr().out


def test_numbers_that_a_full_disk_takes_are_an_error(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--checkpoint", checkpoint, "--limit", "1", "--output"]
    with open("/dev/full", "w") as full, monkeypatch.context() as replaced:
        replaced.setattr("sys.stdout", full)
        assert main([*arguments, str(tmp_path / "e.json")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads((tmp_path / "e.json").read_text())["images"] == 1  # what has a file of its own is kept
    monkeypatch.setattr("heteroakd.commands.evaluate.evaluate_maps", None)  # for such files nothing is measured
    assert main([*arguments, "/proc/nowhere/e.json"]) == 1
    assert "/proc/nowhere/e.json: cannot be written there" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path)]) == 1
    assert f"{tmp_path} is a folder: --output names the file" in capsys.readouterr().err
    (tmp_path / "photo.png").write_bytes(b"photo")
    assert main([*arguments, str(tmp_path / "photo.png")]) == 1
    assert "output must end in .json" in capsys.readouterr().err
    assert (tmp_path / "photo.png").read_bytes() == b"photo"


@pytest.mark.parametrize("labels", ["true", "false"])
def test_images_are_never_replaced_by_their_overlays(
    checkpoint: str, tmp_path: Path, labels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(folder / "a.png", "RGB")
    before = (folder / "a.png").read_bytes()
    arguments = ["predict", "--checkpoint", checkpoint, "--images", f"[{folder}]", "--labels", labels]
    assert main([*arguments, "--output", str(folder)]) == 1
    assert f"{folder}/a.png is one of the images and would be replaced" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["a.png"] and (folder / "a.png").read_bytes() == before
    (folder / "a.png").rename(folder / "a.bmp")  # another suffix: nothing to replace
    assert main([*arguments, "--output", str(folder)]) == 0
