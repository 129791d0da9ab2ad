"""Byte-level byte-pair encoding as in GPT-2: any text is a sequence of bytes, frequent runs of which are one token.

Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), its `encoder.py`. Compared with:
`GPT2TokenizerFast` of transformers, equal ids.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ...errors import InputError
from .files import (
    BPE_VOCAB_FILE,
    CONFIG_FILE,
    MERGES_FILE,
    in_order,
    read_lines,
    read_object,
    read_scheme,
    write_object,
)
from .interface import Encoded
from .library import run
from .vocabulary import hash_of, token_at

END = "<|endoftext|>"
BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())
"""The printable characters by which vocabularies write the 256 bytes."""
JSON_SCHEME = {
    "model.type": ("BPE",),
    "model.ignore_merges": (False, None),
    "normalizer.type": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True, None),
}

Merge = tuple[str, str]


class ByteLevelBPETokenizer:
    """Text to runs of bytes and back, exactly: `decode(encode(text)[0]) == text` for every text.

    There is no padding, unknown, [CLS], [SEP] or [MASK] token, and nothing is put around a text. `end_id` is the id of
    `<|endoftext|>`, which stands between documents and ends a generated text. A batch is filled up with any id, say
    `end_id`; the mask keeps these places out. Spans leave no gap, spaces belong to them. A token that covers part of a
    character has the whole of it in its span, so that the spans of neighbours may share one character.

    Args:
        vocabulary: tokens in the order of their ids, bytes written by the printable characters of GPT-2.
        merges: pairs of tokens to be joined, first ones first.

    Raises:
        InputError: one of the bytes or `<|endoftext|>` is missing, a token occurs twice, or a merge joins or makes what
            is not in the vocabulary.
    """

    pad_id = unk_id = cls_id = sep_id = mask_id = None

    def __init__(self, vocabulary: Sequence[str], merges: Iterable[Sequence[str]]) -> None:
        self.vocabulary = tuple(vocabulary)
        self.merges: tuple[Merge, ...] = tuple((left, right) for left, right in merges)
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        if missing := sorted({*BYTES, END} - self._ids.keys()):
            raise InputError(f"the vocabulary lacks {' '.join(missing)}; it needs the 256 bytes and {END}")
        if len(self._ids) != len(self.vocabulary):
            token, count = Counter(self.vocabulary).most_common(1)[0]
            raise InputError(f"the vocabulary holds {token!r} {count} times; keep one of each token")
        for left, right in self.merges:
            if not {left, right, left + right} <= self._ids.keys():
                raise InputError(f"the vocabulary lacks a part or the result of the merge {left!r} {right!r}; add it")
        self.end_id = self._ids[END]
        self._backend = tokenizers.Tokenizer(models.BPE(self._ids, list(self.merges)))
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._decoder = decoders.ByteLevel()

    def save(self, folder: str | Path) -> None:
        """Write `vocab.json`, `merges.txt` and `tokenizer_config.json`, which transformers reads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_object(self._ids, folder / BPE_VOCAB_FILE)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges)]
        (folder / MERGES_FILE).write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
        write_object({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}, folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `vocab.json` and `merges.txt`: what `save` wrote or as GPT-2 was published.

        Raises:
            InputError: a file is missing or broken.
        """
        path = Path(folder) / MERGES_FILE
        merges = []
        for number, line in enumerate(read_lines(path), 1):
            if line.startswith("#version") or not line:
                continue
            pair = line.split(" ")
            if len(pair) != 2:
                raise InputError(f"{path}:{number}: {line!r:.60} is not a merge; write two tokens with a space between")
            merges.append(pair)
        path = Path(folder) / BPE_VOCAB_FILE
        return cls._checked(in_order(read_object(path), path), merges, path)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json` of GPT-2's kind; tokens added to its vocabulary keep their ids, no text gives them.

        Raises:
            InputError: the file is missing, broken, or of another kind.
        """
        vocabulary, content = read_scheme(path, JSON_SCHEME)
        pairs = content["model"].get("merges", [])
        return cls._checked(vocabulary, [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs], path)

    @classmethod
    def _checked(cls, vocabulary: Sequence[str], merges: Iterable[Sequence[str]], path: str | Path) -> Self:
        try:
            return cls(vocabulary, merges)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.vocabulary)

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[tuple[str, ...], tuple[Merge, ...]]]:
        """Travel to another process as vocabulary and merges, and be built anew there."""
        return type(self), (self.vocabulary, self.merges)

    def encode(self, text: str) -> Encoded:
        """Turn a text into ids and the character span (start, exclusive end) of each."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode` for each of the texts, with the threads of the library."""
        return [(encoding.ids, encoding.offsets) for encoding in run(self._backend, texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into a text; `<|endoftext|>` leaves none, bytes that are no whole character give U+FFFD."""
        return self._decoder.decode([self.token_of(index) for index in ids if index != self.end_id])

    def token_of(self, index: int) -> str:
        """The token with an id, bytes written by the printable characters of GPT-2.

        Raises:
            InputError: there is no such id.
        """
        return token_at(self.vocabulary, index)

    def id_of(self, token: str) -> int:
        """The id of a token, bytes written by the printable characters of GPT-2.

        Raises:
            InputError: the vocabulary lacks it.
        """
        if token not in self._ids:
            raise InputError(f"id_of({token!r}): not in the vocabulary; use encode for text")
        return self._ids[token]

    def fingerprint(self) -> str:
        """A hash of vocabulary and merges: equal where the same text gives the same ids."""
        return hash_of([self.vocabulary, self.merges])

    def restrict(self, ids: Iterable[int]) -> tuple[Self, list[int]]:
        """Keep these ids, the bytes, `<|endoftext|>` and what kept tokens are merged from; see `Tokenizer.restrict`.

        A text all of whose tokens are kept is encoded as before: the merges on the way to them stay in their order.
        """
        kept = {*BYTES, END, *(self.token_of(index) for index in ids)}
        makes: dict[str, list[Merge]] = {}
        for merge in self.merges:
            makes.setdefault("".join(merge), []).append(merge)
        waiting = list(kept)
        while waiting:
            parts = {part for merge in makes.get(waiting.pop(), ()) for part in merge} - kept
            kept |= parts
            waiting.extend(parts)
        order = sorted(self._ids[token] for token in kept)
        merges = [(left, right) for left, right in self.merges if left + right in kept]
        return type(self)([self.vocabulary[index] for index in order], merges), order
