"""Event extraction: sentences with events from files in DuEE's format, or from the built-in generator."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .base import Split
from .duee import labels_of, read_events, read_schema, write_answers
from .generators.event_sentences import SCHEMA, event_sentences
from .records import TRIGGER_ROLE, Argument, Event, EventRecord
from .rows import OnBadRow
from .sentences import SentenceDataModule, encode_texts
from .targets import event_targets, stack_cells
from .tokenizers import CharTokenizer
from .tokenizers.numbers import NumberTokenizer
from .windows import check_windows, not_whole_in_any, windows_over

log = logging.getLogger(__name__)


class EventDataModule(SentenceDataModule[EventRecord]):
    """Batches for GPLinker: character ids, the positive cells of its three matrices, and the records themselves.

    Sentences are seen as a whole, those to be scored or predicted on whatever their length, and a training sentence
    longer than `max_length` is a bad row; or, with a `stride`, in windows.

    Args:
        batch_size: most sentences in a training batch of one process.
        root: folder of real data; None takes the built-in generator.
        train_file, dev_file, test_file, schema_file: below `root`; `test_file=None` tests on the dev file.
        stride: see a text longer than `max_length` in windows that begin so many tokens apart, for models that put
            them together again (taggers; GPLinker does not).
        max_characters: a longer text is a bad row: a whole book on one line.
        vocab_file, min_count, lowercase, half_width, max_length, row_budget, num_generated: see `SentenceDataModule`.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.
    """

    LABELS = "[event type, role] pairs"

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
        stride: int | None = None,
        max_characters: int = 100_000,
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
            root=root,
            files={"train": train_file, "val": dev_file, "test": test_file or dev_file, "schema": schema_file},
            vocab_file=vocab_file,
            min_count=min_count,
            lowercase=lowercase,
            half_width=half_width,
            max_length=max_length,
            row_budget=row_budget,
            num_generated=num_generated,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            bad_rows_file=bad_rows_file,
        )
        self.window = None if stride is None else (max_length - 2, stride)
        if self.window is not None:
            check_windows(*self.window, "data.max_length - 2, data.stride: windows")
        self.max_characters = max_characters

    def read_labels(self) -> list[list[str]]:
        """The [event type, role] pairs in the order of the schema."""
        return labels_of(read_schema(self.file("schema")) if self.root is not None else SCHEMA)

    def generated(self) -> Iterator[EventRecord]:
        """Sentences of the built-in generator."""
        return event_sentences()

    def read_file(self, split: Split) -> Iterator[EventRecord]:
        """The sentences of a file, checked against the schema."""
        whole = split == "train" and self.window is None
        limit = min(self.max_characters, self.max_length - 2) if whole else self.max_characters
        return read_events(self.file(split), self._schema(), max_characters=limit, **self.row_options())

    def collator(self) -> "EventCollator":
        """An `EventCollator` for this vocabulary and these labels."""
        label_ids = {(kind, role): i for i, (kind, role) in enumerate(self.labels)}
        return EventCollator(self.get_tokenizer(), label_ids, self.row_budget, self.window)

    def read_inputs(self, path: Path) -> None:
        """Read the texts to predict on: rows with `id` and `text`; events in them are left aside."""
        rows = read_events(path, with_events=False, max_characters=self.max_characters, **self.row_options())
        self.set_records("predict", list(rows))

    def write_answers(self, predictions: Iterable[EventRecord], path: Path) -> int:
        """Write DuEE's answer format, in the order of the inputs where `read_inputs` has read them."""
        return write_answers(self.in_order_of_inputs(predictions), path)

    def cut_by_windows(self, split: Split) -> list[tuple[EventRecord, list[Argument]]]:
        """Gold arguments of a split that no window holds as a whole, and that no model is shown."""
        lost: list[tuple[EventRecord, list[Argument]]] = []
        if self.window is None:
            return lost
        for record in self.records(split):
            windows = windows_over(len(record.text), *self.window)
            arguments = [argument for event in record.events for argument in event.arguments]
            cut = set(not_whole_in_any(windows, [(argument.start, argument.end - 1) for argument in arguments]))
            gone = [argument for argument in arguments if (argument.start, argument.end - 1) in cut]
            lost += [(record, gone)] if gone else []
        return lost

    def setup(self, stage: str | None = None) -> None:
        """As in `KexueDataModule`; says how many arguments of the training rows no window holds."""
        super().setup(stage)
        lost = self.cut_by_windows("train") if stage == "fit" else []
        if lost:
            count, (record, gone) = sum(len(arguments) for _, arguments in lost), lost[0]
            log.warning("%d training arguments cut by windows, the first: %s in row %s", count, gone[0], record.id)

    def _schema(self) -> dict[str, list[str]]:
        schema: dict[str, list[str]] = {}
        for event_type, role in self.labels:
            roles = schema.setdefault(event_type, [])
            if role != TRIGGER_ROLE:
                roles.append(role)
        return schema


@dataclass(frozen=True)
class EventCollator:
    """Records to a batch.

    Beside what `encode_texts` gives, of whole texts or of windows with the arguments that lie in them, the batch holds
    `argument_labels` (B, P, 3), `head_labels` (B, Q, 3) and `tail_labels` (B, R, 3), rows of (label, row, column)
    filled up with -1, see `EventTargets`.
    """

    tokenizer: CharTokenizer | NumberTokenizer
    label_ids: dict[tuple[str, str], int]
    row_budget: int | None = None
    window: tuple[int, int] | None = None

    def __call__(self, records: list[EventRecord]) -> dict[str, Any]:
        """Encode, mark and fill up."""
        batch, borders = encode_texts(self.tokenizer, records, self.row_budget, self.window)
        shown = records
        if self.window is not None:
            shown = [
                _within(records[owner], offsets[1][0], offsets[-2][1])
                for owner, offsets in zip(batch["owners"], batch["offsets"], strict=True)
            ]
        targets = [
            event_targets(record, starts, ends, self.label_ids)
            for record, (starts, ends) in zip(shown, borders, strict=True)
        ]
        return batch | {
            "argument_labels": stack_cells([target.arguments for target in targets]),
            "head_labels": stack_cells([target.heads for target in targets]),
            "tail_labels": stack_cells([target.tails for target in targets]),
        }


def _within(record: EventRecord, start: int, end: int) -> EventRecord:
    """The record with those arguments alone that lie in a piece of its text."""
    events = (
        Event(event.type, tuple(part for part in event.arguments if start <= part.start and part.end <= end))
        for event in record.events
    )
    return replace(record, events=tuple(event for event in events if event.arguments))
