"""How warps meet memory in the main kernels, beside the least that so many bytes need: cycles of shared memory's banks
and sectors of global memory, of all that a kernel asks and of its worst instruction. A change that needs more says so
here."""

import collections

import emulation
import pytest
import torch
from cases import leaves, make_labels

from hetero_kernels.ops import projection as ops

# Kernel: banks of all its instructions, of the worst; sectors of all, of the worst; in multiples of the least.
BUDGETS = {
    ("hakd", 19): {
        "hakd_kernel": (1.7, 5.7, 1.0, 1.0),
        "finish_kernel": (1.0, 1.0, 1.0, 1.0),
    },
    ("hakd", 150): {
        "hakd_kernel": (2.0, 9.1, 2.7, 3.5),
        "finish_kernel": (1.0, 1.0, 6.1, 7.4),
    },
    ("segmentation", 19): {
        "segmentation_kernel": (1.7, 5.7, 1.0, 1.0),
        "finish_kernel": (1.0, 1.0, 1.0, 1.0),
    },
    ("segmentation", 150): {
        "segmentation_kernel": (2.0, 9.1, 2.7, 3.5),
        "finish_kernel": (1.0, 1.0, 6.1, 7.4),
    },
    ("features", 19): {
        "projected_hakd_kernel": (1.0, 1.0, 1.0, 1.0),
        "project_back_kernel": (1.0, 1.0, 1.0, 1.0),
    },
    ("features", 150): {
        "pack_weights_kernel": (0.0, 0.0, 1.5, 2.0),
        "projected_hakd_kernel": (1.3, 2.0, 1.0, 1.0),
        "weight_gradients_kernel": (1.2, 2.0, 1.0, 1.0),
        "project_back_kernel": (1.0, 1.0, 1.0, 1.0),
    },
    ("projection", 19): {
        "project_back_kernel": (1.0, 1.0, 1.1, 1.2),
        "project_kernel": (1.2, 4.0, 1.0, 1.0),
        "projection_weights_kernel": (1.0, 1.0, 1.4, 1.9),
    },
    ("projection", 150): {
        "project_back_kernel": (1.0, 1.0, 1.1, 1.2),
        "project_kernel": (1.2, 4.0, 1.0, 1.0),
        "projection_weights_kernel": (1.0, 1.0, 1.7, 2.0),
    },
}  # fmt: skip


def ratios(requests):
    """By kernel, as above."""
    sums = collections.defaultdict(lambda: [0, 0, 0.0])
    for r in requests:
        kind = sums[r.kernel, r.shared]
        kind[0] += r.taken
        kind[1] += r.least
        kind[2] = max(kind[2], r.taken / r.least)
    found = {}
    for kernel in dict.fromkeys(kernel for kernel, _ in sums):
        kinds = (sums[kernel, shared] for shared in (True, False))
        found[kernel] = [n for taken, least, worst in kinds for n in (taken / max(least, 1), worst)]
    return found


def logits_and_labels(classes):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, classes, 2, 16)
    return (*leaves(student), teacher, make_labels(1, (16, 128), classes))


def hakd(classes):
    emulation.hakd_loss(*logits_and_labels(classes))


def segmentation(classes):
    student, teacher, labels = logits_and_labels(classes)
    emulation.segmentation_loss(student, labels, teacher)


def on_features(classes):
    torch.manual_seed(0)
    given = leaves(*torch.randn(2, 1, 64, 8, 16), *torch.randn(2, classes, 64))
    labels = make_labels(1, (8, 16), classes)
    emulation.projected_hakd_loss(*given, labels, resolution="feature", proj_weight=1.0).backward()


def projection(classes):
    torch.manual_seed(0)
    features, weight = leaves(torch.randn(1, 64, 8, 16), torch.randn(classes, 64))
    z, _, statistics = ops.project(features, weight, True, "none", emulation.NAME)
    torch.autograd.backward((z, statistics), (torch.randn_like(z), torch.randn_like(statistics)))


CALLS = {"hakd": hakd, "segmentation": segmentation, "features": on_features, "projection": projection}


@pytest.mark.parametrize("classes", [19, 150])
@pytest.mark.parametrize("call", CALLS)
def test_budgets(call, classes):
    with emulation.counted_requests() as requests:
        CALLS[call](classes)
    found = ratios(requests)
    for kernel, budget in BUDGETS[call, classes].items():
        assert all(n <= most for n, most in zip(found[kernel], budget, strict=True)), (kernel, found[kernel])


def test_counts():
    """Of a kernel whose accesses are known: side by side, and every eighth word."""
    with emulation.counted_requests() as requests:
        emulation.module().selftest("strided")
    assert ratios(requests)["selftest"] == [4.5, 8, 2.4, 8]
