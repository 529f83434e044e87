"""docs/mathematics.md, "Ours, and what others read": their formulas in plain torch, and the options that give them."""

import pytest
import torch
import torch.nn.functional as F
from cases import relative_l2

from hetero_kernels import HeteroAKDLoss, functional, reference

CLASSES, TEMPERATURE = 5, 2.0


def make():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, CLASSES, 6, 7) * 3
    return student, teacher, torch.randint(0, CLASSES, (2, 6, 7))


def mixed_and_weights(student, teacher, labels):
    """z^h, and W by a softmax over classes."""
    y = F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float()

    def h(z):
        return F.binary_cross_entropy_with_logits(z, y, reduction="none")

    share = (h(student) + reference.EPS) / (h(student) + h(teacher) + 2 * reference.EPS)
    mixed = share * teacher + (1 - share) * student
    score = h(student) + (h(student) - h(mixed)).relu()
    return mixed, score.softmax(1)


def test_fm2edge(any_backend):
    """A mean over classes of the weighted soft-target cross-entropy: theirs x K T^2."""
    student, teacher, labels = make()
    mixed, weight = mixed_and_weights(student, teacher, labels)
    theirs = -(weight * (mixed / TEMPERATURE).softmax(1) * (student / TEMPERATURE).log_softmax(1)).mean()
    ours = functional.hakd_loss(
        student, teacher, labels, temperature=TEMPERATURE, divergence="ce", backend=any_backend,
        hakd_weight=1 / (CLASSES * TEMPERATURE**2),
    )  # fmt: skip
    assert relative_l2(ours, theirs) <= 2e-6


@pytest.mark.parametrize("reduction", ["mean over pixels", "mean over images"])
def test_kd_on_the_coarse_grid(any_backend, reduction):
    """CIRKD counts ignored pixels; mmrazor and torchdistill also sum over the grid: h w times ours."""
    student, teacher, labels = make()
    p, log_q = (teacher / TEMPERATURE).softmax(1), (student / TEMPERATURE).log_softmax(1)
    theirs = TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")
    kd_weight = 42.0
    if reduction == "mean over pixels":
        theirs, kd_weight = theirs / 42, 1.0
    ours = functional.segmentation_loss(
        student, torch.zeros_like(labels), teacher, task_weight=0.0, kd_weight=kd_weight, temperature=TEMPERATURE,
        backend=any_backend,
    )  # fmt: skip
    assert relative_l2(ours, theirs) <= 2e-6


def test_the_term_is_commonly_negative_at_first():
    """K = 4, T = 4: not always, or the docs should say so."""
    negative = 0
    for seed in range(40):
        torch.manual_seed(seed)
        module = HeteroAKDLoss(8, 12, 4, temperature=4.0)
        labels = torch.randint(0, 4, (2, 16, 16))
        negative += int(module(torch.randn(2, 8, 4, 4), torch.randn(2, 12, 4, 4), labels).hakd < 0)
    assert negative > 30
