"""Trained networks: what a checkpoint holds, as a network, with the data set and the options it was trained with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from hetero_kernels import Distiller
from heteroakd.config.commands import CheckpointUse
from heteroakd.config.groups import EvaluationConfig, LossConfig, ModelConfig, TeacherConfig, from_dict, to_dict
from heteroakd.data import DataConfig, SegmentationData, build_data, reading
from heteroakd.evaluation.metrics import how_measured
from heteroakd.methods import objective_of
from heteroakd.networks.shapes import tap_paths
from heteroakd.networks.weights import SUFFIXES, is_weights_file
from heteroakd.networks.zoo import build_network
from heteroakd.system.distributed import choose_device, say
from heteroakd.system.files import LAST
from heteroakd.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_latest, load_state


class Trained(NamedTuple):
    """A network in use, and what its run says of data set and evaluation, with other options in their places."""

    path: str
    checkpoint: Checkpoint
    network: nn.Module
    """In eval mode on the device."""
    data: DataConfig
    """See `saved_data`."""
    evaluation: EvaluationConfig
    """See `choose_evaluation`."""
    align_corners: bool
    """Of the interpolation of its logits."""

    @property
    def measured(self) -> dict[str, Any]:
        """How a mIoU of it is measured."""
        return how_measured(self.data, self.evaluation)

    def build_data(self) -> SegmentationData:
        """The data set, which need not be here before. Raises CheckpointError where it has other classes."""
        data = build_data(self.data)
        check_classes(self.path, self.checkpoint, data)
        return data


def load_trained(
    use: CheckpointUse,
    device_name: str,
    data: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> Trained:
    """The network of a checkpoint on a device, to be used on `data` by `evaluation`, where these are given; raises as
    `restore_network`."""
    device, path = choose_device(device_name, use.threads), use.checkpoint
    checkpoint = load_checkpoint(path)
    network = restore_network(path, checkpoint, use.trust_architecture).to(device).eval()
    options = choose_evaluation(evaluation, checkpoint)
    align_corners = from_dict(LossConfig, checkpoint.config["loss"], path).logits_align_corners
    return Trained(path, checkpoint, network, saved_data(path, checkpoint, use.root, data), options, align_corners)


def check_trusted(path: str, model: ModelConfig, trusted: Sequence[str] | str) -> None:
    """Raises CheckpointError where a file names a function to import and call that the user's options do not name."""
    if ":" in model.architecture and model.architecture not in tap_paths(trusted):
        raise CheckpointError(
            f"{path}: its network is what {model.architecture!r} returns for the options {model.options}, as the file "
            f"says and none of your options does. Only if you trust it: --trust_architecture {model.architecture}"
        )


def restore_network(path: str, checkpoint: Checkpoint, trusted: Sequence[str] | str = ()) -> nn.Module:
    """The network that a checkpoint holds; nothing is downloaded.

    Raises CheckpointError where it is not one of ours, and its import path none of those `trusted`.
    """
    model = from_dict(ModelConfig, checkpoint.model, path)
    check_trusted(path, model, trusted)
    network, _ = build_network(model, len(checkpoint.classes), load_weights=False)
    load_state(network.load_state_dict, checkpoint.network, path)
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


def choose_evaluation(given: dict[str, Any] | None, checkpoint: Checkpoint) -> EvaluationConfig:
    """The options of the checkpoint's own run, with those given in their places; says so where they differ.

    Raises ValueError for options that an evaluation does not have.
    """
    saved = from_dict(EvaluationConfig, checkpoint.config["evaluation"], "checkpoint")
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


def load_teacher(
    config: TeacherConfig, data: SegmentationData, trusted: Sequence[str] | str
) -> tuple[nn.Module, list[str], str]:
    """The network to distil from, the paths of its taps, and where it comes from.

    Raises CheckpointError as `check_classes` and `restore_network` do of a checkpoint, WeightsError where a file of
    weights does not cover the network, ValueError for a network without trained weights.
    """
    if config.model is None:
        checkpoint = load_checkpoint(config.checkpoint)
        check_classes(config.checkpoint, checkpoint, data)
        network = restore_network(config.checkpoint, checkpoint, trusted)
        tap = from_dict(ModelConfig, checkpoint.model, config.checkpoint).tap if config.tap is None else config.tap
        source = f"{config.checkpoint}, step {checkpoint.step}, mIoU {checkpoint.metrics['miou']:.4f}"
        return network, tap_paths(tap), source
    if ":" not in config.model.architecture and not is_weights_file(config.model.weights):
        raise ValueError(
            f"teacher.model.weights must be a file {', '.join(SUFFIXES)} with the trained network, "
            f"got {config.model.weights!r}"
        )
    network, loaded = build_network(config.model, len(data.classes), whole=True)
    taps = tap_paths(config.model.tap if config.tap is None else config.tap)
    return network, taps, f"{loaded}\n  its classes are taken to be the data set's: {', '.join(data.classes)}"


def files_digest(data: SegmentationData, root: str | None) -> str:
    """What tells the files of a data set from others, wherever its root is: a digest of their names below it; empty for
    a set without files."""
    parts = [reading.files_of(part.source) for part in (data.train, data.val)]
    names = [[[os.path.relpath(file, root) for file in pair] for pair in part.pairs] if part else [] for part in parts]
    return hashlib.blake2b(json.dumps(names).encode(), digest_size=8).hexdigest() if any(names) else ""


def may_differ(checkpoint: Checkpoint, files: str) -> set[str]:
    """Options that do not make another run of a checkpoint's; of the same `files_digest`, the data set's root too."""
    moved = {"data.root"} if files and checkpoint.files == files else set()
    return {"runtime", "output", "trust_architecture"} | moved


class Origin:
    """What a run that trains on starts from: another run's network, and what was trained beside it.

    Args:
        folder: of the run, or the path of a checkpoint. model: the network as the run to come is to have it.

    Raises CheckpointError where it cannot be read or holds another network, ValueError for weights of another origin.
    """

    def __init__(self, folder: str, model: ModelConfig) -> None:
        self.path, self.checkpoint = load_latest(
            Path(folder) / LAST if Path(folder).is_dir() else Path(folder), lambda error: say(f"passed over: {error}")
        )
        there = from_dict(ModelConfig, self.checkpoint.model, str(self.path))
        if model.weights not in (None, there.weights):
            raise ValueError(
                f"weights must be null, as the network is that of continue_from {self.path}, or {there.weights!r}, as "
                f"that run had them; got {model.weights!r}"
            )
        for name in ("architecture", "encoder", "options"):
            ours, theirs = to_dict(model)[name], to_dict(there)[name]
            if ours != theirs:
                raise CheckpointError(
                    f"continue_from: {self.path} has another network: {name} ({theirs!r} there, {ours!r} now)"
                )
        self.model = replace(model, weights=there.weights, weights_strict=there.weights_strict)
        """The network, as it is built: what normalises its images depends on where its weights came from at first."""

    def __str__(self) -> str:
        metrics = self.checkpoint.metrics
        return f"trains on from {self.path}, step {self.checkpoint.step}, mIoU {metrics['miou']:.4f}"

    def load_into(self, distiller: Distiller) -> None:
        """Network, and auxiliary head and projectors where both runs have them. Raises CheckpointError where they do
        not fit."""
        objective, saved = objective_of(distiller), self.checkpoint
        parts = [(distiller.student, saved.network), (objective.auxiliary, saved.auxiliary)]
        for part, state in [*parts, (objective.criterion if objective.pairs else None, saved.loss)]:
            if part is not None and state:
                load_state(part.load_state_dict, state, str(self.path))
