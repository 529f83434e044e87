"""One training step: precision, moving average, ramps, memory format, compilation, and the options it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from heteroakd.config.groups import LossConfig, OptimizerConfig, RuntimeConfig, ScheduleConfig
from heteroakd.methods import Taps, build_distiller
from heteroakd.training.step import TrainingStep, build_optimizer, distillation_factor, encoder_prefixes
from test_distributed import SIZE, Plain, TwoHeads, batch
from torch import Tensor, nn

from hetero_kernels import Distiller


def training(config: OptimizerConfig | None = None, network: type[Plain] = Plain, **options: Any) -> TrainingStep:
    """A student and a teacher without batch norm under the method heteroakd."""
    torch.manual_seed(0)
    teacher, student = Plain(3, 12), network(3)
    loss = LossConfig(projector="conv", kd_weight=2.0, hakd_weight=3.0)
    distiller = build_distiller(student, teacher, "heteroakd", loss, 3, SIZE, Taps("encoder", "encoder"))
    config = config or OptimizerConfig(name="sgd", lr=0.1)
    schedule = ScheduleConfig(steps=10, batch_size=4, **options.pop("schedule", {}))
    runtime = RuntimeConfig(**options)
    return TrainingStep(distiller, build_optimizer(distiller, config), config, schedule, runtime)


def gradient(step: TrainingStep) -> Tensor:
    gradients = [parameter.grad for parameter in step.distiller.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 4e-3)])
def test_mixed_precision_is_near_and_keeps_weights_and_losses_in_float32(precision: Any, tolerance: float) -> None:
    full, mixed = training(), training(OptimizerConfig(name="sgd", lr=0.1, precision=precision))
    seen: list[torch.dtype] = []
    mixed.distiller.student.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected, terms = full(0, *batch()), mixed(0, *batch())
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16]
    assert terms.loss.dtype == torch.float32
    assert float(terms.loss) == pytest.approx(float(expected.loss), rel=tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in mixed.distiller.parameters())
    scale = mixed.scaler.get_scale() if precision == "fp16" else 1.0
    reference = gradient(full)
    assert (gradient(mixed) - reference).norm() < tolerance * reference.norm()  # the optimiser unscaled them
    assert mixed.scaler.is_enabled() == (precision == "fp16") and (scale > 1) == (precision == "fp16")


def test_float16_step_that_overflows_is_left_out_and_the_scale_halved() -> None:
    step = training(OptimizerConfig(name="sgd", lr=0.1, precision="fp16"))
    before = [parameter.detach().clone() for parameter in step.distiller.parameters()]
    images, labels = batch()
    step(0, images, labels)
    scale = step.scaler.get_scale()
    after = [parameter.detach().clone() for parameter in step.distiller.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    weight = step.distiller.student.head.weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    step(1, images, labels)
    assert step.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(after, step.distiller.parameters(), strict=True))


def test_moving_average_is_what_is_evaluated() -> None:
    step = training(OptimizerConfig(name="sgd", lr=0.1, ema_decay=0.15))
    assert step.evaluated.student is not step.distiller.student
    name, expected = "head.weight", None
    for number in range(4):
        step(number, *batch())
        value = step.distiller.student.state_dict()[name]
        decay = min(0.15, (1 + number) / (10 + number))
        expected = value.clone() if expected is None else decay * expected + (1 - decay) * value
    average = step.evaluated.student.state_dict()[name]
    torch.testing.assert_close(average, expected)
    assert not torch.equal(average, value)
    assert not step.evaluated.student(batch()[0]).equal(step.distiller.student(batch()[0]))
    without = training()
    assert without.average is None and without.evaluated is without.distiller


def test_parameters_without_a_gradient_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    step = training(network=TwoHeads, schedule={"micro_batches": 2})
    step(0, *batch())
    assert "no gradient reaches student.second: " in capsys.readouterr().out
    step(1, *batch())
    training()(0, *batch())
    assert capsys.readouterr().out == ""


def test_distillation_weights_rise_linearly_and_the_others_stay() -> None:
    schedule = ScheduleConfig(steps=10, distillation_warmup_steps=4)
    assert [distillation_factor(step, schedule) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    assert distillation_factor(0, ScheduleConfig(steps=10)) == 1
    step = training(schedule={"distillation_warmup_steps": 4})
    for number, factor in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        terms = step(number, *batch())
        torch.testing.assert_close(terms.loss, terms.task + factor * (2 * terms.kd + 3 * terms.hakd) + terms.proj)


def test_channels_last_changes_the_order_in_memory_and_nothing_else() -> None:
    plain, last = training(), training(channels_last=True)
    seen: list[bool] = []
    last.distiller.student.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(last(0, *batch()).loss, plain(0, *batch()).loss)
    assert seen == [True]
    torch.testing.assert_close(gradient(last), gradient(plain))


def test_compiled_networks_do_what_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[object] = []

    def recording(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward  # the compiler's back end is torch's matter

    plain = training()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=recording, fullgraph=True))
    step = training(compile=True)
    for number in range(2):
        torch.testing.assert_close(step(number, *batch()).loss, plain(number, *batch()).loss)
        torch.testing.assert_close(gradient(step), gradient(plain))
    assert len(graphs) == 2  # student and teacher
    assert set(step.distiller.state_dict()) == set(plain.distiller.state_dict())
    with step.eagerly():
        step.evaluated.student(torch.zeros(1, 3, 8, 8))
    assert len(graphs) == 2  # images of other sizes are left to the network itself
    step.evaluated.student(torch.zeros(1, 3, 8, 8))
    assert len(graphs) == 3


def test_options_that_make_no_sense_are_named() -> None:
    with pytest.raises(ValueError, match=r"precision must be one of fp32, bf16, fp16, got 'int8'"):
        training(OptimizerConfig(precision="int8"))  # type: ignore[arg-type]
    assert isinstance(training().distiller, Distiller)


class Other(nn.Module):
    """Neither `encoder` nor `backbone`; it begins in `body`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 1))
        self.classifier = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(images))
        return logits


