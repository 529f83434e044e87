"""Data sets, augmentation and the errors of broken data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from heteroakd.data import IGNORE_INDEX, DataConfig, DataError, build_data, denormalize
from heteroakd.data.augmentation import TrainTransform, eval_transform
from heteroakd.data.files import pair_files
from heteroakd.data.folder import read_classes
from heteroakd.data.reading import LabelValues, read_image, read_label_values
from heteroakd.data.samples import CachedSource, SegmentationDataset
from heteroakd.data.street import StreetScenes
from PIL import Image

CAMVID = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "camvid"
SIZE = (64, 96)


def write_png(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def write_pair(image: Path, label: Path, seed: int = 0, classes: int = 3, size: tuple[int, int] = (24, 32)) -> None:
    random = np.random.default_rng(seed)
    write_png(image, random.integers(0, 256, (*size, 3), dtype=np.uint8))
    write_png(label, random.integers(0, classes, size, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "classes.txt").write_text("road #804080\n\n// far away\ntraffic sign\ncar #00008e\n")
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            write_pair(
                tmp_path / "images" / part / f"{number}.png",
                tmp_path / "labels" / part / f"{number}.png",
                seed=number,
            )
    return tmp_path


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    for part in ("train", "val", "test"):
        for number in range(2):
            write_pair(
                tmp_path / part / f"{part}_{number}.png",
                tmp_path / f"{part}annot" / f"{part}_{number}.png",
                seed=number, classes=12, size=(36, 48),
            )  # fmt: skip
    return tmp_path


# samples and augmentation


def test_samples_have_the_documented_form():
    data = build_data(DataConfig(image_size=SIZE, crop_size=(40, 56), train_images=4, val_images=2, seed=1))
    assert len(data.train) == 4 and len(data.val) == 2
    assert data.palette.dtype == torch.uint8 and data.palette.shape == (len(data.classes), 3)
    for dataset, size in ((data.train, (40, 56)), (data.val, SIZE)):
        image, label = dataset[0]
        assert image.dtype == torch.float32 and image.shape == (3, *size)
        assert label.dtype == torch.int64 and label.shape == size
        assert type(image) is torch.Tensor and type(label) is torch.Tensor
    with pytest.raises(IndexError, match=r"\[0, 2\), got 2"):
        data.val[2]


def test_val_samples_are_the_pictures_normalised():
    data = build_data(DataConfig(image_size=SIZE, val_images=2))
    raw_image, raw_label = data.val.source[1]
    image, label = data.val[1]
    assert torch.equal(denormalize(image), raw_image)
    assert torch.equal(label, raw_label.long())
    assert abs(float(image.mean())) < 2


def code_picture(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture whose colour says its label: blocks of 8x8 pixels, red = 20 x label."""
    rows, columns = torch.arange(height)[:, None] // 8, torch.arange(width)[None] // 8
    label = ((rows * 5 + columns * 3) % 12).to(torch.uint8)
    image = torch.stack([label * 20, 255 - label * 20, torch.full_like(label, 7)])
    return image, label


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.5, 0.5), (2.0, 2.0), (0.73, 0.73)])
@pytest.mark.parametrize("crop", [(32, 48), (130, 90)])
def test_augmentation_keeps_image_and_label_together(scale: tuple[float, float], crop: tuple[int, int]):
    picture = code_picture(64, 96)
    transform = TrainTransform(crop, scale, scale_step=0.1 if scale[0] != scale[1] else 0.0)
    torch.manual_seed(0)
    compared = 0
    for _ in range(12):
        image, label = transform(*picture)
        assert image.shape == (3, *crop) and label.shape == crop
        valid = label != IGNORE_INDEX
        assert set(label[valid].unique().tolist()) <= set(range(12))  # nothing interpolated
        red = denormalize(image)[0].float()
        # Where the label has no edge nearby, the colour must be the label's; what lies outside the crop is
        # unknown.
        padded = torch.nn.functional.pad(label, (2, 2, 2, 2), value=-1)
        windows = padded.unfold(0, 5, 1).unfold(1, 5, 1).flatten(2)
        inner = valid & (windows.amin(2) == windows.amax(2))
        compared += int(inner.sum())
        assert not ((red - 20 * label).abs() > 3)[inner].any()
    assert compared > 100 or scale == (0.5, 0.5)  # where blocks of 4x4 pixels have no inner pixel


