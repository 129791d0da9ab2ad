"""Answers of several models as one."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .records import Span, SpanRecord, without_overlaps
from .span_dictionary import units_of
from .tagged import OUTSIDE, Tag, spans_of


def vote_on_spans(predictions: Sequence[Iterable[SpanRecord]], separator: str = "") -> list[SpanRecord]:
    """Give each token the tag that most models give it; of tags with equally many votes that of the first model.

    Tags have a part (first, inner, last, single) and a type. What the winners say together may contradict itself, and
    is then read as scorers read it. A model that outvotes itself changes nothing: all its spans come back, but for
    those that overlap a longer one.

    Args:
        predictions: of each model its records, of the same texts under the same ids, in any order.
        separator: what stands between tokens, see `units_of`.

    Returns:
        Records in the order of the first model.

    Raises:
        KeyError: a model lacks a record of the first one.
    """
    first, *others = [list(group) for group in predictions]
    by_id = [{record.id: record for record in group} for group in others]
    return [_voted([record, *(group[record.id] for group in by_id)], separator) for record in first]


def _voted(records: Sequence[SpanRecord], separator: str) -> SpanRecord:
    text, units = records[0].text, units_of(records[0].text, separator)
    ballots = zip(*(_tags(record, units) for record in records), strict=True)
    winners = [Counter(ballot).most_common(1)[0][0] for ballot in ballots]  # of equal counts the first that came
    borders = [(kind, units[first][0], units[end - 1][1]) for kind, first, end in spans_of(winners)]
    return SpanRecord(records[0].id, text, tuple(Span(kind, text[start:end], start) for kind, start, end in borders))


def _tags(record: SpanRecord, units: Sequence[tuple[int, int]]) -> list[Tag]:
    starts = {start: place for place, (start, _) in enumerate(units)}
    ends = {end: place + 1 for place, (_, end) in enumerate(units)}
    tags = [OUTSIDE] * len(units)
    for span in without_overlaps(record.spans):
        first, end = starts[span.start], ends[span.end]
        parts = "S" if end - first == 1 else "B" + "I" * (end - first - 2) + "E"
        tags[first:end] = [(part, span.type) for part in parts]
    return tags
