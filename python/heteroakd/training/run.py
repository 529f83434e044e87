"""What one training run is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hetero_kernels import Distiller
from heteroakd.config.groups import EvaluationConfig, OptimizerConfig, RuntimeConfig, ScheduleConfig
from heteroakd.data import SegmentationData


@dataclass
class Run:
    """All that one training run is made of."""

    kind: Literal["teacher", "student"]
    """What the checkpoints will say."""
    distiller: Distiller
    """Network to train, with its loss and, where the method has one, the frozen teacher."""
    data: SegmentationData
    """Data set."""
    schedule: ScheduleConfig
    """How long, and on which batches."""
    optimizer: OptimizerConfig
    """How the network is updated."""
    runtime: RuntimeConfig
    """Where the run happens and what it writes."""
    output: Path
    """Folder for everything that is written."""
    config: dict[str, Any]
    """The whole configuration, for checkpoints."""
    model: dict[str, Any]
    """The network's ModelConfig, for checkpoints."""
    loss_backend: str
    """Name of the backend that computes the losses."""
    evaluation: EvaluationConfig
    """How the network is applied to the val images."""
    align_corners: bool = False
    """How evaluation interpolates the logits."""


def due(step: int, every: int) -> bool:
    """Whether what happens after every so many steps (0: never) follows this one."""
    return every > 0 and step % every == 0
