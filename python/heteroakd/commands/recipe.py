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
    origin = run.config["continue_from"]
    lines = {
        "data": _data(run),
        "augmentation": _augmentation(run.config["data"]),
        run.kind: _network(run.model) + (f", trained on from {origin}" if origin else ""),
        **_teacher(run),
        "loss": _loss(run),
        "optimizer": _optimizer(run),
        "schedule": _schedule(run),
    }
    return "\n".join(["recipe", *(f"  {name:<13} {line}" for name, line in lines.items() if line)])


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
    scale = f"scale {smallest:g}"
    if smallest < largest:
        scale += f" to {largest:g}"
        scale += f" in steps of {data['scale_step']:g}" if data["scale_step"] else ""
    return f"{scale}, random crop {height}x{width}, mirrored with probability {data['flip_probability']:g}"


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
    details += [f"label smoothing {config.label_smoothing:g}"] if config.label_smoothing else []
    terms = [f"{config.task_weight:g} x cross-entropy{_in_brackets(details)}"]
    if objective.auxiliary is not None:
        tap = run.model["auxiliary_tap"]
        terms.append(f"{objective.auxiliary.weight:g} x cross-entropy of an FCN head on {tap}")
    if method.kd:
        terms.append(f"{config.kd_weight:g} x KD{_in_brackets([f'T {config.kd_temperature:g}'])}")
    if method.cwd:
        terms.append(f"{config.cwd_weight:g} x channel-wise KD (T {config.cwd_temperature:g})")
    if objective.pairs:
        pair = objective.pairs[0]
        details = [
            f"T {config.temperature:g}",
            "KMM" if pair.kmm else "no KMM",
            f"KEM by {pair.kem}" if pair.kem != "none" else "no KEM",
            config.divergence,
            f"at {config.resolution} resolution",
        ]
        terms.append(f"{config.hakd_weight:g} x HeteroAKD{_in_brackets(details)}")
        terms.append(f"{config.proj_weight:g} x projectors ({config.projector})")
    corners = "with" if config.logits_align_corners else "without"
    return f"\n{INDENT}+ ".join(terms) + f"\n{INDENT}logits interpolated {corners} aligned corners"


def _in_brackets(details: list[str]) -> str:
    return f" ({', '.join(details)})" if details else ""


def _optimizer(run: Run) -> str:
    config = run.optimizer
    rates = f"lr {config.lr:g}"
    factors = [f"head x {config.head_lr_multiplier:g}"] if config.head_lr_multiplier != 1 else []
    factors += [f"projectors x {config.projector_lr_multiplier:g}"] if objective_of(run.distiller).pairs else []
    momentum = f", momentum {config.momentum:g}" if config.name == "sgd" else ""
    norms = "" if config.decay_norms else ", not of norms and biases"
    decay = f", weight decay {config.weight_decay:g}{norms}" if config.weight_decay else ""
    average = f", moving average {config.ema_decay:g}" if config.ema_decay else ""
    return f"{config.name}, {rates}{_in_brackets(factors)}{momentum}{decay}, {config.precision}{average}"


def _schedule(run: Run) -> str:
    schedule = run.schedule
    epochs = schedule.steps * schedule.batch_size / len(run.data.train)
    parts = [f"{schedule.steps} steps of {schedule.batch_size} images ({epochs:.1f} epochs)"]
    if world_size() > 1 or schedule.micro_batches > 1:
        parts.append(f"{world_size()} processes x {schedule.micro_batches} micro-batches")
    parts.append(f"poly {schedule.power:g}")
    if schedule.warmup_steps:
        parts.append(f"warm-up {schedule.warmup_steps} steps")
    if schedule.distillation_warmup_steps and run.distiller.teacher is not None:
        parts.append(f"distillation weights rise over {schedule.distillation_warmup_steps} steps")
    return ", ".join([*parts, f"seed {schedule.seed}"])
