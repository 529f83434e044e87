"""Training batches that depend on seed and step alone: the same for every method, worker count and continued run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from heteroakd.system.distributed import rank, world_size
from heteroakd.system.signals import leave_signals_to_the_parent


class SampleKey(NamedTuple):
    """Which image, and the seed of its augmentation."""

    image: int
    seed: int


@dataclass(eq=False)
class SeededSamples(Dataset[tuple[Tensor, Tensor]]):
    """A data set whose augmentation, drawn from torch's generator, is a function of the key instead of the past."""

    dataset: Dataset[tuple[Tensor, Tensor]]

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):  # the training process's own draws (dropout) stay out of it
            torch.default_generator.manual_seed(key.seed)
            return self.dataset[key.image]


@dataclass(eq=False)
class BatchSampler(Sampler[list[SampleKey]]):
    """The batches of steps `first_step` to `steps` - 1.

    The images come in one endless stream of epochs, each a permutation of its own; a batch may span two of them, so
    that no image is left out and no batch is short. Of several processes each gets its part of every batch, so that
    together they see what a single one would.
    """

    dataset_size: int
    """Number of images."""
    batch_size: int
    """Images of a batch, of all processes together."""
    steps: int
    """Of the whole run."""
    seed: int
    """Of permutations and augmentations."""
    first_step: int = 0
    """Where a continued run starts."""
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.dataset_size < 1 or self.batch_size < 1:
            got = f"{self.dataset_size} and {self.batch_size}"
            raise ValueError(f"dataset and batch must hold at least one image, got {got}")
        first, last = ((self.rank + end) * self.batch_size // self.world_size for end in (0, 1))
        self.part = range(first, last)

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.first_step, self.steps):
            batch = []
            for position in (step * self.batch_size + number for number in self.part):
                if position // self.dataset_size != epoch:
                    epoch = position // self.dataset_size
                    generator = torch.Generator().manual_seed(mix("order", self.seed, epoch))
                    order = torch.randperm(self.dataset_size, generator=generator)
                index = int(order[position % self.dataset_size])
                batch.append(SampleKey(index, mix("augmentation", self.seed, position)))
            yield batch


def mix(purpose: str, *numbers: int) -> int:
    """A 63-bit seed; hashed, so that neighbouring numbers give unrelated streams."""
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def training_batches(
    dataset: Dataset[tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    steps: int,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """This process's part of the batches of steps `first_step` to `steps` - 1: images float32 [B, 3, H, W], labels
    int64 [B, H, W], `batch_size` counting the images of all processes."""
    size = len(dataset)  # type: ignore[arg-type]
    sampler = BatchSampler(size, batch_size, steps, seed, first_step, rank(), world_size())
    return DataLoader(
        SeededSamples(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator().manual_seed(seed),  # else the loader draws from torch's own, and shifts dropout
    )
