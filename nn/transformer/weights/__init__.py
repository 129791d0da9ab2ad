"""Weights in and out: published layouts, strictly, and changes to the tables of a Transformer that has weights."""

from .configs import layout_of
from .families import LAYOUTS
from .layouts import Layout
from .pretrained import from_pretrained, to_pretrained
from .vocabulary import extend_positions, resize_vocabulary, subset_vocabulary, widen_keys

__all__ = [
    "LAYOUTS",
    "Layout",
    "extend_positions",
    "from_pretrained",
    "layout_of",
    "resize_vocabulary",
    "subset_vocabulary",
    "to_pretrained",
    "widen_keys",
]
