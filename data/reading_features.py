"""What a word of a passage has to do with a question, in eight numbers.  Shapes: T words of a passage, Q of a question.

Source: https://kexue.fm/archives/5409.  Checked against: its worked example, and plain Python.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_FEATURES = 8
NOTHING = -1
"""What a window holds beyond the ends of the passage."""
Floats = NDArray[np.float64]


def passage_features(question: Sequence[str], passages: Sequence[Sequence[str]]) -> list[Floats]:
    """Features of every word of every passage of a question, `(T, 8)` each.

    In order: whether the word occurs in the question; the share of the passages that hold it, its own left out in
    counting but not in dividing; how alike the question and the window of Q words around it are, as sets (Jaccard) and
    as sequences (edit distance / Q); and the last four again over characters, averaged over those of the word: whether
    it occurs, the share, both kinds of likeness.

    Args:
        question: its words.
        passages: words of each passage.
    """
    characters = [[*"".join(passage)] for passage in passages]
    asked = [*"".join(question)]
    by_word = _features(question, passages)
    by_character = _features(asked, characters)
    found = []
    for words, own, spread in zip(passages, by_word, by_character, strict=True):
        lengths = [len(word) for word in words]
        borders = np.cumsum([0, *lengths[:-1]]) if words else np.zeros(0, dtype=int)
        means = np.add.reduceat(spread, borders, axis=0) / np.array(lengths)[:, None] if words else spread
        found.append(np.concatenate((own, means), axis=1))
    return found


def set_likeness(question: Sequence[str], passage: Sequence[str]) -> Floats:
    """Jaccard index of the question and the window around each unit of the passage, both as sets, `(T,)`."""
    if not question or not passage:
        return np.zeros(len(passage))
    asked, windows = _windows(question, passage)
    windows = np.sort(windows, axis=1)
    is_new = np.diff(windows, axis=1, prepend=NOTHING) != 0  # what a window lacks at the ends is never new
    common = (is_new & np.isin(windows, asked)).sum(1)
    return common / (len(np.unique(asked)) + is_new.sum(1) - common)


def edit_distance(question: Sequence[str], passage: Sequence[str]) -> Floats:
    """Levenshtein distance of the question and the window around each unit, by the question's length, `(T,)`.

    All windows go through the table of distances together. What a window lacks at the ends of the passage is filled up
    with units that are taken away for nothing.
    """
    if not question or not passage:
        return np.zeros(len(passage))
    asked, windows = _windows(question, passage)
    steps = np.arange(len(asked) + 1)
    row = np.broadcast_to(steps, (len(windows), len(steps)))
    for unit in windows.T[:, :, None]:
        taken = row + (unit != NOTHING)
        taken[:, 1:] = np.minimum(taken[:, 1:], row[:, :-1] + (unit != asked))
        row = np.minimum.accumulate(taken - steps, axis=1) + steps  # units of the question that a window leaves out
    return row[:, -1] / len(asked)


def _features(question: Sequence[str], passages: Sequence[Sequence[str]]) -> list[Floats]:
    """The four kinds of features over one kind of units."""
    asked, held = set(question), [set(passage) for passage in passages]
    found = []
    for number, passage in enumerate(passages):
        others = [units for other, units in enumerate(held) if other != number]
        shares = {unit: sum(unit in units for units in others) / len(passages) for unit in held[number]}
        columns = (
            [float(unit in asked) for unit in passage],
            [shares[unit] for unit in passage],
            set_likeness(question, passage),
            edit_distance(question, passage),
        )
        found.append(np.stack([np.asarray(column, dtype=float) for column in columns], axis=1))
    return found


def _windows(question: Sequence[str], passage: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The question `(Q,)` and the window around each unit of the passage `(T, Q)` in numbers of units."""
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys([*question, *passage]))}
    size, length = len(question), len(passage)
    padded = np.full(length + size, NOTHING)
    padded[size // 2 : size // 2 + length] = [numbers[unit] for unit in passage]
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[:length]
    return np.array([numbers[unit] for unit in question]), windows
