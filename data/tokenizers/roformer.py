"""Words first: jieba cuts a text, words of the vocabulary stay whole, all else goes through WordPiece.

Source: Su et al., RoFormer (https://arxiv.org/abs/2104.09864), whose Chinese models are word-based, after WoBERT.
Compared with: `RoFormerTokenizerFast` of transformers, equal ids.
"""

import re
from collections.abc import Container, Iterator
from functools import partial

from tokenizers import PreTokenizedString, pre_tokenizers

from .interface import Span
from .wordpiece import WordPieceTokenizer

CHINESE = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f"
)
CHARACTER_OR_RUN = re.compile(rf"[{CHINESE}]|[^\s{CHINESE}]+")


class RoFormerTokenizer(WordPieceTokenizer):
    """Text to words, and to pieces of those the vocabulary lacks, with [CLS] before and [SEP] after it.

    Spans and options are those of `WordPieceTokenizer`. Words are found in the dictionary of rjieba, after folding to
    lower case, without its model for unknown words.

    Raises:
        ImportError: rjieba is not installed.
    """

    tokenizer_class = "RoFormerTokenizer"
    splits_chinese = False

    def _pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.PreTokenizer.custom(_Words(self._ids))


class _Words:
    """Cuts a text for WordPiece, as the library calls it."""

    def __init__(self, vocabulary: Container[str]) -> None:
        try:
            import rjieba
        except ImportError as error:
            raise ImportError("RoFormerTokenizer needs rjieba: pip install rjieba") from error
        self._words = partial(rjieba.tokenize, hmm=False)
        self._vocabulary = vocabulary

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(lambda _, part: [part[start:end] for start, end in self._cuts(str(part))])

    def _cuts(self, text: str) -> Iterator[Span]:
        for word, start, end in self._words(text):
            if word in self._vocabulary:
                yield start, end
            else:
                yield from ((start + cut.start(), start + cut.end()) for cut in CHARACTER_OR_RUN.finditer(word))
