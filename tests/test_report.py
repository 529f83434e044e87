"""The HTML report."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from heteroakd.report import figures
from heteroakd.report.figures import Bars, Curve, Matrix, svg
from heteroakd.report.page import Picture, Section, Table, write_report
from PIL import Image

VOID = {"meta", "img", "br", "link", "input", "hr"}
REFERENCES = {"src", "href", "xlink:href", "srcset", "data", "action"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects references, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in REFERENCES]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in REFERENCES]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def png(colour: tuple[int, int, int] = (1, 2, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_sample(path: Path) -> str:
    picture = path.parent / "picture.png"
    picture.write_bytes(png((9, 9, 9)))
    series = {"none": [(0, 2.0), (1, float("nan")), (2, 1.0)], "kd": [(0, 1.5), (2, 0.5)]}
    write_report(
        path,
        title="A <run> & more",
        introduction="First paragraph.\n\nSecond <b>paragraph</b>.",
        tables=[
            Table(
                "Results",
                ("method", "mIoU", "steps"),
                [("none", 0.123456, 200), ("a<b", float("nan"), None)],
                "note!",
            )
        ],
        sections=[
            Section("Curves", diagrams=[Curve("Loss", "step", "loss", series), Curve("Empty", "step", "mIoU", {})]),
            Section(
                "Pictures",
                pictures=[
                    Picture("in memory", Image.open(io.BytesIO(png()))),
                    Picture('from a "file"', picture),
                    Picture("once more", picture),
                ],
            ),
        ],
    )
    return path.read_text(encoding="utf-8")


def test_report_is_self_contained(tmp_path: Path):
    text = write_sample(tmp_path / "report.html")
    page = Page(text)
    assert not re.search(r"https?:|//www|url\((?!#)|@import|<script|<link", text)
    assert page.references and all(
        reference.startswith(("#", "data:image/webp;base64,")) for reference in page.references
    )
    identifiers = set(re.findall(r'id="([^"]*)"', text))
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= identifiers
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= identifiers


def test_report_shows_everything_once_and_escaped(tmp_path: Path):
    page = Page(write_sample(tmp_path / "report.html"))
    assert page.tags.count("svg") == 2 and page.tags.count("img") == 3 and page.tags.count("table") == 1
    assert page.text.count("A <run> & more") == 2  # title of the window and of the page
    for shown in (
        "First paragraph.",
        "Second <b>paragraph</b>.",
        "a<b",
        "0.1235",
        "200",
        "note!",
        'from a "file"',
    ):
        assert shown in page.text
    assert page.text.count("–") == 2
    assert "b" not in page.tags


def test_report_holds_the_pictures(tmp_path: Path):
    page = Page(write_sample(tmp_path / "report.html"))
    data = [base64.b64decode(link.split(",")[1]) for link in page.references if link.startswith("data:")]
    shown, given = ([Image.open(io.BytesIO(one)).convert("RGB") for one in pictures]
                    for pictures in (data, [png(), png((9, 9, 9)), png((9, 9, 9))]))  # fmt: skip
    for ours, theirs in zip(shown, given, strict=True):
        assert ours.size == theirs.size
        assert max(abs(a - b) for a, b in zip(ours.getpixel((1, 1)), theirs.getpixel((1, 1)), strict=True)) <= 4


def test_pictures_are_a_fraction_of_their_pngs(tmp_path: Path):
    noise = torch.randint(0, 256, (60, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    photo = Image.fromarray(noise.numpy()).resize((640, 480), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "a.png")
    pictures = [Picture("a", tmp_path / "a.png")]
    write_report(tmp_path / "report.html", title="T", introduction="", sections=[Section("P", pictures=pictures)])
    assert (tmp_path / "report.html").stat().st_size < 0.3 * (tmp_path / "a.png").stat().st_size


def test_pictures_wider_than_webp_has_them_are_made_smaller(tmp_path: Path):
    Image.new("RGB", (20000, 40)).save(tmp_path / "a.png")
    pictures = [Picture("a", tmp_path / "a.png")]
    write_report(tmp_path / "report.html", title="T", introduction="", sections=[Section("P", pictures=pictures)])
    (link,) = [link for link in Page((tmp_path / "report.html").read_text()).references if link.startswith("data:")]
    assert Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))).size == (16383, 33)


def test_text_of_diagrams_is_legible_on_a_phone_and_over_no_curve():
    points = {f"series {number}": [(0.0, 0.0), (1.0, float(number))] for number in range(4)}
    counts = [[1] * 12] * 12
    for diagram in (Curve("C", "x", "y", points), Matrix("M", list("abcdefghijkl"), counts)):
        text = svg(diagram)
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
        scales = [float(scale) for scale in re.findall(r"scale\(([\d.]+) -", text)]  # of letters, drawn 100 units high
        assert scales and 100 * min(scales) * 360 / width > 9.5
    figure = figures._curve(Curve("C", "x", "y", points))
    figure.draw_without_rendering()
    assert figure.axes[0].get_legend() is None
    assert figure.legends[0].get_window_extent().y0 >= figure.axes[0].get_window_extent().y1


def test_report_follows_light_and_dark(tmp_path: Path):
    text = write_sample(tmp_path / "report.html")
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    assert "currentColor" in text and "#123456" not in text
    for drawn in re.findall(r"<svg.*?</svg>", text, re.S):
        assert "#ffffff" not in drawn  # nothing paints a white ground under the diagram


def test_report_is_reproducible_and_replaces_the_old_one(tmp_path: Path):
    first = write_sample(tmp_path / "report.html")
    assert write_sample(tmp_path / "report.html") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "report.html"]


def test_sections_hold_diagrams_tables_and_pictures_in_their_order(tmp_path: Path):
    bars = Bars("IoU", "%", ("road", "<sky>"), {"none": (10.0, None), "kd": (20.0, 30.0)})
    matrix = Matrix("Confusion", ("a", "b", "c"), [[3, 1, 0], [0, 0, 0], [0, 2, 2]])
    table = Table("Numbers", ("class", "kd"), [("road", 1)])
    shown = Picture("P", Image.open(io.BytesIO(png())))
    sections = [
        Section("One & two", "First.\n\nSecond.", [bars, matrix], [table], [shown]),
        Section("Last"),
    ]
    write_report(tmp_path / "r.html", title="t", introduction="", sections=sections)
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    words = [word for word in page.text if word]
    order = [
        words.index(word) for word in ("One & two", "First.", "Second.", "IoU", "Confusion", "Numbers", "P", "Last")
    ]
    assert order == sorted(order)
    assert page.tags.count("svg") == 2 and page.tags.count("h3") == 1
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert "#123456" not in text
    assert "#ffffff" not in "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    shown = re.findall(r"<!-- (.*?) -->", text)  # matplotlib names the text of every label
    assert "&lt;sky&gt;" in shown and {"75", "25", "50"} <= set(shown)  # the row of 0 counts stays empty


def test_diagrams_of_many_classes_stay_readable():
    names = [f"class {number}" for number in range(150)]
    counts = torch.eye(150, dtype=torch.int64).tolist()
    assert len(svg(Matrix("M", names, counts))) < 200_000
    assert "class 149" in svg(Bars("IoU", "%", names, {"a": [1.0] * 150}))


def test_report_makes_folders(tmp_path: Path):
    write_report(tmp_path / "a" / "b" / "report.html", title="t", introduction="i")
    assert "<h1>t</h1>" in (tmp_path / "a" / "b" / "report.html").read_text()


def test_report_errors_keep_the_old_one(tmp_path: Path):
    path = tmp_path / "report.html"
    before = write_sample(path)
    with pytest.raises(OSError, match=r"cannot identify image file .*report\.html"):
        write_report(path, title="t", introduction="", sections=[Section("S", pictures=[Picture("P", path)])])
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        missing = Section("S", pictures=[Picture("P", tmp_path / "nothing.png")])
        write_report(path, title="t", introduction="", sections=[missing])
    assert path.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["picture.png", "report.html"]


def test_names_are_shown_as_they_are():
    names = ["_hidden", "$x^{$", "cost_$"]
    for diagram in (
        Curve("Curves", "step", "value", {name: [(0, 1.0), (1, 2.0)] for name in names}),
        Bars("Bars", "%", names, {name: [1.0, 2.0, 3.0] for name in names}),
        Matrix("Matrix", names, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ):
        comments = re.findall(r"<!-- *(.*?) *-->", svg(diagram))
        assert set(names) <= set(comments), comments
