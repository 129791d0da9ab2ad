"""The Transformer and its parts: attention, positions, masks, blocks, stacks, heads, caches."""

from .attention import Attention, Context, entropy_factor
from .blocks import FeedForward, TransformerBlock
from .cache import Cache, Memory
from .config import TransformerConfig
from .decoder import CachedDecoder
from .embeddings import Embedding, Table
from .masks import Visibility, visibility
from .packing import encode
from .positions import position_angles, rotate, sinusoids
from .residual import ResidualConstants, residual_constants
from .transformer import EncoderDecoder, Layers, Transformer, take_last_norm, unshared
from .weights import from_pretrained, to_pretrained

__all__ = [
    "Attention",
    "Cache",
    "CachedDecoder",
    "Context",
    "Embedding",
    "EncoderDecoder",
    "FeedForward",
    "Layers",
    "Memory",
    "ResidualConstants",
    "Table",
    "Transformer",
    "TransformerBlock",
    "TransformerConfig",
    "Visibility",
    "encode",
    "entropy_factor",
    "from_pretrained",
    "position_angles",
    "residual_constants",
    "rotate",
    "sinusoids",
    "take_last_norm",
    "to_pretrained",
    "unshared",
    "visibility",
]
