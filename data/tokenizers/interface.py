"""What a tokenizer offers, whatever its scheme."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, Self

Span = tuple[int, int]
"""Start and exclusive end in characters (code points) of the text as it was given; (0, 0) for a special token."""
Encoded = tuple[list[int], list[Span]]
"""Ids, and the span of each."""


class Tokenizer(Protocol):
    """Text to ids and back.

    Spans are in order of the text and refer to the text as given, not to a lower-cased or otherwise normalised form.
    Text is only ever text: `[SEP]` or `<|endoftext|>` written in it are encoded as the characters they are, never as
    the special token. Ids of special tokens are None where the scheme has no such token.
    """

    @property
    def pad_id(self) -> int | None:
        """Fills up a batch. A scheme without it takes any id, and the mask keeps these places out."""
        ...

    @property
    def unk_id(self) -> int | None:
        """Stands for what the vocabulary lacks."""
        ...

    @property
    def cls_id(self) -> int | None:
        """Stands before a text."""
        ...

    @property
    def sep_id(self) -> int | None:
        """Stands after a text."""
        ...

    @property
    def mask_id(self) -> int | None:
        """Stands for a token to be predicted."""
        ...

    def __len__(self) -> int:
        """Number of ids."""
        ...

    def encode(self, text: str) -> Encoded:
        """Turn a text into ids, with the special tokens of the scheme around them, and the span of each."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode` for each of the texts."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into a text; special tokens leave none. To quote from a known text take `text_of`."""
        ...

    def token_of(self, index: int) -> str:
        """The token with an id, as the vocabulary writes it."""
        ...

    def id_of(self, token: str) -> int:
        """The id of a token, as the vocabulary writes it; `unk_id`, or `InputError`, where the vocabulary lacks it."""
        ...

    def fingerprint(self) -> str:
        """A hash of vocabulary and options: equal where the same text gives the same ids."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the files from which `load` makes an equal tokenizer."""
        ...

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote."""
        ...

    def restrict(self, ids: Iterable[int]) -> tuple[Self, list[int]]:
        """Keep these ids and those the scheme cannot do without.

        Returns:
            The smaller tokenizer, and the kept ids in ascending order: its id i is what was `kept[i]`.
        """
        ...


class PairTokenizer(Tokenizer, Protocol):
    """A tokenizer whose scheme knows pairs of texts."""

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int], list[Span]]:
        """Turn two texts into ids, segments (0 or 1 for each id) and spans, each in the text of its segment."""
        ...


def text_of(text: str, spans: Iterable[Span]) -> str:
    """Quote from a text what a run of tokens stands for, with all that lies between them.

    Unlike decoding this loses nothing: no case, no accent, no space, no unknown character.
    """
    inner = [span for span in spans if span != (0, 0)]
    return text[inner[0][0] : inner[-1][1]] if inner else ""
