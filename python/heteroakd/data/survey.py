"""What a data set holds, counted from its labels, and what that says against training on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from heteroakd.data.files import DataError
from heteroakd.data.reading import files_of
from heteroakd.data.samples import IGNORE_INDEX, SegmentationData, Source

BROKEN_KEPT = 20
LOOKED_AT = 32
"""Labels of each part that are read before a training begins."""
MANY_IGNORED = 0.2
"""Share of ignored pixels beside which a class that is labelled nowhere is likely to be among them."""
MOST_IGNORED = 0.5
"""Share of ignored pixels that no data set known to us has."""


class Reading(NamedTuple):
    """What one pair of files holds, or why it cannot be read."""

    size: str = ""
    """WIDTHxHEIGHT."""
    counts: tuple[int, ...] = ()
    """Pixels of each of the K classes, and last those that are ignored."""
    turned: str | None = None
    """The image file, where its EXIF data turn it and not its label."""
    error: str | None = None
    """What is broken, naming the file."""


@dataclass(eq=False)
class Readings(Dataset[Reading]):
    """Pictures of a source as what is counted of them; broken ones too, where the source raises DataError."""

    source: Source
    num_classes: int
    indices: Sequence[int]
    """Which pictures."""
    labels: bool = False
    """Read the labels alone."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Reading:
        index, source = self.indices[number], self.source
        files = files_of(source)
        try:
            label = files.label(index) if files and self.labels else source[index][1]
        except DataError as error:
            return Reading(error=str(error))
        counts = torch.bincount(label.flatten(), minlength=IGNORE_INDEX + 1).tolist()
        turned = str(files.pairs[index].image) if files and files.turned(index) else None
        size = f"{label.shape[1]}x{label.shape[0]}"
        return Reading(size, (*counts[: self.num_classes], counts[IGNORE_INDEX]), turned)


class PartReport:
    """What was counted over one part of a data set: `pairs` of files, `published` as many where it is a public set, and
    of the `read` ones `broken`, the first `errors`, images by `sizes`, those `turned` by EXIF data that their labels
    lack, and by class, and last for what is ignored, `pixels` and `images` that hold it."""

    def __init__(
        self, pairs: int, published: int | None, classes: tuple[str, ...], readings: Iterable[Reading]
    ) -> None:
        self.pairs, self.published, self.classes = pairs, published, classes
        self.read, self.broken, self.errors = 0, 0, list[str]()
        self.sizes, self.turned = Counter[str](), list[str]()
        self.pixels, self.images = ([0] * (len(classes) + 1) for _ in range(2))
        for reading in readings:
            self.read += 1
            if reading.error is not None:
                self.broken += 1
                self.errors += [reading.error] if len(self.errors) < BROKEN_KEPT else []
                continue
            self.sizes[reading.size] += 1
            self.turned += [reading.turned] if reading.turned else []
            for index, count in enumerate(reading.counts):
                self.pixels[index] += count
                self.images[index] += count > 0
        self.ignored_share = self.pixels[-1] / max(1, sum(self.pixels))

    def share(self, index: int) -> float:
        """Share of the labelled pixels that are of the class."""
        return self.pixels[index] / max(1, sum(self.pixels[:-1]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        by_class = {name: dict(zip(self.classes, getattr(self, name), strict=False)) for name in ("pixels", "images")}
        return {**vars(self), "sizes": dict(self.sizes.most_common()), **by_class}


def nowhere(reports: dict[str, PartReport]) -> list[str]:
    """Classes that no label of any part holds."""
    classes = next(iter(reports.values())).classes
    return [name for index, name in enumerate(classes) if not any(part.images[index] for part in reports.values())]


def meaningless(reports: dict[str, PartReport], *, own: bool) -> str | None:
    """Why training on a data set of which this was counted could not mean anything, with the cure: it has one class,
    or a part, all of which was read, without a labelled pixel. `own`: the set is the user's, not a published one."""
    classes = next(iter(reports.values())).classes
    if len(classes) < 2:
        return (
            f"one class, {classes[0]!r}, is all that a network could predict; expected at least 2: name in classes.txt "
            "what the other pixels are"
        )
    for name, report in reports.items():
        if report.pairs == report.read > report.broken and not sum(report.pixels[:-1]):
            return (
                f"{name}: all pixels of all labels are ignored, so that nothing can be learnt or measured; "
                f"{_cure(len(classes), own)}"
            )
    return None


def warnings(reports: dict[str, PartReport], *, own: bool, complete: bool = True) -> list[str]:
    """What speaks against training on a data set of which this was counted, each with its cure; what only all labels
    can tell is left out where they were not `complete`. Of a published set, which may lack classes, absent ones are
    nothing to speak of."""
    found, absent = [], nowhere(reports) if own else []
    for name, report in reports.items():
        cure = _cure(len(report.classes), own)
        share = f"{name}: {100 * report.ignored_share:.0f} % of the pixels are ignored"
        if absent and report.ignored_share >= MANY_IGNORED:
            found.append(f"{share}, and no label holds {', '.join(absent)}; {cure}")
        elif report.ignored_share >= MOST_IGNORED:
            found.append(f"{share}; if that is not meant, {cure}")
        if sum(count > 0 for count in report.images[:-1]) == 1:
            found.append(f"{name}: every labelled pixel is of one class; {cure}")
        if report.turned:
            found.append(
                f"{name}: EXIF data turn {len(report.turned)} images and not their labels, {report.turned[0]} first; "
                "where the contact sheet of heteroakd check-data shows labels that do not fit, store the images upright"
            )
    if absent and not found and complete:
        found.append(f"no label holds {', '.join(absent)}: the lines of classes.txt are the values 0, 1, ... of labels")
    return found


def _cure(num_classes: int, own: bool) -> str:
    if not own:
        return "these are not the labels as they were published"
    if num_classes == 2:
        return "masks of 0 and 255 are read by --data.label_values '{0: 0, 255: 1}'"
    return "data.label_values says what the labels' values mean"


def look(data: SegmentationData, *, own: bool = True) -> list[str]:
    """`warnings` of a data set by some labels of each part, spread over it, before a training begins; none of a set
    without files.

    Raises DataError for what is `meaningless`, where all labels have been read, and for a broken label among them.
    """
    reports, complete = {}, True
    for name, dataset in (("train", data.train), ("evaluation", data.val)):
        if (source := files_of(dataset.source)) is None:
            return []
        count = len(source)
        for read in (min(LOOKED_AT, count), count):
            readings = Readings(source, len(data.classes), [i * count // read for i in range(read)], labels=True)
            reports[name] = PartReport(count, None, data.classes, (readings[number] for number in range(read)))
            if reports[name].errors:
                raise DataError(reports[name].errors[0])
            if sum(reports[name].pixels[:-1]):
                break  # else all are read before it is said that they hold nothing
        complete &= read == count
    if problem := meaningless(reports, own=own):
        raise DataError(problem)
    return warnings(reports, own=own, complete=complete)
