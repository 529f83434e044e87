"""The set-up of ``train_step``: one step of the trainer on a real pair, and its loss alone on the same maps."""

from __future__ import annotations

import torch
from heteroakd.config.groups import LossConfig, ModelConfig, OptimizerConfig
from heteroakd.methods.distiller import Teacher, build_distiller
from heteroakd.networks.zoo import build_tapped
from heteroakd.training.step import build_optimizer
from torch import Tensor

from .cases import DistillationCase
from .steps import Step

STUDENT = ModelConfig(architecture="segformer", encoder="mit_b0", options={"decoder_segmentation_channels": 64})
TEACHER = ModelConfig(
    architecture="fpn",
    encoder="tu-tf_efficientnet_lite0",
    options={"decoder_segmentation_channels": 64, "decoder_pyramid_channels": 128},
)
TEMPERATURE = 2.0


class Distillation:
    """Student, frozen teacher, HeteroAKDLoss and AdamW as ``heteroakd distill`` builds them; random weights and images.

    Args:
        case: classes and images.
    """

    def __init__(self, case: DistillationCase, device: str = "cpu", seed: int = 0) -> None:
        torch.manual_seed(seed)
        student, _ = build_tapped(STUDENT, case.num_classes)
        teacher, _ = build_tapped(TEACHER, case.num_classes)
        self.teacher = Teacher(teacher.to(device))
        config = LossConfig(temperature=TEMPERATURE)
        student = student.to(device)
        self.distiller = build_distiller(
            student, self.teacher, "heteroakd", config, case.num_classes, case.crop
        ).to(device)  # fmt: skip
        self.optimizer = build_optimizer(self.distiller, OptimizerConfig(lr=6e-4))
        self.distiller.train()
        self.images = torch.randn(case.batch, 3, *case.crop).to(device)
        coarse = torch.randint(0, case.num_classes, (case.batch, case.crop[0] // 32, case.crop[1] // 32))
        self.labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2).to(device)

    def step(self, backend: str) -> Step:
        """Teacher forward, student forward, loss; backward, optimiser step."""

        def loss() -> Tensor:
            self.distiller.loss.backend = backend
            return self.distiller(self.images, self.labels, self.teacher(self.images)).loss

        return Step(loss, list(self.distiller.parameters()), self.optimizer.step)

    def loss(self, backend: str) -> Step:
        """The loss alone, projectors included, on features and logits of this pair: gradients of the student's maps and
        of the projectors."""
        with torch.no_grad():
            output = self.distiller.student(self.images)
            features, logits = output.features.clone(), output.logits.clone()
        taught = self.teacher(self.images)
        features.requires_grad_()
        logits.requires_grad_()
        module = self.distiller.loss

        def loss() -> Tensor:
            module.backend = backend
            return module(features, taught.features, self.labels, logits, taught.logits).loss

        return Step(loss, [features, logits, *module.parameters()])
