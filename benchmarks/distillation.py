"""The set-up of ``train_step``: one step of the trainer on a real pair, and its loss alone on the same maps."""

from __future__ import annotations

import torch
from heteroakd.config.groups import LossConfig, ModelConfig, OptimizerConfig
from heteroakd.methods import Taps, build_distiller, objective_of
from heteroakd.networks.zoo import build_network
from heteroakd.training.step import build_optimizer
from torch import Tensor

from .cases import DistillationCase
from .steps import Step

STUDENTS = {
    "segformer": ModelConfig(architecture="segformer", encoder="mit_b0", options={"decoder_segmentation_channels": 64}),
    # 512 channels at stride 8: the pair whose projections weigh most
    "deeplabv3": ModelConfig(architecture="deeplabv3", encoder="resnet18", options={"encoder_output_stride": 8}),
}
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
        student, _ = build_network(STUDENTS[case.student], case.num_classes)
        teacher, _ = build_network(TEACHER, case.num_classes)
        config = LossConfig(temperature=TEMPERATURE)
        self.distiller = build_distiller(
            student.to(device), teacher.to(device), "heteroakd", config, case.num_classes, case.crop,
            Taps("encoder", "encoder"),
        ).to(device)  # fmt: skip
        self.criterion = objective_of(self.distiller).criterion
        self.optimizer = build_optimizer(self.distiller, OptimizerConfig(lr=6e-4))
        self.distiller.train()
        self.images = torch.randn(case.batch, 3, *case.crop).to(device)
        coarse = torch.randint(0, case.num_classes, (case.batch, case.crop[0] // 32, case.crop[1] // 32))
        self.labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2).to(device)

    def step(self, backend: str) -> Step:
        """Teacher forward, student forward, loss; backward, optimiser step."""

        def loss() -> Tensor:
            self.criterion.backend = backend
            return self.distiller(self.images, self.labels).loss

        return Step(loss, list(self.distiller.parameters()), self.optimizer.step)

    def loss(self, backend: str) -> Step:
        """The loss alone, projectors included, on features and logits of this pair: gradients of the student's maps and
        of the projectors."""
        with torch.no_grad():
            outputs = self.distiller.outputs(self.images)
        features, logits = (outputs[name] for name in ("student_features", "student_logits"))
        features, logits = features[0].clone().requires_grad_(), logits.clone().requires_grad_()
        module, taught = self.criterion, outputs["teacher_features"][0]

        def loss() -> Tensor:
            module.backend = backend
            return module(features, taught, self.labels, logits, outputs["teacher_logits"]).loss

        return Step(loss, [features, logits, *module.parameters()])
