"""What the tokenizers with a `vocab.txt` share: the special tokens of BERT and a list of tokens."""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from ...errors import InputError
from .interface import Encoded, Span

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP)


class VocabularyTokenizer(ABC):
    """A list of tokens, with [CLS] before and [SEP] after a text. `mask_id` is None where there is no [MASK].

    Args:
        vocabulary: tokens in the order of their ids.

    Raises:
        InputError: a special token is missing or a token occurs twice.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        if missing := [token for token in SPECIAL_TOKENS if token not in self._ids]:
            raise InputError(f"the vocabulary lacks {', '.join(missing)}; add each on a line of its own")
        if len(self._ids) != len(self.vocabulary):
            token, count = Counter(self.vocabulary).most_common(1)[0]
            raise InputError(f"the vocabulary holds {token!r} {count} times; keep one line of each token")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (self._ids[token] for token in SPECIAL_TOKENS)
        self.mask_id = self._ids.get(MASK)

    @property
    @abstractmethod
    def options(self) -> dict[str, bool]:
        """The keyword arguments that make an equal tokenizer of the same vocabulary."""

    @abstractmethod
    def encode(self, text: str) -> Encoded:
        """Turn a text into ids and the span of each."""

    @abstractmethod
    def _join(self, tokens: list[str]) -> str:
        """Write tokens as a text."""

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.vocabulary)

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[tuple[str, ...]]]:
        """Travel to another process as vocabulary and options, and be built anew there."""
        return functools.partial(type(self), **self.options), (self.vocabulary,)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int], list[Span]]:
        """Turn two texts into ids of `[CLS] first [SEP] second [SEP]`, segments and spans.

        Segments are 0 up to the first [SEP] and 1 after it; a span lies in the text of its segment.
        """
        (ids, spans), (more_ids, more_spans) = self.encode(first), self.encode(second)
        segments = [0] * len(ids) + [1] * (len(more_ids) - 1)
        return ids + more_ids[1:], segments, spans + more_spans[1:]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into a text; [PAD], [CLS] and [SEP] leave none."""
        silent = {self.pad_id, self.cls_id, self.sep_id}
        return self._join([self.token_of(index) for index in ids if index not in silent])

    def token_of(self, index: int) -> str:
        """The token with an id.

        Raises:
            InputError: there is no such id.
        """
        return token_at(self.vocabulary, index)

    def id_of(self, token: str) -> int:
        """The id of a token, that of [UNK] where the vocabulary lacks it."""
        return self._ids.get(token, self.unk_id)

    def restrict(self, ids: Iterable[int]) -> tuple[Self, list[int]]:
        """Keep these ids and the special tokens; see `Tokenizer.restrict`."""
        special = {self._ids[token] for token in (*SPECIAL_TOKENS, MASK) if token in self._ids}
        kept = sorted(special.union(ids))
        return type(self)([self.token_of(index) for index in kept], **self.options), kept


def token_at(vocabulary: Sequence[str], index: int) -> str:
    """Look up an id.

    Raises:
        InputError: there is no such id.
    """
    if not 0 <= index < len(vocabulary):
        raise InputError(f"id {index} is not in the vocabulary; its ids go from 0 to {len(vocabulary) - 1}")
    return vocabulary[index]


def hash_of(content: Any) -> str:
    """A short hash of JSON data."""
    return hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()[:16]
