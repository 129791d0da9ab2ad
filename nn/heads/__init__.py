"""Task heads: from hidden states to scores."""

from .answer_span import PairHead, SpanHead
from .conditional_norm import ConditionalLayerNorm
from .crf import LinearChainCRF
from .cross_match import CrossAttention, CrossMatch
from .global_pointer import HEADS, EfficientGlobalPointer, GlobalPointer, HeadKind
from .half_pointer import HalfPointer, bordered_loss
from .scores import CompactScores, FactoredScores, ProductScores
from .start_end import StartEndHead, decode_start_end, start_end_classes, start_end_loss

__all__ = [
    "HEADS",
    "CompactScores",
    "ConditionalLayerNorm",
    "CrossAttention",
    "CrossMatch",
    "EfficientGlobalPointer",
    "FactoredScores",
    "GlobalPointer",
    "HalfPointer",
    "HeadKind",
    "LinearChainCRF",
    "PairHead",
    "ProductScores",
    "SpanHead",
    "StartEndHead",
    "bordered_loss",
    "decode_start_end",
    "start_end_classes",
    "start_end_loss",
]
