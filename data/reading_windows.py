"""Questions beside windows of their passages, for an encoder that takes both in one row.

A row is `[CLS] question [SEP] window [SEP]`; what is longer than a row goes into several that overlap, so nothing of a
passage is cut.  Shapes: B questions, R rows, T tokens, P targets of a row.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .base import HostList
from .records import Answer, ReadingRecord
from .tokenizers import Tokenizer
from .tokenizers.interface import Span
from .windows import Window, check_windows, whole_in, windows_over

log = logging.getLogger(__name__)

NO_TARGET = -1
"""Fills up the targets of a row in a batch."""
NO_ANSWER = (0, 0)
"""Target of a row without an answer: it begins and ends at [CLS]."""
QUESTION, PASSAGE, SHARED = range(3)
"""Segments; a token is shared when it stands in the question as well."""


@dataclass(frozen=True)
class WindowBatches:
    """Batches for a model that points at the first and the last token of an answer, see `WindowCollator`.

    Attributes:
        max_length: most tokens of a row.
        stride: tokens from one window of a passage to the next; None takes half of a window. An answer that is no
            longer than what two windows share is whole in one of them.
        max_question: most tokens of a question; the rest of a longer one is left out, which is said once.
        mark_shared: give tokens of a passage that the question has, too, a segment of their own: what an encoder
            without pretraining cannot learn from few rows.

    Raises:
        InputError: a value out of range.
    """

    max_length: int = 512
    stride: int | None = None
    max_question: int = 64
    mark_shared: bool = False

    def __post_init__(self) -> None:
        if self.max_question < 1:
            raise InputError(f"data.batches.max_question={self.max_question}: use 1 or more")
        if self.max_length < self.max_question + 4:
            raise InputError(
                f"data.batches.max_length={self.max_length}: use {self.max_question + 4} or more, for a question of "
                "max_question tokens, three special ones and a window"
            )
        if self.stride is not None:
            check_windows(self.max_length - 3 - self.max_question, self.stride, "data.batches")

    def collator(self, tokenizer: Tokenizer, training: bool = False) -> "WindowCollator":
        """The function from records to a batch.

        Raises:
            InputError: a tokenizer without [CLS] and [SEP].
        """
        if tokenizer.cls_id is None or tokenizer.sep_id is None:
            raise InputError("data.tokenizer: it has no [CLS] and [SEP]; use one of BERT's kind")
        return WindowCollator(tokenizer, tokenizer.cls_id, tokenizer.sep_id, self)

    def model_arguments(self) -> dict[str, Any]:
        """`num_segments` and `max_length`."""
        return {"num_segments": SHARED + self.mark_shared, "max_length": self.max_length}

    def source_files(self) -> list[Path]:
        """None."""
        return []


@dataclass(frozen=True)
class RowWindow:
    """What a row shows of a passage.

    Attributes:
        passage: its number among those of the question.
        first: place of the window's first token in the row.
        spans: characters of each token of the window.
    """

    passage: int
    first: int
    spans: tuple[Span, ...]

    def characters(self, first: int, last: int) -> Span:
        """Start and exclusive end, in the passage, of what lies between two places of the row."""
        return self.spans[first - self.first][0], self.spans[last - self.first][1]

    def answer(self, record: ReadingRecord, first: int, last: int) -> Answer:
        """What a record says there."""
        start, end = self.characters(first, last)
        return Answer(record.passages[self.passage][start:end], start, self.passage)


@dataclass(frozen=True)
class WindowCollator:
    """Records to a batch.

    The batch holds `ids`, `mask` and `segments` (R, T); `places` (R, T), True where an answer may begin or end;
    `targets` (R, P, 2), first and last token of every answer that is whole in the row, `NO_ANSWER` where none is,
    filled up with -1; `owners` (R,), the record that a row belongs to; `num_tokens`; `records`, and a `RowWindow` for
    each row in `windows`.
    """

    tokenizer: Tokenizer
    cls_id: int
    sep_id: int
    options: WindowBatches

    def __call__(self, records: list[ReadingRecord]) -> dict[str, Any]:
        """Encode, cut into windows, mark the answers and fill up."""
        rows, owners, targets, windows = [], [], [], []
        for owner, record in enumerate(records):
            for tokens, question_length, window, found in self._rows(record):
                rows.append((tokens, question_length))
                owners.append(owner)
                windows.append(window)
                targets.append(found)
        lengths = np.array([len(tokens) for tokens, _ in rows])
        ids = np.full((len(rows), lengths.max()), self.tokenizer.pad_id or 0)
        segments = np.zeros_like(ids)
        places = np.zeros(ids.shape, dtype=bool)
        for number, ((tokens, question_length), window) in enumerate(zip(rows, windows, strict=True)):
            ids[number, : len(tokens)] = tokens
            segments[number, window.first : len(tokens)] = PASSAGE
            inside = slice(window.first, window.first + len(window.spans))
            places[number, inside] = [end > start for start, end in window.spans]
            if self.options.mark_shared:
                asked = set(tokens[1 : 1 + question_length]) - {self.tokenizer.unk_id}
                shared = [token in asked for token in tokens[inside]]
                segments[number, inside] += np.array(shared, dtype=int) * (SHARED - PASSAGE)
        return {
            "ids": torch.from_numpy(ids),
            "mask": torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]),
            "segments": torch.from_numpy(segments),
            "places": torch.from_numpy(places),
            "targets": _stack(targets),
            "owners": torch.tensor(owners),
            "num_tokens": int(lengths.sum()),
            "records": HostList(records),
            "windows": HostList(windows),
        }

    def _rows(self, record: ReadingRecord) -> list[tuple[list[int], int, RowWindow, list[tuple[int, int]]]]:
        """Ids, tokens of the question, window and targets of each row of a question."""
        asked = self.tokenizer.encode(record.question)[0][1:-1]
        most = self.options.max_question
        if len(asked) > most:
            _say_once(f"of a question of {len(asked)} tokens the first {most} are read; see data.batches.max_question")
            asked = asked[:most]
        head = [self.cls_id, *asked, self.sep_id]
        size = self.options.max_length - len(head) - 1
        found = []
        for passage, text in enumerate(record.passages):
            encoded = self.tokenizer.encode(text)
            ids, spans = encoded[0][1:-1], encoded[1][1:-1]
            answers = answer_tokens(record, passage, spans)
            for window in windows_over(len(ids), size, self.options.stride or max(1, size // 2)):
                inside = slice(*window)
                tokens = [*head, *ids[inside], self.sep_id]
                targets = _targets(answers, window, len(head))
                found.append((tokens, len(asked), RowWindow(passage, len(head), tuple(spans[inside])), targets))
        return found


def answer_tokens(record: ReadingRecord, passage: int, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """First and last token of every answer in a passage: the fewest tokens that hold all its characters."""
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    found = {}
    for answer in record.answers:
        if answer.passage == passage and answer.start is not None and answer.end is not None:
            first, last = bisect_right(ends, answer.start), bisect_left(starts, answer.end) - 1
            if first <= last:
                found[first, last] = None
    return list(found)


def _targets(answers: Sequence[tuple[int, int]], window: Window, first: int) -> list[tuple[int, int]]:
    """Answers that are whole in a window, by places of a row in which the window begins at `first`."""
    shift = first - window[0]
    whole = [(start + shift, end + shift) for start, end in answers if whole_in(window, start, end)]
    return whole or [NO_ANSWER]


def _stack(targets: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Targets of each row as (R, P, 2)."""
    stacked = np.full((len(targets), max(map(len, targets)), 2), NO_TARGET)
    for row, found in zip(stacked, targets, strict=True):
        row[: len(found)] = found
    return torch.from_numpy(stacked)


@cache
def _say_once(text: str) -> None:
    log.warning(text)
