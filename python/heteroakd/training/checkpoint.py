"""Checkpoints: one file with all that evaluation, teaching and an exact continuation need, never half-written; the
generators that a run draws from, own networks' too, among it."""

from __future__ import annotations

import hashlib
import os
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from heteroakd.system.files import LAST, atomic_file, older

FORMAT = "heteroakd checkpoint"
VERSION = 2


class CheckpointError(ValueError):
    """A file that is missing, damaged, not a checkpoint of this trainer, or a checkpoint of another run."""


@dataclass
class Checkpoint:
    """The state of a run after `step` optimiser steps; tensors, numbers, strings and containers of them only."""

    kind: Literal["teacher", "student"]
    """Which command wrote it."""
    step: int
    """Optimiser steps taken."""
    config: dict[str, Any]
    """The run's configuration, as `config.to_dict` gives it."""
    model: dict[str, Any]
    """The part of the configuration that builds the network: a ModelConfig as a dictionary."""
    classes: list[str]
    """K class names, in the order of the labels."""
    network: dict[str, Tensor]
    """state_dict of the network: of its moving average, where the run has one."""
    loss: dict[str, Tensor]
    """state_dict of the loss: the projectors."""
    optimizer: dict[str, Any]
    """state_dict of the optimiser."""
    random_states: list[dict[str, Any]]
    """From `random_states`, one per process."""
    metrics: dict[str, float]
    """miou of the evaluation at this step (NaN where there was none) and best_miou of the run so far."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """state_dict of the gradient scaler; empty where the precision needs none."""
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    """state_dict of the auxiliary head, where the run has one."""
    updated: dict[str, Tensor] = field(default_factory=dict)
    """state_dict of the network that the optimiser updates, where `network` is its moving average; else empty."""
    teacher: str = ""
    """`state_digest` of the teacher, where the run has one."""
    files: str = ""
    """`trained.files_digest` of the data set, where it has files."""


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, keep: int = 1) -> None:
    """Write `checkpoint` atomically, with up to `keep` - 1 older ones beside it, see `atomic_file`.

    Raises OSError, naming the file, where it cannot be written; all that was there then stays as it was.
    """
    contents = {entry.name: getattr(checkpoint, entry.name) for entry in fields(Checkpoint)}
    try:
        with atomic_file(path, keep=keep) as file:
            torch.save({"format": FORMAT, "version": VERSION, **contents}, file)
    except (OSError, RuntimeError) as error:  # of a full disk torch raises RuntimeError, after the OSError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        left = "the one before it is intact" if path.is_file() else "there is none before it"
        raise OSError(
            f"{path}: the checkpoint of step {checkpoint.step} cannot be written ({cause}); {left}"
        ) from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the last one of a run's folder, onto the CPU, executing nothing that is in it
    (`weights_only=True`).

    Raises CheckpointError, naming the file, where it is missing, truncated, otherwise damaged or not written by
    `save_checkpoint`.
    """
    path = Path(path)
    path = path / LAST if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()  # torch does not look for flipped bits
    except Exception as error:  # zip, pickle and OS errors: torch documents no common kind
        # Of a foreign pickle torch says how to load it after all: no advice to pass on.
        first_line = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint ({type(error).__name__}: {first_line})"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, its record {damaged!r} is not what was written")
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a file of torch, but not a checkpoint that heteroakd wrote")
    if contents.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {contents.get('version')}, expected {VERSION}")
    optional = {entry.name for entry in fields(Checkpoint) if (entry.default, entry.default_factory) != (MISSING,) * 2}
    known = [entry.name for entry in fields(Checkpoint)]
    if missing := [name for name in known if name not in contents and name not in optional]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}")
    return Checkpoint(**{name: contents[name] for name in known if name in contents})


def load_latest(path: Path, complain: Callable[[str], None]) -> tuple[Path, Checkpoint]:
    """The checkpoint at `path` or, where that is missing or damaged, the youngest that was kept before it, and where
    it was. `complain` is told of every file passed over.

    Raises CheckpointError, as `load_checkpoint` does for `path`, where none of them can be read.
    """
    pattern = re.compile(rf"{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}")
    matches = [pattern.fullmatch(name) for name in os.listdir(path.parent)] if path.parent.is_dir() else []
    ages = sorted(int(match[1]) for match in matches if match)
    errors: list[CheckpointError] = []
    for candidate in (older(path, age) for age in (0, *ages)):
        try:
            checkpoint = load_checkpoint(candidate)
        except CheckpointError as error:
            errors.append(error)
            continue
        for passed_over in errors:
            complain(str(passed_over))
        return candidate, checkpoint
    raise errors[0]


def load_state(target: Callable[[dict[str, Any]], object], state: dict[str, Any], source: str) -> None:
    """Apply a strict `load_state_dict`. Raises CheckpointError, naming `source`, where names or shapes differ."""
    try:
        target(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: does not fit the configured network: {error}") from error


def state_digest(state: dict[str, Any]) -> str:
    """What tells trained networks apart: a digest of the names and values in a state_dict."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:  # a module's own extra state
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


def check_same_run(path: Path, saved: dict[str, Any], current: dict[str, Any], *, may_differ: set[str]) -> None:
    """Refuse to continue another run: raises CheckpointError naming the options, as `a.b`, that differ; `may_differ`
    names groups and options."""
    saved, current = _flatten(saved), _flatten(current)
    names = sorted(saved.keys() | current.keys())
    differing = [
        f"{name} ({saved.get(name)!r} there, {current.get(name)!r} now)"
        for name in names
        if may_differ.isdisjoint({name, name.partition(".")[0]}) and saved.get(name) != current.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path}: cannot be resumed with other options: {'; '.join(differing)}. "
            "Its own are in config.yaml beside it; another --output begins another run, from this one's network by "
            "continue_from"
        )


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def seed_generators(seed: int) -> None:
    """Start all generators of this process, on its GPUs too, at a seed from 0 on. (Order and augmentation of images
    depend on the configured seed and the step alone.)"""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # as many bits as it takes


def random_states() -> dict[str, Any]:
    """States of this process's generators, of GPUs that of its own, if it uses one: of types that `weights_only=True`
    loads."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    name, keys, *rest = np.random.get_state()
    numpy = [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest]
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo what happened since `random_states`."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
