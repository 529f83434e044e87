"""HeteroAKD in a loop under accelerate: an FPN on MobileNetV3 learns from one on ResNet-18.

    python examples/accelerate_loop.py                          # random networks, a made-up task, a CPU
    accelerate launch --num_processes 4 examples/accelerate_loop.py --precision bf16
    python examples/accelerate_loop.py --resume                 # goes on from the checkpoint

Needs accelerate, segmentation_models_pytorch and timm. Your own data set, of images [3, H, W] and labels [H, W] with
255 for pixels to ignore, takes the place of `make_data`.
"""

import argparse
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from hetero_kernels import Distiller, check_replicas, mean_over_processes


def make_data(images: int = 16) -> TensorDataset:
    """Coloured blocks; a pixel's label is its strongest colour."""
    pictures = torch.rand(images, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return TensorDataset(pictures, pictures.argmax(1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    options = parser.parse_args(arguments)
    set_seed(0)
    # Without `cpu=True` accelerate leaves processes without a GPU to themselves.
    accelerator = Accelerator(mixed_precision=options.precision, cpu=not torch.cuda.is_available())
    data = make_data()
    student = smp.FPN("tu-mobilenetv3_small_050", encoder_weights=None, classes=3)
    teacher = smp.FPN("resnet18", encoder_weights=None, classes=3)
    taps = {"student_tap": "encoder", "teacher_tap": "encoder"}
    distiller = Distiller.heteroakd(student, teacher, data[0][0][None], num_classes=3, **taps)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=2e-3)
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    # One module for all that is trained: the projectors stay the same in every process. The teacher goes along.
    model, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
    state, counter = options.output / "state", EpochsDone()
    accelerator.register_for_checkpointing(counter)
    if options.resume:
        accelerator.load_state(state)
    for epoch in range(counter.epochs, options.epochs):
        loader.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            # Every labelled pixel counts the same, on whichever process it is.
            out = model(images, labels, normalizer=mean_over_processes(distiller.divisors(labels)))
            optimizer.zero_grad()
            accelerator.backward(out.loss)
            optimizer.step()
        terms = {name: round(float(value), 4) for name, value in out.scalars().items()}  # of this process's images
        accelerator.print({"epoch": epoch + 1, **terms}, flush=True)
        counter.epochs = epoch + 1
        accelerator.save_state(state)  # student and projectors, optimiser, random numbers; no teacher
    check_replicas(model)
    if accelerator.is_main_process:
        torch.save(student.state_dict(), options.output / "student.pt")  # loads into the plain network
    accelerator.end_training()


class EpochsDone:
    """How far a run is, in accelerate's checkpoints."""

    epochs = 0

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


if __name__ == "__main__":
    main()
