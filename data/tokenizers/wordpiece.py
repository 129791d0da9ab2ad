"""WordPiece as in BERT: words and Chinese characters, cut into the longest pieces that the vocabulary holds.

Source: Devlin et al., BERT (https://arxiv.org/abs/1810.04805), its `tokenization.py`. Compared with:
`BertTokenizerFast` of transformers, equal ids.
"""

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ...errors import InputError
from .files import CONFIG_FILE, VOCAB_FILE, read_object, read_scheme, read_vocabulary, write_object
from .interface import Encoded, Span
from .library import run
from .vocabulary import UNK, VocabularyTokenizer, hash_of

CONTINUES = "##"
MAX_WORD = 100
"""A longer word is unknown."""
JSON_SCHEME = {
    "model.type": ("WordPiece",),
    "model.unk_token": (UNK,),
    "model.continuing_subword_prefix": (CONTINUES,),
    "model.max_input_chars_per_word": (MAX_WORD,),
    "normalizer.type": ("BertNormalizer",),
    "normalizer.clean_text": (True,),
    "normalizer.lowercase": (True, False),
    "normalizer.strip_accents": (True, False, None),
    "pre_tokenizer.type": ("BertPreTokenizer",),
}


class WordPieceTokenizer(VocabularyTokenizer):
    """Text to pieces of words, with [CLS] before and [SEP] after it.

    Control, format and private-use characters and U+FFFD are dropped, as BERT does it, and no span begins or ends with
    them. Combining marks that are stripped belong to the span of the character before them. All other characters but
    spaces lie in the span of a token, [UNK] included: a word is unknown as a whole if one of its pieces is, or if it is
    longer than 100 characters. Pieces of one character (a Hangul syllable, a capital I with a dot) share its span.

    Args:
        vocabulary: tokens in the order of their ids.
        lowercase: fold to lower case first.
        strip_accents: take combining marks away first; None does so where `lowercase` is set, as BERT does.

    Raises:
        InputError: a special token is missing or a token occurs twice.
    """

    tokenizer_class = "BertTokenizer"
    """The name that folders of published models use for this scheme."""
    splits_chinese = True
    """Whether every Chinese character is a word, before words are looked up."""

    def __init__(self, vocabulary: Sequence[str], *, lowercase: bool = True, strip_accents: bool | None = None) -> None:
        super().__init__(vocabulary)
        self.lowercase = lowercase
        self.strip_accents = lowercase if strip_accents is None else strip_accents
        model = models.WordPiece(self._ids, unk_token=UNK, max_input_chars_per_word=MAX_WORD)
        self._backend = tokenizers.Tokenizer(model)
        self._backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self.splits_chinese,
            strip_accents=self.strip_accents,
            lowercase=self.lowercase,
        )
        self._backend.pre_tokenizer = self._pre_tokenizer()

    @classmethod
    def from_vocab(cls, path: str | Path, *, lowercase: bool = True, strip_accents: bool | None = None) -> Self:
        """Read one token a line (`vocab.txt` as BERT has it).

        Raises:
            InputError: no such file, not UTF-8, an empty line, a repeated token, a missing special token.
        """
        return cls._checked(read_vocabulary(path), path, lowercase=lowercase, strip_accents=strip_accents)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json` of BERT's kind; tokens added to its vocabulary keep their ids, no text gives them.

        Raises:
            InputError: the file is missing, broken, or of another kind.
        """
        wanted = JSON_SCHEME | {"normalizer.handle_chinese_chars": (cls.splits_chinese,)}
        vocabulary, content = read_scheme(path, wanted)
        lowercase, strip_accents = (content["normalizer"].get(name) for name in ("lowercase", "strip_accents"))
        return cls._checked(vocabulary, path, lowercase=lowercase, strip_accents=strip_accents)

    @classmethod
    def _checked(
        cls, vocabulary: Sequence[str], path: str | Path, *, lowercase: bool, strip_accents: bool | None
    ) -> Self:
        try:
            return cls(vocabulary, lowercase=lowercase, strip_accents=strip_accents)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @property
    def options(self) -> dict[str, bool]:
        """`lowercase` and `strip_accents`."""
        return {"lowercase": self.lowercase, "strip_accents": self.strip_accents}

    def save(self, folder: str | Path) -> None:
        """Write `vocab.txt` and `tokenizer_config.json`, which transformers reads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(token + "\n" for token in self.vocabulary)
        (folder / VOCAB_FILE).write_bytes(text.encode("utf-8"))
        config = {
            "tokenizer_class": self.tokenizer_class,
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
        }
        write_object(config, folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `vocab.txt` and, where there is one, `tokenizer_config.json`: what `save` or transformers wrote.

        Raises:
            InputError: a file is missing or broken.
        """
        path = Path(folder) / CONFIG_FILE
        config = read_object(path) if path.is_file() else {}
        options = {"lowercase": config.get("do_lower_case", True), "strip_accents": config.get("strip_accents")}
        return cls.from_vocab(Path(folder) / VOCAB_FILE, **options)

    def encode(self, text: str) -> Encoded:
        """Turn a text into ids and the character span (start, exclusive end) of each.

        [CLS] and [SEP] have the span (0, 0).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode` for each of the texts, with the threads of the library."""
        return [
            ([self.cls_id, *encoding.ids, self.sep_id], [(0, 0), *with_marks(text, encoding.offsets), (0, 0)])
            for text, encoding in zip(texts, run(self._backend, texts), strict=True)
        ]

    def fingerprint(self) -> str:
        """A hash of scheme, vocabulary and options: equal where the same text gives the same ids."""
        return hash_of([self.tokenizer_class, self.lowercase, self.strip_accents, *self.vocabulary])

    def _pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.BertPreTokenizer()

    def _join(self, tokens: list[str]) -> str:
        """Write spaces where English has them: between words and after punctuation, not beside wide characters."""
        pieces = tokens[:1]
        for left, right in pairwise(tokens):
            if right.startswith(CONTINUES) and right != CONTINUES:
                pieces.append(right.removeprefix(CONTINUES))
            else:
                pieces.append(" " + right if _space_between(left[-1], right[0]) else right)
        return "".join(pieces)


def with_marks(text: str, spans: Sequence[Span]) -> list[Span]:
    """Stretch spans over the combining marks behind them that no token stands for."""
    stretched = []
    for (start, end), (limit, _) in pairwise([*spans, (len(text), len(text))]):
        while end < limit and unicodedata.category(text[end]) == "Mn":
            end += 1
        stretched.append((start, end))
    return stretched


def _space_between(left: str, right: str) -> bool:
    if unicodedata.east_asian_width(left) in "WF" or unicodedata.east_asian_width(right) in "WF":
        return False
    if left in ".,:" and right.isdigit():
        return False
    return right.isalnum() and (left.isalnum() or left in ".,:;!?")
