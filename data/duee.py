"""DuEE 1.0, Chinese event extraction: its schema, its annotated rows and its answer format.

One JSON object a line: `text`, `id`, `event_list` of {`event_type`, `trigger`, `trigger_start_index`, `class`,
`arguments` of {`role`, `argument`, `argument_start_index`, `alias`}}. Positions are 0-based character offsets.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_rows
from .records import TRIGGER_ROLE, Argument, Event, EventRecord
from .rows import OnBadRow, RowError, object_of, read_rows, value_of

Schema = Mapping[str, Sequence[str]]
"""Event type -> its roles, without the trigger; both in the order of the schema file."""


def read_schema(path: str | Path) -> dict[str, list[str]]:
    """Read event types and their roles, one type a line with a `role_list`.

    Raises:
        InputError: a line that is not such an object, a type or role that occurs twice, a role named like the trigger.
    """
    return dict(read_rows(path, _schema_row, identity=lambda entry: entry[0]))


def read_events(
    path: str | Path,
    schema: Schema | None = None,
    *,
    with_events: bool = True,
    max_characters: int | None = None,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[EventRecord]:
    """Stream annotated sentences, each checked against its own text and the schema.

    Args:
        path: file in DuEE's format, plain or gzip.
        schema: allowed types and roles; None allows all.
        with_events: False reads `id` and `text` only, for texts whose events are to be found.
        max_characters: a longer text is a bad row; None sets no limit.
        on_bad_row: "raise" or "skip", see `read_rows`.
        bad_rows_file: where skipped rows are listed.

    Raises:
        InputError: see `read_rows`; the line names the row and what is wrong in it.
    """

    def parse(row: dict[str, Any]) -> EventRecord:
        record = _record(row, schema, with_events)
        if max_characters is not None and len(record.text) > max_characters:
            raise RowError(
                f"text of {len(record.text)} characters, at most {max_characters} are read; raise max_length (of whole "
                "training texts) or max_characters"
            )
        return record

    return read_rows(path, parse, identity=lambda record: record.id, on_bad_row=on_bad_row, bad_rows_file=bad_rows_file)


def write_answers(records: Iterable[EventRecord], path: str | Path) -> int:
    """Write events in DuEE's answer format (`id`, `event_list` of `event_type` and `arguments` without the trigger).

    Returns:
        The number of rows written.

    Raises:
        InputError: the file cannot be written; nothing is left half done.
    """
    return write_rows(map(answer_row, records), path)


def answer_row(record: EventRecord) -> dict[str, Any]:
    """One row of the answer format."""
    return {
        "id": record.id,
        "event_list": [
            {
                "event_type": event.type,
                "arguments": [
                    {"role": argument.role, "argument": argument.text}
                    for argument in event.arguments
                    if argument.role != TRIGGER_ROLE
                ],
            }
            for event in record.events
        ],
    }


def event_row(record: EventRecord) -> dict[str, Any]:
    """One row of the annotated format, as `read_events` reads it."""
    return {"text": record.text, "id": record.id, "event_list": [_annotation(event) for event in record.events]}


def labels_of(schema: Schema) -> list[list[str]]:
    """All [event type, role] pairs in the order of the schema, the trigger first for each type."""
    return [[event_type, role] for event_type, roles in schema.items() for role in (TRIGGER_ROLE, *roles)]


def _annotation(event: Event) -> dict[str, Any]:
    trigger = event.trigger
    arguments = [argument for argument in event.arguments if argument.role != TRIGGER_ROLE]
    return {
        "event_type": event.type,
        **({"trigger": trigger.text, "trigger_start_index": trigger.start} if trigger else {}),
        "arguments": [
            {"argument_start_index": argument.start, "role": argument.role, "argument": argument.text, "alias": []}
            for argument in arguments
        ],
        "class": event.type.split("-")[0],
    }


def _schema_row(row: dict[str, Any]) -> tuple[str, list[str]]:
    event_type = value_of(row, "event_type", str)
    roles = [value_of(object_of(entry, "role_list"), "role", str) for entry in value_of(row, "role_list", list)]
    if TRIGGER_ROLE in roles or len(set(roles)) != len(roles):
        raise RowError(f"event type {event_type!r} has roles {roles}; each once, and none named {TRIGGER_ROLE!r}")
    return event_type, roles


def _record(row: dict[str, Any], schema: Schema | None, with_events: bool) -> EventRecord:
    text, row_id = value_of(row, "text", str), value_of(row, "id", str)
    rows = value_of(row, "event_list", list) if with_events else []
    return EventRecord(row_id, text, tuple(_event(object_of(entry, "event_list"), text, schema) for entry in rows))


def _event(row: dict[str, Any], text: str, schema: Schema | None) -> Event:
    event_type = value_of(row, "event_type", str)
    if schema is not None and event_type not in schema:
        raise RowError(f"event type {event_type!r} is not in the schema; correct it or add it to the schema file")
    arguments = []
    if "trigger" in row or "trigger_start_index" in row:  # corpora without triggers leave out both
        arguments.append(_argument(row, "trigger", TRIGGER_ROLE, text))
    for entry in value_of(row, "arguments", list):
        entry = object_of(entry, "arguments")
        role = value_of(entry, "role", str)
        if schema is not None and role not in schema[event_type]:
            raise RowError(
                f"role {role!r} is not one of event type {event_type!r} in the schema; use one of {schema[event_type]}"
            )
        arguments.append(_argument(entry, "argument", role, text))
    if not arguments:
        raise RowError(f"event of type {event_type!r} has neither a trigger nor arguments; take it out of event_list")
    return Event(event_type, tuple(arguments))


def _argument(row: dict[str, Any], key: str, role: str, text: str) -> Argument:
    span, start = value_of(row, key, str), value_of(row, f"{key}_start_index", int)
    if start < 0 or text[start : start + len(span)] != span:
        found = text[max(start, 0) : max(start, 0) + len(span)]
        places = [str(i) for i in range(len(text)) if text.startswith(span, i)][:5]
        advice = f"it occurs at {', '.join(places)}" if places else "it does not occur in the text; correct the row"
        raise RowError(f"{key} {span!r} ({role}) is said to start at {start}, where the text has {found!r}; {advice}")
    return Argument(role, span, start)
