"""HeteroAKD in MMSegmentation: a SegFormer learns from an FCN on ResNet-18, both by configs, under mmengine's Runner.

    python examples/mmseg_segmentor.py   # random networks, a made-up task, a CPU; --resume goes on

Tried with mmsegmentation 1.2.2, mmengine 0.10.7, mmcv-lite 2.1.0 (`pip install mmcv-lite==2.1.0 mmsegmentation ftfy`):
mmcv-lite lacks compiled operators that MMSegmentation imports and nothing here uses, and torch.load must be told to
trust what mmengine saved.
"""

import argparse
import importlib.util
import os
import sys
import types

import torch

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
if importlib.util.find_spec("mmcv._ext") is None:
    unused = ("CrissCrossAttention", "PSAMask", "point_sample", "sigmoid_focal_loss")
    sys.modules["mmcv.ops"] = types.SimpleNamespace(**dict.fromkeys(unused))

from mmengine import ConfigDict, model, runner, structures
from mmseg.models import build_segmentor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from hetero_kernels import Distiller, check_replicas, mean_over_processes


@MODELS.register_module()
class DistilledSegmentor(model.BaseModel):
    """Trains by the distiller and predicts by the student. Checkpoints hold the student and the projectors."""

    def __init__(self, student, teacher, student_tap="backbone", teacher_tap="backbone", **base):
        super().__init__(**base)
        student, teacher = build_segmentor(student), build_segmentor(teacher)
        for network in (student, teacher):
            network.init_weights()  # mmengine, which looks into modules of its own, would not find them
        found = {"num_classes": student.num_classes, "student_tap": student_tap, "teacher_tap": teacher_tap}
        self.distiller = Distiller.heteroakd(student, teacher, torch.zeros(1, 3, 64, 64), **found)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        if mode != "loss":
            return self.distiller.student(inputs, data_samples, mode)
        labels = torch.cat([sample.gt_sem_seg.data for sample in data_samples])  # [B, H, W]
        out = self.distiller(inputs, labels, normalizer=mean_over_processes(self.distiller.divisors(labels)))
        return out.terms._asdict()  # mmengine adds up what has "loss" in its name, and logs it all


def make_config() -> ConfigDict:
    """A trained teacher: "init_cfg": {"type": "Pretrained", "checkpoint": FILE} in its own."""
    head = {"num_classes": 3, "norm_cfg": {"type": "BN"}, "align_corners": False, "channels": 16}
    mit = {"type": "MixVisionTransformer", "embed_dims": 8, "num_layers": [1] * 4, "num_heads": [1, 2, 5, 8]}
    segformer = {"type": "SegformerHead", "in_channels": [8, 16, 40, 64], "in_index": [0, 1, 2, 3], **head}
    resnet = {"type": "ResNetV1c", "depth": 18, "norm_cfg": {"type": "BN"}}
    fcn = {"type": "FCNHead", "in_channels": 512, "in_index": 3, **head}
    whole = {"type": "EncoderDecoder", "train_cfg": {}, "test_cfg": {"mode": "whole"}}
    config = {"type": "DistilledSegmentor", "data_preprocessor": {"type": "SegDataPreProcessor", "size": (64, 64)}}
    config["student"] = {**whole, "backbone": mit, "decode_head": segformer}
    config["teacher"] = {**whole, "backbone": resnet, "decode_head": fcn}
    return ConfigDict(config)


def make_data(images: int = 16) -> list[dict]:
    """Coloured blocks; a pixel's label is its strongest colour. In a config of your own: `train_dataloader`."""
    pictures = torch.rand(images, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    labels = [structures.PixelData(data=picture.argmax(0, keepdim=True)) for picture in pictures]
    return [{"inputs": pictures[i], "data_samples": SegDataSample(gt_sem_seg=labels[i])} for i in range(images)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/mmseg")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    checkpoints = {"type": "CheckpointHook", "by_epoch": False, "interval": 10}
    trained = runner.Runner(
        **{"model": make_config(), "work_dir": options.output, "resume": options.resume, "default_scope": "mmseg"},
        **{"optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 2e-3}}, "default_hooks": {"checkpoint": checkpoints}},
        train_dataloader={"dataset": make_data(), "batch_size": 4, "sampler": {"type": "InfiniteSampler"}},
        **{"train_cfg": {"by_epoch": False, "max_iters": options.steps}, "randomness": {"seed": 0}},
    ).train()
    check_replicas(trained)


if __name__ == "__main__":
    main()
