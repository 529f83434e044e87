"""The definition itself: closed forms of docs/mathematics.md against autograd, gradcheck, and PyTorch's own losses."""

import pytest
import torch
import torch.nn.functional as F
from cases import OPTIONS, leaves, make_case, make_labels, make_logits, pairwise, relative_l2

from hetero_kernels import reference


def softplus(z):
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def closed_form(z_s, z_t, labels, temperature, kmm, kem):
    """dL_hakd/dz^s and dL_proj/d(z^s, z^t) of sections 5 and 6, written out from the text (float64)."""
    batch, classes = z_s.shape[:2]
    valid = (labels != 255)[:, None]
    y = F.one_hot(labels.masked_fill(labels == 255, 0), classes).movedim(-1, 1).double()
    h = [softplus(z) - y * z for z in (z_s, z_t)]
    s = (h[0] + 1e-6) / (h[0] + h[1] + 2e-6)
    z_h = s * z_t + (1 - s) * z_s if kmm else z_t
    q = h[0] + (h[0] - (softplus(z_h) - y * z_h)).clamp(min=0)
    if kem == "class":
        w = q.softmax(1)
    elif kem == "spatial":
        w = q.masked_fill(~valid, -torch.inf).flatten(2).softmax(2).view_as(q)
    else:
        w = torch.ones_like(q)
    count = int(valid.sum())
    divisor = batch * classes if kem == "spatial" else count
    p_h, p_s = (z_h / temperature).softmax(1), (z_s / temperature).softmax(1)
    hakd = temperature / divisor * (p_s * (w * p_h).sum(1, keepdim=True) - w * p_h) * valid
    proj = [(z.sigmoid() - y) / (count * classes) * valid for z in (z_s, z_t)]
    return hakd, *proj


