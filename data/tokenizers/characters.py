"""One token per character: every position of the text is a position of the tokens, whatever the text holds."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

from ...errors import InputError
from ..files import read_text
from .files import TOKENIZER_FILE, VOCAB_FILE, read_vocabulary
from .interface import Encoded
from .vocabulary import SPECIAL_TOKENS, VocabularyTokenizer, hash_of

_ESCAPED = re.compile(r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}")


class CharTokenizer(VocabularyTokenizer):
    """Characters (code points) to ids, with [CLS] before and [SEP] after the text.

    White space, control characters and combining marks are tokens like any other, so character i of a text is always
    token i + 1. Only tokens of one character and the special ones are used; a longer entry of a given vocabulary (a
    BERT word or `##` piece) keeps its id and is never produced.

    Args:
        vocabulary: tokens in the order of their ids.
        lowercase: look characters up in lower case, where that is again one character.
        half_width: look characters up in their compatibility form (full-width letters and digits as plain ones, NFKC),
            where that is again one character.

    Raises:
        InputError: a special token is missing or a token occurs twice.
    """

    def __init__(self, vocabulary: Sequence[str], *, lowercase: bool = False, half_width: bool = False) -> None:
        super().__init__(vocabulary)
        self.lowercase = lowercase
        self.half_width = half_width
        self._lookup = _Lookup(self)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], *, min_count: int = 1, lowercase: bool = False, half_width: bool = False
    ) -> Self:
        """Build the vocabulary from texts: special tokens, then characters seen `min_count` times, most first."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        return cls.from_counts(counts, min_count=min_count, lowercase=lowercase, half_width=half_width)

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], *, min_count: int = 1, lowercase: bool = False, half_width: bool = False
    ) -> Self:
        """Build the vocabulary from how often each character was seen, see `from_texts`."""
        normal: Counter[str] = Counter()
        for character, count in counts.items():
            normal[normalise(character, lowercase, half_width)] += count
        kept = sorted((c for c, count in normal.items() if count >= min_count), key=lambda c: (-normal[c], c))
        return cls([*SPECIAL_TOKENS, *kept], lowercase=lowercase, half_width=half_width)

    @classmethod
    def from_vocab(cls, path: str | Path, *, lowercase: bool = False, half_width: bool = False) -> Self:
        """Read one token a line (`vocab.txt` as BERT has it, or as `save` writes it).

        Raises:
            InputError: no such file, not UTF-8, an empty line, a repeated token, a missing special token.
        """
        vocabulary = [_unescape(line) for line in read_vocabulary(path)]
        try:
            return cls(vocabulary, lowercase=lowercase, half_width=half_width)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @property
    def options(self) -> dict[str, bool]:
        """`lowercase` and `half_width`."""
        return {"lowercase": self.lowercase, "half_width": self.half_width}

    def save(self, folder: str | Path) -> None:
        """Write `vocab.txt` and the options into a folder, so that `load` gives an equal tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(_escape(token) + "\n" for token in self.vocabulary)
        (folder / VOCAB_FILE).write_bytes(text.encode("utf-8"))
        (folder / TOKENIZER_FILE).write_text(json.dumps(self.options) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or broken.
        """
        path = Path(folder) / TOKENIZER_FILE
        try:
            options = json.loads(read_text(path))
            lowercase, half_width = bool(options["lowercase"]), bool(options["half_width"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the options of a tokenizer ({error}); save the tokenizer again") from error
        return cls.from_vocab(Path(folder) / VOCAB_FILE, lowercase=lowercase, half_width=half_width)

    def encode(self, text: str) -> Encoded:
        """Turn a text of n characters into n + 2 ids and the character span (start, exclusive end) of each.

        [CLS] and [SEP] have the span (0, 0).
        """
        places = range(len(text) + 1)
        ids = [self.cls_id, *map(self._lookup.__getitem__, text), self.sep_id]
        return ids, [(0, 0), *pairwise(places), (0, 0)]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode` for each of the texts."""
        return [self.encode(text) for text in texts]

    def id_of(self, token: str) -> int:
        """The id of one character in its looked-up form or of a special token, that of [UNK] for any other."""
        return self._ids.get(normalise(token, self.lowercase, self.half_width), self.unk_id)

    def fingerprint(self) -> str:
        """A hash of vocabulary and options: equal where the same text gives the same ids."""
        return hash_of([self.lowercase, self.half_width, *self.vocabulary])

    def _join(self, tokens: list[str]) -> str:
        return "".join(tokens)


class _Lookup(dict[str, int]):
    """Ids of the characters met so far, so that each is normalised once."""

    def __init__(self, tokenizer: CharTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, character: str) -> int:
        return self.setdefault(character, self._tokenizer.id_of(character))


def normalise(character: str, lowercase: bool, half_width: bool) -> str:
    """Return the form under which a character is looked up; always one character, so that offsets stay."""
    forms = []
    if half_width:
        forms.append(lambda c: unicodedata.normalize("NFKC", c))
    if lowercase:
        forms.append(str.lower)
    for form in forms:
        changed = form(character)
        character = changed if len(changed) == 1 else character
    return character


def _escape(token: str) -> str:
    """Write a lone white-space, control or format character by its code point: it would not survive as a line."""
    if len(token) == 1 and (token.isspace() or not token.isprintable()):
        return f"\\u{ord(token):04x}" if ord(token) < 0x10000 else f"\\U{ord(token):08x}"
    return token


def _unescape(line: str) -> str:
    if _ESCAPED.fullmatch(line) and int(line[2:], 16) < 0x110000:
        return chr(int(line[2:], 16))
    return line
