"""Public data sets on tiny trees in the layout of their downloads: mapped labels, classes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heteroakd.data import IGNORE_INDEX, DataConfig, DataError, build_data
from heteroakd.data.published import PUBLISHED
from numpy.typing import NDArray
from PIL import Image

SIZE = (12, 16)


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_label(path: Path, values: NDArray[Any] | list[int], palette: bool = False) -> NDArray[np.uint8]:
    """A label PNG that holds the given values, repeated to SIZE; with a palette as VOC's, or grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.resize(np.asarray(values, np.uint8), SIZE)
    picture = Image.fromarray(pixels)
    if palette:
        picture.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(path)
    return pixels


def write_names(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def val_label(name: str, root: Path, index: int = 0) -> NDArray[Any]:
    return build_data(DataConfig(name, str(root), crop_size=SIZE)).val[index][1].numpy()


# all of them


@pytest.mark.parametrize(
    ("name", "count", "first", "last", "colour"),
    [
        ("camvid", 11, "sky", "bicyclist", (128, 128, 128)),
        ("cityscapes", 19, "road", "bicycle", (128, 64, 128)),
        ("voc", 21, "background", "tv monitor", (0, 0, 0)),
        ("voc_aug", 21, "background", "tv monitor", (0, 0, 0)),
        ("ade20k", 150, "wall", "flag", (120, 120, 120)),
        ("coco_stuff", 182, "person", "wood", None),
    ],
)
def test_classes_and_colours(name: str, count: int, first: str, last: str, colour: tuple[int, int, int] | None) -> None:
    classes, colours = PUBLISHED[name].classes()
    assert len(classes) == len(colours) == len(set(classes)) == count
    assert (classes[0], classes[-1]) == (first, last)
    assert colour is None or colours[0] == colour


def test_class_lists_have_what_the_benchmarks_publish_in_its_place() -> None:
    assert PUBLISHED["cityscapes"].classes()[0][16:] == ("train", "motorcycle", "bicycle")
    voc, colours = PUBLISHED["voc"].classes()
    assert voc[15] == "person" and colours[15] == (192, 128, 128)
    ade, colours = PUBLISHED["ade20k"].classes()
    assert (ade[2], ade[12], ade[136]) == ("sky", "person", "traffic light") and colours[12] == (150, 5, 61)
    coco, _ = PUBLISHED["coco_stuff"].classes()
    assert (coco[11], coco[90], coco[91], coco[156]) == ("street sign", "hair brush", "banner", "sky-other")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_roots_without_the_set_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root must name the folder .* got None"):
        build_data(DataConfig(name))
    with pytest.raises(DataError, match="nowhere: no such folder; expected the root of the data set"):
        build_data(DataConfig(name, str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=f"^{tmp_path}/.*: no such folder; expected"):
        build_data(DataConfig(name, str(tmp_path)))
    if name != "camvid":
        with pytest.raises(ValueError, match="evaluation_part must be 'val'.*got 'test'"):
            DataConfig(name, str(tmp_path), evaluation_part="test")


# cityscapes


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    for part, cities in {"train": ("aachen", "bochum"), "val": ("lindau",)}.items():
        for city in cities:
            for number in range(2):
                stem = f"{city}_{number:06d}_000019"
                write_image(tmp_path / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png", number)
                folder = tmp_path / "gtFine" / part / city
                write_label(folder / f"{stem}_gtFine_labelIds.png", list(range(34)))
                # what else the download, and cityscapesScripts, put there
                write_label(folder / f"{stem}_gtFine_instanceIds.png", [1])
                write_label(folder / f"{stem}_gtFine_labelTrainIds.png", [1])
                write_image(folder / f"{stem}_gtFine_color.png")
                (folder / f"{stem}_gtFine_polygons.json").write_text("{}")
    return tmp_path


def test_cityscapes_label_ids_become_train_ids(cityscapes: Path) -> None:
    data = build_data(DataConfig("cityscapes", str(cityscapes), crop_size=(8, 8)))
    assert (len(data.train), len(data.val)) == (4, 2)
    expected = [255] * 34
    for train_id, label_id in enumerate([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]):
        expected[label_id] = train_id
    assert np.array_equal(val_label("cityscapes", cityscapes), np.resize(expected, SIZE))
    pairs = data.train.source.pairs
    assert [pair.image.parent.name for pair in pairs] == ["aachen", "aachen", "bochum", "bochum"]
    assert all(pair.label.name.startswith(pair.image.name[:20]) for pair in pairs)


def test_cityscapes_names_what_is_missing_or_wrong(cityscapes: Path) -> None:
    label = cityscapes / "gtFine" / "val" / "lindau" / "lindau_000001_000019_gtFine_labelIds.png"
    write_label(label, [7, 34])
    with pytest.raises(DataError, match=r"labelIds\.png: label 34 at row 0, column 1; expected a label id .* 0 to 33"):
        val_label("cityscapes", cityscapes, 1)
    label.unlink()
    with pytest.raises(DataError, match=r"000001_000019_leftImg8bit\.png: no label for it; expected .*_labelIds\.png"):
        val_label("cityscapes", cityscapes)
    (cityscapes / "leftImg8bit" / "val" / "lindau" / "lindau_000001_000019_leftImg8bit.png").unlink()
    assert len(build_data(DataConfig("cityscapes", str(cityscapes))).val) == 1
    (cityscapes / "leftImg8bit" / "val" / "lindau" / "lindau_000000_000019_leftImg8bit.png").unlink()
    with pytest.raises(DataError, match=r"leftImg8bit/val: no picture in it; expected _leftImg8bit\.png"):
        val_label("cityscapes", cityscapes)


def test_cityscapes_without_cities_or_labels_says_which_archive(cityscapes: Path) -> None:
    (cityscapes / "gtFine").rename(cityscapes / "gtCoarse")
    with pytest.raises(DataError, match=r"gtFine/train: no such folder; expected .* gtFine_trainvaltest\.zip"):
        val_label("cityscapes", cityscapes)
    for part in ("train", "val"):
        (cityscapes / "gtFine" / part).mkdir(parents=True)
    (cityscapes / "leftImg8bit" / "train").rename(cityscapes / "elsewhere")
    (cityscapes / "leftImg8bit" / "train").mkdir()
    with pytest.raises(DataError, match="leftImg8bit/train: no picture in it; expected _leftImg8bit"):
        val_label("cityscapes", cityscapes)


# voc


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """VOC 2012 with 2 training, 2 validation images, and 2 that only SBD labels."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    names = ["2007_000032", "2007_000039", "2007_000033", "2007_000042", "2008_000002", "2008_000003"]
    for seed, name in enumerate(names):
        write_image(base / "JPEGImages" / f"{name}.jpg", seed)
    for name in names[:4]:
        write_label(base / "SegmentationClass" / f"{name}.png", [0, 15, 20, 255], palette=True)
    write_names(base / "ImageSets" / "Segmentation" / "train.txt", names[:2])
    write_names(base / "ImageSets" / "Segmentation" / "val.txt", names[2:4])
    return tmp_path


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_palette_labels_are_read_as_indices(voc: Path, below: str) -> None:
    root = voc / below
    data = build_data(DataConfig("voc", str(root)))
    assert (len(data.train), len(data.val)) == (2, 2)
    with Image.open(voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000033.png") as picture:
        assert picture.mode == "P"
    assert np.array_equal(val_label("voc", root), np.resize([0, 15, 20, 255], SIZE))
    assert [pair.image.stem for pair in data.val.source.pairs] == ["2007_000033", "2007_000042"]


def augmented(voc: Path, label: list[int]) -> Path:
    base = voc / "VOCdevkit" / "VOC2012"
    for path in (base / "JPEGImages").iterdir():
        write_label(base / "SegmentationClassAug" / f"{path.stem}.png", label)
    return base


def test_voc_aug_is_all_of_it_but_val(voc: Path) -> None:
    base = augmented(voc, [0, 1, 2])
    data = build_data(DataConfig("voc_aug", str(voc), crop_size=SIZE, scale_range=(1, 1), flip_probability=0))
    names = [pair.image.stem for pair in data.train.source.pairs]
    assert names == ["2007_000032", "2007_000039", "2008_000002", "2008_000003"]
    assert set(data.train[0][1].unique().tolist()) == {0, 1, 2}
    assert np.array_equal(val_label("voc_aug", voc), np.resize([0, 15, 20, 255], SIZE))  # VOC's own, not SBD's
    # lists in either of the forms in circulation
    lists = base / "ImageSets" / "Segmentation"
    write_names(lists / "trainaug.txt", ["2008_000003"])
    assert len(build_data(DataConfig("voc_aug", str(voc))).train) == 1
    names = ["2008_000003", "2007_000032"]
    write_names(lists / "train_aug.txt", [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in names])
    pairs = build_data(DataConfig("voc_aug", str(voc))).train.source.pairs
    assert [pair.image.stem for pair in pairs] == names


def test_voc_names_wrong_lists(voc: Path) -> None:
    base = augmented(voc, [0, 1])
    lists = base / "ImageSets" / "Segmentation"
    write_names(lists / "train_aug.txt", ["2008_000002", "2007_000033"])
    with pytest.raises(DataError, match=r"train_aug\.txt: '2007_000033' belongs to the val part"):
        build_data(DataConfig("voc_aug", str(voc)))
    write_names(lists / "train_aug.txt", ["2008_000002", "", "2008_000002"])
    with pytest.raises(DataError, match=r"train_aug\.txt, line 3: '2008_000002' stands in line 1 already"):
        build_data(DataConfig("voc_aug", str(voc)))
    write_names(lists / "train_aug.txt", ["2009_000001"])
    with pytest.raises(DataError, match=r"JPEGImages/2009_000001\.jpg: no such file; .*train_aug\.txt names it"):
        build_data(DataConfig("voc_aug", str(voc)))
    (base / "SegmentationClass" / "2007_000042.png").unlink()
    with pytest.raises(DataError, match=r"SegmentationClass/2007_000042\.png: no such file; .*val\.txt names it"):
        build_data(DataConfig("voc", str(voc)))
    write_names(lists / "val.txt", [])
    with pytest.raises(DataError, match=r"val\.txt: expected image names, one per line, got none"):
        build_data(DataConfig("voc", str(voc)))
    (lists / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt: no such file; expected a list"):
        build_data(DataConfig("voc", str(voc)))


def test_voc_colour_labels_are_refused(voc: Path) -> None:
    write_image(voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000033.png")
    with pytest.raises(DataError, match=r"2007_000033\.png: a label must be a single-channel PNG .* got mode RGB"):
        val_label("voc", voc)


def test_voc_aug_without_sbd_says_where_it_is_looked_for(voc: Path) -> None:
    message = r"SegmentationClassAug: no such folder; expected the labels of SBD.*benchmark_RELEASE/dataset/cls"
    with pytest.raises(DataError, match=message):
        build_data(DataConfig("voc_aug", str(voc)))


def write_mat(path: Path, values: list[int]) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.resize(np.asarray(values, np.uint8), SIZE)
    savemat(path, {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": pixels, "CategoriesPresent": [1]}})


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_aug_reads_sbd_as_it_is_downloaded(voc: Path, below: str) -> None:
    pytest.importorskip("scipy")
    folder = voc / below / "benchmark_RELEASE" / "dataset" / "cls"
    for name in ("2007_000032", "2007_000033", "2008_000002", "2008_000003"):
        write_mat(folder / f"{name}.mat", [3, 4])
    data = build_data(DataConfig("voc_aug", str(voc / below), crop_size=SIZE, scale_range=(1, 1), flip_probability=0))
    names = [pair.image.stem for pair in data.train.source.pairs]
    assert names == ["2007_000032", "2007_000039", "2008_000002", "2008_000003"]
    assert set(data.train[0][1].unique().tolist()) == {0, 15, 20, 255}  # VOC's labels where there are some
    assert np.array_equal(data.train[2][1].numpy(), np.resize([3, 4], SIZE))
    (folder / "2008_000002.mat").write_bytes(b"MATLAB, but not really")
    with pytest.raises(DataError, match=r"2008_000002\.mat: not a label file of SBD"):
        data.train[2]
    write_mat(folder / "2008_000003.mat", [21])
    with pytest.raises(DataError, match=r"2008_000003\.mat: label 21 at row 0, column 0; expected 0 to 20 or 255"):
        data.train[3]


# ade20k


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    base = tmp_path / "ADEChallengeData2016"
    for folder, part, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(count):
            stem = f"ADE_{part}_{number:08d}"
            write_image(base / "images" / folder / f"{stem}.jpg", number)
            write_label(base / "annotations" / folder / f"{stem}.png", list(range(151)))
    (base / "objectInfo150.txt").write_text("Idx\tRatio\n")
    return tmp_path


@pytest.mark.parametrize("below", ["", "ADEChallengeData2016"])
def test_ade20k_labels_lose_one_and_0_is_ignored(ade20k: Path, below: str) -> None:
    data = build_data(DataConfig("ade20k", str(ade20k / below)))
    assert (len(data.train), len(data.val)) == (3, 2)
    assert np.array_equal(val_label("ade20k", ade20k / below), np.resize([255, *range(150)], SIZE))


def test_ade20k_names_wrong_values_and_missing_files(ade20k: Path) -> None:
    label = ade20k / "ADEChallengeData2016" / "annotations" / "validation" / "ADE_val_00000001.png"
    write_label(label, [150, 151])
    with pytest.raises(DataError, match=r"00001\.png: label 151 at row 0, column 1; expected 0 \(unlabelled\) to 150"):
        val_label("ade20k", ade20k, 1)
    label.unlink()
    with pytest.raises(DataError, match=r"ADE_val_00000001\.jpg: no label for it; expected .*ADE_val_00000001\.png"):
        val_label("ade20k", ade20k)
    (label.parent.parent / "training").rename(label.parent.parent / "elsewhere")
    with pytest.raises(DataError, match=r"annotations/training: no such folder; expected .*ADEChallengeData2016\.zip"):
        val_label("ade20k", ade20k)


@pytest.mark.parametrize(
    "marker",
    ["index_ade20k.mat", "index_ade20k.pkl", "images/ADE/training/x_seg.png", "ADE20K_2016_07_26/images/index.txt",
     "ADE20K_2021_17_01/index_ade20k.pkl"],
)  # fmt: skip
def test_the_full_ade20k_is_refused_with_an_explanation(tmp_path: Path, marker: str) -> None:
    (tmp_path / marker).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / marker).touch()
    (tmp_path / "images" / "training" / "a" / "abbey").mkdir(parents=True)
    with pytest.raises(DataError, match=r"belongs to the full ADE20K.*3000 classes.*ADEChallengeData2016\.zip"):
        build_data(DataConfig("ade20k", str(tmp_path)))


# coco-stuff


@pytest.fixture
def coco_stuff(tmp_path: Path) -> Path:
    for part, count in (("train", 2), ("val", 1)):
        for number in range(count):
            write_image(tmp_path / "images" / f"{part}2017" / f"{number:012d}.jpg", number)
            write_label(tmp_path / "annotations" / f"{part}2017" / f"{number:012d}.png", [*range(182), 255])
            write_label(tmp_path / "annotations" / f"{part}2017" / f"{number:012d}_labelTrainIds.png", [0])
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    return tmp_path


def test_coco_stuff_values_are_its_classes(coco_stuff: Path) -> None:
    data = build_data(DataConfig("coco_stuff", str(coco_stuff)))
    assert (len(data.train), len(data.val)) == (2, 1)
    assert np.array_equal(val_label("coco_stuff", coco_stuff), np.resize([*range(182), IGNORE_INDEX], SIZE))


def test_coco_stuff_names_what_is_wrong(coco_stuff: Path) -> None:
    write_label(coco_stuff / "annotations" / "val2017" / "000000000000.png", [0, 0, 182])
    with pytest.raises(DataError, match=r"label 182 at row 0, column 2; expected 0 to 181 or 255 \(ignore\)"):
        val_label("coco_stuff", coco_stuff)
    (coco_stuff / "annotations" / "train2017").rename(coco_stuff / "elsewhere")
    with pytest.raises(DataError, match=r"annotations/train2017: no such folder; expected the PNGs of stuffthingmaps"):
        val_label("coco_stuff", coco_stuff)


def test_training_crops_of_a_published_set_have_its_classes(cityscapes: Path) -> None:
    data = build_data(DataConfig("cityscapes", str(cityscapes), crop_size=(32, 32)))
    torch.manual_seed(0)
    image, label = data.train[3]
    assert image.shape == (3, 32, 32) and label.shape == (32, 32)
    assert set(label.unique().tolist()) <= {*range(19), IGNORE_INDEX}
