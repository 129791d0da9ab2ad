"""Event extraction: sentences with events from files in DuEE's format, or from the built-in generator."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .base import HostList, KexueDataModule, Split
from .duee import labels_of, read_events, read_schema, write_answers
from .generators.event_sentences import SCHEMA, event_sentences
from .packing import even_fit
from .records import TRIGGER_ROLE, EventRecord
from .rows import OnBadRow, read_text
from .targets import Cell, event_targets
from .tokenizers import CharTokenizer

log = logging.getLogger(__name__)

LABELS_FILE = "labels.json"
NO_CELL = -1
"""Fills up the cells of a record in a batch; the loss leaves such cells out."""


class EventDataModule(KexueDataModule):
    """Batches for GPLinker: character ids, the positive cells of its three matrices, and the records themselves.

    Args:
        batch_size: most sentences in a training batch of one process.
        root: folder of real data; None takes the built-in generator.
        train_file, dev_file, test_file, schema_file: below `root`; `test_file=None` tests on the dev file.
        vocab_file: vocabulary, one token a line; None builds it from the training texts.
        min_count: a character seen less often in the training texts is unknown, so that [UNK] is trained too.
        lowercase, half_width: see `CharTokenizer`.
        max_length: most tokens of a training sentence with [CLS] and [SEP]; a longer one is a bad row. Sentences to be
            scored or predicted on are never cut or left out.
        row_budget: let the encoder see several sentences in a row, at most so many tokens (or the longest sentence of
            the batch where that is more); None: a row each, filled up to the longest.
        num_generated: training sentences made by the generator, and a tenth of it for validation and test each.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.
    """

    def __init__(
        self,
        batch_size: int = 32,
        *,
        root: str | None = None,
        train_file: str = "event_extraction_duee/duee_train.json",
        dev_file: str = "event_extraction_duee/duee_dev.json",
        test_file: str | None = None,
        schema_file: str = "event_extraction_duee/duee_event_schema.json",
        vocab_file: str | None = None,
        min_count: int = 2,
        lowercase: bool = False,
        half_width: bool = False,
        max_length: int = 512,
        row_budget: int | None = None,
        num_generated: int = 2000,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_row: OnBadRow = "raise",
        bad_rows_file: str | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            bad_rows_file=bad_rows_file,
        )
        if max_length < 3:
            raise InputError(f"data.max_length={max_length}: use 3 or more, [CLS] and [SEP] count")
        if row_budget is not None and row_budget < 1:
            raise InputError(f"data.row_budget={row_budget}: use 1 or more, or null for rows of one sentence")
        if num_generated < 10:
            raise InputError(f"data.num_generated={num_generated}: use 10 or more, a tenth is for validation")
        self.root = Path(root).expanduser() if root is not None else None
        self.files = {"train": train_file, "val": dev_file, "test": test_file or dev_file, "schema": schema_file}
        self.vocab_file = vocab_file
        self.min_count = min_count
        self.lowercase = lowercase
        self.half_width = half_width
        self.max_length = max_length
        self.row_budget = row_budget
        self.num_generated = num_generated
        self.tokenizer: CharTokenizer | None = None
        self.labels: list[list[str]] = []

    def prepare(self) -> None:
        """Read the schema and, unless given, build the vocabulary from the training texts."""
        if self.tokenizer is not None:
            return
        self.labels = labels_of(read_schema(self._file("schema")) if self.root is not None else SCHEMA)
        options = {"lowercase": self.lowercase, "half_width": self.half_width}
        if self.vocab_file is not None:
            self.tokenizer = CharTokenizer.from_vocab(self.vocab_file, **options)
        else:
            texts = (record.text for record in self.records("train"))
            self.tokenizer = CharTokenizer.from_texts(texts, min_count=self.min_count, **options)

    def model_arguments(self) -> dict[str, Any]:
        """`vocab_size` and `labels`, the [event type, role] pairs in the order of the schema."""
        return {"vocab_size": len(self._tokenizer()), "labels": self.labels}

    def read_split(self, split: Split) -> Sequence[EventRecord]:
        """Read the sentences of train, val or test."""
        if self.root is None:
            held_out = self.num_generated // 10
            first = {"train": 0, "val": self.num_generated, "test": self.num_generated + held_out}[split]
            number = self.num_generated if split == "train" else held_out
            return list(islice(event_sentences(), first, first + number))
        max_characters = self.max_length - 2 if split == "train" else None
        return list(read_events(self._file(split), self._schema(), max_characters=max_characters, **self.row_options()))

    def collator(self) -> "EventCollator":
        """An `EventCollator` for this vocabulary and these labels."""
        label_ids = {(kind, role): i for i, (kind, role) in enumerate(self.labels)}
        return EventCollator(self._tokenizer(), label_ids, self.row_budget)

    def source_files(self) -> list[Path]:
        """The files of the splits and the schema, and the vocabulary if one is given."""
        given = [Path(self.vocab_file)] if self.vocab_file is not None else []
        return given if self.root is None else [self.root / name for name in self.files.values()] + given

    def length(self, record: EventRecord) -> int:
        """Characters of the text."""
        return len(record.text)

    def fingerprint(self) -> dict[str, Any]:
        """Vocabulary and labels."""
        return {"vocabulary": self._tokenizer().fingerprint(), "labels": self.labels}

    def save_assets(self, folder: Path) -> None:
        """Write `vocab.txt`, `tokenizer.json` and `labels.json`."""
        self._tokenizer().save(folder)
        text = json.dumps(self.labels, ensure_ascii=False, indent=0)
        (Path(folder) / LABELS_FILE).write_text(text + "\n", encoding="utf-8")

    def load_assets(self, folder: Path) -> None:
        """Read what `save_assets` wrote.

        Raises:
            InputError: a file is missing or broken.
        """
        path = Path(folder) / LABELS_FILE
        try:
            labels = [[str(kind), str(role)] for kind, role in json.loads(read_text(path))]
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a list of [event type, role] pairs; save the assets again") from error
        self.labels, self.tokenizer = labels, CharTokenizer.load(folder)

    def read_inputs(self, path: Path) -> None:
        """Read the texts to predict on: rows with `id` and `text`; events in them are left aside."""
        self.set_records("predict", list(read_events(path, with_events=False, **self.row_options())))

    def write_answers(self, predictions: Iterable[EventRecord], path: Path) -> int:
        """Write DuEE's answer format, in the order of the inputs where `read_inputs` has read them."""
        place = {record.id: index for index, record in enumerate(self._records.get("predict", ()))}
        return write_answers(sorted(predictions, key=lambda record: place.get(record.id, len(place))), path)

    def _tokenizer(self) -> CharTokenizer:
        if self.tokenizer is None:
            self.prepare()
        assert self.tokenizer is not None
        return self.tokenizer

    def _schema(self) -> dict[str, list[str]]:
        schema: dict[str, list[str]] = {}
        for event_type, role in self.labels:
            roles = schema.setdefault(event_type, [])
            if role != TRIGGER_ROLE:
                roles.append(role)
        return schema

    def _file(self, name: str) -> Path:
        assert self.root is not None
        if not self.root.is_dir():
            raise InputError(
                f"data.root={self.root}: no such folder; give the folder of the data sets, or data.root=null for "
                "generated sentences"
            )
        return self.root / self.files[name]


