"""Fused losses for distilling segmentation networks across architectures (HeteroAKD, AAAI 2025).

``HeteroAKDLoss`` is the drop-in module, ``functional`` the losses as functions, ``reference`` their definition in
eager PyTorch. ``show_config()`` prints which backends there are, ``available_backends`` says which can run for a device
and ``select_backend`` which does.
"""

from . import functional, reference
from .config import show_config
from .loss import HeteroAKDLoss, HeteroAKDOutput, PixelProjector
from .ops.backends import available as available_backends
from .ops.backends import select as select_backend

__all__ = [
    "HeteroAKDLoss",
    "HeteroAKDOutput",
    "PixelProjector",
    "available_backends",
    "functional",
    "reference",
    "select_backend",
    "show_config",
]
