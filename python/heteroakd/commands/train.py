"""What the subcommands do: put together networks, data and loss by a configuration, and hand them over."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml  # type: ignore[import-untyped]

import hetero_kernels
from heteroakd.commands.projections import evaluate_projections, projections_table, run_with_projectors
from heteroakd.commands.recipe import recipe
from heteroakd.commands.teacher_cache import open_cache
from heteroakd.config.commands import DistillRun, EvaluateRun, TeacherRun, fill_names
from heteroakd.config.groups import EvaluationConfig, LossConfig, ModelConfig, TeacherConfig, from_dict, to_dict
from heteroakd.data import DataConfig, SegmentationData, build_data
from heteroakd.evaluation.metrics import Evaluation, evaluate
from heteroakd.methods.distiller import METHODS, Distiller, Teacher, build_distiller
from heteroakd.networks.taps import TappedNetwork, probe
from heteroakd.networks.weights import SUFFIXES, is_weights_file
from heteroakd.networks.zoo import build_tapped
from heteroakd.system.distributed import choose_device, main_first, on_main, process_group, say, world_size
from heteroakd.system.lock import only_run_in
from heteroakd.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_state, older, write_text
from heteroakd.training.log import METRICS_FILE
from heteroakd.training.loop import train
from heteroakd.training.random_state import seed_generators
from heteroakd.training.run import BEST, CONFIG, CONFUSION, LAST, MAPS, PICTURES, SUMMARY, Run

RECIPE = "recipe.txt"


class _Start(NamedTuple):
    """What a run does with its output folder: the flags of the command line."""

    resume: bool
    overwrite: bool
    resume_or_start: bool


def run_teacher(
    config: TeacherRun, *, resume: bool = False, overwrite: bool = False, resume_or_start: bool = False
) -> Evaluation:
    """`heteroakd teacher`: train a network on labels alone into `config.output`."""
    config = fill_names(config, "teacher")
    device = choose_device(config.runtime.device, config.runtime.threads)
    with process_group(device):
        return _run_teacher(config, device, _Start(resume, overwrite, resume_or_start))


def _run_teacher(config: TeacherRun, device: torch.device, start: _Start) -> Evaluation:
    on_main(partial(check_output, Path(config.output), start))
    backend = select_backend(config.loss, device)
    data = build_data(config.data)
    seed_generators(config.schedule.seed)
    with main_first():
        network, loaded = build_tapped(config.model, len(data.classes), auxiliary=True)
    say(f"teacher: {loaded}\n  {describe(network, config.data.crop_size)}")
    distiller = build_distiller(
        network,
        None,
        "none",
        config.loss,
        len(data.classes),
        config.data.crop_size,
        auxiliary_weight=config.model.auxiliary_weight,
    )
    return _train(_run(config, config.model, distiller.to(device), None, data, backend), start)


def run_distill(
    config: DistillRun, *, resume: bool = False, overwrite: bool = False, resume_or_start: bool = False
) -> Evaluation:
    """`heteroakd distill`: train a student by `config.method` into `config.output`.

    Under one seed all methods start from the same student and see the same batches.
    """
    if config.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {config.method!r}")
    config = fill_names(config, config.method)
    device = choose_device(config.runtime.device, config.runtime.threads)
    with process_group(device):
        return _run_distill(config, device, _Start(resume, overwrite, resume_or_start))


def _run_distill(config: DistillRun, device: torch.device, start: _Start) -> Evaluation:
    backend = select_backend(config.loss, device)
    data = build_data(config.data)
    num_classes, crop_size = len(data.classes), config.data.crop_size
    teacher = None
    if config.method != "none":
        teacher_network, source = load_teacher(config.teacher, data)
        say(f"teacher: {source}\n  {describe(teacher_network, crop_size)}")
        teacher_network.to(device)
        teacher = Teacher(teacher_network)
        if config.runtime.teacher_cache is not None:
            teacher = open_cache(config, teacher_network, data)
    on_main(partial(check_output, Path(config.output), start))
    seed_generators(config.schedule.seed)  # here, so that the teacher leaves the student's initialisation alone
    with main_first():
        student, loaded = build_tapped(config.student, num_classes, auxiliary=True)
    say(f"student: {loaded}\n  {describe(student, crop_size)}")
    distiller = build_distiller(
        student.to(device),
        teacher,
        config.method,
        config.loss,
        num_classes,
        crop_size,
        auxiliary_weight=config.student.auxiliary_weight,
    )
    return _train(_run(config, config.student, distiller.to(device), teacher, data, backend), start)


def _run(
    config: TeacherRun | DistillRun,
    model: ModelConfig,
    distiller: Distiller,
    teacher: Teacher | None,
    data: SegmentationData,
    backend: str,
) -> Run:
    return Run(
        kind="student" if isinstance(config, DistillRun) else "teacher",
        distiller=distiller,
        teacher=teacher,
        data=data,
        schedule=config.schedule,
        optimizer=config.optimizer,
        runtime=config.runtime,
        output=Path(config.output),
        config=to_dict(config),
        model=to_dict(model),
        loss_backend=backend,
        evaluation=config.evaluation,
        align_corners=config.loss.logits_align_corners,
    )


def load_teacher(config: TeacherConfig, data: SegmentationData) -> tuple[TappedNetwork, str]:
    """The network to distil from, and where it comes from.

    Raises CheckpointError where a checkpoint's classes are not those of the data set, WeightsError where a file of
    weights does not cover the network, ValueError for a network without trained weights.
    """
    if config.model is None:
        checkpoint = load_checkpoint(config.checkpoint)
        check_classes(config.checkpoint, checkpoint, data)
        network = restore_network(config.checkpoint, checkpoint, tap=config.tap)
        return network, f"{config.checkpoint}, step {checkpoint.step}, mIoU {checkpoint.metrics['miou']:.4f}"
    if ":" not in config.model.architecture and not is_weights_file(config.model.weights):
        raise ValueError(
            f"teacher.model.weights must be a file {', '.join(SUFFIXES)} with the trained network, "
            f"got {config.model.weights!r}"
        )
    network, loaded = build_tapped(config.model, len(data.classes), tap=config.tap, whole=True)
    return network, f"{loaded}\n  its classes are taken to be the data set's: {', '.join(data.classes)}"


def _train(run: Run, start: _Start) -> Evaluation:
    device = next(run.distiller.parameters()).device
    method = run.config.get("method", "cross-entropy")
    processes = f"{world_size()} processes of " if world_size() > 1 else ""
    say(
        f"{run.kind} into {run.output}: {method}, {run.schedule.steps} steps of {run.schedule.batch_size} images, "
        f"seed {run.schedule.seed}, {device} ({processes}{torch.get_num_threads()} threads), "
        f"loss backend {run.loss_backend}"
    )
    text = recipe(run)
    say(text)
    with only_run_in(run.output):
        start = on_main(partial(check_output, run.output, start))  # again: a run may have ended there meanwhile
        on_main(partial(_prepare, run, start, text))
        evaluation = train(run, resume=start.resume)
    say(evaluation.table())
    return evaluation


def _prepare(run: Run, start: _Start, text: str) -> None:
    if start.overwrite:  # only now: nothing is lost to a configuration that cannot run
        clear_output(run.output)
    if not start.resume:
        write_text(run.output / CONFIG, yaml.safe_dump(run.config, sort_keys=False))
        write_text(run.output / RECIPE, text + "\n")


def run_evaluate(config: EvaluateRun) -> Evaluation:
    """`heteroakd evaluate`: print IoU per class and mIoU of a checkpoint on a val set."""
    with process_group(choose_device(config.device, config.threads)):
        checkpoint, network, data = load_trained(
            config.checkpoint, config.data, config.root, config.device, config.threads
        )
        run = run_with_projectors(config.checkpoint, checkpoint) if config.projections else None
        teacher = None if run is None else _teacher_of(run, config.teacher, data, network)
        measure = partial(
            evaluate,
            dataset=data.val,
            classes=data.classes,
            options=choose_evaluation(config.evaluation, checkpoint),
            limit=config.limit,
            workers=config.workers,
            progress=True,
        )
        evaluation = measure(network, align_corners=saved_loss(checkpoint).logits_align_corners)
        say(evaluation.table())
        numbers = _numbers(evaluation)
        if run is not None and teacher is not None:
            found = evaluate_projections(run, config.checkpoint, checkpoint, network, teacher, measure)
            say(projections_table(evaluation, found))
            numbers["projections"] = {name: _numbers(each) for name, each in found.items()}
        if config.output is not None:
            on_main(partial(write_text, Path(config.output), json.dumps(numbers, indent=2) + "\n"))
    return evaluation


def _teacher_of(
    run: DistillRun, elsewhere: str | None, data: SegmentationData, student: TappedNetwork
) -> TappedNetwork:
    config = run.teacher if elsewhere is None else replace(run.teacher, checkpoint=elsewhere)
    teacher, source = load_teacher(config, data)
    say(f"teacher: {source}")
    return teacher.to(next(student.parameters()).device).eval()


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    return {**evaluation.to_dict(), "confusion": evaluation.confusion.tolist()}


def load_trained(
    path: str, data_options: dict[str, Any] | None, root: str | None, device_name: str, threads: int | None
) -> tuple[Checkpoint, TappedNetwork, SegmentationData]:
    """A checkpoint, its network in eval mode on the device, and the data set it is to be used on, see `saved_data`.

    Raises CheckpointError where the data set's classes are not those of the checkpoint.
    """
    checkpoint, network = load_network(path, device_name, threads)
    data = build_data(saved_data(path, checkpoint, root, data_options))
    check_classes(path, checkpoint, data)
    return checkpoint, network, data


def load_network(path: str, device_name: str, threads: int | None) -> tuple[Checkpoint, TappedNetwork]:
    """A checkpoint and its network in eval mode on the device, without its data set."""
    device = choose_device(device_name, threads)
    checkpoint = load_checkpoint(path)
    return checkpoint, restore_network(path, checkpoint).to(device).eval()


def restore_network(path: str, checkpoint: Checkpoint, *, tap: list[str] | str | None = None) -> TappedNetwork:
    """The network that a checkpoint holds, with its own taps unless others are given; nothing is downloaded."""
    model = from_dict(ModelConfig, checkpoint.model, path)
    network, _ = build_tapped(model, len(checkpoint.classes), tap=tap, load_weights=False)
    load_state(network.network.load_state_dict, checkpoint.network, path)
    return network


def saved_data(
    path: str, checkpoint: Checkpoint, root: str | None, options: dict[str, Any] | None = None
) -> DataConfig:
    """The data set that the checkpoint was trained on, with other options where some are given, or, where they name
    another data set, that one; in another folder where `root` is given.

    Raises ValueError for options that a data set does not have.
    """
    saved = from_dict(DataConfig, checkpoint.config["data"], path)
    if options:
        same = options.get("name", saved.name) == saved.name
        saved = from_dict(DataConfig, {**(to_dict(saved) if same else {}), **options}, "data")
    return saved if root is None else replace(saved, root=root)


def saved_loss(checkpoint: Checkpoint) -> LossConfig:
    """The loss options that the checkpoint was trained with."""
    return from_dict(LossConfig, checkpoint.config["loss"], "checkpoint")


def saved_evaluation(checkpoint: Checkpoint) -> EvaluationConfig:
    """The evaluation options of the run that wrote the checkpoint."""
    return from_dict(EvaluationConfig, checkpoint.config.get("evaluation", {}), "checkpoint")


def choose_evaluation(given: dict[str, Any] | None, checkpoint: Checkpoint) -> EvaluationConfig:
    """The options of the checkpoint's own run, with those given in their places; says so where they differ.

    Raises ValueError for options that an evaluation does not have.
    """
    saved = saved_evaluation(checkpoint)
    chosen = from_dict(EvaluationConfig, {**to_dict(saved), **(given or {})}, "evaluation")
    if chosen != saved:
        say(f"evaluated by {to_dict(chosen)}; the run's own evaluations: {to_dict(saved)}")
    return chosen


def check_classes(path: str, checkpoint: Checkpoint, data: SegmentationData) -> None:
    """Raises CheckpointError, saying how they differ, where the data set has other classes than the checkpoint."""
    there, here = checkpoint.classes, list(data.classes)
    if len(there) != len(here):
        raise CheckpointError(f"{path}: trained for {len(there)} classes, the data set has {len(here)}")
    if there != here:
        index = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
        raise CheckpointError(f"{path}: class {index} is {there[index]!r} there and {here[index]!r} in the data set")


def select_backend(config: LossConfig, device: torch.device) -> str:
    """Name of the backend that will compute the losses. Raises ValueError, with the reason, where it cannot run."""
    try:
        return hetero_kernels.select_backend(config.backend, device.type)
    except RuntimeError as error:
        raise ValueError(f"loss.backend: {error}") from error


def describe(network: TappedNetwork, image_size: tuple[int, int]) -> str:
    """A line with the network's size and the shapes of taps and logits for a crop; raises as `taps.probe`."""
    output = probe(network, image_size)
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    shapes = [f"tap {path} {tuple(taken.shape[1:])}" for path, taken in zip(network.taps, output.maps, strict=True)]
    if output.auxiliary is not None:
        shapes.append(f"auxiliary head on {network.auxiliary_tap} {tuple(output.auxiliary.shape[1:])}")
    shapes.append(f"logits {tuple(output.logits.shape[1:])}")
    return f"{parameters:.2f} M parameters, crop {tuple(image_size)} -> {', '.join(shapes)}"