@pytest.mark.parametrize(
    ("tap", "encoder", "at_lr"),
    [
        ("body", None, "body"),
        ("body.1", None, "body"),
        ("classifier", "body", "body"),
        ("body", "classifier", "classifier"),
    ],
)
def test_the_encoder_is_what_the_tap_or_the_options_say(tap: str, encoder: str | None, at_lr: str) -> None:
    distiller = Distiller.heteroakd(
        Other(), Other(), torch.randn(1, 3, 32, 32), num_classes=3, student_tap=tap, teacher_tap="body"
    )
    config = OptimizerConfig(lr=0.1, head_lr_multiplier=10.0, encoder=encoder)
    prefixes = encoder_prefixes(distiller, config)
    names = {name for name, _ in distiller.student.named_parameters()}
    assert {name for name in names if name.startswith(prefixes)} == {n for n in names if n.startswith(f"{at_lr}.")}


def test_a_factor_on_the_head_needs_an_encoder() -> None:
    distiller = Distiller.heteroakd(
        Other(), Other(), torch.randn(1, 3, 32, 32), num_classes=3, student_tap="classifier", teacher_tap="body"
    )
    with pytest.raises(
        ValueError, match=r"head_lr_multiplier is 10, .*--optimizer.encoder NAME.* are body, classifier"
    ):
        encoder_prefixes(distiller, OptimizerConfig(head_lr_multiplier=10.0))
    with pytest.raises(ValueError, match=r"optimizer.encoder 'neck' has no parameters; modules are body, classifier"):
        encoder_prefixes(distiller, OptimizerConfig(encoder="neck"))
    assert encoder_prefixes(distiller, OptimizerConfig()) == ()
