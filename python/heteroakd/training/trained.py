"""Trained networks: what a checkpoint holds, as a network, with the data set and the options it was trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from heteroakd.config.groups import EvaluationConfig, LossConfig, ModelConfig, TeacherConfig, from_dict, to_dict
from heteroakd.data import DataConfig, SegmentationData, build_data
from heteroakd.networks.shapes import tap_paths
from heteroakd.networks.weights import SUFFIXES, is_weights_file
from heteroakd.networks.zoo import build_network
from heteroakd.system.distributed import choose_device, say
from heteroakd.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_state


def load_trained(
    path: str, data_options: dict[str, Any] | None, root: str | None, device_name: str, threads: int | None
) -> tuple[Checkpoint, nn.Module, SegmentationData]:
    """A checkpoint, its network in eval mode on the device, and the data set it is to be used on, see `saved_data`.

    Raises CheckpointError where the data set's classes are not those of the checkpoint.
    """
    checkpoint, network = load_network(path, device_name, threads)
    data = build_data(saved_data(path, checkpoint, root, data_options))
    check_classes(path, checkpoint, data)
    return checkpoint, network, data


def load_network(path: str, device_name: str, threads: int | None) -> tuple[Checkpoint, nn.Module]:
    """A checkpoint and its network in eval mode on the device, without its data set."""
    device = choose_device(device_name, threads)
    checkpoint = load_checkpoint(path)
    return checkpoint, restore_network(path, checkpoint).to(device).eval()


def restore_network(path: str, checkpoint: Checkpoint) -> nn.Module:
    """The network that a checkpoint holds; nothing is downloaded."""
    model = from_dict(ModelConfig, checkpoint.model, path)
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


def saved_loss(checkpoint: Checkpoint) -> LossConfig:
    """The loss options that the checkpoint was trained with."""
    return from_dict(LossConfig, checkpoint.config["loss"], "checkpoint")


def saved_evaluation(checkpoint: Checkpoint) -> EvaluationConfig:
    """The evaluation options of the run that wrote the checkpoint."""
    return from_dict(EvaluationConfig, checkpoint.config["evaluation"], "checkpoint")


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


def load_teacher(config: TeacherConfig, data: SegmentationData) -> tuple[nn.Module, list[str], str]:
    """The network to distil from, the paths of its taps, and where it comes from.

    Raises CheckpointError where a checkpoint's classes are not those of the data set, WeightsError where a file of
    weights does not cover the network, ValueError for a network without trained weights.
    """
    if config.model is None:
        checkpoint = load_checkpoint(config.checkpoint)
        check_classes(config.checkpoint, checkpoint, data)
        network = restore_network(config.checkpoint, checkpoint)
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
