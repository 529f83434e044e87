"""Coloured labels, overlays, heat maps and panels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from heteroakd.evaluation import fonts
from heteroakd.evaluation.fonts import families_for, font_for
from heteroakd.evaluation.pictures import NEUTRAL, colorize, heatmap, labelled_class_map, overlay, panel
from PIL import Image

PALETTE = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
LABEL = torch.tensor([[0, 1, 2], [2, 255, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_colorize(dtype: torch.dtype):
    picture = colorize(LABEL.to(dtype), PALETTE)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 2, 3)
    assert picture[:, 0, 1].tolist() == [0, 255, 0] and picture[:, 1, 0].tolist() == [0, 0, 255]
    assert picture[:, 1, 1].tolist() == list(NEUTRAL)


def test_colorize_a_class_of_index_255_is_still_ignored():
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    assert colorize(torch.tensor([[255]]), palette)[:, 0, 0].tolist() == list(NEUTRAL)


def test_colorize_errors():
    with pytest.raises(ValueError, match=r"label must lie in 0..2 or be 255 \(ignore\), got 3"):
        colorize(torch.tensor([[3]]), PALETTE)
    with pytest.raises(ValueError, match="got -1"):
        colorize(torch.tensor([[-1]]), PALETTE)


def test_overlay_blends_and_leaves_ignored_pixels():
    image = torch.full((3, 2, 3), 100, dtype=torch.uint8)
    picture = overlay(image, LABEL, PALETTE, alpha=0.5)
    assert picture.dtype == torch.uint8
    assert picture[:, 0, 0].tolist() == [178, 50, 50]
    assert picture[:, 1, 1].tolist() == [100, 100, 100]
    assert torch.equal(overlay(image, LABEL, PALETTE, alpha=0.0), image)
    assert image.unique().tolist() == [100]


def test_heatmap_is_monotone_in_lightness_and_neutral_for_nan():
    values = torch.linspace(0, 1, 33)[None]
    picture = heatmap(values)
    lightness = (picture.float() * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(0)[0]
    assert (lightness.diff() > 0).all()
    shown = heatmap(torch.tensor([[float("nan"), -5.0, 0.0, 1.0, 7.0, float("inf")]]))[:, 0].T.tolist()
    assert shown[0] == list(NEUTRAL) and shown[1] == shown[2] and shown[3] == shown[4] == shown[5] != shown[2]
    assert NEUTRAL not in {tuple(colour) for colour in picture[:, 0].T.tolist()}


def test_heatmap_range():
    assert torch.equal(heatmap(torch.tensor([[0.0, 4.0]]), maximum=4), heatmap(torch.tensor([[0.0, 1.0]])))


def test_heatmap_of_half_precision_that_requires_grad():
    values = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(heatmap(values), heatmap(torch.tensor([[0.0, 1.0]])))


def test_labelled_class_map():
    maps = torch.arange(18, dtype=torch.float32).view(3, 2, 3)
    chosen = labelled_class_map(maps, LABEL)
    assert chosen.nan_to_num(-1).tolist() == [[0, 7, 14], [15, -1, 5]]
    assert chosen.isnan().tolist() == (LABEL == 255).tolist()
    with pytest.raises(ValueError, match=r"label must lie in 0..1 or be 255 \(ignore\), got 2"):
        labelled_class_map(maps[:2], LABEL)


def pictures(count: int, size: tuple[int, int] = (20, 30)) -> list[tuple[str, torch.Tensor]]:
    random = np.random.default_rng(0)
    return [
        (f"picture {number}", torch.from_numpy(random.integers(0, 256, (3, *size), dtype=np.uint8)))
        for number in range(count)
    ]


def test_panel_shows_the_pictures_unchanged_side_by_side(tmp_path: Path):
    shown = pictures(3)
    path = tmp_path / "new" / "folder" / "panel.png"
    panel(shown, path)
    sheet = np.asarray(Image.open(path))
    factor = 10  # 30 columns become 300
    top = next(row for row in range(sheet.shape[0]) if (sheet[row, 8] == shown[0][1][:, 0, 0].numpy()).all())
    for number, (_, picture) in enumerate(shown):
        left = 8 + number * (30 * factor + 8)
        cut = sheet[top : top + 20 * factor : factor, left : left + 30 * factor : factor]
        assert np.array_equal(cut, picture.permute(1, 2, 0).numpy())
    assert (sheet[8:top] < 128).any()  # captions
    assert [file.name for file in path.parent.iterdir()] == ["panel.png"]


def test_panel_rows_and_legend(tmp_path: Path):
    panel(pictures(5), tmp_path / "row.png")
    panel(pictures(5), tmp_path / "rows.png", columns=2)
    panel(pictures(5), tmp_path / "legend.png", columns=2, classes=("a", "b", "c"), palette=PALETTE)
    row, rows, legend = (Image.open(tmp_path / f"{name}.png") for name in ("row", "rows", "legend"))
    assert rows.width < row.width and rows.height > 2.5 * row.height
    assert legend.width == rows.width and legend.height > rows.height
    below = np.asarray(legend)[rows.height - 8 :].reshape(-1, 3)
    assert {tuple(colour) for colour in PALETTE.tolist()} <= {tuple(colour) for colour in below.tolist()}


def test_panel_of_different_sizes_and_long_captions(tmp_path: Path):
    panel([("a" * 200, pictures(1)[0][1]), ("", pictures(1, (400, 500))[0][1])], tmp_path / "panel.png")
    assert Image.open(tmp_path / "panel.png").height > 400


@pytest.mark.parametrize("letters", ["Straße", "δρόμος", "дорога"])
def test_letters_beyond_ascii_are_no_boxes(letters: str) -> None:
    font = font_for(letters, 20)
    boxes = [bytes(font.getmask(letter)) for letter in ("\ue000", *letters)]
    assert len(set(boxes)) == 1 + len(set(letters))  # a letter that is lacking looks as a private one does


def test_letters_that_dejavu_lacks_are_looked_for_on_the_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for cached in (fonts._file_for, fonts._warn, font_for, families_for):
        cached.cache_clear()
    entry = SimpleNamespace(fname="/nowhere/Han.otf", name="Han", weight=400, style="normal")
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", [entry])
    has = fonts._has
    monkeypatch.setattr(fonts, "_has", lambda file, letters: file == entry.fname or has(file, letters))
    assert families_for("a 道路") == ["DejaVu Sans", "Han"] and families_for("a") == ["DejaVu Sans"]
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", [])
    for letters in ("道", "道"):
        assert families_for(letters) == ["DejaVu Sans"]
    assert capsys.readouterr().out.count("no font here has '道'") == 1
    for cached in (fonts._file_for, fonts._warn, font_for, families_for):
        cached.cache_clear()


def test_panel_errors_leave_nothing_behind(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        panel(pictures(1), tmp_path / "file" / "panel.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
