"""Questions apart from their passages, for a model that reads each on its own.

A passage longer than a row goes into several rows that overlap, so nothing of it is cut.  Shapes: B questions, Q tokens
of the longest, R rows, T tokens, 8 features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..errors import InputError
from .base import HostList
from .reading_features import NUM_FEATURES, passage_features
from .reading_windows import RowWindow, answer_tokens
from .records import ReadingRecord
from .segmentation import WordKind, segmenter, word_of_each_character
from .tokenizers import Tokenizer
from .tokenizers.interface import Span
from .windows import check_windows, whole_in, windows_over
from .word_vectors import WordVectors

Visits = Literal["all", "one"]
Units = tuple[list[int], list[Span]]
"""Ids of a text's tokens, and the characters of each."""


@dataclass(frozen=True)
class PassageBatches:
    """Batches for a model that says of every token whether an answer begins or ends there, see `PassageCollator`.

    Attributes:
        max_length: most tokens of a row.
        stride: tokens from one row of a passage to the next; None takes half of a row.
        features: compute the hand-made features.
        half_ascii: letters and digits count half in the length of an answer.
        visits: what a question is trained on each time: "all" its rows, or "one" row of one passage, drawn at random;
            of a passage longer than half a row, either its beginning or a piece of random length and place.
        unmarked: share of the answers in a passage that training passes over, at random.
        word_vectors: file in word2vec's text format: each token gets the vector of the word it begins in; None: none.
        words: what is a word to the vectors: "jieba" or "characters".
        cache_dir: where the vectors lie once they are read; None: see `cached_arrays`.

    Raises:
        InputError: a value out of range.
    """

    max_length: int = 256
    stride: int | None = None
    features: bool = False
    half_ascii: bool = False
    visits: Visits = "all"
    unmarked: float = 0.0
    word_vectors: str | None = None
    words: WordKind = "jieba"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_windows(self.max_length, self.stride or 1, "data.batches")
        if self.visits not in get_args(Visits):
            raise InputError(f"data.batches.visits={self.visits!r}: use one of {', '.join(get_args(Visits))}")
        if not 0 <= self.unmarked < 1:
            raise InputError(f"data.batches.unmarked={self.unmarked}: use a share from 0 to below 1")

    @cached_property
    def vectors(self) -> WordVectors | None:
        """The words' vectors, opened when first needed."""
        return None if self.word_vectors is None else WordVectors.cached(self.word_vectors, self.cache_dir)

    def collator(self, tokenizer: Tokenizer, training: bool = False) -> "PassageCollator":
        """The function from records to a batch.

        Raises:
            InputError: a tokenizer without [CLS] and [SEP], or a broken file of vectors.
        """
        if tokenizer.cls_id is None or tokenizer.sep_id is None:
            raise InputError("data.tokenizer: it has no [CLS] and [SEP]; use one of BERT's kind")
        return PassageCollator(tokenizer, self, self.vectors, training)

    def model_arguments(self) -> dict[str, Any]:
        """`num_features` and `word_dim`."""
        return {
            "num_features": NUM_FEATURES if self.features else 0,
            "word_dim": 0 if self.vectors is None else self.vectors.dim,
        }

    def source_files(self) -> list[Path]:
        """The file of vectors."""
        return [] if self.word_vectors is None else [Path(self.word_vectors)]


@dataclass(frozen=True)
class PassageCollator:
    """Records to a batch.

    The batch holds `questions` and `question_mask` (B, Q); `ids`, `mask` and, True where an answer may begin or end,
    `places` (R, T); `starts` and `ends` (R, T), 1 where an answer does; `lengths` (R, T), how long each token counts;
    `features` (R, T, 8) if wanted; `owners` (R,), the record that a row belongs to; `num_tokens`; `records`, and a
    `RowWindow` for each row in `windows`. With vectors of words there are `word_vectors` (W, V) and their rows,
    `question_words` (B, Q) and `words` (R, T); row 0, of zeros, is that of unknown words and padding.
    """

    tokenizer: Tokenizer
    options: PassageBatches
    vectors: WordVectors | None = None
    training: bool = False

    def __call__(self, records: list[ReadingRecord]) -> dict[str, Any]:
        """Encode, cut into rows, mark the answers and fill up."""
        questions = [self._units(record.question) for record in records]
        rows, owners, windows, answers, features = [], [], [], [], []
        for owner, record in enumerate(records):
            passages = [self._units(passage) for passage in record.passages]
            known = self._features(record, questions[owner][1], [spans for _, spans in passages])
            for number, (ids, spans) in self._visited(passages):
                targets = self._kept(answer_tokens(record, number, spans))
                for window in self._windows(len(ids)):
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
            **self._words(records, [spans for _, spans in questions], owners, windows, ids.shape, asked.shape),
            "owners": torch.tensor(owners),
            "num_tokens": int(mask.sum() + question_mask.sum()),
            "records": HostList(records),
            "windows": HostList(windows),
        }

    @property
    def draws(self) -> bool:
        """Whether a question shows one row, drawn at random."""
        return self.training and self.options.visits == "one"

    def _visited(self, passages: list[Units]) -> Iterable[tuple[int, Units]]:
        """The passages to make rows of, with their numbers."""
        if not self.draws or not passages:
            return enumerate(passages)
        number = int(torch.randint(len(passages), ()))
        return [(number, passages[number])]

    def _kept(self, targets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        rate = self.options.unmarked if self.training else 0.0
        return [target for target in targets if torch.rand(()) >= rate] if rate else targets

    def _windows(self, length: int) -> list[tuple[int, int]]:
        """First and exclusive last token of the rows of a passage."""
        size = self.options.max_length
        if not self.draws:
            return windows_over(length, size, self.options.stride or max(1, size // 2))
        half = max(1, size // 2)
        if length <= half or torch.rand(()) < 0.5:
            return [(0, min(length, size))]
        drawn = int(torch.randint(half, min(size, length) + 1, ()))
        first = int(torch.randint(length - drawn + 1, ()))
        return [(first, first + drawn)]

    def _words(
        self,
        records: list[ReadingRecord],
        asked: list[list[Span]],
        owners: list[int],
        windows: list[RowWindow],
        rows: tuple[int, ...],
        questions: tuple[int, ...],
    ) -> dict[str, torch.Tensor]:
        """The words' vectors and where they stand in rows and questions of these shapes."""
        if self.vectors is None:
            return {}
        segment = segmenter(self.options.words)
        told: dict[tuple[int, int], list[str]] = {}
        for owner, window in zip(owners, windows, strict=True):
            if (owner, window.passage) not in told:
                text = records[owner].passages[window.passage]
                told[owner, window.passage] = word_of_each_character(text, segment)
        spoken = [word_of_each_character(record.question, segment) for record in records]
        places, table = self.vectors.table(word for words in (*spoken, *told.values()) for word in dict.fromkeys(words))
        of_rows, of_questions = np.zeros(rows, dtype=np.int64), np.zeros(questions, dtype=np.int64)
        for row, (owner, window) in enumerate(zip(owners, windows, strict=True)):
            words = told[owner, window.passage]
            of_rows[row, : len(window.spans)] = [places[words[a]] if a < b else 0 for a, b in window.spans]
        for row, (words, spans) in enumerate(zip(spoken, asked, strict=True)):
            of_questions[row, : len(spans)] = [places[words[a]] if a < b else 0 for a, b in spans]
        return {
            "word_vectors": torch.from_numpy(table),
            "words": torch.from_numpy(of_rows),
            "question_words": torch.from_numpy(of_questions),
        }

    def _units(self, text: str) -> Units:
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
