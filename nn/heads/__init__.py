"""Task heads: from hidden states to scores."""

from .global_pointer import EfficientGlobalPointer, GlobalPointer
from .scores import FactoredScores

__all__ = ["EfficientGlobalPointer", "FactoredScores", "GlobalPointer"]