def test_augmentation_resizes_labels_about_pixel_centres():
    """A third of the size: image and label must agree, on average, on where a vertical edge lies."""
    transform = TrainTransform((10, 32), (1 / 3, 1 / 3), scale_step=0.0, flip_probability=0.0)
    shifts = []
    for edge in range(30, 60):
        label = (torch.arange(96) >= edge).to(torch.uint8).expand(30, 96).contiguous()
        image, resized = transform(label[None].expand(3, -1, -1) * 255, label)
        shifts.append(float((denormalize(image)[0].float() / 255).sum() - resized.sum()) / 10)
    assert abs(sum(shifts) / len(shifts)) < 0.02  # torchvision's own way with masks is off by a third of a pixel


def test_augmentation_pads_labels_with_ignore_and_images_with_the_mean_colour():
    image, label = torch.full((3, 10, 12), 200, dtype=torch.uint8), torch.ones(10, 12, dtype=torch.uint8)
    image, label = TrainTransform((40, 48), (1.0, 1.0), 0.0)(image, label)
    assert int((label == 1).sum()) == 120 and int((label == IGNORE_INDEX).sum()) == 40 * 48 - 120
    assert image[:, label == IGNORE_INDEX].abs().max() < 0.02  # zero, up to the rounding of the mean to 8 bits


def test_augmentation_draws_from_torch_alone():
    picture = code_picture(64, 96)
    transform = TrainTransform((32, 32))

    def draws(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [transform(*picture)[0] for _ in range(4)]

    first = draws(5)
    np.random.seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(5), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, draws(6), strict=True))


def test_augmentation_scales_come_in_steps_and_mirrors_happen():
    image = torch.arange(60, dtype=torch.uint8).expand(3, 40, 60).contiguous()
    label = torch.ones(40, 60, dtype=torch.uint8)
    transform = TrainTransform((100, 140), (0.5, 2.0), 0.5, flip_probability=0.5)
    torch.manual_seed(0)
    widths, mirrored = set(), set()
    for _ in range(60):
        picture, mask = transform(image, label)
        columns = torch.nonzero((mask == 1).any(0)).flatten()
        widths.add(len(columns))
        row = int(torch.nonzero((mask == 1).any(1))[0])
        mirrored.add(bool(picture[0, row, columns[0]] > picture[0, row, columns[-1]]))
    assert widths == {30, 60, 90, 120} and mirrored == {True, False}
    never = TrainTransform((40, 60), (1.0, 1.0), 0.0, flip_probability=0.0)
    assert torch.equal(denormalize(never(image, label)[0]), image)


def test_augmentation_does_not_write_to_the_source():
    scenes = CachedSource(StreetScenes("train", 1, SIZE))
    before = [tensor.clone() for tensor in scenes[0]]
    for transform in (TrainTransform((32, 32)), TrainTransform(SIZE, (1.0, 1.0), 0.0, 0.0), eval_transform):
        image, label = SegmentationDataset(scenes, transform)[0]
        image.zero_()
        label.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, scenes[0], strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_size", (0, 4)), ("image_size", (16, 200)),
        ("scale_range", (2.0, 0.5)), ("scale_range", (0.0, 1.0)),
        ("scale_step", -0.1), ("flip_probability", 1.5), ("seed", -1), ("train_images", 0), ("val_images", 0),
        ("evaluation_part", "test"),
    ],
)  # fmt: skip
def test_config_refuses_nonsense_by_name(field: str, value: object):
    with pytest.raises(ValueError, match=f"{field} must.*got"):
        DataConfig(**{field: value})


# camvid


