"""`heteroakd teacher` and `heteroakd distill`: networks, data and loss by a configuration, handed to the loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml  # type: ignore[import-untyped]
from torch import nn

import hetero_kernels
from heteroakd.commands.recipe import recipe
from heteroakd.config.commands import DistillRun, TeacherRun, fill_names
from heteroakd.config.groups import LossConfig
from heteroakd.data import build_data
from heteroakd.data.survey import look
from heteroakd.evaluation.metrics import Evaluation
from heteroakd.methods import LABELS_ALONE, METHODS, Taps, build_distiller
from heteroakd.networks.shapes import probe, tap_paths
from heteroakd.networks.zoo import build_network
from heteroakd.system.distributed import choose_device, main_first, on_main, process_group, say, world_size
from heteroakd.system.files import BEST, CONFIG, LAST, METRICS, clear_output, older, only_run_in, write_text
from heteroakd.training.checkpoint import seed_generators
from heteroakd.training.loop import train
from heteroakd.training.run import Run
from heteroakd.training.step import check_parts
from heteroakd.training.trained import Origin, check_classes, load_teacher


class _Start(NamedTuple):
    """What a run does with its output folder: the flags of the command line."""

    resume: bool = False
    overwrite: bool = False
    resume_or_start: bool = False


def run_teacher(config: TeacherRun, **flags: bool) -> Evaluation:
    """`heteroakd teacher`: train a network on labels alone into `config.output`; flags as in `_Start`."""
    return _run(fill_names(config, "teacher"), _Start(**flags))


def run_distill(config: DistillRun, **flags: bool) -> Evaluation:
    """`heteroakd distill`: train a student by `config.method` into `config.output`; flags as in `_Start`.

    Under one seed all methods start from the same student and see the same batches.
    """
    return _run(fill_names(config, config.method), _Start(**flags))


def _run(config: TeacherRun | DistillRun, wanted: _Start) -> Evaluation:
    device, output = choose_device(config.runtime.device, config.runtime.threads), Path(config.output)
    with process_group(device):
        check_parts(config.schedule, world_size())
        start = on_main(partial(check_output, output, wanted))
        run = _build_run(config, device, start)
        _announce(run, device)
        with only_run_in(output):
            if on_main(partial(check_output, output, wanted)) != start:
                raise ValueError(f"{output}: another run began or ended there meanwhile; the same command looks again")
            on_main(partial(_prepare, run, start))
            evaluation = train(run, resume=start.resume)
        say(evaluation.table())
    return evaluation


def _build_run(config: TeacherRun | DistillRun, device: torch.device, start: _Start) -> Run:
    if isinstance(config, DistillRun):
        kind, model, method = "student", config.student, config.method
    else:
        kind, model, method = "teacher", config.model, LABELS_ALONE
    backend = select_backend(config.loss, device)
    data = build_data(config.data)
    for warning in on_main(partial(look, data, own=config.data.name == "folder")):
        say(f"warning: {warning}")
    num_classes, crop_size = len(data.classes), config.data.crop_size
    teacher: nn.Module | None = None
    teacher_tap: list[str] = []
    if isinstance(config, DistillRun) and METHODS[method].needs_teacher:
        trusted = [*tap_paths(config.trust_architecture), config.student.architecture]
        teacher, teacher_tap, source = load_teacher(config.teacher, data, trusted)
        say(f"teacher: {source}\n  {describe(teacher, Taps(teacher_tap), crop_size)}")
        teacher.to(device)
    origin: Origin | None = None
    if (folder := config.continue_from) is not None:
        output = Path(config.output).resolve()
        if output in (Path(folder).resolve(), Path(folder).resolve().parent):
            raise ValueError(f"continue_from must be another folder than output, got {folder} for both")
        # A run that is resumed starts from itself, and the folder need not be there any more.
        origin = Origin(config.output if start.resume else folder, model)
        check_classes(str(origin.path), origin.checkpoint, data)
        model = origin.model
    seed_generators(config.schedule.seed)  # here, so that the teacher leaves the student's initialisation alone
    with main_first():
        network, loaded = build_network(model, num_classes, load_weights=origin is None)
    taps = Taps(model.tap, teacher_tap, model.auxiliary_tap if model.auxiliary_weight else None)
    say(f"{kind}: {origin or loaded}\n  {describe(network, taps, crop_size)}")
    distiller = build_distiller(
        network.to(device),
        teacher,
        method,
        config.loss,
        num_classes,
        crop_size,
        taps,
        auxiliary_weight=model.auxiliary_weight,
    )
    if origin is not None and not start.resume:
        origin.load_into(distiller)
    return Run(config, distiller.to(device), data, model, backend)


def _announce(run: Run, device: torch.device) -> None:
    method = run.config.get("method", "cross-entropy")
    processes = f"{world_size()} processes of " if world_size() > 1 else ""
    say(
        f"{run.kind} into {run.output}: {method}, {run.schedule.steps} steps of {run.schedule.batch_size} images, "
        f"seed {run.schedule.seed}, {device} ({processes}{torch.get_num_threads()} threads), "
        f"loss backend {run.loss_backend}"
    )
    say(recipe(run))


def _prepare(run: Run, start: _Start) -> None:
    if start.overwrite:  # only now: nothing is lost to a configuration that cannot run
        clear_output(run.output)
    if not start.resume:
        write_text(run.output / CONFIG, yaml.safe_dump(run.config, sort_keys=False))


def select_backend(config: LossConfig, device: torch.device) -> str:
    """Name of the backend that will compute the losses. Raises ValueError, with the reason, where it cannot run."""
    try:
        return hetero_kernels.select_backend(config.backend, device.type)
    except RuntimeError as error:
        raise ValueError(f"loss.backend: {error}") from error


def describe(network: nn.Module, taps: Taps, image_size: tuple[int, int]) -> str:
    """A line with the network's size and the shapes of taps and logits for a crop; raises as `shapes.probe`."""
    output = probe(network, taps.of_student(), image_size)
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    maps = dict(zip(taps.of_student(), output.maps, strict=True))
    shapes = [f"tap {path} {tuple(maps[path].shape[1:])}" for path in tap_paths(taps.student)]
    if taps.auxiliary is not None:
        shapes.append(f"auxiliary head on {taps.auxiliary} {tuple(maps[taps.auxiliary].shape[1:])}")
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
    started = [name for name in (LAST, older(Path(LAST), 1).name, BEST, METRICS) if (folder / name).exists()]
    if started and not start.resume and not start.overwrite:
        raise ValueError(
            f"{folder} holds a run already ({', '.join(started)}): --resume continues it, --overwrite replaces it, "
            f"--output names another folder"
        )
    return start
