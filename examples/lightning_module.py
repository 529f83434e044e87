"""HeteroAKD as a LightningModule: an FPN on MobileNetV3 learns from a SegFormer.

    python examples/lightning_module.py                                     # random networks, a made-up task, a CPU
    python examples/lightning_module.py --devices 2 --precision bf16-mixed  # DistributedDataParallel
    python examples/lightning_module.py --resume                            # goes on from the checkpoint

Needs lightning, segmentation_models_pytorch and timm. Your own data set, of images [3, H, W] and labels [H, W] with 255
for pixels to ignore, takes the place of `make_data`.
"""

import argparse
from pathlib import Path

import lightning
import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from hetero_kernels import Distiller, check_replicas, mean_over_processes


class Distillation(lightning.LightningModule):
    """The distiller is a submodule, so that Lightning moves, wraps and saves it; the teacher is in no checkpoint."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        # Every labelled pixel counts the same, on whichever process it is.
        out = self.distiller(images, labels, normalizer=mean_over_processes(self.distiller.divisors(labels)))
        self.log_dict(out.scalars(), prog_bar=True)
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.distiller.parameters(), lr=2e-3)

    def on_train_end(self) -> None:
        check_replicas(self)


def make_data(images: int = 16) -> TensorDataset:
    """Coloured blocks; a pixel's label is its strongest colour."""
    pictures = torch.rand(images, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return TensorDataset(pictures, pictures.argmax(1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)
    data = make_data()
    student = smp.FPN("tu-mobilenetv3_small_050", encoder_weights=None, classes=3)
    teacher = smp.Segformer("mit_b0", encoder_weights=None, classes=3)
    taps = {"student_tap": "encoder", "teacher_tap": "encoder"}
    distiller = Distiller.heteroakd(student, teacher, data[0][0][None], num_classes=3, **taps)
    trainer = lightning.Trainer(
        **{"max_epochs": options.epochs, "precision": options.precision, "devices": options.devices},
        **{"strategy": "ddp" if options.devices > 1 else "auto", "default_root_dir": options.output},
        **{"logger": CSVLogger(options.output), "log_every_n_steps": 1, "enable_model_summary": False},
        callbacks=[ModelCheckpoint(options.output, save_last=True, every_n_epochs=1)],
    )
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    trainer.fit(Distillation(distiller), loader, ckpt_path=options.output / "last.ckpt" if options.resume else None)
    if trainer.is_global_zero:
        torch.save(student.state_dict(), options.output / "student.pt")  # loads into the plain network


if __name__ == "__main__":
    main()
