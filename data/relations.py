"""Relation extraction: sentences with relations from files in DuIE 2.0's format, or from the built-in generator."""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..errors import InputError
from .base import HostList, Split
from .duie import Occurrences, Schema, labels_of, read_relations, read_schema, schema_row, write_answers
from .generators.relation_sentences import SCHEMA, relation_sentences
from .records import Argument, Mention, Relation, RelationRecord
from .rows import OnBadRow
from .sentences import SentenceDataModule, encode_texts
from .targets import relation_targets, stack_cells
from .tokenizers import CharTokenizer
from .tokenizers.numbers import NumberTokenizer
from .windows import check_windows, windows_over

log = logging.getLogger(__name__)

SCHEMA_FILE = "schema.jsonl"


class RelationDataModule(SentenceDataModule[RelationRecord]):
    """Batches for models of relations: character ids, positive cells, and the records themselves.

    A text longer than `max_length` is seen in windows; a relation is shown to the model, and found, in those that hold
    all its spans.

    Args:
        batch_size: most sentences in a training batch of one process.
        root: folder of real data; None takes the built-in generator.
        train_file, dev_file, test_file, schema_file: below `root`; `test_file=None` tests on the dev file.
        occurrences: which place of a text that occurs several times is positive: its "first", the one where subject and
            object are "nearest" to each other, or "all".
        vocab_file, min_count, lowercase, half_width, row_budget, num_generated: see `SentenceDataModule`.
        max_length: most tokens that the encoder sees together, with [CLS] and [SEP].
        stride: characters from one window to the next, see `windows_over`.
        max_characters: a longer text is a bad row: a whole book on one line.
        eval_batch_size, num_workers, seed, on_bad_row, bad_rows_file: see `KexueDataModule`.
    """

    LABELS = "[predicate, slot] pairs"

    def __init__(
        self,
        batch_size: int = 32,
        *,
        root: str | None = None,
        train_file: str = "relation_extraction_duie/duie_train.json.gz",
        dev_file: str = "relation_extraction_duie/duie_dev.json",
        test_file: str | None = None,
        schema_file: str = "relation_extraction_duie/duie_schema.json",
        occurrences: Occurrences = "first",
        vocab_file: str | None = None,
        min_count: int = 2,
        lowercase: bool = False,
        half_width: bool = False,
        max_length: int = 256,
        stride: int = 192,
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
        if occurrences not in get_args(Occurrences):
            raise InputError(f"data.occurrences={occurrences!r}: use one of {', '.join(get_args(Occurrences))}")
        check_windows(max_length - 2, stride, "data.max_length - 2, data.stride: windows")
        self.occurrences: Occurrences = occurrences
        self.window = max_length - 2, stride
        self.max_characters = max_characters
        self.schema: Schema = {}

    def read_labels(self) -> list[list[str]]:
        """The [predicate, slot] pairs in the order of the schema."""
        self.schema = read_schema(self.file("schema")) if self.root is not None else SCHEMA
        return labels_of(self.schema)

    def generated(self) -> Iterator[RelationRecord]:
        """Sentences of the built-in generator."""
        return relation_sentences()

    def read_file(self, split: Split) -> Iterator[RelationRecord]:
        """The sentences of a file, checked against the schema."""
        return read_relations(
            self.file(split),
            self.schema,
            occurrences=self.occurrences,
            max_characters=self.max_characters,
            **self.row_options(),
        )

    def setup(self, stage: str | None = None) -> None:
        """As in `KexueDataModule`; says how many relations of the training rows no model can learn."""
        super().setup(stage)
        if stage == "fit" and (cut := self.cut_by_windows("train")):
            relations = sum(len(lost) for _, lost in cut)
            log.warning(
                "%d training relations cut by windows, the first in row %s: %s", relations, cut[0][0].id, cut[0][1]
            )

    def cut_by_windows(self, split: Split) -> list[tuple[RelationRecord, list[Relation]]]:
        """Records with those of their gold relations that no window holds whole: models are not shown them."""
        found = []
        for record in self.records(split):
            if len(record.text) > self.window[0]:
                pieces = windows_of(record, self.window, self.occurrences == "all")
                shown = {plain for _, piece in pieces for plain in map(_texts, piece.relations)}
                if lost := [relation for relation in record.relations if _texts(relation) not in shown]:
                    found.append((record, lost))
        return found

    def collator(self) -> "RelationCollator":
        """A `RelationCollator` for this vocabulary and these labels."""
        labels = tuple((predicate, slot) for predicate, slot in self.labels)
        return RelationCollator(self.get_tokenizer(), labels, self.window, self.occurrences == "all", self.row_budget)

    def save_assets(self, folder: Path) -> None:
        """Write the schema as well: answers name the types of subjects and objects."""
        super().save_assets(folder)
        rows = (schema_row(predicate, types) for predicate, types in self.schema.items())
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (Path(folder) / SCHEMA_FILE).write_text(text, encoding="utf-8")

    def load_assets(self, folder: Path) -> None:
        """Read what `save_assets` wrote."""
        super().load_assets(folder)
        self.schema = read_schema(Path(folder) / SCHEMA_FILE)

    def read_inputs(self, path: Path) -> None:
        """Read the texts to predict on: rows with `text`; relations in them are left aside."""
        options = {"max_characters": self.max_characters, **self.row_options()}
        self.set_records("predict", list(read_relations(path, with_relations=False, **options)))

    def write_answers(self, predictions: Iterable[RelationRecord], path: Path) -> int:
        """Write DuIE's answer format, in the order of the inputs where `read_inputs` has read them."""
        return write_answers(self.in_order_of_inputs(predictions), self.schema, path)


@dataclass(frozen=True)
class RelationCollator:
    """Records to a batch, a row for each window of a text.

    Beside what `encode_texts` gives, the batch holds `entity_labels` (W, P, 3), `head_labels` (W, Q, 3) and
    `tail_labels` (W, R, 3), rows of (label, row, column), and `triple_labels` (W, S, 5), all filled up with -1, see
    `RelationTargets`; `owners`, for each row the number of its record; `offsets` in the text of the record.
    """

    tokenizer: CharTokenizer | NumberTokenizer
    labels: tuple[tuple[str, str], ...]
    window: tuple[int, int]
    every_occurrence: bool = False
    row_budget: int | None = None

    def __call__(self, records: list[RelationRecord]) -> dict[str, Any]:
        """Cut into windows, encode, mark and fill up."""
        pieces = [
            (owner, start, piece)
            for owner, record in enumerate(records)
            for start, piece in windows_of(record, self.window, self.every_occurrence)
        ]
        batch, borders = encode_texts(self.tokenizer, [piece for _, _, piece in pieces], self.row_budget)
        targets = [
            relation_targets(piece, starts, ends, self.labels, self.every_occurrence)
            for (_, _, piece), (starts, ends) in zip(pieces, borders, strict=True)
        ]
        offsets = [
            [(first + start, end + start) if end else (0, 0) for first, end in row]
            for (_, start, _), row in zip(pieces, batch["offsets"], strict=True)
        ]
        return batch | {
            "entity_labels": stack_cells([target.entities for target in targets]),
            "head_labels": stack_cells([target.heads for target in targets]),
            "tail_labels": stack_cells([target.tails for target in targets]),
            "triple_labels": stack_cells([target.triples for target in targets], width=5),
            "records": HostList(records),
            "owners": HostList(owner for owner, _, _ in pieces),
            "offsets": HostList(offsets),
        }


def windows_of(
    record: RelationRecord, window: tuple[int, int], every_occurrence: bool
) -> list[tuple[int, RelationRecord]]:
    """Windows of a text as records of their own, each with where it begins and the relations that lie in it.

    Args:
        record: the text.
        window: size and stride in characters.
        every_occurrence: a relation lies where all its texts occur, not only where the record says.
    """
    if len(record.text) <= window[0]:
        return [(0, record)]
    pieces = []
    for start, end in windows_over(len(record.text), *window):
        text = record.text[start:end]
        inside = [_moved(relation, text, start, every_occurrence) for relation in record.relations]
        relations = tuple(relation for relation in inside if relation is not None)
        pieces.append((start, RelationRecord(record.id, text, relations)))
    return pieces


def _moved(relation: Relation, text: str, start: int, every_occurrence: bool) -> Relation | None:
    """A relation within a window that begins at `start`; None if that does not hold all its spans."""

    def place(span: Mention | Argument) -> int:
        at = text.find(span.text) if every_occurrence else span.start - start
        return at if at + len(span.text) <= len(text) else -1

    spans = (relation.subject, *relation.object)
    if min(map(place, spans)) < 0:
        return None
    slots = tuple(Argument(slot.role, slot.text, place(slot)) for slot in relation.object)
    return Relation(relation.predicate, Mention(relation.subject.text, place(relation.subject)), slots)


def _texts(relation: Relation) -> tuple[str, ...]:
    return relation.predicate, relation.subject.text, *(slot.role + slot.text for slot in relation.object)
