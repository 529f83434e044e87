"""The classes of the street scenes and their colours."""

from enum import IntEnum

from heteroakd.data.samples import IGNORE_INDEX


class Label(IntEnum):
    """Class indices as they stand in a label picture."""

    ROAD = 0
    LANE_MARKING = 1
    SIDEWALK = 2
    BUILDING = 3
    FENCE = 4
    POLE = 5
    TRAFFIC_LIGHT = 6
    TRAFFIC_SIGN = 7
    VEGETATION = 8
    SKY = 9
    PERSON = 10
    VEHICLE = 11
    IGNORED = IGNORE_INDEX


CLASSES: tuple[str, ...] = tuple(label.name.lower().replace("_", " ") for label in Label if label is not Label.IGNORED)
PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 64, 128), (255, 255, 255), (244, 35, 232), (90, 90, 90), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (70, 130, 180), (220, 20, 60), (0, 0, 142),
)  # fmt: skip
