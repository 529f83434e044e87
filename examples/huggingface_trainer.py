"""HeteroAKD in Hugging Face's Trainer: a SegFormer learns from a UperNet on ConvNeXt.

    python examples/huggingface_trainer.py                        # tiny random networks, a made-up task, a CPU
    torchrun --nproc_per_node 2 examples/huggingface_trainer.py   # DistributedDataParallel
    python examples/huggingface_trainer.py --pretrained nvidia/mit-b0 openmmlab/upernet-convnext-tiny

Needs transformers and accelerate. Your own images, labelled with the teacher's classes, take the place of `make_data`.
"""

import argparse

import torch
import transformers
from torch import Tensor, nn

from hetero_kernels import Distiller, check_replicas, mean_over_processes


class Distillation(nn.Module):
    """What Trainer calls: named inputs, a dictionary with the loss first."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        normalizer = mean_over_processes(self.distiller.divisors(labels))
        out = self.distiller(pixel_values, labels, normalizer=normalizer)
        self.terms = out.scalars()
        return {"loss": out.loss, "logits": out.logits}


class LogTerms(transformers.TrainerCallback):
    """Adds the last step's terms, of this process's images, to what is logged beside the loss."""

    def __init__(self, model: Distillation) -> None:
        self.model = model

    def on_log(self, args, state, control, logs, **more) -> None:
        if "loss" in logs:
            logs.update({name: float(value) for name, value in self.model.terms.items() if name != "loss"})
            state.log_history[-1].update(logs)


def make_networks(pretrained: list[str] | None) -> tuple[nn.Module, nn.Module]:
    student, teacher = transformers.SegformerForSemanticSegmentation, transformers.UperNetForSemanticSegmentation
    if pretrained:
        trained = teacher.from_pretrained(pretrained[1])
        return student.from_pretrained(pretrained[0], num_labels=trained.config.num_labels), trained
    small = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_labels": 3}
    backbone = transformers.ConvNextConfig(**small, out_features=["stage1", "stage2", "stage3", "stage4"])
    upernet = transformers.UperNetConfig(
        **{"backbone_config": backbone, "hidden_size": 16, "use_auxiliary_head": False, "num_labels": 3}
    )
    return student(transformers.SegformerConfig(**small, decoder_hidden_size=16)), teacher(upernet)


def make_data(images: int = 16) -> list[dict[str, Tensor]]:
    """Coloured blocks; a pixel's label is its strongest colour."""
    pictures = torch.rand(images, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return [{"pixel_values": picture, "labels": picture.argmax(0)} for picture in pictures]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/huggingface")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=30)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--pretrained", nargs=2, metavar=("STUDENT", "TEACHER"), help="names or folders")
    options = parser.parse_args(arguments)
    transformers.set_seed(0)
    (student, teacher), data = make_networks(options.pretrained), make_data()
    found = {"num_classes": student.config.num_labels, "student_tap": "segformer", "teacher_tap": "backbone"}
    model = Distillation(Distiller.heteroakd(student, teacher, data[0]["pixel_values"][None], **found))
    settings = transformers.TrainingArguments(
        **{"output_dir": options.output, "max_steps": options.steps, "save_steps": options.save_every},
        **{"learning_rate": 3e-3, "per_device_train_batch_size": 4, "logging_steps": 5, "report_to": "none"},
        use_cpu=not torch.cuda.is_available(),  # said aloud, or Trainer leaves processes without a GPU to themselves
        ddp_find_unused_parameters=False,  # student and projectors all get gradients; the teacher is no parameter
    )
    trainer = transformers.Trainer(model, settings, train_dataset=data, callbacks=[LogTerms(model)])
    trainer.train(resume_from_checkpoint=options.resume)
    check_replicas(model)
    if trainer.is_world_process_zero():
        student.save_pretrained(f"{options.output}/student")  # a SegFormer as any other


if __name__ == "__main__":
    main()
