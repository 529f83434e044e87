"""Channel-wise distillation: torch's own formula, classes without mass, options as every loss's."""

import pytest
import torch
import torch.nn.functional as F
from cases import leaves, relative_l2
from heteroakd.config.groups import LossConfig
from heteroakd.methods.losses import ChannelWiseLoss, channel_wise_loss

LOW = -float("inf")


def make(teacher_grid=(4, 5)):
    torch.manual_seed(0)
    return leaves(torch.randn(2, 3, 4, 5))[0], torch.randn(2, 3, *teacher_grid)


def test_it_is_the_divergence_of_the_softmaxes_over_space():
    student, teacher = make((2, 3))
    loss = channel_wise_loss(student, teacher, 4.0, False)
    wide = F.interpolate(teacher, (4, 5), mode="bilinear")
    ours, theirs = ((z.flatten(2) / 4.0).log_softmax(2) for z in (student, wide))
    assert relative_l2(loss, 16.0 * F.kl_div(ours, theirs, reduction="sum", log_target=True) / 6) <= 1e-6
    assert relative_l2(channel_wise_loss(student, teacher, 4.0, False, torch.tensor(4.0)), loss / 2) <= 1e-6


@pytest.mark.parametrize("low", [LOW, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("who", ["teacher", "both"])
def test_positions_without_mass(who, low):
    """Two rows of a class: as with a merely low logit, in float64."""
    rows = torch.zeros(3, 4, 5, dtype=torch.bool)
    rows[1, :2] = True
    results = []
    for value, dtype in ((low, torch.float32), (-1e4, torch.float64)):
        student, teacher = (x.to(dtype) for x in make())
        ours = torch.where(rows, value, student) if who == "both" else student
        loss = channel_wise_loss(ours, torch.where(rows, value, teacher), 2.0, False)
        results.append((loss, *torch.autograd.grad(loss, student)))
    assert all(relative_l2(a, e) <= 2e-6 for a, e in zip(*results, strict=True))


def test_a_class_that_nobody_has_anywhere():
    student, teacher = make()
    rest = channel_wise_loss(student[:, ::2], teacher[:, ::2], 4.0, False)
    masked = torch.where(torch.tensor([False, True, False])[:, None, None], LOW, student)
    teacher[:, 1] = LOW
    loss = channel_wise_loss(masked, teacher, 4.0, False)
    (gradient,) = torch.autograd.grad(loss, student)
    assert relative_l2(loss * 3, rest * 2) <= 1e-6 and gradient.isfinite().all() and not gradient[:, 1].any()


@pytest.mark.parametrize("temperature", [0.0, -4.0, float("nan"), float("inf"), "4", True])
def test_temperature_is_checked(temperature):
    with pytest.raises((TypeError, ValueError), match="temperature is "):
        channel_wise_loss(*make(), temperature, False)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "3"])
@pytest.mark.parametrize("name", ["cwd_weight", "task_weight", "cwd_temperature"])
def test_options_of_the_criterion_are_checked(name, value):
    student, teacher = make()
    config = LossConfig()
    setattr(config, name, value)  # past the configuration's own bounds
    with pytest.raises((TypeError, ValueError), match=f"{name.removeprefix('cwd_t')} is "):
        loss = ChannelWiseLoss(config)
        loss(student, torch.zeros(2, 8, 8, dtype=torch.long), teacher)
