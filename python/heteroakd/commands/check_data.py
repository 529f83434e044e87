"""`heteroakd check-data`: reads every pair of a data set once, counts what is in it and names what is broken."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from heteroakd.config.commands import CheckDataRun
from heteroakd.data import IGNORE_INDEX, DataError, SegmentationData, build_data, denormalize
from heteroakd.data.published import PUBLISHED
from heteroakd.data.reading import files_of
from heteroakd.data.samples import SegmentationDataset, Source
from heteroakd.data.survey import PartReport, Readings, meaningless, nowhere, warnings
from heteroakd.evaluation.pictures import NEUTRAL, colorize, panel
from heteroakd.report.templates import render
from heteroakd.system.files import write_text

REPORT, SHEET = "check.json", "contact_sheet.png"
SHEET_COLUMNS = 4  # two samples a row, each beside its label
THUMBNAIL_WIDTH = 288


def run_check_data(config: CheckDataRun) -> dict[str, PartReport]:
    """Read the data set once; write check.json and contact_sheet.png into `config.output`, print both's essence.

    Returns what was counted by part. Raises DataError, naming the first of them, where files are missing or broken:
    missing ones at once, broken ones after everything else has been counted and written; and where no training on the
    set could mean anything.
    """
    # Without the cache: every picture is needed once.
    data, own = build_data(replace(config.data, cache=False)), config.data.name == "folder"
    root = f"-{Path(config.data.root).resolve().name}" if own and config.data.root else ""
    output = Path(config.output.replace("{name}", config.data.name + root))
    published = PUBLISHED[config.data.name].images if config.data.name in PUBLISHED else {}
    parts = {"train": data.train, config.data.evaluation_part: data.val}
    reports = {}
    for name, part in parts.items():
        count = len(part) if config.limit is None else min(config.limit, len(part))
        readings = Readings(part.source, len(data.classes), range(count))
        loader = DataLoader(readings, batch_size=None, num_workers=config.workers)
        shown = tqdm(loader, name, len(readings), unit="pair", disable=None)
        reports[name] = PartReport(len(part), published.get(name), data.classes, shown)
    found = warnings(reports, own=own, complete=config.limit is None) if config.data.name != "street" else []
    summary = {
        "data": config.data.name,
        "root": config.data.root,
        "parts": {name: report.to_dict() for name, report in reports.items()},
        "warnings": found,
    }
    write_text(output / REPORT, json.dumps(summary, indent=2) + "\n")
    print(
        render("check.txt.j2", {}, config=config.data, classes=data.classes, reports=reports, absent=nowhere(reports))
    )
    if config.samples and write_contact_sheet(output / SHEET, parts, data, config.samples):
        print(f"samples: {output / SHEET}")
    print(f"all numbers: {output / REPORT}", flush=True)
    for text in found:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    broken = sum(report.broken for report in reports.values())
    if broken:
        first = next(report.errors[0] for report in reports.values() if report.errors)
        read = sum(report.read for report in reports.values())
        raise DataError(f"{broken} of {read} pairs are broken; the first: {first}")
    if problem := meaningless(reports, own=own):
        raise DataError(problem)
    return reports


def write_contact_sheet(
    path: Path, datasets: dict[str, SegmentationDataset], data: SegmentationData, samples: int
) -> bool:
    """Pictures beside their labels in the colours of the classes, as one PNG: `samples` spread over each part, and
    half as many training crops. Broken pairs are passed over; False, and no file, where nothing is left."""
    captioned: list[tuple[str, Tensor]] = []
    present: set[int] = set()

    def show(caption: str, image: Tensor, label: Tensor) -> None:
        present.update(label.unique().tolist())
        image = transforms.to_dtype(image, torch.uint8, scale=True)
        if label.shape[1] > THUMBNAIL_WIDTH:
            size = [max(1, round(label.shape[0] * THUMBNAIL_WIDTH / label.shape[1])), THUMBNAIL_WIDTH]
            image = transforms.resize(image, size, antialias=True)
            label = transforms.resize(label[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
        captioned.extend([(caption, image), ("label", colorize(label, data.palette))])

    torch.manual_seed(0)
    for name, pictures, wanted in (
        *((name, dataset.source, samples) for name, dataset in datasets.items()),
        ("training crop", data.train, max(1, samples // 2)),
    ):
        count = min(wanted, len(pictures))
        for index in (number * len(pictures) // count for number in range(count)):
            with suppress(DataError):
                image, label = pictures[index]
                if pictures is data.train:
                    show(name, denormalize(image), label)
                else:
                    show(f"{name}: {_name(pictures, index)}", image, label)
    if not captioned:
        return False
    shown = sorted(present - {IGNORE_INDEX})
    legend, colours = [data.classes[index] for index in shown], data.palette[shown]
    if IGNORE_INDEX in present:
        legend, colours = [*legend, "ignored"], torch.cat([colours, torch.tensor([NEUTRAL], dtype=torch.uint8)])
    panel(captioned, path, columns=SHEET_COLUMNS, classes=legend, palette=colours)
    return True


def _name(source: Source, index: int) -> str:
    return files.pairs[index].image.stem if (files := files_of(source)) else str(index)
