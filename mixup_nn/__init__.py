"""MixUp and CutMix for PyTorch: exact arithmetic, one graph under torch.compile."""

from . import functional, sampling
from ._criterion import MixUpCriterion
from ._mix import Mix
from ._modules import CutMix, Mixer, MixUp, RandomChoice

__all__ = ["CutMix", "Mix", "MixUp", "MixUpCriterion", "Mixer", "RandomChoice", "functional", "sampling"]
__version__ = "0.1.0"
