"""Questions apart from their passages, for a model that reads each on its own.

A passage longer than a row goes into several rows that overlap, so nothing of it is cut.  Shapes: B questions, Q tokens
of the longest, R rows, T tokens, 8 features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .base import HostList
from .reading_features import NUM_FEATURES, passage_features
from .reading_windows import RowWindow, answer_tokens
from .records import ReadingRecord
from .tokenizers import Tokenizer
from .tokenizers.interface import Span
from .windows import check_windows, whole_in, windows_over


@dataclass(frozen=True)
class PassageBatches:
    """Batches for a model that says of every token whether an answer begins or ends there, see `PassageCollator`.

    Attributes:
        max_length: most tokens of a row.
        stride: tokens from one row of a passage to the next; None takes half of a row.
        features: compute the hand-made features.
        half_ascii: letters and digits count half in the length of an answer.

    Raises:
        InputError: a value out of range.
    """

    max_length: int = 256
    stride: int | None = None
    features: bool = False
    half_ascii: bool = False

    def __post_init__(self) -> None:
        check_windows(self.max_length, self.stride or 1, "data.batches")

    def collator(self, tokenizer: Tokenizer) -> "PassageCollator":
        """The function from records to a batch.

        Raises:
            InputError: a tokenizer without [CLS] and [SEP].
        """
        if tokenizer.cls_id is None or tokenizer.sep_id is None:
            raise InputError("data.tokenizer: it has no [CLS] and [SEP]; use one of BERT's kind")
        return PassageCollator(tokenizer, self)

    def model_arguments(self) -> dict[str, Any]:
        """`num_features`."""
        return {"num_features": NUM_FEATURES if self.features else 0}


@dataclass(frozen=True)
class PassageCollator:
    """Records to a batch.

    The batch holds `questions` and `question_mask` (B, Q); `ids`, `mask` and, True where an answer may begin or end,
    `places` (R, T); `starts` and `ends` (R, T), 1 where an answer does; `lengths` (R, T), how long each token counts;
    `features` (R, T, 8) if wanted; `owners` (R,), the record that a row belongs to; `num_tokens`; `records`, and a
    `RowWindow` for each row in `windows`.
    """

    tokenizer: Tokenizer
    options: PassageBatches

    def __call__(self, records: list[ReadingRecord]) -> dict[str, Any]:
        """Encode, cut into rows, mark the answers and fill up."""
        questions = [self._units(record.question) for record in records]
        rows, owners, windows, answers, features = [], [], [], [], []
        size = self.options.max_length
        for owner, record in enumerate(records):
            passages = [self._units(passage) for passage in record.passages]
            known = self._features(record, questions[owner][1], [spans for _, spans in passages])
            for number, (ids, spans) in enumerate(passages):
                targets = answer_tokens(record, number, spans)
                for window in windows_over(len(ids), size, self.options.stride or max(1, size // 2)):
                    inside = slice(*window)
                    rows.append(ids[inside])
                    owners.append(owner)
                    windows.append(RowWindow(number, 0, tuple(spans[inside])))
                    answers.append([(a - window[0], b - window[0]) for a, b in targets if whole_in(window, a, b)])
                    features.append(known[number][inside] if known else None)
        ids, mask = _stack(rows, self.tokenizer.pad_id or 0)
        asked, question_mask = _stack([ids for ids, _ in questions], self.tokenizer.pad_id or 0)
        starts, ends, lengths = (np.zeros(ids.shape, dtype=np.float32) for _ in range(3))
        table = np.zeros((*ids.shape, NUM_FEATURES), dtype=np.float32) if self.options.features else None
        for row, (window, targets) in enumerate(zip(windows, answers, strict=True)):
            passage = records[owners[row]].passages[window.passage]
            lengths[row, : len(window.spans)] = [self._length(passage[start:end]) for start, end in window.spans]
            for first, last in targets:
                starts[row, first] = ends[row, last] = 1
            if table is not None:
                table[row, : len(window.spans)] = features[row]
        return {
            "questions": torch.from_numpy(asked),
            "question_mask": torch.from_numpy(question_mask),
            "ids": torch.from_numpy(ids),
            "mask": torch.from_numpy(mask),
            "places": torch.from_numpy(mask & (lengths > 0)),
            "starts": torch.from_numpy(starts),
            "ends": torch.from_numpy(ends),
            "lengths": torch.from_numpy(lengths),
            **({} if table is None else {"features": torch.from_numpy(table)}),
            "owners": torch.tensor(owners),
            "num_tokens": int(mask.sum() + question_mask.sum()),
            "records": HostList(records),
            "windows": HostList(windows),
        }

    def _units(self, text: str) -> tuple[list[int], list[Span]]:
        ids, spans = self.tokenizer.encode(text)
        return ids[1:-1], spans[1:-1]

    def _features(self, record: ReadingRecord, asked: list[Span], spans: list[list[Span]]) -> list[np.ndarray]:
        if not self.options.features:
            return []
        question = [record.question[start:end].lower() for start, end in asked]
        passages = [
            [text[start:end].lower() for start, end in found]
            for text, found in zip(record.passages, spans, strict=True)
        ]
        return passage_features(question, passages)

    def _length(self, token: str) -> float:
        return 0.5 if self.options.half_ascii and token.isascii() and token.isalnum() else float(bool(token))


def _stack(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of each row, one column at least, and where they are."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), max(1, lengths.max())), pad_id)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.arange(ids.shape[1]) < lengths[:, None]
