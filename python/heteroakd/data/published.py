"""The public data sets that are read as they are downloaded, by the names that `DataConfig.name` takes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from heteroakd.data.ade20k import ade20k_source
from heteroakd.data.camvid import camvid_source
from heteroakd.data.cityscapes import cityscapes_source
from heteroakd.data.coco_stuff import coco_stuff_source
from heteroakd.data.files import FileSource
from heteroakd.data.folder import Colour, read_classes
from heteroakd.data.voc import voc_aug_source, voc_source

_CLASSES = Path(__file__).parent / "classes"


class PublishedSet(NamedTuple):
    """How one public data set is read, and what it should hold."""

    source: Callable[[Path, Any], FileSource]
    """Root and part ("train", "val", of CamVid "test") -> pictures."""
    class_list: str
    """File of names and colours in `classes/`."""
    images: Mapping[str, int]
    """Images of each part as published."""

    def classes(self) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
        """Names and colours."""
        return read_classes(_CLASSES / self.class_list)


PUBLISHED: dict[str, PublishedSet] = {
    "camvid": PublishedSet(camvid_source, "camvid.txt", {"train": 367, "val": 101, "test": 233}),
    "cityscapes": PublishedSet(cityscapes_source, "cityscapes.txt", {"train": 2975, "val": 500}),
    "voc": PublishedSet(voc_source, "voc.txt", {"train": 1464, "val": 1449}),
    "voc_aug": PublishedSet(voc_aug_source, "voc.txt", {"train": 10582, "val": 1449}),
    "ade20k": PublishedSet(ade20k_source, "ade20k.txt", {"train": 20210, "val": 2000}),
    "coco_stuff": PublishedSet(coco_stuff_source, "coco_stuff.txt", {"train": 118287, "val": 5000}),
}
