"""The one reader of pictures: bit depths, damaged files, EXIF data, and what every command makes of the same file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from heteroakd.cli import main
from heteroakd.commands.predict import read_image as predicts
from heteroakd.data import DataConfig, DataError, build_data
from heteroakd.data.augmentation import TrainTransform
from heteroakd.data.reading import orientation, read_image, read_label_values
from PIL import Image

RAMP = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)


def write_set(root: Path, image: str = "a.png") -> Path:
    """The place of the only image of a set, whose label is written: "a" in both parts."""
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("ground\nthing\n")
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / part).mkdir(parents=True)
        Image.fromarray((RAMP > 30000).astype(np.uint8)).save(root / "labels" / part / "a.png")
    Image.new("RGB", (32, 24)).save(root / "images" / "train" / "a.png")
    return root / "images" / "val" / image


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed little-endian TIFF of one strip; Pillow writes too few kinds."""
    fields = {
        256: values.shape[1], 257: values.shape[0], 258: values.itemsize * 8, 259: 1, 262: 1, 273: 0, 277: 1,
        278: values.shape[0], 279: values.nbytes, 339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind],
    } | {int(name[1:]): value for name, value in tags.items()}  # fmt: skip
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + b"\0" * 4 + values.tobytes()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_gray_of_16_bits_is_divided_by_65535_in_every_command(name: str, tmp_path: Path) -> None:
    path = write_set(tmp_path, name)
    Image.fromarray(RAMP).save(path)
    expected = torch.from_numpy(RAMP / 65535).float().expand(3, -1, -1)
    torch.testing.assert_close(read_image(path), expected)
    data = ["--data.name", "folder", "--data.root", str(tmp_path), "--data.crop_size", "[32,32]"]
    assert main(["check-data", *data, "--output", str(tmp_path / "check")]) == 0
    sample, label = build_data(DataConfig("folder", str(tmp_path))).val[0]
    assert torch.equal(sample, predicts(path))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(sample, (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    transform = TrainTransform((40, 48), (1.0, 1.0), 0.0, 0.0)
    crop, there = transform(read_image(path), label.to(torch.uint8))
    assert crop[:, there == 255].abs().max() < 1e-6  # padded by the mean colour
    torch.testing.assert_close(crop[:, there != 255], sample.flatten(1))


@pytest.mark.parametrize(
    ("values", "tags", "expected"),
    [
        (RAMP, {}, RAMP / 65535),
        (RAMP, {"t262": 0}, 1 - RAMP / 65535),
        (np.arange(0, 240, dtype=np.uint8).reshape(10, 24), {"t262": 0}, 1 - np.arange(240).reshape(10, 24) / 255),
    ],
    ids=["16 bits", "16 bits, 0 is white", "8 bits, 0 is white"],
)
def test_tiffs_of_either_polarity(
    values: np.ndarray, tags: dict[str, int], expected: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(values, **tags))
    image = read_image(tmp_path / "a.tif")
    image = image if image.is_floating_point() else image / 255
    torch.testing.assert_close(image[1], torch.from_numpy(expected).float())


def test_12_bits_are_divided_by_4095(tmp_path: Path) -> None:
    packed = np.array([[0xFF, 0xF8, 0x00]], np.uint8)  # 4095 and 2048
    content = tiff(packed, t256=2, t258=12)
    (tmp_path / "a.tif").write_bytes(content)
    torch.testing.assert_close(read_image(tmp_path / "a.tif")[0], torch.tensor([[1.0, 2048 / 4095]]))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(np.float32, "floating-point"), (np.int32, "32 bit"), (np.uint32, "32 bit"), (np.int16, "signed")],
)
def test_pixels_without_a_known_range_are_refused_by_name(dtype: type, kind: str, tmp_path: Path) -> None:
    path = write_set(tmp_path, "a.tif")
    path.write_bytes(tiff(RAMP.astype(dtype)))
    data = build_data(DataConfig("folder", str(tmp_path)))
    for read in (lambda: data.val[0], lambda: predicts(path)):
        with pytest.raises(DataError, match=rf"val/a\.tif: not a readable picture: .*{kind}.* range is not known"):
            read()


def damage(path: Path, kind: str) -> None:
    Image.new("RGB", (32, 24)).save(path, exif=b"Exif\0\0no such block" if kind == "exif" else b"")
    content = path.read_bytes()
    if kind == "bomb":  # the size that the header says, and no picture of it
        start = content.index(b"\xff\xc0") + 5
        path.write_bytes(content[:start] + struct.pack(">HH", 60000, 60000) + content[start + 4 :])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(content[:-20])


@pytest.mark.parametrize("kind", ["exif", "bomb", "empty", "truncated"])
def test_whatever_pillow_raises_is_named_with_the_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_set(tmp_path / "set", "a.png" if kind == "exif" else "a.jpg")
    damage(path, kind)
    data = ["--data.name", "folder", "--data.root", str(tmp_path / "set")]
    status = main(["check-data", *data, "--output", str(tmp_path / "out"), "--samples", "0"])
    printed = capsys.readouterr().err
    assert status == 1 and f"{path}: not a readable picture: " in printed


def test_orientation_without_a_picture_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    assert orientation(tmp_path / "a.png") == 1


def test_labels_of_many_formats_keep_their_values(tmp_path: Path) -> None:
    values = (RAMP % 7).astype(np.uint8)
    for suffix in ("png", "bmp", "tif", "gif"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        assert np.array_equal(read_label_values(tmp_path / f"a.{suffix}"), values), suffix
    Image.fromarray(values).convert("LA").save(tmp_path / "la.png")
    assert np.array_equal(read_label_values(tmp_path / "la.png"), values)
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(
        DataError, match=r"f\.tif: a label must be a single-channel picture of class indices, got mode F"
    ):
        read_label_values(tmp_path / "f.tif")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("check-data", "data.evaluation_part", "test"),
        ("teacher", "data.crop_size", "[-64,64]"),
        ("teacher", "data.scale_range", "[.nan,1.0]"),
        ("teacher", "data.scale_range", "[0.5,1e9]"),
        ("compare", "data.scale_step", ".nan"),
        ("teacher", "data.flip_probability", ".nan"),
        ("teacher", "data.seed", "99999999999999999999999"),
        ("check-data", "data.train_images", "-3"),
    ],
)
def test_options_out_of_bounds_are_a_line(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, f"--{option}", value])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and f"error: {option} must" in printed
