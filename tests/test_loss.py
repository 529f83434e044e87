"""HeteroAKDLoss and PixelProjector as modules."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import make_labels, relative_l2
from torch import nn

from hetero_kernels import HeteroAKDLoss, HeteroAKDOutput, PixelProjector, arguments, functional, reference


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {
        "student_features": torch.randn(2, 8, 6, 7, requires_grad=True),
        "teacher_features": torch.randn(2, 12, 3, 4, requires_grad=True),
        "labels": make_labels(2, (24, 28), 5),
        "student_logits": torch.randn(2, 5, 6, 7, requires_grad=True),
        "teacher_logits": torch.randn(2, 5, 12, 14),
    }


def gradients(module, batch, **kwargs):
    tensors = [*module.parameters(), *(t for t in batch.values() if t.requires_grad)]
    return torch.autograd.grad(module(**batch, **kwargs).loss, tensors, allow_unused=True)


@pytest.mark.parametrize("projector", ["conv_bn", "conv_bn_relu", "conv"])
def test_projector(projector):
    layers = PixelProjector(3, 4, projector)
    kinds = {"conv": [nn.Conv2d], "conv_bn": [nn.Conv2d, nn.BatchNorm2d]}
    kinds["conv_bn_relu"] = [*kinds["conv_bn"], nn.ReLU]
    assert [type(m) for m in layers] == kinds[projector]
    assert (layers[0].bias is not None) == (projector == "conv")
    assert layers(torch.randn(2, 3, 5, 6)).shape == (2, 4, 5, 6)


@pytest.mark.parametrize("backend", ["reference", None])
def test_objective_is_the_weighted_sum_of_its_terms(batch, backend):
    loss = HeteroAKDLoss(
        8, 12, 5, task_weight=0.7, kd_weight=0.3, hakd_weight=2.0, proj_weight=0.9, temperature=2.0,
        kd_temperature=4.0, class_weight=torch.linspace(0.5, 1.5, 5), label_smoothing=0.1, backend=backend,
    )  # fmt: skip
    out = loss(**batch)
    assert isinstance(out, HeteroAKDOutput)
    assert relative_l2(out.loss, 0.7 * out.task + 0.3 * out.kd + 2.0 * out.hakd + 0.9 * out.proj) <= 1e-6
    assert out.loss.requires_grad and not any(term.requires_grad for term in out[1:])
    z_s, z_t = loss.student_projector(batch["student_features"]), loss.teacher_projector(batch["teacher_features"])
    terms = reference.hakd_loss(z_s, z_t, batch["labels"], temperature=2.0, return_terms=True)
    assert relative_l2(out.hakd, terms.hakd) <= 1e-5 and relative_l2(out.proj, terms.proj) <= 1e-6


def test_backends_agree_to_rounding(batch):
    fused = HeteroAKDLoss(8, 12, 5, temperature=2.0)
    eager = HeteroAKDLoss(8, 12, 5, temperature=2.0, backend="reference")
    eager.load_state_dict(fused.state_dict())
    for actual, expected in zip(gradients(fused, batch), gradients(eager, batch), strict=True):
        assert relative_l2(actual, expected) <= 5e-6 or (actual - expected).abs().max() <= 1e-8


def test_every_parameter_and_input_learns(batch):
    for gradient in gradients(HeteroAKDLoss(8, 12, 5), batch):
        assert gradient is not None and gradient.count_nonzero() > 0


def test_terms_without_inputs_are_zero(batch):
    loss = HeteroAKDLoss(8, 12, 5)
    batch.pop("teacher_logits")
    out = loss(**batch)
    assert out.kd == 0 and out.task > 0
    batch.pop("student_logits")
    out = loss(**batch)
    assert out.task == 0 and out.kd == 0 and out.hakd != 0


def test_state_dict_deepcopy_pickle(batch):
    loss = HeteroAKDLoss(8, 12, 5, class_weight=torch.ones(5) * 2, temperature=3.0)
    loss.hakd_weight = 0.25
    expected = loss.eval()(**batch)
    for clone in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(clone(**batch).loss, expected.loss)
    fresh = HeteroAKDLoss(8, 12, 5, class_weight=torch.ones(5) * 2, temperature=3.0, hakd_weight=0.25)
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.eval()(**batch).loss, expected.loss)
    HeteroAKDLoss(8, 12, 5).load_state_dict(loss.state_dict())  # class weights are an option, not a state
    loss.load_state_dict(HeteroAKDLoss(8, 12, 5).state_dict())


def test_class_weight_moves_with_the_module():
    loss = HeteroAKDLoss(8, 12, 5, class_weight=torch.ones(5)).double()
    assert loss.class_weight.dtype == torch.float64
    assert dict(loss.named_buffers())["class_weight"] is loss.class_weight


@pytest.mark.parametrize("term", ["task", "kd", "hakd", "proj"])
def test_each_entry_of_a_normalizer_reaches_its_term(batch, term):
    module = HeteroAKDLoss(8, 12, 5)
    count = (batch["labels"] != 255).sum()
    plain, doubled = module(**batch), module(**batch, normalizer={term: 2 * count})
    for name, value in doubled._asdict().items():
        if name != "loss":
            torch.testing.assert_close(value, getattr(plain, name) / (2 if name == term else 1))


def test_normalizer_of_two_halves_gives_the_gradient_of_the_whole(batch):
    """Gradient accumulation: with the joint count of valid pixels the halves add up exactly."""
    loss = HeteroAKDLoss(8, 12, 5, projector="conv")
    whole = gradients(loss, batch)
    count = (batch["labels"] != 255).sum()
    halves = []
    for i in range(2):
        half = {name: t[i : i + 1].detach().requires_grad_(t.requires_grad) for name, t in batch.items()}
        halves.append(gradients(loss, half, normalizer=count))
    parameters = len(list(loss.parameters()))
    for a, b, expected in zip(*halves, whole, strict=True):
        total = a + b if parameters > 0 else torch.cat([a, b])
        parameters -= 1
        assert relative_l2(total, expected) <= 2e-6


@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_projected_loss_is_projection_then_loss(batch, resolution):
    student, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 12, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    arguments = (batch["student_features"], batch["teacher_features"], student, teacher, batch["labels"])
    options = {"student_bias": bias, "proj_weight": 0.5, "resolution": resolution}
    actual = functional.projected_hakd_loss(*arguments, **options)
    expected = reference.projected_hakd_loss(*arguments, **options)
    wanted = [*arguments[:4], bias]
    pairs = zip(torch.autograd.grad(actual, wanted), torch.autograd.grad(expected, wanted), strict=True)
    assert relative_l2(actual, expected) <= 1e-6
    assert all(relative_l2(a, b) <= 5e-6 for a, b in pairs)


def test_projected_loss_takes_mixed_dtypes_and_ignores_autocast(batch):
    arguments = (
        batch["student_features"],
        batch["teacher_features"].half(),
        torch.randn(5, 8).double(),
        torch.randn(5, 12),
    )
    plain = functional.projected_hakd_loss(*arguments, batch["labels"])
    assert plain.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(functional.projected_hakd_loss(*arguments, batch["labels"]), plain)


def test_overfits_a_batch(batch):
    torch.manual_seed(0)
    loss = HeteroAKDLoss(8, 12, 5)
    features, logits = batch["student_features"], batch["student_logits"]
    optimizer = torch.optim.Adam([*loss.parameters(), features, logits], lr=0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        out = loss(**batch)
        out.loss.backward()
        optimizer.step()
        values.append(out.loss.item())
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_logits_of_other_classes_are_named(name):
    criterion = HeteroAKDLoss(4, 6, 3)
    maps = {"student_features": torch.randn(1, 4, 2, 2), "teacher_features": torch.randn(1, 6, 2, 2)}
    logits = {"student_logits": torch.randn(1, 3, 2, 2), "teacher_logits": torch.randn(1, 3, 2, 2)}
    logits[name] = torch.randn(1, 2, 2, 2)
    with pytest.raises(ValueError, match=rf"{name} is \[1, 2, 2, 2\], expected 3 classes as constructed"):
        criterion(**maps, **logits, labels=torch.zeros(1, 4, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("student_logits", {"out": torch.randn(1, 3, 2, 2)}, r"is dict of \['out'\], .*; pass student_logits\['out'\]"),
        (
            "teacher_logits",
            (torch.randn(1, 3, 2, 2),),
            r"(?s)is tuple .*; pass one of them, such as teacher_l",
        ),
        ("student_features", torch.randn(1, 2, 3, 4), r"expected 4 channels .*use student_features.permute\(0, 3, 1"),
        ("teacher_features", torch.randn(1, 4, 6), r"teacher_features.transpose\(1, 2\).unflatten\(2, \(h, w\)\)"),
        ("teacher_features", torch.randn(1, 6, 2, 2, device="meta"), r"teacher_projector.0.weight is on cpu, .* meta"),
    ],
)
def test_what_is_passed_wrong_says_what_to_pass(name, wrong, message):
    criterion = HeteroAKDLoss(4, 6, 3)
    maps = {"student_features": torch.randn(1, 4, 2, 2), "teacher_features": torch.randn(1, 6, 2, 2)}
    logits = {"student_logits": torch.randn(1, 3, 2, 2), "teacher_logits": torch.randn(1, 3, 2, 2)}
    with pytest.raises((TypeError, ValueError), match=message):
        criterion(**{**maps, **logits, "labels": torch.zeros(1, 4, 4, dtype=torch.long), name: wrong})


def test_probabilities_in_place_of_logits_are_noticed_once(monkeypatch):
    logits, labels = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    for teacher, warns in ((logits, False), (logits.softmax(1), True), (logits.softmax(1).half(), True)):
        monkeypatch.setattr(arguments, "_looked_for_probabilities", False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                functional.segmentation_loss(logits, labels, teacher)
        said = [str(each.message) for each in caught if "teacher_logits add up to 1" in str(each.message)]
        assert len(said) == warns
