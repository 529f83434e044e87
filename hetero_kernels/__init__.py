"""Fused losses for distilling segmentation networks across architectures (HeteroAKD, AAAI 2025).

``Distiller`` distils one network into another with a criterion; ``HeteroAKDLoss`` and ``SegmentationLoss`` are such
criteria and drop-in modules, ``functional`` the losses as functions, ``reference`` their definition in eager PyTorch.
``mean_over_processes`` and ``check_replicas`` are for training over several processes. ``show_config()`` prints which
backends there are, ``available_backends`` says which can run for a device and ``select_backend`` which does.
"""

from . import functional, reference
from .config import show_config
from .distiller import Distiller, DistillerOutput, MeanOverTaps
from .distributed import check_replicas, mean_over_processes
from .loss import HeteroAKDLoss, HeteroAKDOutput, PixelProjector, SegmentationLoss
from .ops.backends import available as available_backends
from .ops.backends import select as select_backend

__all__ = [
    "Distiller",
    "DistillerOutput",
    "HeteroAKDLoss",
    "HeteroAKDOutput",
    "MeanOverTaps",
    "PixelProjector",
    "SegmentationLoss",
    "available_backends",
    "check_replicas",
    "functional",
    "mean_over_processes",
    "reference",
    "select_backend",
    "show_config",
]
