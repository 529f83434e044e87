"""More elements than 32 bits count: compared where the loss grid's last rows and columns are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .case import LIMITS, Case, Data, DidNotRun
from .compare import judge
from .device import Device
from .problems import Results

GIB = 2**30
STRIDE = 1024  # of the labels' grid over the logits'
COARSE = (8, 16)
CLASSES = 19


def _losses(function: Callable, name: str, logits: Sequence[Tensor], labels: Tensor, **options: object) -> Results:
    student, teacher = (x.detach().requires_grad_() for x in logits)
    if name == "hakd_loss":
        loss = function(student, teacher, labels, temperature=2.0, proj_weight=0.5, reduction="sum", **options)
    else:
        loss = function(student, labels, teacher, kd_weight=0.4, reduction="sum", **options)
    (gradient,) = torch.autograd.grad(loss, student)
    return {"loss": loss.detach(), "gradient": gradient}


def loss_grid(name: str, stride: int, backend: str, device: Device) -> Data:
    """8192 x 16384 pixels of 19 classes. All but the last 1.5 coarse cells both ways are ignored, so that a crop of the
    last 2 x 2 coarse pixels, which eager has room for, is all that counts."""
    from hetero_kernels import functional, reference

    generator = torch.Generator().manual_seed(0)
    size = [n * stride for n in COARSE]
    student, teacher = (
        (torch.randn(1, CLASSES, *COARSE, generator=generator) * 3).to(device.device) for _ in range(2)
    )  # fmt: skip
    seen = 3 * stride // 2
    labels = torch.full((1, *size), 255, dtype=torch.uint8)
    labels[:, -seen:, -seen:] = torch.randint(0, CLASSES, (1, seen, seen), dtype=torch.uint8, generator=generator)
    labels = labels.to(device.device)
    ours = _losses(getattr(functional, name), name, (student, teacher), labels, backend=device.backend(backend))
    assert not ours["gradient"][..., :-2, :].any(), "gradients where every pixel is ignored"
    ours["gradient"] = ours["gradient"][..., -2:, -2:]
    plain = getattr(reference, name)
    crop = [x[..., -2:, -2:] for x in (student, teacher)], labels[:, -2 * stride :, -2 * stride :]
    eager = _losses(plain, name, *crop)
    exact = _losses(plain, name, [x.double() for x in crop[0]], crop[1])
    ours["gradient"], eager["gradient"] = (r["gradient"].contiguous() for r in (ours, eager))
    data = judge(ours, eager, exact, {"loss": 10.0 if name == "hakd_loss" else 1.0})
    return {**data, "detail": f"{size[0] * size[1] * CLASSES:.2e} elements; {data['detail']}"}


def _far_apart(x: Tensor, gap: int) -> Tensor:
    """The same values with images ``gap`` elements apart, most of them never touched."""
    base = torch.empty((x.shape[0] - 1) * gap + x[0].numel(), dtype=x.dtype, device=x.device)
    far = base.as_strided(x.shape, (gap, *x.stride()[1:]))
    return far.copy_(x)


def offsets(name: str, gap: int, backend: str, device: Device) -> Data:
    """Two images more than 2^31 elements apart in memory."""
    from hetero_kernels import functional

    if device.free_bytes() < 2 * 3 * gap:
        raise DidNotRun(f"{2 * 3 * gap / GIB:.0f} GiB are needed, {device.free_bytes() / GIB:.0f} are free")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (2, 32, 48), generator=generator).to(device.device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device.device, torch.bfloat16)

    options = {"backend": device.backend(backend), "temperature": 2.0, "proj_weight": 0.5}
    channels = 24 if name == "projected_hakd_loss" else 7
    near = [draw(2, channels, 8, 12) for _ in range(2)]
    weights = [draw(7, channels) for _ in range(2)] if name == "projected_hakd_loss" else []

    def run(maps: Sequence[Tensor]) -> Results:
        leaves = [x.detach().requires_grad_() for x in maps]
        resolution = {"resolution": "feature"} if weights else {}
        loss = getattr(functional, name)(*leaves, *weights, labels, **options, **resolution)
        gradients = torch.autograd.grad(loss, leaves)
        return {"loss": loss.detach(), **{f"gradient {i}": g.contiguous() for i, g in enumerate(gradients)}}

    expected = run(near)
    actual = run([_far_apart(x, gap) for x in near])
    data = judge(actual, expected, {k: v.double() for k, v in expected.items()})
    return {**data, "detail": f"{gap:.2e} elements between images, beside dense ones: {data['detail']}"}


def cases(backend: str) -> list[Case]:
    rehearsing = backend == "cuda"
    found = []
    for name in ("hakd_loss", "segmentation_loss"):
        run = functools.partial(_sized, loss_grid, name, STRIDE, 16, backend)
        found.append(Case(f"{backend}/more than 2^31 elements: {name}", run, backend, rehearsing, LIMITS[backend]))
    for name in ("hakd_loss", "projected_hakd_loss"):
        run = functools.partial(_sized, offsets, name, 2**31 + 16, 2**20, backend)
        found.append(Case(f"{backend}/offsets beyond 2^31: {name}", run, backend, rehearsing, LIMITS[backend]))
    return found


def _sized(run: Callable, name: str, size: int, rehearsed: int, backend: str, device: Device) -> Data:
    return run(name, size if device.kind == "cuda" else rehearsed, backend, device)
