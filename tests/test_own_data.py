"""Data as people have it: masks of other values and colours, lists, suffixes, subfolders, and what is warned of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from heteroakd.cli import main
from heteroakd.data import DataConfig, DataError, build_data
from heteroakd.data.folder import read_classes
from heteroakd.data.survey import look
from PIL import Image

SIZE = (24, 32)
MASK = np.zeros(SIZE, np.uint8)
MASK[:, 20:] = 255  # 37.5 % of the pixels
SAME_FOLDER = {"image_folder": "{part}", "label_folder": "{part}"}
TEACHER = [
    *("teacher", "--model", "{architecture: fpn, encoder: tu-mobilenetv3_small_050, weights: null}"),
    *("--schedule", "{steps: 1, batch_size: 2}", "--data.crop_size", "[32,32]"),
    *("--runtime", "{device: cpu, threads: 1, tensorboard: false, progress: none, pictures: 0}"),
]


def save(values: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def make(
    root: Path, labels: np.ndarray, classes: str = "ground\nthing\n", parts: tuple[str, ...] = ("train", "val")
) -> Path:
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text(classes)
    for part in parts:
        for name in ("a", "b"):
            save(np.full((*SIZE, 3), 90, np.uint8), root / "images" / part / f"{name}.jpg")
            save(labels, root / "labels" / part / f"{name}.png")
    return root


def label_of(root: Path, index: int = 0, **options: object) -> np.ndarray:
    return build_data(DataConfig("folder", str(root), **options)).val[index][1].numpy()


def check(root: Path, *options: str) -> int:
    given = ["--data.name", "folder", "--data.root", str(root), "--output", str(root / "check"), "--samples", "0"]
    return main(["check-data", *given, *options])


# label values


def test_masks_of_0_and_255_are_warned_of_with_the_cure_which_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "set", MASK)
    assert check(root) == 0
    printed = capsys.readouterr().err
    assert "warning: train: 38 % of the pixels are ignored, and no label holds thing; masks of 0 and 255 are" in printed
    assert "warning: train: every labelled pixel is of one class" in printed
    assert len(json.loads((root / "check" / "check.json").read_text())["warnings"]) == 4
    data = ["--data.name", "folder", "--data.root", str(root)]
    assert main([*TEACHER, *data, "--output", str(tmp_path / "run")]) == 0
    assert "warning: train: 38 % of the pixels are ignored, and no label holds thing" in capsys.readouterr().out
    cure = ["--data.label_values", "{0: 0, 255: 1}"]
    assert check(root, *cure) == 0
    assert "warning" not in capsys.readouterr().err
    assert np.array_equal(label_of(root, label_values={0: 0, 255: 1}), MASK // 255)
    assert main([*TEACHER, *data, *cure, "--output", str(tmp_path / "run2")]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["evaluate", "--checkpoint", str(tmp_path / "run2" / "last.pt")]) == 0  # the map is in the checkpoint


def test_values_that_are_not_mapped_are_named_or_what_other_says(tmp_path: Path) -> None:
    values = MASK.copy()
    values[0, 0] = 7
    root = make(tmp_path, values)
    with pytest.raises(DataError, match=r"label 7 at row 0, column 0; expected .*0 \(read as 0\), 255 \(read as 1\)"):
        label_of(root, label_values={0: 0, 255: 1})
    read = label_of(root, label_values={0: 0, 255: 1, "other": 255})
    assert read[0, 0] == 255 and np.array_equal(read[1:], MASK[1:] // 255)


def test_values_of_16_bits_are_mapped(tmp_path: Path) -> None:
    root = make(tmp_path, np.where(MASK > 0, 40000, 300).astype(np.uint16))
    assert np.array_equal(label_of(root, label_values={300: 1, 40000: 0}), 1 - MASK // 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_those_of_classes_txt_unless_label_values_says_otherwise(mode: str, tmp_path: Path) -> None:
    colours = np.where(MASK[..., None] > 0, np.array([128, 64, 128], np.uint8), np.array([0, 0, 142], np.uint8))
    root = make(tmp_path, np.asarray(Image.fromarray(colours).convert(mode)), "car #00008e\nroad #804080\n")
    assert np.array_equal(label_of(root), MASK // 255)
    given = {"#804080": 255, "#00008E": 1}
    assert np.array_equal(label_of(root, label_values=given), np.where(MASK > 0, 255, 1))
    (root / "classes.txt").write_text("car #00008e\nroad #804081\n")
    with pytest.raises(DataError, match=r"label #804080 at row 0, column 20; expected #00008e \(0\), #804081 \(1\)"):
        label_of(root)
    (root / "classes.txt").write_text("car\nroad\n")
    with pytest.raises(DataError, match=r"got mode RGB; colours are read as classes\.txt .* or data\.label_values"):
        label_of(root)


def test_palette_pictures_are_read_by_colour_where_the_map_names_colours(tmp_path: Path) -> None:
    picture = Image.fromarray((MASK > 0).astype(np.uint8) * 9)
    picture.putpalette([0, 0, 0] + [1, 1, 1] * 8 + [255, 0, 0])
    root = make(tmp_path, MASK)
    picture.save(root / "labels" / "val" / "a.png")
    assert np.array_equal(label_of(root, label_values={"#000000": 0, "#ff0000": 1}), MASK // 255)
    assert np.array_equal(label_of(root, 1, label_values={"#000000": 0, "#ffffff": 1}), MASK // 255)  # gray, too


def test_a_palette_in_another_order_than_the_classes_is_no_picture_of_classes(tmp_path: Path) -> None:
    """As Pillow makes one of colours: by how often each occurs."""
    root = make(tmp_path, MASK // 255)
    (root / "classes.txt").write_text("car #ff0000\nroad #00ff00\n")
    path = root / "labels" / "val" / "a.png"
    colours = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    for order in ([0, 1], [1, 0]):
        picture = Image.fromarray((MASK > 0).astype(np.uint8) if order == [0, 1] else (MASK == 0).astype(np.uint8))
        picture.putpalette(colours[order].tobytes())
        assert np.array_equal(np.asarray(picture.convert("RGB")), colours[MASK // 255])
        picture.save(path)
        if order == [0, 1]:
            assert np.array_equal(label_of(root), MASK // 255)
    with pytest.raises(DataError, match=r"a\.png: index 0 has the colour #00ff00 of class 1 in the picture's palette"):
        label_of(root)
    assert np.array_equal(label_of(root, label_values={"#ff0000": 0, "#00ff00": 1}), MASK // 255)
    picture.putpalette([0, 0, 0] * 2)  # says nothing: indices are classes
    picture.save(path)
    assert np.array_equal(label_of(root), 1 - MASK // 255)


def test_a_value_of_labels_in_two_spellings_is_an_error(tmp_path: Path) -> None:
    root = str(make(tmp_path, MASK))
    for wrong in ({"#FF0000": 0, "#ff0000": 1}, {0: 0, "00": 1}, {"Other": 0, "other": 1}):
        with pytest.raises(ValueError, match="label_values must say each value once, got .* twice"):
            DataConfig("folder", root, label_values=wrong)


def test_a_map_to_classes_that_are_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label_values must map to 0 to 1 or 255 \(ignore\), got 2 for 255"):
        label_of(make(tmp_path, MASK), label_values={0: 0, 255: 2})


def test_values_and_classes_that_no_label_has_are_refused_with_their_bounds(tmp_path: Path) -> None:
    root = str(make(tmp_path, MASK))
    with pytest.raises(ValueError, match=r"must map numbers from 0 to 65535, .*, got '65536'"):
        DataConfig("folder", root, label_values={65536: 0})
    for wrong in (256, -1):
        with pytest.raises(ValueError, match=rf"must map to classes 0 to 254 or 255 \(ignore\), got {wrong}"):
            DataConfig("folder", root, label_values={0: 0, 255: wrong})


# what is judged


def test_a_part_without_a_labelled_pixel_is_an_error_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "set", (MASK > 0).astype(np.uint8))
    for name in ("a", "b"):
        save(np.full(SIZE, 255, np.uint8), root / "labels" / "val" / f"{name}.png")
    assert check(root) == 1
    assert "error: val: all pixels of all labels are ignored" in capsys.readouterr().err
    assert (root / "check" / "check.json").is_file()
    data = ["--data.name", "folder", "--data.root", str(root), "--output", str(tmp_path / "run")]
    assert main([*TEACHER, *data]) == 1
    assert "error: evaluation: all pixels of all labels are ignored" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_public_sets_are_judged_too_before_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CamVid's void is 11; classes that it lacks are nothing to warn of."""
    for part, value in (("train", 0), ("val", 11)):
        save(np.full((*SIZE, 3), 90, np.uint8), tmp_path / "set" / part / "a.png")
        save(np.where(MASK > 0, value, 3).astype(np.uint8), tmp_path / "set" / f"{part}annot" / "a.png")
    data = ["--data.name", "camvid", "--data.root", str(tmp_path / "set")]
    assert look(build_data(DataConfig("camvid", data[-1])), own=False) == ["evaluation: every labelled pixel is of one "
        "class; these are not the labels as they were published"]  # fmt: skip
    save(np.full(SIZE, 11, np.uint8), tmp_path / "set" / "valannot" / "a.png")
    assert main([*TEACHER, *data, "--output", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "evaluation: all pixels of all labels are ignored" in error and "as they were published" in error
    assert not (tmp_path / "run").exists()


def test_one_class_is_an_error_and_an_unused_one_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path, np.zeros(SIZE, np.uint8), "ground\n")
    assert check(root) == 1
    assert "one class, 'ground', is all that a network could predict" in capsys.readouterr().err
    root = make(tmp_path, (MASK > 0).astype(np.uint8), "ground\nthing\nboat\n")
    assert check(root) == 0
    assert "warning: no label holds boat: " in capsys.readouterr().err
    assert look(build_data(DataConfig("folder", str(root))))[0].startswith("no label holds boat")


def test_few_labelled_pixels_are_a_warning(tmp_path: Path) -> None:
    values = np.full(SIZE, 255, np.uint8)
    values[:4], values[4:8] = 0, 1
    assert look(build_data(DataConfig("folder", str(make(tmp_path, values))))) == [
        f"{part}: 67 % of the pixels are ignored; if that is not meant, masks of 0 and 255 are read by "
        "--data.label_values '{0: 0, 255: 1}'"
        for part in ("train", "evaluation")
    ]


def test_before_a_training_some_labels_are_looked_at_and_all_where_they_hold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heteroakd.data.survey.LOOKED_AT", 1)
    root = make(tmp_path, np.full(SIZE, 255, np.uint8))
    for part in ("train", "val"):
        save((MASK > 0).astype(np.uint8), root / "labels" / part / "b.png")
    found = look(build_data(DataConfig("folder", str(root))))
    assert [text.split(";")[0] for text in found] == [
        "train: 50 % of the pixels are ignored", "evaluation: 50 % of the pixels are ignored"
    ]  # fmt: skip
    (root / "labels" / "val" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"val/a\.png: not a readable picture"):
        look(build_data(DataConfig("folder", str(root))))


@pytest.mark.parametrize("turn", [3, 6])
def test_images_turned_by_exif_data_that_their_labels_lack(
    turn: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    square = np.zeros((32, 32), np.uint8)
    square[:9] = 1
    root = make(tmp_path, square)
    for path in root.glob("images/*/*.jpg"):
        save(np.full((32, 32, 3), 90, np.uint8), path)
    exif = Image.Exif()
    exif[0x0112] = turn
    turned = save(np.full((32, 32, 3), 90, np.uint8), root / "images" / "train" / "a.jpg", exif=exif)
    assert check(root) == 0
    assert f"warning: train: EXIF data turn 1 images and not their labels, {turned} first" in capsys.readouterr().err
    save(square, root / "labels" / "train" / "a.png", exif=exif)  # as the image is: both are turned
    assert check(root) == 0 and "EXIF" not in capsys.readouterr().err
    label = build_data(DataConfig("folder", str(root))).train.source[0][1].numpy()
    assert np.array_equal(label, np.rot90(square, {3: 2, 6: -1}[turn]))


def test_turned_images_of_another_size_than_their_labels_are_said_to_be(tmp_path: Path) -> None:
    root = make(tmp_path, (MASK > 0).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 8
    save(np.full((*SIZE, 3), 90, np.uint8), root / "images" / "val" / "a.jpg", exif=exif)
    with pytest.raises(DataError, match=r"expected 24x32, .*a\.jpg; its EXIF data turn the image and not the label"):
        label_of(root)


def test_dead_links_are_named_and_live_ones_followed(tmp_path: Path) -> None:
    root = make(tmp_path / "set", (MASK > 0).astype(np.uint8))
    (root / "images" / "val").rename(tmp_path / "elsewhere")
    (root / "images" / "val").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    assert label_of(root, 1).shape == SIZE
    link = root / "labels" / "val" / "c.png"
    link.symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=rf"^{link}: a dead link, to {tmp_path}/gone\.png; expected"):
        label_of(root)


# layouts


def test_a_test_part_and_other_names_of_parts(tmp_path: Path) -> None:
    root = make(tmp_path, (MASK > 0).astype(np.uint8), parts=("training", "validation", "testing"))
    data = build_data(DataConfig("folder", str(root), evaluation_part="test"))
    assert len(data.train) == 2 and data.val.source.pairs[0].image.parent.name == "testing"
    with pytest.raises(DataError, match="images/test: no such folder"):
        (root / "images" / "testing").rename(root / "images" / "more")
        build_data(DataConfig("folder", str(root), evaluation_part="test"))


@pytest.mark.parametrize(
    ("image", "label", "options"),
    [
        ("{part}/x/a.jpg", "{part}/y/a.png", {"image_folder": "{part}/x", "label_folder": "{part}/y"}),
        ("images/{part}/a.jpg", "labels/{part}/a_mask.png", {"label_suffix": "_mask"}),
        ("{part}/a.jpg", "{part}/a.png", SAME_FOLDER),
        ("{part}/a.png", "{part}/a_L.png", {**SAME_FOLDER, "label_suffix": "_L.png"}),
        ("images/{part}/x/y/a.jpg", "labels/{part}/x/y/a.tif", {}),
        ("images/{part}/a.b.jpg", "labels/{part}/a.b.bmp", {}),
    ],
)  # fmt: skip
def test_layouts(image: str, label: str, options: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    for part in ("train", "val"):
        save(np.full((*SIZE, 3), 90, np.uint8), tmp_path / image.format(part=part))
        save((MASK > 0).astype(np.uint8), tmp_path / label.format(part=part))
    assert np.array_equal(label_of(tmp_path, **options), MASK // 255)


def test_labels_of_another_type_than_the_suffix_says_are_passed_over(tmp_path: Path) -> None:
    root = make(tmp_path, (MASK > 0).astype(np.uint8))
    for part in ("train", "val"):
        for name in ("a", "b"):
            save(MASK, root / "labels" / part / f"{name}.tif")
    with pytest.raises(DataError, match="same stem as"):
        label_of(root)
    assert label_of(root, label_suffix=".png").max() == 1


@pytest.mark.parametrize(
    "line", ["a", "a.jpg", "x/a.jpg", "photos/x/a.jpg", "photos/x/a.jpg masks/x/a.png", "photos/x/a.jpg\tmasks/x/a.png"]
)
def test_lists_name_the_pictures_of_a_part(line: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    for name in ("a", "b", "c d"):
        save(np.full((*SIZE, 3), 90, np.uint8), tmp_path / "photos" / "x" / f"{name}.jpg")
        save((MASK > 0).astype(np.uint8), tmp_path / "masks" / "x" / f"{name}.png")
    (tmp_path / "train.txt").write_text("\ufeffb\n\nc d.jpg\n", encoding="utf-8")
    (tmp_path / "val.txt").write_text(line + "\r\n")
    options = {"image_folder": "photos", "label_folder": "masks", "lists": {"train": "train.txt", "val": "val.txt"}}
    data = build_data(DataConfig("folder", str(tmp_path), **options))
    assert [pair.image.name for pair in data.train.source.pairs] == ["b.jpg", "c d.jpg"]
    assert [pair.label.name for pair in data.val.source.pairs] == ["a.png"]
    (tmp_path / "val.txt").write_text("z\n")
    with pytest.raises(DataError, match=r"val\.txt: 'z': no such image in .*photos; expected one, or an image and its"):
        build_data(DataConfig("folder", str(tmp_path), **options))
    save(MASK, tmp_path / "photos" / "y" / "a.jpg")
    (tmp_path / "val.txt").write_text("a\n")
    with pytest.raises(DataError, match="'a': several files of this name"):
        build_data(DataConfig("folder", str(tmp_path), **options))
    (tmp_path / "masks" / "x" / "a.png").unlink()
    (tmp_path / "val.txt").write_text("x/a\n")
    with pytest.raises(DataError, match=r"x/a\.jpg: no label for it; expected .*masks/x/a\.png or \.bmp"):
        build_data(DataConfig("folder", str(tmp_path), **options))


def test_names_are_the_same_in_either_unicode_form(tmp_path: Path) -> None:
    root = make(tmp_path, (MASK > 0).astype(np.uint8))
    for form, kind, name in (("NFC", "images", "a.jpg"), ("NFD", "labels", "a.png")):
        path = root / kind / "val" / name
        path.rename(path.with_name(normalize(form, "stra\u00dfe \u00fc") + path.suffix))
    assert len({os.path.splitext(path.name)[0] for path in root.glob("*/val/stra*")}) == 2
    (root / "val.txt").write_text(normalize("NFD", "stra\u00dfe \u00fc") + "\n", encoding="utf-8")
    assert len(build_data(DataConfig("folder", str(root), lists={"val": "val.txt"})).val) == 1
    (root / "classes.txt").write_text(normalize("NFD", "T\u00fcr") + "\nthing\n", encoding="utf-8")
    assert read_classes(root / "classes.txt")[0][0] == "T\u00fcr"


def test_comments_of_classes_txt_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("# my classes\n#\nroad #804080\n// more\ncar\n")
    assert read_classes(tmp_path / "classes.txt")[0] == ("road", "car")
