"""Texts whose words have been replaced by numbers: a number is a token."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from ...errors import InputError
from .files import VOCAB_FILE, read_vocabulary
from .interface import Encoded
from .vocabulary import MASK, SPECIAL_TOKENS, VocabularyTokenizer, hash_of

SEPARATOR = "_"


class NumberTokenizer(VocabularyTokenizer):
    """Numbers with `_` between them to ids, with [CLS] before and [SEP] after the text; offsets leave the `_` out.

    Args:
        vocabulary: tokens in the order of their ids.

    Raises:
        InputError: a special token is missing or a token occurs twice.
    """

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, min_count: int = 1) -> Self:
        """Build the vocabulary from texts: special tokens, then numbers seen `min_count` times, most first."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text.split(SEPARATOR))
        kept = (number for number, count in counts.items() if count >= min_count)
        return cls([*SPECIAL_TOKENS, MASK, *sorted(kept, key=lambda number: (-counts[number], number))])

    @classmethod
    def from_vocab(cls, path: str | Path) -> Self:
        """Read one token a line.

        Raises:
            InputError: no such file, not UTF-8, an empty line, a repeated token, a missing special token.
        """
        try:
            return cls(read_vocabulary(path))
        except InputError as error:
            raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error

    @property
    def options(self) -> dict[str, bool]:
        """None."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write `vocab.txt`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCAB_FILE).write_text("".join(f"{token}\n" for token in self.vocabulary), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or broken.
        """
        return cls.from_vocab(Path(folder) / VOCAB_FILE)

    def encode(self, text: str) -> Encoded:
        """Turn a text of n numbers into n + 2 ids and the characters (start, exclusive end) of each."""
        ids, spans, start = [self.cls_id], [(0, 0)], 0
        for number in text.split(SEPARATOR):
            ids.append(self.id_of(number))
            spans.append((start, start + len(number)))
            start += len(number) + len(SEPARATOR)
        return [*ids, self.sep_id], [*spans, (0, 0)]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode` for each of the texts."""
        return [self.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """A hash of scheme and vocabulary: equal where the same text gives the same ids."""
        return hash_of([type(self).__name__, *self.vocabulary])

    def _join(self, tokens: list[str]) -> str:
        return SEPARATOR.join(tokens)
