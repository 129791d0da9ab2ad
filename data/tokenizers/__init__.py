"""Text to ids and back, every id with its span in the text; see `Tokenizer` for what all schemes share."""

from .bpe import ByteLevelBPETokenizer
from .characters import CharTokenizer
from .interface import Encoded, PairTokenizer, Span, Tokenizer, text_of
from .loading import load_tokenizer
from .roformer import RoFormerTokenizer
from .subset import vocabulary_subset
from .wordpiece import WordPieceTokenizer
from .words import WordTokenizer

__all__ = [
    "ByteLevelBPETokenizer",
    "CharTokenizer",
    "Encoded",
    "PairTokenizer",
    "RoFormerTokenizer",
    "Span",
    "Tokenizer",
    "WordPieceTokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "text_of",
    "vocabulary_subset",
]
