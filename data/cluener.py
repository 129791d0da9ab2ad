"""CLUENER 2020, Chinese named entities, and its answer format.

One JSON object a line: `text`, `label` of {type: {text of the span: [[start, end], ...]}}, both positions 0-based
character offsets and the end inclusive. The test file has `id` and `text`; a row without an id gets its number.
"""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from .files import write_rows
from .records import Span, SpanRecord
from .rows import OnBadRow, RowError, object_of, read_rows, value_of


def read_cluener(
    path: str | Path,
    types: Collection[str] | None = None,
    *,
    with_spans: bool = True,
    max_characters: int | None = None,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[SpanRecord]:
    """Stream texts with their spans, each checked against its own text.

    Args:
        path: file in CLUENER's format, plain or gzip.
        types: allowed types; None allows all.
        with_spans: False reads `id` and `text` only.
        max_characters: a longer text is a bad row; None sets no limit.
        on_bad_row: "raise" or "skip", see `read_rows`.
        bad_rows_file: where skipped rows are listed.

    Raises:
        InputError: see `read_rows`; the line names the row and what is wrong in it.
    """

    def parse(row: dict[str, Any]) -> SpanRecord:
        text, row_id = value_of(row, "text", str), row["id"]
        if type(row_id) is not int:
            row_id = value_of(row, "id", str)
        check_length(text, max_characters)
        return SpanRecord(row_id, text, tuple(_spans(row, text, types)) if with_spans else ())

    return read_rows(
        path,
        parse,
        identity=lambda record: str(record.id),
        number_key="id",
        on_bad_row=on_bad_row,
        bad_rows_file=bad_rows_file,
    )


def write_cluener(records: Iterable[SpanRecord], path: str | Path) -> int:
    """Write answers, `{"id": 0, "label": {"name": {"text of the span": [[start, end]]}}}`; return the number of rows.

    Raises:
        InputError: the file cannot be written; nothing is left half done.
    """
    return write_rows(({"id": record.id, "label": label_of(record)} for record in records), path)


def cluener_row(record: SpanRecord) -> dict[str, Any]:
    """One row of the annotated format, as `read_cluener` reads it."""
    return {"id": record.id, "text": record.text, "label": label_of(record)}


def label_of(record: SpanRecord) -> dict[str, dict[str, list[list[int]]]]:
    """The spans as CLUENER writes them: by type and text, in the order of the spans, each once."""
    label: dict[str, dict[str, list[list[int]]]] = {}
    for span in dict.fromkeys(record.spans):
        label.setdefault(span.type, {}).setdefault(span.text, []).append([span.start, span.end - 1])
    return label


def check_length(text: str, max_characters: int | None) -> None:
    """Refuse a text that is a whole document on a line.

    Raises:
        RowError: it is longer.
    """
    if max_characters is not None and len(text) > max_characters:
        raise RowError(f"text of {len(text)} characters, at most {max_characters} are taken; raise max_characters")


def check_type(kind: str, types: Collection[str] | None) -> None:
    """Refuse a type that is not among those allowed.

    Raises:
        RowError: it is not.
    """
    if types is not None and kind not in types:
        raise RowError(f"label {kind!r} is not one of {', '.join(types)}; correct it or add it to data.types")


def _spans(row: dict[str, Any], text: str, types: Collection[str] | None) -> Iterator[Span]:
    for kind, surfaces in value_of(row, "label", dict).items():
        check_type(kind, types)
        for surface, places in object_of(surfaces, f"label of {kind}").items():
            if not surface or not isinstance(places, list) or not places:
                raise RowError(
                    f"{kind} has {surface!r} at {places!r:.60}; give the text of a span and [[start, end], ...]"
                )
            for place in places:
                yield _span(kind, surface, place, text)


def _span(kind: str, surface: str, place: Any, text: str) -> Span:
    if not (isinstance(place, list) and len(place) == 2 and all(type(border) is int for border in place)):
        raise RowError(f"{kind} {surface!r} is at {place!r:.60}; give [start, end], whole numbers, the end inclusive")
    start, end = place
    if start < 0 or end < start or end >= len(text) or text[start : end + 1] != surface:
        found = f"the text has {text[start : end + 1]!r}" if 0 <= start <= end < len(text) else "there is no such place"
        hits = [str([i, i + len(surface) - 1]) for i in range(len(text)) if text.startswith(surface, i)][:5]
        advice = f"it occurs at {', '.join(hits)}" if hits else "it does not occur in the text; correct the row"
        raise RowError(f"{kind} {surface!r} is said to be at {place}, where {found}; {advice}")
    return Span(kind, surface, start)
