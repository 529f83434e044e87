"""The generators that a run draws from, own networks' too: torch's, NumPy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Start all generators of this process, on its GPUs too, at a seed from 0 on. (Order and augmentation of images
    depend on the configured seed and the step alone.) Raises ValueError for a seed that torch does not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"schedule.seed must lie in 0 to 2^63 - 1, got {seed}")
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
