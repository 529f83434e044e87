"""HeteroAKD in a training loop as torchvision's references have it: LR-ASPP on MobileNetV3 learns from DeepLabV3.

    python examples/torchvision_loop.py   # random networks, a made-up task, a CPU
    python examples/torchvision_loop.py --resume runs/torchvision/checkpoint-5.pt
    python examples/torchvision_loop.py --teacher deeplabv3.pth --classes 21

Needs torchvision. Your own data set, of images [3, H, W] and labels [H, W] with 255 for pixels to ignore, takes the
place of `make_data`.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large

from hetero_kernels import Distiller

RANDOM = {"weights": None, "weights_backbone": None}


def make_data(images: int = 16) -> TensorDataset:
    """Coloured blocks; a pixel's label is its strongest colour."""
    pictures = torch.rand(images, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return TensorDataset(pictures, pictures.argmax(1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/torchvision"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--resume", help="a checkpoint to go on from")
    parser.add_argument("--teacher", help="state_dict of the teacher; without one it is random")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    data = make_data()
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    student = lraspp_mobilenet_v3_large(**RANDOM, num_classes=options.classes)
    teacher = deeplabv3_mobilenet_v3_large(**RANDOM, num_classes=options.classes)
    if options.teacher:
        teacher.load_state_dict(torch.load(options.teacher, map_location="cpu"))
    distiller = Distiller.heteroakd(  # both return a dictionary with "out"; a backbone's last map is taken
        *(student, teacher, data[0][0][None]),
        **{"num_classes": options.classes, "student_tap": "backbone", "teacher_tap": "backbone"},
    ).to(options.device)  # the teacher goes along
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, options.epochs * len(loader), power=0.9)
    parts = {"distiller": distiller, "optimizer": optimizer, "schedule": schedule}
    begin = 0
    if options.resume:
        checkpoint = torch.load(options.resume, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        begin = checkpoint["epochs"]
        torch.set_rng_state(checkpoint["random"])
    options.output.mkdir(parents=True, exist_ok=True)
    for epoch in range(begin, options.epochs):
        distiller.train()
        for images, labels in loader:
            out = distiller(images.to(options.device), labels.to(options.device))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            schedule.step()
        terms = {name: round(float(value), 4) for name, value in out.scalars().items()}
        print({"epoch": epoch + 1, **terms}, flush=True)
        checkpoint = {name: part.state_dict() for name, part in parts.items()}  # student and projectors, no teacher
        checkpoint |= {"epochs": epoch + 1, "random": torch.get_rng_state()}
        torch.save(checkpoint, options.output / f"checkpoint-{epoch + 1}.pt")
    torch.save(student.state_dict(), options.output / "student.pt")  # loads into the plain network


if __name__ == "__main__":
    main()
