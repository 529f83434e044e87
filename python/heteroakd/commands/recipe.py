"""The recipe of a run in lines to read: data, augmentation, networks, losses and their weights, optimiser, schedule."""

from __future__ import annotations

from typing import Any

from heteroakd.config.groups import LossConfig, from_dict
from heteroakd.methods import LABELS_ALONE, method_named, objective_of
from heteroakd.networks.shapes import tap_paths
from heteroakd.system.distributed import world_size
from heteroakd.training.run import Run

INDENT = " " * 16


def recipe(run: Run) -> str:
    """The whole recipe, a line per subject and term of the loss; what is not said is as the options' help has it."""
    lines = {
        "data": _data(run),
        "augmentation": _augmentation(run.config["data"]),
        run.kind: _network(run.model),
        **_teacher(run),
        "loss": _loss(run),
        "optimizer": _optimizer(run),
        "schedule": _schedule(run),
    }
    return "\n".join(["recipe", *(f"  {name:<13} {line}" for name, line in lines.items() if line)])


def _number(value: float) -> str:
    return f"{value:g}"


def _data(run: Run) -> str:
    data = run.config["data"]
    root = f" in {data['root']}" if data["root"] else ""
    return (
        f"{data['name']}{root}: {len(run.data.train)} train and {len(run.data.val)} {data['evaluation_part']} images, "
        f"{len(run.data.classes)} classes"
    )


def _augmentation(data: dict[str, Any]) -> str:
    height, width = data["crop_size"]
    if not data["augment"]:
        return f"none: the middle {height}x{width} of every image"
    smallest, largest = data["scale_range"]
    scale = f"scale {_number(smallest)}"
    if smallest < largest:
        scale += f" to {_number(largest)}"
        scale += f" in steps of {_number(data['scale_step'])}" if data["scale_step"] else ""
    return f"{scale}, random crop {height}x{width}, mirrored with probability {_number(data['flip_probability'])}"


def _network(model: dict[str, Any]) -> str:
    own = ":" in model["architecture"]
    name = model["architecture"] if own else f"{model['architecture']} {model['encoder']}"
    weights = "" if own and not model["weights"] else f", weights {model['weights'] or 'random'}"
    options = "".join(f", {name} {value}" for name, value in model["options"].items())
    return f"{name}{weights}{options}"


def _teacher(run: Run) -> dict[str, str]:
    if run.distiller.teacher is None:
        return {}
    teacher = run.config["teacher"]
    line = _network(teacher["model"]) if teacher["model"] else teacher["checkpoint"]
    if not objective_of(run.distiller).pairs:
        return {"teacher": line}
    taps = zip(tap_paths(run.config["student"]["tap"]), run.distiller.teacher_tap or (), strict=True)
    return {"teacher": line, "taps": ", ".join(f"{ours} <- {theirs}" for ours, theirs in taps)}


def _loss(run: Run) -> str:
    config = from_dict(LossConfig, run.config["loss"], "loss")
    method, objective = method_named(run.config.get("method", LABELS_ALONE)), objective_of(run.distiller)
    details = ["class weights"] if config.class_weight is not None else []
    details += [f"label smoothing {_number(config.label_smoothing)}"] if config.label_smoothing else []
    terms = [f"{_number(config.task_weight)} x cross-entropy{_in_brackets(details)}"]
    if objective.auxiliary is not None:
        tap = run.model["auxiliary_tap"]
        terms.append(f"{_number(objective.auxiliary.weight)} x cross-entropy of an FCN head on {tap}")
    if method.kd:
        terms.append(f"{_number(config.kd_weight)} x KD{_in_brackets([f'T {_number(config.kd_temperature)}'])}")
    if method.cwd:
        terms.append(f"{_number(config.cwd_weight)} x channel-wise KD (T {_number(config.cwd_temperature)})")
    if objective.pairs:
        pair = objective.pairs[0]
        details = [
            f"T {_number(config.temperature)}",
            "KMM" if pair.kmm else "no KMM",
            f"KEM by {pair.kem}" if pair.kem != "none" else "no KEM",
            config.divergence,
            f"at {config.resolution} resolution",
        ]
        terms.append(f"{_number(config.hakd_weight)} x HeteroAKD{_in_brackets(details)}")
        terms.append(f"{_number(config.proj_weight)} x projectors ({config.projector})")
    corners = "with" if config.logits_align_corners else "without"
    return f"\n{INDENT}+ ".join(terms) + f"\n{INDENT}logits interpolated {corners} aligned corners"


def _in_brackets(details: list[str]) -> str:
    return f" ({', '.join(details)})" if details else ""


def _optimizer(run: Run) -> str:
    config = run.optimizer
    rates = f"lr {_number(config.lr)}"
    factors = [f"head x {_number(config.head_lr_multiplier)}"] if config.head_lr_multiplier != 1 else []
    factors += [f"projectors x {_number(config.projector_lr_multiplier)}"] if objective_of(run.distiller).pairs else []
    momentum = f", momentum {_number(config.momentum)}" if config.name == "sgd" else ""
    norms = "" if config.decay_norms else ", not of norms and biases"
    decay = f", weight decay {_number(config.weight_decay)}{norms}" if config.weight_decay else ""
    average = f", moving average {_number(config.ema_decay)}" if config.ema_decay else ""
    return f"{config.name}, {rates}{_in_brackets(factors)}{momentum}{decay}, {config.precision}{average}"


def _schedule(run: Run) -> str:
    schedule = run.schedule
    epochs = schedule.steps * schedule.batch_size / len(run.data.train)
    parts = [f"{schedule.steps} steps of {schedule.batch_size} images ({epochs:.1f} epochs)"]
    if world_size() > 1 or schedule.micro_batches > 1:
        parts.append(f"{world_size()} processes x {schedule.micro_batches} micro-batches")
    parts.append(f"poly {_number(schedule.power)}")
    if schedule.warmup_steps:
        parts.append(f"warm-up {schedule.warmup_steps} steps")
    if schedule.distillation_warmup_steps and run.distiller.teacher is not None:
        parts.append(f"distillation weights rise over {schedule.distillation_warmup_steps} steps")
    return ", ".join([*parts, f"seed {schedule.seed}"])
