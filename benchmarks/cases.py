"""The benchmarked shapes, the ratios that are asked of them, and the series in which one quantity varies."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Size = tuple[int, int]
Asked = dict[str, tuple[float, float]]  # provider: time of it / ours, as it should be and the least acceptable


@dataclass(frozen=True)
class PixelCase:
    """A loss on logits of both networks."""

    name: str
    loss: str  # "hakd_loss" or "segmentation_loss"
    shape: tuple[int, int, int, int]  # logits [B, K, h, w]
    size: Size  # labels H, W
    options: dict[str, Any] = field(default_factory=dict)
    teacher: bool = True
    dtype: str = "float32"
    scale: float = 1.0  # standard deviation of the logits
    threads: int | None = None  # None: as many as the run has
    instruction_set: str | None = None  # of the "cpu" backend; None: the best of the machine
    asked: Asked = field(default_factory=dict)
    allowance: float | None = None  # seconds that ours may take beyond eager

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def num_classes(self) -> int:
        return self.shape[1]

    @property
    def grid(self) -> Size:
        """Pixels of the loss grid."""
        return self.shape[2:] if self.options.get("resolution") == "feature" else self.size

    @property
    def elements(self) -> int:
        """Pixels of the loss grid times classes."""
        return self.shape[0] * self.num_classes * self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ProjectedCase:
    """A loss on features, the 1x1 projections to K classes included, on the grid of the features."""

    name: str
    loss: str  # "projected_hakd_loss", or "cross_entropy": one projection and its cross-entropy
    shape: tuple[int, int, int, int]  # student features [B, Cs, h, w]
    teacher_channels: int  # Ct; 0 where there is no teacher
    num_classes: int
    size: Size  # labels H, W
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # of the features; weights are float32
    channels_last: bool = False
    compiled: bool = True  # torch.compile is measured too
    asked: Asked = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def elements(self) -> int:
        """Pixels of the loss grid times classes."""
        return self.shape[0] * self.num_classes * self.shape[2] * self.shape[3]

    @property
    def operations(self) -> int:
        """Floating point operations of the projections: forward and weight gradient of both, feature gradient of
        the student."""
        return 2 * self.elements * (3 * self.shape[1] + 2 * self.teacher_channels)

    @property
    def feature_bytes(self) -> int:
        """Bytes if every feature is read once and the student's gradient written once."""
        pixels = self.shape[0] * self.shape[2] * self.shape[3]
        return (
            pixels * (2 * self.shape[1] + self.teacher_channels) * (2 if self.dtype in ("bfloat16", "float16") else 4)
        )


@dataclass(frozen=True)
class ProjectionCase:
    """The projectors of both networks alone, in training mode, with gradients for what they give."""

    name: str
    batch: int
    num_classes: int
    grid: Size  # of both networks' features
    student_channels: int
    teacher_channels: int
    channels_last: bool = False
    asked: Asked = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Pixels of the features times classes, of one network."""
        return self.batch * self.num_classes * self.grid[0] * self.grid[1]

    @property
    def operations(self) -> int:
        """Floating point operations: forward and weight gradient of both, feature gradient of the student."""
        return 2 * self.elements * (3 * self.student_channels + 2 * self.teacher_channels)

    @property
    def feature_bytes(self) -> int:
        """Bytes if every feature is read twice (statistics stand between) and the student's gradient written once."""
        return 4 * self.batch * self.grid[0] * self.grid[1] * (3 * self.student_channels + 2 * self.teacher_channels)


