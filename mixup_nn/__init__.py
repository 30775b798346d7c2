"""MixUp for PyTorch: exact arithmetic, one graph under torch.compile."""

from . import functional, sampling
from ._criterion import MixUpCriterion
from ._mixup import MixUp
from .sampling import Mix

__all__ = ["Mix", "MixUp", "MixUpCriterion", "functional", "sampling"]
__version__ = "0.1.0"
