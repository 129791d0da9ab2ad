"""A dictionary of up to millions of names, and all their occurrences in texts.  Shapes: N nodes, M names.

The names form a tree of characters, kept as a few arrays: nodes are numbered level by level, so that the children of a
node are neighbours in the order of their characters, and its entry says where they begin. Such arrays are built and
searched for many texts at once by NumPy, lie in a file that all processes map, and take 12 bytes a node.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .tokenizers.characters import normalise

MAX_NAME_LENGTH = 1000
TEXT_END = 0xFFFFFFFF
"""Stands after each text; no character has this number."""


@dataclass(frozen=True, slots=True)
class Occurrences:
    """Names found in texts, sorted by text, start and end.

    Attributes:
        text: number of the text.
        start: character at which the name begins.
        end: character after it.
        name: number of the name.
    """

    text: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    name: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.text)

    def where(self, kept: NDArray[np.bool_]) -> "Occurrences":
        """Those of them that are kept."""
        return Occurrences(self.text[kept], self.start[kept], self.end[kept], self.name[kept])


class NameDictionary:
    """Names by number, the number being their place in the order of code points.

    Args:
        arrays: `characters` (N,), the last character of each node's path; `children` (N + 1,), where the children of
            each node begin; `names` (N,), the name that ends there or -1; `roots`, the node of each first character.
    """

    def __init__(self, arrays: Mapping[str, NDArray]) -> None:
        self.arrays = {name: arrays[name] for name in ("characters", "children", "names", "roots")}
        self._characters, self._children, self._names, self._roots = self.arrays.values()
        self._size = int(self._names.max(initial=-1)) + 1

    @classmethod
    def build(cls, names: Iterable[str]) -> "NameDictionary":
        """Build the tree, level by level; names that are there twice count once.

        Raises:
            InputError: an empty name, or one of more than `MAX_NAME_LENGTH` characters.
        """
        ordered = sorted(set(names))
        lengths = np.fromiter(map(len, ordered), dtype=np.int64, count=len(ordered))
        for wrong in np.flatnonzero((lengths == 0) | (lengths > MAX_NAME_LENGTH))[:1]:
            raise InputError(
                f"NameDictionary: a name of {lengths[wrong]} characters ({ordered[wrong][:30]!r}); "
                f"use 1 to {MAX_NAME_LENGTH}"
            )
        codes = _codes("".join(ordered))
        starts = np.cumsum(lengths) - lengths
        characters, parents, ends = [np.zeros(1, np.uint32)], [], [np.full(1, -1, np.int32)]
        rows, parent, total, depth = np.arange(len(ordered)), np.zeros(len(ordered), np.int64), 1, 0
        while len(rows):
            code = codes[starts[rows] + depth]
            new = np.ones(len(rows), dtype=bool)
            new[1:] = (parent[1:] != parent[:-1]) | (code[1:] != code[:-1])
            node = np.cumsum(new) - 1
            depth += 1
            whole = lengths[rows] == depth
            end = np.full(int(new.sum()), -1, dtype=np.int32)
            end[node[whole]] = rows[whole]
            characters.append(code[new])
            parents.append(parent[new])
            ends.append(end)
            rows, parent = rows[~whole], node[~whole] + total
            total += len(end)
        if total > np.iinfo(np.int32).max:
            raise InputError(f"NameDictionary: {total} nodes do not fit; use fewer or shorter names")
        parented = np.concatenate(parents) if parents else np.zeros(0, np.int64)
        children = (np.searchsorted(parented, np.arange(total + 1)) + 1).astype(np.int32)
        letters = np.concatenate(characters)
        first = letters[children[0] : children[1]]
        roots = np.full(int(first.max(initial=0)) + 2, -1, dtype=np.int32)
        roots[first] = np.arange(children[0], children[1])
        return cls({"characters": letters, "children": children, "names": np.concatenate(ends), "roots": roots})

    def __len__(self) -> int:
        return self._size

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def find(self, texts: Sequence[str]) -> Occurrences:
        """All occurrences of all names, nested and overlapping ones too."""
        codes, begins = _joined(texts)
        places = np.arange(len(codes))
        found: list[tuple[NDArray, NDArray, NDArray]] = []
        node, depth = self._first(codes), 1
        places, node = places[node >= 0], node[node >= 0]
        while len(places):
            name = self._names[node]
            whole = name >= 0
            if whole.any():
                found.append((places[whole], places[whole] + depth, name[whole].astype(np.int64)))
            places, node = self._step(places, node, codes[places + depth])
            depth += 1
        if not found:
            return Occurrences(*(np.zeros(0, np.int64) for _ in range(4)))
        start, end, name = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((end, start))
        start, end, name = start[order], end[order], name[order]
        text = np.searchsorted(begins, start, side="right") - 1
        return Occurrences(text, start - begins[text], end - begins[text], name)

    def numbers(self, names: Sequence[str]) -> NDArray[np.int64]:
        """The number of each of these names, -1 for one that is not there."""
        codes, begins = _joined(names)
        result = np.full(len(names), -1, dtype=np.int64)
        node, depth = self._first(codes[begins]), 1
        rows, node = np.flatnonzero(node >= 0), node[node >= 0]
        while len(rows):
            code = codes[begins[rows] + depth]
            whole = code == TEXT_END
            result[rows[whole]] = self._names[node[whole]]
            rows, node = self._step(rows, node, code)
            depth += 1
        return result

    def _first(self, codes: NDArray[np.uint32]) -> NDArray[np.int32]:
        return self._roots[np.minimum(codes, len(self._roots) - 1)]  # the last entry is always -1

    def _step(
        self, places: NDArray[np.int64], node: NDArray[np.int32], code: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Go down by one character: the places that can, and the nodes they reach."""
        low, end = self._children[node], self._children[node + 1]
        inner = low < end
        if not inner.all():
            places, code, low, end = places[inner], code[inner], low[inner], end[inner]
        if not len(places):
            return places, low
        high = end - 1
        for _ in range(int((high - low).max()).bit_length()):
            middle = (low + high) >> 1
            below = self._characters[middle] < code
            low = np.where(below, np.minimum(middle + 1, high), low)
            high = np.where(below, high, middle)
        reached = self._characters[low] == code
        return places[reached], low[reached]


