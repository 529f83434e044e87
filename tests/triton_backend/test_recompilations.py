"""Random crops and batches compile each kernel a few times, not again and again: what changes with a crop is ``hidden``
from Triton's specialisation (tile.py). Nothing is compiled here: the keys that would be are counted. And what a call of
shapes met before need not do again."""

import collections
import random

import pytest
import torch

pytest.importorskip("triton")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.triton_static import TARGETS, StubDriver  # noqa: E402
from hetero_kernels.triton import pixel_losses, projected_losses, projection  # noqa: E402
from hetero_kernels.triton.launch import Launch  # noqa: E402

CROPS, MOST = 400, 4
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


def hakd(resolution, classes=19, calls=None):
    for batch, student, teacher, size in calls or crops():
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


def test_calls_of_the_same_shapes_share_a_plan(kernels):
    one, other = (2, (8, 16), (8, 16), (64, 128)), (2, (8, 16), (4, 8), (64, 128))
    pixel_losses.hakd_plan.cache_clear()
    hakd("label", calls=[one, one, other, one])
    found = pixel_losses.hakd_plan.cache_info()
    assert (found.misses, found.hits) == (2, 2)


class Operators(TorchDispatchMode):
    """Names of torch's operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("resolution, cleared", [("label", 1), ("feature", 0)])
def test_a_call_allocates_and_no_more(kernels, resolution, cleared):
    """Loss and terms, two gradients and one workspace; a counter is cleared where the main launch counts."""
    size = (64, 128)
    given = empty(2, 19, 8, 16), empty(2, 19, 8, 16), empty(2, *size, dtype=torch.int64), scalars(1.0, 1.0, 1.0)
    with Operators() as ran:
        pixel_losses.hakd_loss(*given, None, None, None, *OPTIONS, resolution, False, 255, "mean", True, True)
    allocated = ["empty", *["new_empty"] * 3, *["empty_like"] * 2, *["zeros"] * cleared]
    assert sorted(name for name in ran.names if name != "slice") == sorted(allocated)


class Kernel:
    """Stands for one of Triton's: launches that its launcher sees, and those of what it compiled."""

    arg_names = ("x", "number", "BLOCK")

    def __init__(self):
        self.seen, self.straight = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.seen.append((grid, arguments, constants))
            compiled = object.__new__(Compiled)
            compiled.launches = self.straight
            return compiled

        return launch


class Compiled(CompiledKernel):
    module = None

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


def test_aligned_launches_go_straight_to_what_the_first_compiled():
    kernel = Kernel()
    start = Launch(kernel, (3,), BLOCK=16, num_warps=4)
    for aligned, number in ((False, 0), (True, 1), (True, 2), (False, 3)):
        start(aligned, "x", number)
    constants = {"BLOCK": 16, "num_warps": 4}
    assert kernel.seen == [((3, 1, 1), ("x", number), constants) for number in (0, 1, 3)]
    assert kernel.straight == [((3, 1, 1), ("x", 2, 16))]
