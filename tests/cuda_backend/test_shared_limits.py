"""Shared memory beyond 48 KB, which a kernel must be allowed on each device: a limit of the kernel, not of a call."""

import emulation
import torch
from cases import make_labels

GRID, LABELS = (4, 6), (8, 12)


def call(classes):
    """Losses and gradients, at label resolution and from features."""
    labels = make_labels(1, LABELS, classes)
    logits = [torch.randn(1, classes, *GRID, requires_grad=True) for _ in range(2)]
    emulation.hakd_loss(*logits, labels, proj_weight=1.0).backward()
    features = [torch.randn(1, 200 + classes, *GRID, requires_grad=True) for _ in range(2)]
    weights = [torch.randn(classes, 200 + classes, requires_grad=True) for _ in range(2)]
    emulation.projected_hakd_loss(*features, *weights, labels, resolution="feature", proj_weight=1.0).backward()


def test_each_kernel_is_allowed_what_its_card_has_and_once():
    """Whatever a call needs: what is set for one call, another thread's may lower before the launch. Nor does one card
    answer for another: a kernel that was allowed too little there is reported."""
    for kilobytes in (227, 99, 227):
        emulation.Settings.shared_per_block = kilobytes << 10
        for classes in (150, 7):
            call(classes)
    limits = [limit for limit in emulation.module().shared_limits() if limit[0] != "selftest"]
    for card in (227, 99):
        assert {"hakd_kernel", "projected_hakd_kernel"} <= {name for name, device, _, _ in limits if device == card}
    assert [limit for limit in limits if limit[2:] != (limit[1] << 10, 1)] == []
