"""Random crops and batches compile each kernel a few times, not again and again: what changes with a crop is ``hidden``
from Triton's specialisation (tile.py). Nothing is compiled here: the keys that would be are counted."""

import collections
import random

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.triton_static import TARGETS, StubDriver  # noqa: E402
from hetero_kernels.triton import pixel_losses, projected_losses, projection  # noqa: E402

CROPS, MOST = 60, 4
OPTIONS = (True, "class", "kl")


class ManyDevices(StubDriver):
    """A device that no other test has compiled anything for."""

    def get_current_device(self):
        return len(TARGETS)


@pytest.fixture
def kernels(monkeypatch):
    """Keys of the kernels that launches would compile, by name."""
    keys = collections.defaultdict(set)

    def compile(self, key, *_, **__):
        keys[self.fn.__name__].add(key)

    monkeypatch.setattr(JITFunction, "_do_compile", compile)
    monkeypatch.setattr(driver, "_active", ManyDevices(TARGETS["sm_90"]))
    return keys


def crops():
    """Batch, student's grid, teacher's grid, labels' size."""
    draw = random.Random(0)
    for _ in range(CROPS):
        size = draw.randint(256, 1024), draw.randint(256, 1024)
        student, teacher = (tuple(-(-n // stride) for n in size) for stride in (8, draw.choice((8, 16))))
        yield draw.randint(1, 16), student, teacher, size


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


def scalars(*values):
    return torch.tensor(values, dtype=torch.float64)


def hakd(resolution, classes=19):
    for batch, student, teacher, size in crops():
        pixel_losses.hakd_loss(
            empty(batch, classes, *student), empty(batch, classes, *teacher), empty(batch, *size, dtype=torch.int64),
            scalars(1.0, 1.0, 1.0), None, None, None, *OPTIONS, resolution, False, 255, "mean", True, True,
        )  # fmt: skip


def segmentation(classes=19):
    for batch, student, teacher, size in crops():
        pixel_losses.segmentation_loss(
            empty(batch, classes, *student), empty(batch, classes, *teacher), empty(batch, *size, dtype=torch.int64),
            empty(classes), scalars(1.0, 1.0, 0.1, 0.0), None, None, None, False, 255, "mean", True,
        )  # fmt: skip


def projected():
    for batch, grid, _, size in crops():
        features, weights = [empty(batch, c, *grid) for c in (256, 512)], [empty(19, c) for c in (256, 512)]
        gradient = projected_losses.projected_hakd_loss(
            *features, *weights, empty(19), empty(19), empty(batch, *size, dtype=torch.int64), scalars(1.0, 1.0, 1.0),
            None, None, None, *OPTIONS, 255, "mean", True, True, False, True,
        )[3]  # fmt: skip
        projected_losses.project_back(gradient, weights[0], empty(), features[0])


def projections():
    """With batch statistics, and the loss between them."""
    for batch, student, teacher, size in crops():
        pairs = [(empty(batch, c, *grid), empty(19, c)) for c, grid in ((512, student), (2048, teacher))]
        outputs = [projection.project(f, w, True, "none") for f, w in pairs]
        networks = [t for z, _, _ in outputs for t in (z, empty(19), empty(19))]
        gradients = pixel_losses.normalized_hakd_loss(
            *networks, empty(batch, *size, dtype=torch.int64), scalars(1.0, 1.0, 1.0), None, None, None, False, False,
            *OPTIONS, "label", False, 255, "mean", True, True,
        )[3:5]  # fmt: skip
        for (f, w), gradient, found in zip(pairs, gradients, outputs, strict=True):
            projection.project_gradients(gradient, found[2], f, w, *found, "none", True, True)


CASES = {
    "hakd": lambda: hakd("label"),
    "hakd, feature resolution": lambda: hakd("feature"),
    "hakd, many classes": lambda: hakd("label", 200),
    "segmentation": segmentation,
    "segmentation, many classes": lambda: segmentation(200),
    "projected": projected,
    "projections": projections,
}


@pytest.mark.parametrize("case", CASES)
def test_random_crops(kernels, case):
    CASES[case]()
    counts = {name: len(keys) for name, keys in kernels.items()}
    assert len(counts) > 1 and max(counts.values()) <= MOST, counts
