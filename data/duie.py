"""DuIE 2.0, Chinese relation extraction: its schema, its annotated rows and its answer format.

One JSON object a line: `text`, `spo_list` of {`predicate`, `subject`, `subject_type`, `object` and `object_type`, both
with the same slots: `@value` and, for a few predicates, others such as `inWork`}. A row has no id and says nothing of
positions: spans are found in the text.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import InputError
from .files import write_rows
from .records import VALUE_SLOT, Argument, Mention, Relation, RelationRecord
from .rows import OnBadRow, RowError, object_of, read_rows, value_of
from .targets import places_of

Occurrences = Literal["first", "nearest", "all"]
"""Which place of a text that occurs several times: its first; the one where subject and object are nearest to each
other; or all, which are then positive (the record names the first)."""


@dataclass(frozen=True, slots=True)
class PredicateTypes:
    """What a predicate joins: the type of its subject, and the type of each slot of its object, `@value` first."""

    subject: str
    slots: dict[str, str]


Schema = Mapping[str, PredicateTypes]
"""Predicate -> its types, in the order of the schema file."""


def read_schema(path: str | Path) -> dict[str, PredicateTypes]:
    """Read predicates and their types, one a line.

    Raises:
        InputError: a line that is not such an object, an object without `@value`, a predicate that occurs twice.
    """
    return dict(read_rows(path, schema_entry, identity=lambda entry: entry[0]))


def read_relations(
    path: str | Path,
    schema: Schema | None = None,
    *,
    with_relations: bool = True,
    occurrences: Occurrences = "first",
    max_characters: int | None = None,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[RelationRecord]:
    """Stream annotated sentences, each checked against its own text and the schema; a record's id is its number.

    Args:
        path: file in DuIE's format, plain or gzip.
        schema: allowed predicates and their types; None allows all.
        with_relations: False reads `text` only, for texts whose relations are to be found.
        occurrences: which place of a text that occurs several times, see `Occurrences`.
        max_characters: a longer text is a bad row; None sets no limit.
        on_bad_row: "raise" or "skip", see `read_rows`. A subject or object that is not in the text makes a bad row.
        bad_rows_file: where skipped rows are listed.

    Raises:
        InputError: see `read_rows`; the line names the row and what is wrong in it.
    """
    if occurrences not in get_args(Occurrences):
        raise InputError(f"occurrences={occurrences!r}: use one of {', '.join(get_args(Occurrences))}")
    numbers = count()

    def parse(row: dict[str, Any]) -> RelationRecord:
        number, text = next(numbers), value_of(row, "text", str)
        if max_characters is not None and len(text) > max_characters:
            raise RowError(
                f"text of {len(text)} characters, at most {max_characters} are read; raise max_length or cut it up"
            )
        rows = value_of(row, "spo_list", list) if with_relations else []
        found = (_relation(object_of(entry, "spo_list"), text, schema, occurrences) for entry in rows)
        return RelationRecord(str(number), text, tuple(dict.fromkeys(found)))

    return read_rows(path, parse, on_bad_row=on_bad_row, bad_rows_file=bad_rows_file)


def write_answers(records: Iterable[RelationRecord], schema: Schema, path: str | Path) -> int:
    """Write relations in DuIE's answer format, which is that of the annotated rows.

    Returns:
        The number of rows written.

    Raises:
        InputError: the file cannot be written; nothing is left half done.
    """
    return write_rows((relation_row(record, schema) for record in records), path)


def relation_row(record: RelationRecord, schema: Schema) -> dict[str, Any]:
    """One annotated row, as `read_relations` reads it; types come from the schema."""
    return {
        "text": record.text,
        "spo_list": [
            {
                "predicate": relation.predicate,
                "object_type": {slot.role: schema[relation.predicate].slots[slot.role] for slot in relation.object},
                "subject_type": schema[relation.predicate].subject,
                "object": {slot.role: slot.text for slot in relation.object},
                "subject": relation.subject.text,
            }
            for relation in record.relations
        ],
    }


def schema_row(predicate: str, types: PredicateTypes) -> dict[str, Any]:
    """One row of the schema file, as `read_schema` reads it."""
    return {"object_type": dict(types.slots), "predicate": predicate, "subject_type": types.subject}


def schema_entry(row: dict[str, Any]) -> tuple[str, PredicateTypes]:
    """A predicate and its types from one row of the schema file.

    Raises:
        RowError: a key is missing, or there is no slot `@value`.
    """
    predicate, subject = value_of(row, "predicate", str), value_of(row, "subject_type", str)
    slots = _slots(row, "object_type", predicate)
    return predicate, PredicateTypes(subject, slots)


def labels_of(schema: Schema) -> list[list[str]]:
    """All [predicate, slot] pairs in the order of the schema, `@value` first for each predicate."""
    return [[predicate, slot] for predicate, types in schema.items() for slot in types.slots]


def _relation(row: dict[str, Any], text: str, schema: Schema | None, occurrences: Occurrences) -> Relation:
    predicate, subject = value_of(row, "predicate", str), value_of(row, "subject", str)
    slots = _slots(row, "object", predicate)
    if schema is not None:
        _check_types(row, predicate, slots, schema)
    starts = {name: places_of(text, span) for name, span in (("subject", subject), *slots.items())}
    for (name, places), span in zip(starts.items(), (subject, *slots.values()), strict=True):
        if not places:
            raise RowError(f"{name} {span!r} of {predicate!r} does not occur in the text; correct the row")
    first, value = starts["subject"][0], starts[VALUE_SLOT][0]
    if occurrences == "nearest":
        pairs = ((one, other) for one in starts["subject"] for other in starts[VALUE_SLOT])
        first, value = min(pairs, key=lambda pair: _gap(pair[0], subject, pair[1], slots[VALUE_SLOT]))
    arguments = []
    for slot, span in slots.items():
        start = starts[slot][0]
        if slot == VALUE_SLOT:
            start = value
        elif occurrences == "nearest":
            start = min(starts[slot], key=lambda place, span=span: _gap(value, slots[VALUE_SLOT], place, span))
        arguments.append(Argument(slot, span, start))
    return Relation(predicate, Mention(subject, first), tuple(arguments))


def _gap(start: int, span: str, other_start: int, other: str) -> int:
    """Characters between two spans, 0 where they touch or overlap."""
    return max(0, other_start - start - len(span), start - other_start - len(other))


def _slots(row: dict[str, Any], key: str, predicate: str) -> dict[str, str]:
    """The slots of an object or of its types, `@value` first, the others in the order of the row."""
    given = value_of(row, key, dict)
    if VALUE_SLOT not in given:
        raise RowError(f"{key!r} of {predicate!r} has no slot {VALUE_SLOT!r}; give one")
    return {slot: value_of(given, slot, str) for slot in sorted(given, key=lambda slot: slot != VALUE_SLOT)}


def _check_types(row: dict[str, Any], predicate: str, slots: dict[str, str], schema: Schema) -> None:
    if predicate not in schema:
        raise RowError(f"predicate {predicate!r} is not in the schema; correct it or add it to the schema file")
    allowed = schema[predicate]
    if (subject := value_of(row, "subject_type", str)) != allowed.subject:
        raise RowError(f"subject of {predicate!r} has type {subject!r}, in the schema it is {allowed.subject!r}")
    types = _slots(row, "object_type", predicate)
    if types.keys() != slots.keys():
        raise RowError(
            f"object of {predicate!r} has slots {list(slots)}, its types are for {list(types)}; use the same"
        )
    for slot, kind in types.items():
        if allowed.slots.get(slot) != kind:
            raise RowError(f"slot {slot!r} of type {kind!r} is not one of {predicate!r}; use one of {allowed.slots}")
