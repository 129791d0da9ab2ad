"""The format of the Daguan cup 2019: words replaced by numbers, in segments with a label.

A line is a sentence, segments with two blanks between them: `13_7_502/o  4/a  88_13/o`, "o" being no field. Without
labels a line is the numbers alone, `13_7_502_4_88_13`; that is the text of a record in any case, and the spans of its
fields are characters of it. The format knows no ids: a sentence has the number of its line.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from .cluener import check_length, check_type
from .files import write_lines
from .records import Span, SpanRecord, without_overlaps
from .rows import OnBadRow, RowError, read_lines
from .tokenizers.numbers import SEPARATOR

OUTSIDE = "o"
BETWEEN = "  "
Segment = tuple[str, str]
"""(numbers, label)."""
_NUMBERS = re.compile(r"[0-9]+(?:_[0-9]+)*", re.ASCII)


def read_daguan(
    path: str | Path,
    types: Collection[str] | None = None,
    *,
    with_spans: bool = True,
    max_characters: int | None = None,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[SpanRecord]:
    """Stream sentences with the spans of their fields.

    Args:
        path: file in the contest's format, plain or gzip.
        types: allowed labels besides "o"; None allows all.
        with_spans: False leaves labels aside; lines may then be without.
        max_characters: a longer line is a bad row; None sets no limit.
        on_bad_row: "raise" or "skip", see `read_lines`.
        bad_rows_file: where skipped rows are listed.

    Raises:
        InputError: see `read_lines`; the line names the row and what is wrong in it.
    """

    def parse(number: int, line: str) -> SpanRecord:
        check_length(line, max_characters)
        if not with_spans and "/" not in line:
            return SpanRecord(number, _numbers(line))
        return record_of(number, [_segment(part, types) for part in line.split(BETWEEN)], with_spans)

    return read_lines(path, parse, on_bad_row=on_bad_row, bad_rows_file=bad_rows_file)


def write_daguan(records: Iterable[SpanRecord], path: str | Path) -> int:
    """Write labelled sentences; of spans that overlap, those that segments can say, see `without_overlaps`.

    Returns:
        The number of sentences written.

    Raises:
        InputError: the file cannot be written; nothing is left half done.
    """
    return write_lines((BETWEEN.join(f"{text}/{label}" for text, label in segments_of(r)) for r in records), path)


def segments_of(record: SpanRecord) -> list[Segment]:
    """The segments of a sentence: its spans, and "o" for what lies between."""
    found: list[Segment] = []
    place = 0
    for span in without_overlaps(record.spans):
        if span.start > place:
            found.append((record.text[place : span.start - len(SEPARATOR)], OUTSIDE))
        found.append((span.text, span.type))
        place = span.end + len(SEPARATOR)
    if place < len(record.text):
        found.append((record.text[place:], OUTSIDE))
    return found


def record_of(name: str | int, segments: Iterable[Segment], with_spans: bool = True) -> SpanRecord:
    """The sentence of some segments."""
    text, spans = "", []
    for numbers, label in segments:
        text += SEPARATOR if text else ""
        if label != OUTSIDE and with_spans:
            spans.append(Span(label, numbers, len(text)))
        text += numbers
    return SpanRecord(name, text, tuple(spans))


def pieces_of(record: SpanRecord, size: int) -> list[SpanRecord]:
    """A text of numbers in pieces of at most so many; what it says of fields is left out."""
    numbers = record.text.split(SEPARATOR)
    return [
        SpanRecord(f"{record.id}.{start // size}", SEPARATOR.join(numbers[start : start + size]))
        for start in range(0, len(numbers), size)
    ]


def _segment(text: str, types: Collection[str] | None) -> Segment:
    numbers, slash, label = text.rpartition("/")
    if not slash or not label or " " in label:
        raise RowError(f"segment {text!r:.60} has no label; write numbers, a slash and a label, such as 4_17/a")
    if label != OUTSIDE:
        check_type(label, types)
    return _numbers(numbers), label


def _numbers(text: str) -> str:
    if not _NUMBERS.fullmatch(text):
        where = next((part for part in text.split(SEPARATOR) if not re.fullmatch("[0-9]+", part, re.ASCII)), text)
        raise RowError(f"{where!r:.60} is not a number; write numbers with _ between, and two blanks after a label")
    return text
