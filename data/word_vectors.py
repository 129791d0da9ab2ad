"""Vectors of words that were trained elsewhere, read from word2vec's text format and mapped into memory."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .arrays import Arrays, cached_arrays, open_arrays
from .dictionary import MAX_NAME_LENGTH, NameDictionary, lower_case

KIND = {"holds": "word vectors", "version": "1"}


class WordVectors:
    """Frozen vectors by word, in lower case; a word that is not there has the zero vector.

    Args:
        path: the file that `cached` has made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays = open_arrays(path, KIND)
        self._words = NameDictionary(arrays)
        self._vectors = arrays["vectors"]

    @classmethod
    def cached(cls, source: str | Path, cache_dir: str | Path | None = None) -> "WordVectors":
        """Open the file made of a text file: a line `NUMBER WIDTH`, then a word and its numbers a line.

        Raises:
            InputError: a line of another form.
        """
        return cls(cached_arrays(source, cache_dir, KIND, lambda path, _: _read(path)))

    def __reduce__(self) -> tuple[object, ...]:
        """Travel to another process as the name of the file."""
        return _open_once, (self.path,)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self._vectors.shape[1]

    def table(self, words: Iterable[str]) -> tuple[dict[str, int], NDArray[np.float32]]:
        """The row of each of these words in a table, and the table; row 0, of zeros, stands for unknown ones."""
        asked = list(dict.fromkeys(words))
        numbers = self._words.numbers([lower_case(word) for word in asked])
        known = numbers >= 0
        rows = np.where(known, np.cumsum(known), 0)
        table = np.zeros((1 + int(known.sum()), self.dim), dtype=np.float32)
        table[1:] = self._vectors[numbers[known]]
        return dict(zip(asked, rows.tolist(), strict=True)), table


def _read(path: Path) -> Arrays:
    vectors: dict[str, NDArray] = {}
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        width = _header(path, file.readline())
        for line, text in enumerate(file, 2):
            word, *numbers = text.rstrip("\n ").split(" ")
            try:
                vector = np.array(numbers, dtype=np.float32)
            except ValueError:
                vector = np.zeros(0, dtype=np.float32)
            if len(vector) != width or not 0 < len(word) <= MAX_NAME_LENGTH:
                raise InputError(f"{path}:{line}: use a word and {width} numbers, divided by single spaces")
            vectors.setdefault(lower_case(word), vector)  # the more frequent word comes first
    if not vectors:
        raise InputError(f"{path}: no vectors; write a word and its numbers a line")
    words = NameDictionary.build(vectors)
    return {**words.arrays, "vectors": np.stack([vectors[word] for word in sorted(vectors)])}


def _header(path: Path, line: str) -> int:
    parts = line.split()
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or parts == ["0", "0"]:
        raise InputError(f"{path}:1: {line[:40]!r}; use word2vec's text format, which begins with NUMBER WIDTH")
    return int(parts[1])


@lru_cache(maxsize=4)
def _open_once(path: Path) -> WordVectors:
    return WordVectors(path)
