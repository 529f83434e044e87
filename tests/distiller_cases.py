"""Networks and batches that the tests of `Distiller` share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from cases import make_labels
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hetero_kernels import Distiller, HeteroAKDLoss

CLASSES = 5
OPTIONS = {"hakd_weight": 3.0, "temperature": 2.0}


class Network(nn.Module):
    """Two stages of strides 4 and 8, in a shape of output of one's choice; the second may be checkpointed."""

    def __init__(self, width: int = 6, *, returns: str = "tensor", norm: bool = True, reentrant: bool | None = None):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        layers = [nn.Conv2d(width, 2 * width, 2, 2), nn.BatchNorm2d(2 * width), nn.GELU()]
        self.stage = nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm2d)))
        self.drop = nn.Dropout(0.1 if norm else 0.0)
        self.head = nn.Conv2d(2 * width, CLASSES, 1)
        self.returns, self.reentrant = returns, reentrant

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images).tanh()
        if self.reentrant is None or not self.training:
            x = self.stage(x)
        else:
            x = checkpoint(self.stage, x, use_reentrant=self.reentrant)
        logits = self.head(self.drop(x))
        shaped = {"out": {"out": logits, "aux": -logits}, "logits": {"logits": logits}, "tuple": (logits, images)}
        return {**shaped, "list": [logits, images], "tensor": logits, "nothing": {"loss": logits}}[self.returns]


def make_batch(images: int = 4) -> tuple[Tensor, Tensor]:
    """Images [B, 3, 16, 24] and labels, of which the second half of the images has far fewer."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        labels = make_labels(images, (16, 24), CLASSES)
    labels[images // 2 :, 3:] = 255
    return torch.randn(images, 3, 16, 24, generator=generator), labels


def make_distiller(*, student: dict[str, Any] | None = None, several: bool = False, **options: Any) -> Distiller:
    """Always the same weights; `student`: options of its `Network`."""
    torch.manual_seed(0)
    networks = (Network(6, **(student or {})), Network(10))
    tap = ["stem", "stage"] if several else "stage"
    return Distiller.heteroakd(
        *networks, make_batch()[0][:1], num_classes=CLASSES, student_tap=tap, teacher_tap=tap, **{**OPTIONS, **options}
    )


def by_hand(distiller: Distiller) -> tuple[nn.Module, nn.Module, HeteroAKDLoss]:
    """The parts of a copy, for a loop that knows no `Distiller`."""
    twin = copy.deepcopy(distiller)
    return twin.student, twin.teacher, twin.criterion  # type: ignore[return-value]


def loss_by_hand(student: nn.Module, teacher: nn.Module, criterion: nn.Module, images: Tensor, labels: Tensor, **more):
    """What a user's own loop computes, with hooks of its own: networks that return tensors, tapped at `stage`."""
    found = {}
    handles = [
        network.stage.register_forward_hook(lambda module, inputs, output, name=name: found.__setitem__(name, output))
        for name, network in (("student", student), ("teacher", teacher))
    ]
    student_logits = student(images)
    with torch.no_grad():
        teacher_logits = teacher(images)
    for handle in handles:
        handle.remove()
    return criterion(found["student"], found["teacher"], labels, student_logits, teacher_logits, **more).loss


def train(forward, parameters, steps: int = 3) -> list[float]:
    """Losses of some steps; dropout is the same for everyone."""
    images, labels = make_batch()
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    torch.manual_seed(7)
    for _ in range(steps):
        loss = forward(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
