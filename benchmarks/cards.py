"""The GPUs of the predictions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Vendor's figures: multiprocessors, boost clock in GHz, GB/s; of a multiprocessor float32 lanes, and
    multiplications of its tensor cores in tf32, a clock."""

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    float32_lanes: int
    tensor_multiplications: int


CARDS = (
    Card("A100 40 GB", "sm_80", 108, 1.41, 1555, 64, 512),
    Card("H100 SXM", "sm_90", 132, 1.98, 3350, 128, 1024),
    Card("RTX 4090", "sm_89", 128, 2.52, 1008, 128, 128),
)
