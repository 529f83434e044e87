"""How the CUDA kernels read labels: whatever lies around them in memory, by few loads where they lie side by side."""

import functools

import emulation
import pytest
import torch
from cases import make_labels

DTYPES = (torch.int64, torch.int32, torch.uint8)
WRONG = 200  # what lies around the labels: read as one of them, it would make a loss NaN


def around(size, dtype):
    return torch.full(size, WRONG, dtype=dtype)


# Views of [B, H, W] labels.
LAYOUTS = {
    "dense": lambda b, h, w, dtype: around((b, h, w), dtype),
    "one late": lambda b, h, w, dtype: around((b * h * w + 2,), dtype)[1:-1].view(b, h, w),
    "odd rows": lambda b, h, w, dtype: around((b, h, w + 8 - w % 2), dtype)[:, :, 3 : w + 3],
    "aligned rows": lambda b, h, w, dtype: around((b, h, w // 16 * 16 + 32), dtype)[:, :, 4 : w + 4],
    "every other row": lambda b, h, w, dtype: around((b, 2 * h, w), dtype)[:, ::2],
    "every other column": lambda b, h, w, dtype: around((b, h, 2 * w), dtype)[:, :, ::2],
    "transposed": lambda b, h, w, dtype: around((b, w, h), dtype).mT,
}


def laid_out(labels, dtype, layout):
    view = LAYOUTS[layout](*labels.shape, dtype)
    return view.copy_(labels)


def gradients(student, teacher, labels, classes):
    """Losses and gradients of the kernels that read labels."""
    student = student.clone().requires_grad_()
    losses = [
        emulation.hakd_loss(student, teacher, labels, proj_weight=0.5),
        emulation.hakd_loss(student, teacher, labels, kem="spatial"),
        emulation.segmentation_loss(student, labels, class_weight=torch.linspace(1, 2, classes)),
    ]
    sum(losses).backward()
    return [*(loss.detach() for loss in losses), student.grad]


@functools.cache
def dense(classes, size):
    torch.manual_seed(0)
    labels = make_labels(size[0], size[1:], classes, block=2)
    student, teacher = (torch.randn(size[0], classes, 2, 3) for _ in range(2))
    return labels, student, teacher, gradients(student, teacher, labels, classes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes, size", [(3, (2, 11, 37)), (3, (1, 19, 1)), (5, (1, 9, 150)), (70, (1, 12, 45))])
def test_layouts(dtype, layout, classes, size):
    """Bit for bit what dense int64 labels give: rows of any alignment and width, in one tile, in several, in narrow."""
    labels, student, teacher, expected = dense(classes, size)
    assert (labels == 255).any() and all(x.isfinite().all() for x in expected)
    found = gradients(student, teacher, laid_out(labels, dtype, layout), classes)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", emulation.ORDERS)
def test_orders(order):
    emulation.Settings.order = order
    torch.manual_seed(0)
    labels = make_labels(1, (20, 33), 4)
    student, teacher = (torch.randn(1, 4, 2, 2) for _ in range(2))
    for dtype in DTYPES:
        found = gradients(student, teacher, laid_out(labels, dtype, "odd rows"), 4)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize(
    "dtype, wrong", [(torch.int64, 2**32 + 1), (torch.int64, -(2**63)), (torch.int64, 2**16), (torch.int32, -(2**31))]
)
def test_extremes(dtype, wrong):
    """No label is shortened before it is looked at."""
    torch.manual_seed(0)
    labels = torch.zeros(1, 8, 8, dtype=dtype)
    student, teacher = (torch.randn(1, 3, 2, 2) for _ in range(2))
    labels[0, 5, 3] = wrong
    assert emulation.hakd_loss(student, teacher, labels).isnan()
    maps = emulation.hakd_loss(student, teacher, labels, reduction="none")
    assert maps.isnan().sum() == 1 and maps[0, 5, 3].isnan()
    weight = torch.ones(3)
    assert emulation.segmentation_loss(student, labels, class_weight=weight).isnan()
    ignored = emulation.segmentation_loss(student, labels, class_weight=weight, ignore_index=wrong)
    labels[0, 5, 3] = 255
    assert torch.equal(ignored, emulation.segmentation_loss(student, labels, class_weight=weight))


@pytest.mark.parametrize("dtype, run", [(torch.int64, 2), (torch.int32, 4), (torch.uint8, 4)])
def test_loads(dtype, run):
    """One load for the labels of a run; every label once."""
    torch.manual_seed(0)
    labels = make_labels(2, (32, 128), 3).to(dtype)
    student, teacher = (torch.randn(2, 3, 4, 16) for _ in range(2))

    def loads(labels, **options):
        emulation.take_loads()
        emulation.segmentation_loss(student, labels, teacher, **options)
        return emulation.take_loads()["labels"]

    assert loads(labels) == labels.numel() // run
    # The sum of class weights is counted by a launch before.
    assert loads(labels, class_weight=torch.ones(3)) == 2 * labels.numel() // run
    assert loads(laid_out(labels, dtype, "every other column")) == labels.numel()
    # A row that begins within a run: the labels of the first run and the last are read one by one.
    assert loads(laid_out(labels, dtype, "aligned rows")[:, :, 1:]) <= 2 * 32 * (127 // run + 1 + 2 * (run - 1))
