"""Fused losses for distilling segmentation networks across architectures (HeteroAKD, AAAI 2025).

``HeteroAKDLoss`` is the drop-in module, ``functional`` the losses as functions, ``reference`` their definition in
eager PyTorch. ``show_config()`` prints which backends there are, ``select_backend`` says which runs.
"""

from . import functional, reference
from .config import show_config
from .loss import HeteroAKDLoss, HeteroAKDOutput, PixelProjector
from .ops.backends import select as select_backend

__all__ = [
    "HeteroAKDLoss",
    "HeteroAKDOutput",
    "PixelProjector",
    "functional",
    "reference",
    "select_backend",
    "show_config",
]