def test_camvid_layout(camvid: Path):
    data = build_data(DataConfig("camvid", str(camvid), crop_size=(24, 24)))
    assert len(data.classes) == 11 and data.palette.shape == (11, 3)
    assert len(data.train) == len(data.val) == 2
    stored = np.asarray(Image.open(camvid / "valannot" / "val_1.png"))
    label = data.val[1][1].numpy()
    assert (stored == 11).any()
    assert np.array_equal(label == IGNORE_INDEX, stored == 11)
    assert np.array_equal(label[stored < 11], stored[stored < 11])
    test = build_data(DataConfig("camvid", str(camvid), evaluation_part="test"))
    assert test.val.source.pairs[0].image.name == "test_0.png"


def test_camvid_works_without_its_test_part(camvid: Path):
    for path in [*(camvid / "test").iterdir(), *(camvid / "testannot").iterdir()]:
        path.unlink()
    assert len(build_data(DataConfig("camvid", str(camvid))).val) == 2
    with pytest.raises(DataError, match="test: no picture in it"):
        build_data(DataConfig("camvid", str(camvid), evaluation_part="test"))


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not beside the repository")
def test_camvid_itself():
    data = build_data(DataConfig("camvid", str(CAMVID), crop_size=(180, 240), cache=True))
    assert (len(data.train), len(data.val)) == (367, 101)
    counts = torch.zeros(256, dtype=torch.long)
    for index in range(0, 101, 10):
        image, label = data.val[index]
        assert image.shape == (3, 360, 480)
        counts += torch.bincount(label.flatten(), minlength=256)
    assert counts[data.classes.index("road")] / counts.sum() > 0.15
    assert counts[IGNORE_INDEX] > 0 and counts[11:IGNORE_INDEX].sum() == 0
    image, label = data.train[366]
    assert image.shape == (3, 180, 240) and label.shape == (180, 240)


# folder


def test_folder_layout(folder: Path):
    data = build_data(DataConfig("folder", str(folder), crop_size=(16, 16)))
    assert data.classes == ("road", "traffic sign", "car")
    assert data.palette[[0, 2]].tolist() == [[128, 64, 128], [0, 0, 142]]
    assert len(data.train) == 3 and len(data.val) == 2
    stored = np.asarray(Image.open(folder / "labels" / "val" / "1.png"))
    assert np.array_equal(data.val[1][1].numpy(), stored)


def test_folder_reads_jpeg_palette_labels_and_grey_images(folder: Path):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (24, 32), dtype=np.uint8)).save(folder / "images" / "val" / "p.JPG")
    values = random.integers(0, 3, (24, 32), dtype=np.uint8)
    values[0, 0] = IGNORE_INDEX
    label = Image.fromarray(values)
    label.putpalette([channel for colour in range(256) for channel in (colour, 0, 255 - colour)])
    label.save(folder / "labels" / "val" / "p.png")
    assert Image.open(folder / "labels" / "val" / "p.png").mode == "P"
    image, read = build_data(DataConfig("folder", str(folder))).val[2]
    assert image.shape == (3, 24, 32) and np.array_equal(read.numpy(), values)


def test_image_is_turned_upright(tmp_path: Path):
    picture = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape == (3, 8, 6)


def test_cache_keeps_pictures(folder: Path):
    data = build_data(DataConfig("folder", str(folder), crop_size=(16, 16), cache=True))
    data.train[0]
    (folder / "images" / "train" / "0.png").unlink()
    assert data.train[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["camvid", "folder"])