@dataclass(frozen=True)
class EventCollator:
    """Records to a batch.

    The batch holds `ids` (B, T) and `mask` (B, T), True where there is a token; `num_tokens`, the number of these;
    `argument_labels` (B, P, 3), `head_labels` (B, Q, 3) and `tail_labels` (B, R, 3), rows of (label, row, column)
    filled up with -1, see `EventTargets`; `records` and `offsets` (character span of each token) as they are. With a
    `row_budget` there are also `starts` (B, 2), the place of each sentence in packed rows.
    """

    tokenizer: CharTokenizer
    label_ids: dict[tuple[str, str], int]
    row_budget: int | None = None

    def __call__(self, records: list[EventRecord]) -> dict[str, Any]:
        """Encode, mark and fill up."""
        encoded = [self.tokenizer.encode(record.text) for record in records]
        lengths = np.array([len(ids) for ids, _ in encoded])
        ids = np.full((len(records), lengths.max()), self.tokenizer.pad_id)
        targets = []
        for row, record, (tokens, offsets) in zip(ids, records, encoded, strict=True):
            row[: len(tokens)] = tokens
            spans = list(enumerate(offsets))[1:-1]
            starts = {start: token for token, (start, _) in spans}
            ends = {end: token for token, (_, end) in spans}
            targets.append(event_targets(record, starts, ends, self.label_ids))
        packed = {}
        if self.row_budget is not None:
            packed["starts"] = torch.from_numpy(even_fit(lengths, max(self.row_budget, int(lengths.max()))))
        return {
            "ids": torch.from_numpy(ids),
            "mask": torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]),
            "num_tokens": int(lengths.sum()),
            **packed,
            "argument_labels": _stack([target.arguments for target in targets]),
            "head_labels": _stack([target.heads for target in targets]),
            "tail_labels": _stack([target.tails for target in targets]),
            "records": HostList(records),
            "offsets": HostList(offsets for _, offsets in encoded),
        }


def _stack(cells: list[list[Cell]]) -> torch.Tensor:
    """Cells of each record as (B, P, 3), P at least 1."""
    stacked = np.full((len(cells), max(1, *map(len, cells)), 3), NO_CELL)
    for rows, group in zip(stacked, cells, strict=True):
        if group:
            rows[: len(group)] = group
    return torch.from_numpy(stacked)
