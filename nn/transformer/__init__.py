"""The Transformer and its parts: attention, positions, blocks, encoder."""

from .attention import SelfAttention, attention_mask
from .config import TransformerConfig
from .encoder import Encoder, TransformerBlock
from .rotary import position_angles, rotate, sinusoids

__all__ = [
    "Encoder",
    "SelfAttention",
    "TransformerBlock",
    "TransformerConfig",
    "attention_mask",
    "position_angles",
    "rotate",
    "sinusoids",
]