@dataclass(frozen=True)
class WholeCase:
    """HeteroAKDLoss with all four terms on the maps of a pair of networks."""

    name: str
    batch: int
    num_classes: int
    size: Size  # labels H, W
    student_channels: int
    student_strides: Size  # of features and logits
    teacher_channels: int
    teacher_strides: Size
    options: dict[str, Any] = field(default_factory=dict)  # beside the module's defaults
    asked: Asked = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Pixels of the labels times classes."""
        return self.batch * self.num_classes * self.size[0] * self.size[1]

    @property
    def assumptions(self) -> str:
        """The maps in words."""
        (fs, ls), (ft, lt) = self.student_strides, self.teacher_strides
        return (
            f"K = {self.num_classes}; student: {self.student_channels} channels at stride {fs}, logits at stride {ls}; "
            f"teacher: {self.teacher_channels} channels at stride {ft}, logits at stride {lt}"
        )


@dataclass(frozen=True)
class DistillationCase:
    """A whole training step with a frozen FPN EfficientNet-Lite0 teacher, random weights and images."""

    name: str
    num_classes: int
    batch: int
    crop: Size  # images H, W
    student: str = "segformer"  # one of the students of ``distillation``


Case = PixelCase | ProjectedCase | ProjectionCase | WholeCase


@dataclass(frozen=True)
class Variant:
    """A case beside the first of its group; ``limit`` bounds time per element over that of the first."""

    label: str
    case: PixelCase
    limit: tuple[str, float] | None = None  # ("<=", 1.1)


@dataclass(frozen=True)
class Series:
    """Cases that differ in one quantity."""

    name: str
    quantity: str  # label of the axis
    points: tuple[tuple[float, PixelCase], ...]


T2: dict[str, Any] = {"temperature": 2.0}
CITYSCAPES = (512, 1024)
HAKD = PixelCase("hakd K=19", "hakd_loss", (1, 19, 64, 128), CITYSCAPES, T2)
SEGMENTATION = PixelCase("CE + KD", "segmentation_loss", (1, 19, 64, 128), CITYSCAPES)
PROJECTED_OPTIONS = {**T2, "resolution": "feature", "proj_weight": 1.0}


def _named(*cases: Case) -> dict[str, Any]:
    return {case.name: case for case in cases}


# The paper's pairs; logits of SegFormers at stride 4, else at the features' stride.
WHOLE_LOSSES: dict[str, WholeCase] = _named(
    WholeCase("R101 -> R18, K=19", 1, 19, CITYSCAPES, 512, (8, 8), 2048, (8, 8), asked={"reference": (40, 28)}),
    WholeCase("MiT-B4 -> MBV2, K=19", 1, 19, CITYSCAPES, 320, (8, 8), 512, (32, 4), asked={"reference": (44, 38)}),
    WholeCase("R101 -> B0, K=19", 1, 19, CITYSCAPES, 256, (32, 4), 2048, (8, 8), asked={"reference": (38, 28)}),
    WholeCase("R101 -> R18, K=150", 1, 150, (512, 512), 512, (8, 8), 2048, (8, 8), asked={"reference": (54, 48)}),
    WholeCase("R101 -> R18, feature resolution", 1, 19, CITYSCAPES, 512, (8, 8), 2048, (8, 8),
              {"resolution": "feature", "projector": "conv_bn_relu"}, {"reference": (18, 10)}),
)  # fmt: skip

# A dilated ResNet-18 student (features and logits at stride 8) and a SegFormer-B4 teacher (features of the last stage
# at stride 32, logits at stride 4), at sizes that eager only predicts.
PAPER_SIZES: dict[str, WholeCase] = _named(
    WholeCase("Cityscapes, 512x1024, batch 8", 8, 19, CITYSCAPES, 512, (8, 8), 512, (32, 4)),
    WholeCase("ADE20K, 512x512, batch 16", 16, 150, (512, 512), 512, (8, 8), 512, (32, 4)),
)

PIXEL_LOSSES: dict[str, PixelCase] = _named(
    replace(HAKD, asked={"reference": (80, 55), "compile": (40, 25)}),
    PixelCase("hakd K=150", "hakd_loss", (1, 150, 64, 64), (512, 512), T2,
              asked={"reference": (100, 65), "compile": (35, 22)}),
    PixelCase("hakd feature resolution", "hakd_loss", (2, 19, 64, 128), CITYSCAPES, {**T2, "resolution": "feature"},
              asked={"reference": (20, 15), "compile": (10, 8)}),
    replace(SEGMENTATION, asked={"reference": (35, 25), "compile": (20, 14)}),
    replace(SEGMENTATION, name="CE", teacher=False, asked={"reference": (15, 10), "compile": (8, 6)}),
    PixelCase("hakd tiny", "hakd_loss", (1, 2, 8, 8), (64, 64), T2, asked={"reference": (1, 1)}),
    PixelCase("CE tiny", "segmentation_loss", (1, 2, 8, 8), (64, 64), teacher=False, allowance=150e-6),
)  # fmt: skip

_K19 = ProjectedCase("projected K=19", "projected_hakd_loss", (2, 512, 64, 128), 2048, 19, CITYSCAPES,
                     PROJECTED_OPTIONS)  # fmt: skip
_K150 = ProjectedCase("projected K=150", "projected_hakd_loss", (2, 256, 64, 64), 512, 150, (512, 512),
                      PROJECTED_OPTIONS)  # fmt: skip

PROJECTED_LOSSES: dict[str, ProjectedCase] = _named(
    *(
        variant
        for case in (_K19, _K150)
        for variant in (
            case,
            replace(case, name=f"{case.name}, channels_last", channels_last=True, compiled=False),
            replace(case, name=f"{case.name}, bf16", dtype="bfloat16", compiled=False),
        )
    ),
    # The one loss here that torch.nn.functional.linear_cross_entropy computes too: it knows neither a second network
    # nor interpolation, so none of the others.
    ProjectedCase("CE of projected features", "cross_entropy", (2, 256, 64, 64), 0, 150, (64, 64)),
)

_PROJECTION = ProjectionCase("projections K=19", 1, 19, (64, 128), 512, 2048, asked={"reference": (5, 5)})

PROJECTIONS: dict[str, ProjectionCase] = _named(
    _PROJECTION,
    replace(_PROJECTION, name="projections K=19, channels_last", channels_last=True, asked={"reference": (1.5, 1.5)}),
    replace(_PROJECTION, name="projections K=150", num_classes=150, grid=(64, 64), asked={}),
)

TRAIN_STEPS = {
    case.name: case
    for case in (
        DistillationCase("CamVid crops", num_classes=11, batch=8, crop=(160, 192)),
        DistillationCase("Cityscapes crop", num_classes=19, batch=1, crop=CITYSCAPES),
        DistillationCase("Cityscapes crop, ResNet-18", num_classes=19, batch=2, crop=(256, 512), student="deeplabv3"),
    )
}


def _strides() -> tuple[Variant, ...]:
    variants = [Variant("stride 8", HAKD)]
    for stride in (4, 16, 32):
        shape = (1, 19, CITYSCAPES[0] // stride, CITYSCAPES[1] // stride)
        variants.append(Variant(f"stride {stride}", replace(HAKD, shape=shape), ("<=", 1.5)))
    corners = replace(HAKD, shape=(1, 19, 65, 129), options={**T2, "align_corners": True})
    return (*variants, Variant("65x129, align_corners", corners, ("<=", 1.5)))


VARIANTS: dict[str, tuple[Variant, ...]] = {
    "temperature": (
        Variant("T = 2", HAKD),
        Variant("T = 1", replace(HAKD, options={"temperature": 1.0}), ("<=", 1.1)),
        Variant("T = 4", replace(HAKD, options={"temperature": 4.0}), ("<=", 1.1)),
        Variant("T = 1.5", replace(HAKD, options={"temperature": 1.5}), ("<=", 1.4)),
    ),
    "options": (
        Variant('kem="class"', HAKD),
        Variant('kem="spatial"', replace(HAKD, options={**T2, "kem": "spatial"}), ("<=", 2.2)),
        Variant('kem="none"', replace(HAKD, options={**T2, "kem": "none"})),
        Variant("proj_weight=1", replace(HAKD, options={**T2, "proj_weight": 1.0})),
    ),
    "dtype of hakd": (
        Variant("float32", HAKD),
        Variant("bfloat16", replace(HAKD, dtype="bfloat16"), ("<=", 1.0)),
        Variant("float16", replace(HAKD, dtype="float16")),
    ),
    "dtype of CE + KD": (
        Variant("float32", SEGMENTATION),
        Variant("bfloat16", replace(SEGMENTATION, dtype="bfloat16"), ("<=", 1.0)),
        Variant("float16", replace(SEGMENTATION, dtype="float16")),
    ),
    "grid of the logits": _strides(),
    "size of the logits": (
        Variant("standard deviation 1", HAKD),
        Variant("standard deviation 40 (guarded path)", replace(HAKD, scale=40.0), ("<=", 2.0)),
    ),
    "threads": (
        Variant("2 threads", replace(HAKD, threads=2)),
        Variant("1 thread", replace(HAKD, threads=1), (">=", 1.8)),
    ),
    "instruction set": (
        Variant("avx512", replace(HAKD, instruction_set="avx512")),
        Variant("avx2", replace(HAKD, instruction_set="avx2"), ("<=", 2.2)),
        Variant("portable", replace(HAKD, instruction_set="portable")),
    ),
}


def _point(name: str, shape: tuple[int, int, int, int]) -> PixelCase:
    return PixelCase(name, "hakd_loss", shape, (8 * shape[2], 8 * shape[3]), T2)


SERIES = {
    series.name: series
    for series in (
        Series(
            "resolution",
            "megapixels of the labels",
            tuple((h * w / 1e6, _point(f"{h}x{w}", (1, 19, h // 8, w // 8)))
                  for h, w in ((128, 256), (256, 512), CITYSCAPES, (1024, 2048))),
        ),
        Series("classes", "classes K", tuple((k, _point(f"K={k}", (1, k, 16, 32))) for k in (2, 5, 19, 60, 150, 300))),
        Series("batch", "images B", tuple((b, _point(f"B={b}", (b, 19, 32, 64))) for b in (1, 2, 4, 8))),
    )
}  # fmt: skip

# Every case that memory can be asked for by name, and every one that a suite runs.
CASES: dict[str, Case] = {
    **WHOLE_LOSSES,
    **PAPER_SIZES,
    **PIXEL_LOSSES,
    **PROJECTED_LOSSES,
    **PROJECTIONS,
    **_named(*(c for s in SERIES.values() for _, c in s.points)),
}


def shrink(case: Case, channels: int = 8) -> Case:
    """The same computation on a few pixels, of at most so many feature channels."""
    if isinstance(case, WholeCase):
        sizes = {name: min(channels, getattr(case, name)) for name in ("student_channels", "teacher_channels")}
        return replace(case, batch=2, size=(128, 128), **sizes)
    if isinstance(case, ProjectionCase):
        return replace(case, grid=(4, 4), student_channels=channels, teacher_channels=channels)
    if isinstance(case, PixelCase):
        return replace(case, shape=(*case.shape[:2], 4, 4), size=(32, 32))
    return replace(
        case,
        shape=(case.shape[0], min(channels, case.shape[1]), 4, 4),
        teacher_channels=min(channels, case.teacher_channels),
        size=(4, 4) if case.loss == "cross_entropy" else (32, 32),
    )