class _LowerCase(dict[int, str]):
    """Characters met so far in lower case, where that is again one character, so that places in a text stay."""

    def __missing__(self, code: int) -> str:
        return self.setdefault(code, normalise(chr(code), lowercase=True, half_width=False))


_LOWER_CASE = _LowerCase()


def lower_case(text: str) -> str:
    """A text of the same length in lower case, each character by itself (`str.lower` may lengthen a text, and writes a
    final sigma in another way)."""
    return text.lower() if text.isascii() else text.translate(_LOWER_CASE)


def max_match(length: int, words: Sequence[tuple[int, int]]) -> list[int]:
    """Which words to cover a text with, by their numbers and in its order: as many characters as possible, then few.

    Maximises -1 for each word and -100 for each character without; of equals, the longest word comes first.

    Args:
        length: of the text.
        words: start and exclusive end of each.
    """
    starting: dict[int, list[int]] = {}
    for number, (start, _) in enumerate(words):
        starting.setdefault(start, []).append(number)
    best, choice = [0] * (length + 1), [-1] * length
    for place in range(length - 1, -1, -1):
        best[place] = best[place + 1] - 100
        for number in starting.get(place, ()):
            end = words[number][1]
            chosen = choice[place]
            value = best[end] - 1
            if value > best[place] or (value == best[place] and (chosen < 0 or end > words[chosen][1])):
                best[place], choice[place] = value, number
    chosen, place = [], 0
    while place < length:
        if choice[place] < 0:
            place += 1
        else:
            chosen.append(choice[place])
            place = words[choice[place]][1]
    return chosen


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _joined(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """All texts as code points, `TEXT_END` after each, and where each begins."""
    codes = _codes("\0".join(texts) + "\0").copy()
    ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + 1)
    codes[ends - 1] = codes[-1] = TEXT_END
    return codes, np.concatenate([np.zeros(1, np.int64), ends])[: len(texts)]