@pytest.mark.parametrize("kind", ["randn", "trained"])
@pytest.mark.parametrize("kem", ["class", "spatial", "none"])
@pytest.mark.parametrize("divergence", ["kl", "ce"])
@pytest.mark.parametrize("temperature, kmm", [(1.0, True), (2.0, True), (3.5, False)])
def test_closed_form_gradients(kind, kem, divergence, temperature, kmm):
    torch.manual_seed(0)
    labels = make_labels(2, (9, 11), 5)
    student, teacher = leaves(*(make_logits(kind, (2, 5, 9, 11), labels) for _ in range(2)), dtype=torch.float64)
    options = {"temperature": temperature, "kmm": kmm, "kem": kem, "divergence": divergence}
    hakd, proj_s, proj_t = closed_form(student.detach(), teacher.detach(), labels, temperature, kmm, kem)
    reference.hakd_loss(student, teacher, labels, **options).backward()
    assert (student.grad - hakd).abs().max() <= 1e-12 * max(1.0, hakd.abs().max())
    assert teacher.grad is None or teacher.grad.count_nonzero() == 0
    student.grad = teacher.grad = None
    reference.hakd_loss(student, teacher, labels, hakd_weight=0.0, proj_weight=1.0, **options).backward()
    assert (student.grad - proj_s).abs().max() <= 1e-12 and (teacher.grad - proj_t).abs().max() <= 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck_of_the_projector_supervision(reduction, align_corners):
    """The whole path but the stop-gradient: with hakd_weight=0 the loss is an ordinary function of all inputs."""
    torch.manual_seed(0)
    labels = make_labels(1, (7, 9), 3)
    inputs = [torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(student, teacher):
        return reference.hakd_loss(
            student, teacher, labels, hakd_weight=0.0, proj_weight=1.0, reduction=reduction, align_corners=align_corners
        )

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("kem", ["class", "none"])
def test_gradcheck_with_constant_targets(kem):
    """The divergence itself: targets and weights are constants, as the stop-gradient says."""
    torch.manual_seed(0)
    z_s, z_t = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    labelled = F.one_hot(torch.randint(0, 4, (1, 3, 3)), 4).movedim(-1, 1).bool()
    h_s, h_t = (reference.binary_cross_entropy(z, labelled) for z in (z_s, z_t))
    z_h = reference.mix(z_s, z_t, h_s, h_t)[1]
    weight = 1.0
    if kem == "class":
        weight = reference.evaluation_weight(h_s, reference.binary_cross_entropy(z_h, labelled), valid, kem)
    target = (z_h / 2).log_softmax(1)

    def loss(z):
        return 4 * (weight * target.exp() * (target - (z / 2).log_softmax(1))).sum(1).mean()

    assert torch.autograd.gradcheck(loss, z_s.clone().requires_grad_())
    (student,) = leaves(z_s)
    reference.hakd_loss(student, z_t, labelled.float().argmax(1), temperature=2.0, kem=kem).backward()
    (expected,) = leaves(z_s)
    loss(expected).backward()
    assert relative_l2(student.grad, expected.grad) <= 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_segmentation(reduction):
    torch.manual_seed(0)
    labels = make_labels(1, (7, 9), 3)
    logits = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    weight = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda o: reference.segmentation_loss(
            o, labels, teacher, temperature=2.0, class_weight=weight, label_smoothing=0.2, reduction=reduction
        ),
        logits,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("align_corners", [False, True])
def test_task_is_cross_entropy(weighted, smoothing, align_corners):
    student, _, labels = make_case("mixed strides", "randn")
    weight = torch.linspace(0.5, 2, 7) if weighted else None
    expected = F.cross_entropy(
        F.interpolate(student, labels.shape[1:], mode="bilinear", align_corners=align_corners), labels.long(),
        weight=weight, ignore_index=255, label_smoothing=smoothing,
    )  # fmt: skip
    out = reference.segmentation_loss(
        student, labels, class_weight=weight, label_smoothing=smoothing, align_corners=align_corners, return_terms=True
    )
    assert relative_l2(out.task, expected) <= 1e-6
    assert out.kd == 0


def test_kd_is_the_divergence_of_softmaxes():
    student, teacher, labels = make_case("same grid", "randn")
    out = reference.segmentation_loss(student, labels, teacher, temperature=2.0, return_terms=True)
    per_pixel = 4 * F.kl_div(
        (student / 2).log_softmax(1), (teacher / 2).log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    assert relative_l2(out.kd, per_pixel[labels != 255].mean()) <= 1e-6


@pytest.mark.parametrize("n_in, n_out", [(39, 33), (512, 65), (7, 20), (1, 5), (1024, 129), (33, 33)])
def test_labels_are_sampled_like_interpolate(n_in, n_out):
    labels = torch.arange(n_in)[None, None, :].expand(1, n_in, n_in).contiguous()
    expected = F.interpolate(labels[:, None].float(), (n_out, n_out), mode="nearest")[:, 0].long()
    assert torch.equal(reference.sample_labels(labels, (n_out, n_out)), expected)


def test_mixing_of_two_certain_networks_is_even():
    certain = torch.tensor(0.0, dtype=torch.float64)
    reliability, _ = reference.mix(certain, certain, certain, certain)
    assert reliability == 0.5


@pytest.mark.parametrize(
    "options", list(pairwise({k: OPTIONS[k] for k in ("kmm", "kem", "resolution", "align_corners")}))
)
def test_maps_are_what_the_loss_uses(options):
    """Section 5 evaluated on the published maps gives the loss."""
    student, teacher, labels = make_case("same grid", "randn")
    student, teacher = student.double(), teacher.double()
    reliability, hybrid, weight = reference.hakd_maps(student, teacher, labels, **options)
    log_p_h, log_p_s = hybrid.log_softmax(1), student.log_softmax(1)
    per_pixel = (weight * log_p_h.exp() * (log_p_h - log_p_s)).sum(1)
    expected = reference.hakd_loss(student, teacher, labels, reduction="none", **options)
    valid = labels != 255
    assert relative_l2(per_pixel[valid], expected[valid]) <= 1e-12
    assert (reliability.movedim(1, -1)[~valid] == 0).all() and (weight.movedim(1, -1)[~valid] == 0).all()
    if options["kmm"]:
        assert ((reliability >= 0) & (reliability <= 1)).all()