def check_output(folder: Path, start: _Start) -> _Start:
    """How the run to come starts in the output folder: `resume_or_start` has become one of the other two.

    Raises ValueError where the folder holds a run that is neither to be resumed nor overwritten, and for two at once.
    """
    if sum(start) > 1:
        raise ValueError("--resume, --resume_or_start and --overwrite exclude each other")
    if start.resume_or_start:  # what a run left that died before its first checkpoint is replaced
        found = any((folder / name).exists() for name in (LAST, older(Path(LAST), 1).name))
        return _Start(resume=found, overwrite=not found, resume_or_start=False)
    started = [name for name in (LAST, older(Path(LAST), 1).name, BEST, METRICS_FILE) if (folder / name).exists()]
    if started and not start.resume and not start.overwrite:
        raise ValueError(
            f"{folder} holds a run already ({', '.join(started)}): --resume continues it, --overwrite replaces it, "
            f"--output names another folder"
        )
    return start


def clear_output(folder: Path) -> None:
    """Delete what an earlier run wrote into the folder, and nothing else."""
    patterns = (
        LAST,
        f"{Path(LAST).stem}.*{Path(LAST).suffix}",
        BEST,
        SUMMARY,
        CONFIG,
        RECIPE,
        METRICS_FILE,
        "events.out.tfevents.*",
        f"{PICTURES}/step_*.png",
        f"{MAPS}/step_*.npz",
        CONFUSION,
        "loss_cost.json",
        "report.html",
    )
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()