def test_root_is_needed_and_must_exist(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="root must name the folder .* got None"):
        build_data(DataConfig(name))
    with pytest.raises(DataError, match="nowhere: no such folder; expected the root"):
        build_data(DataConfig(name, str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no such f"):
        build_data(DataConfig(name, str(tmp_path)))


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of street, cityscapes, .*, folder, got 'pets'"):
        DataConfig("pets", ".")  # type: ignore[arg-type]


def test_unpaired_files_are_named_at_construction(folder: Path):
    config = DataConfig("folder", str(folder))
    label = folder / "labels" / "train" / "1.png"
    kept = label.read_bytes()
    label.unlink()
    with pytest.raises(DataError, match=r"images/train/1\.png: no label for it; expected .*labels/train/1\.png"):
        build_data(config)
    label.write_bytes(kept)
    (folder / "images" / "train" / "2.png").unlink()
    with pytest.raises(DataError, match=r"labels/train/2\.png: no image for it; expected .*images/train/2"):
        build_data(config)


def test_two_images_of_one_stem_are_refused_and_dot_files_skipped(folder: Path):
    (folder / "images" / "val" / "._0.png").write_bytes(b"not a picture")
    assert len(build_data(DataConfig("folder", str(folder))).val) == 2
    Image.new("RGB", (32, 24)).save(folder / "images" / "val" / "0.jpg")
    with pytest.raises(DataError, match=r"0\.png: same stem as 0\.jpg"):
        build_data(DataConfig("folder", str(folder)))


def test_pairs_are_sorted_by_stem(folder: Path):
    pairs = pair_files(folder / "images" / "train", folder / "labels" / "train")
    assert [pair.image.stem for pair in pairs] == [pair.label.stem for pair in pairs] == ["0", "1", "2"]


def test_label_out_of_range_is_named_when_read(folder: Path):
    values = np.zeros((24, 32), np.uint8)
    values[5, 7] = 3
    write_png(folder / "labels" / "val" / "0.png", values)
    data = build_data(DataConfig("folder", str(folder)))
    with pytest.raises(DataError, match=r"val/0\.png: label 3 at row 5, column 7; expected 0 to 2 or 255 \(ignore\)"):
        data.val[0]


def test_label_out_of_range_names_the_void_label_too(camvid: Path):
    write_png(camvid / "valannot" / "val_0.png", np.full((36, 48), 12, np.uint8))
    with pytest.raises(DataError, match=r"label 12 at row 0, column 0; expected 0 to 10, 11 \(read as 255\) or 255"):
        build_data(DataConfig("camvid", str(camvid))).val[0]


def read_label(path: Path, num_classes: int) -> torch.Tensor:
    return LabelValues(num_classes).decode(read_label_values(path), path)


def test_colour_label_is_refused(tmp_path: Path):
    path = write_png(tmp_path / "colour.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"colour\.png: a label must be a single-channel PNG .* got mode RGB"):
        read_label(path, 3)


def test_sixteen_bit_labels_are_read_and_checked(tmp_path: Path):
    values = np.array([[0, 2], [255, 1]], np.uint16)
    assert read_label(write_png(tmp_path / "a.png", values), 3).tolist() == values.tolist()
    values[0, 0] = 256
    with pytest.raises(DataError, match="label 256 at row 0, column 0"):
        read_label(write_png(tmp_path / "b.png", values), 3)


def test_sizes_that_differ_are_named(folder: Path):
    write_png(folder / "labels" / "train" / "0.png", np.zeros((20, 32), np.uint8))
    with pytest.raises(DataError, match=r"labels/train/0\.png: 32x20 pixels .* expected 32x24, the size of .*0\.png"):
        build_data(DataConfig("folder", str(folder))).train[0]


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("damage", ["text", "truncated", "gone"])
def test_unreadable_files_are_named(folder: Path, kind: str, damage: str):
    data = build_data(DataConfig("folder", str(folder)))
    path = folder / kind / "val" / "0.png"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"hello" if damage == "text" else content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{kind}/val/0\.png: no(t a readable picture| such file)"):
        data.val[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 1 to 255 class names, one per line, got 0"),
        ("road\ncar\nroad\n", "line 3: class 'road' is named twice"),
        ("road #12\n", "line 1: expected a class name and optionally #rrggbb, got 'road #12'"),
        ("#808080\n", "line 1: expected a class name"),
        ("\n".join(f"class {i}" for i in range(256)), "expected 1 to 255 class names, one per line, got 256"),
    ],
)
def test_classes_file_errors_are_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match="classes.txt.*" + message):
        read_classes(path)


def test_classes_file_must_be_text(tmp_path: Path):
    with pytest.raises(DataError, match="no such file; expected one class name per line"):
        read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\x00road")
    with pytest.raises(DataError, match="not readable as UTF-8"):
        read_classes(tmp_path / "classes.txt")


def test_classes_without_colours_get_different_ones(tmp_path: Path):
    (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(150)))
    names, colours = read_classes(tmp_path / "classes.txt")
    assert len(names) == 150 and len(set(colours)) > 145
