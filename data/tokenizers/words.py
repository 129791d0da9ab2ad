"""Words of jieba's dictionary, with letters and digits one by one: the units of a model that knows words as wholes."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

from ...errors import InputError
from .files import CONFIG_FILE, VOCAB_FILE, read_object, read_vocabulary
from .interface import Encoded, Span
from .vocabulary import SPECIAL_TOKENS, VocabularyTokenizer, hash_of

CLASS = "WordTokenizer"


class WordTokenizer(VocabularyTokenizer):
    """Words to ids, with [CLS] before and [SEP] after the text.

    A word that is written in letters or digits is cut into these, so that a number is as long as it has digits; white
    space belongs to no token.

    Args:
        vocabulary: tokens in the order of their ids.

    Raises:
        InputError: a special token is missing or a token occurs twice.
    """

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, min_count: int = 1) -> Self:
        """Build the vocabulary from texts: special tokens, then words seen `min_count` times, most first.

        Raises:
            ImportError: rjieba is not installed.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text[start:end].lower() for start, end in words_of(text))
        kept = sorted((w for w, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
        return cls([*SPECIAL_TOKENS, *(word for word in kept if word not in SPECIAL_TOKENS)])

    @property
    def options(self) -> dict[str, bool]:
        """None."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write `vocab.txt`, and `tokenizer_config.json` which names this class."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCAB_FILE).write_bytes("".join(f"{token}\n" for token in self.vocabulary).encode("utf-8"))
        (folder / CONFIG_FILE).write_text(json.dumps({"tokenizer_class": CLASS}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or broken.
        """
        path = Path(folder) / CONFIG_FILE
        if read_object(path).get("tokenizer_class") != CLASS:
            raise InputError(f"{path}: not that of a {CLASS}; save the tokenizer again")
        return cls(read_vocabulary(Path(folder) / VOCAB_FILE))

    def encode(self, text: str) -> Encoded:
        """Turn a text into the ids of its words and the character span of each; [CLS] and [SEP] have (0, 0)."""
        spans = words_of(text)
        ids = [self.id_of(text[start:end].lower()) for start, end in spans]
        return [self.cls_id, *ids, self.sep_id], [(0, 0), *spans, (0, 0)]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode` for each of the texts."""
        return [self.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """A hash of scheme and vocabulary: equal where the same text gives the same ids."""
        return hash_of([CLASS, *self.vocabulary])

    def _join(self, tokens: list[str]) -> str:
        return "".join(tokens)


def words_of(text: str) -> list[Span]:
    """Cut a text into words, letters and digits.

    Raises:
        ImportError: rjieba is not installed.
    """
    spans: list[Span] = []
    for word, start, end in _jieba().tokenize(text, hmm=False):
        if word.isspace():
            continue
        if word.isascii():
            spans += [(place, place + 1) for place in range(start, end) if not text[place].isspace()]
        else:
            spans.append((start, end))
    return spans


@cache
def _jieba() -> Any:
    try:
        import rjieba
    except ImportError as error:
        raise ImportError(f"{CLASS} needs rjieba: pip install rjieba") from error
    return rjieba
