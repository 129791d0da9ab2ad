"""Parts of the training rows that take turns as validation rows, and rows made by leaving fields out."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from random import Random

from .daguan import record_of, segments_of
from .records import SpanRecord


def stratified_folds(records: Sequence[SpanRecord], num_folds: int, seed: int = 0) -> list[int]:
    """Deal rows out so that each fold has its share of every set of types that rows have.

    Returns:
        For each row its fold, from 0; folds differ by at most one row, also in what they have of one set of types.
    """
    strata: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        strata[tuple(sorted({span.type for span in record.spans}))].append(index)
    folds, place = [0] * len(records), 0
    for kinds in sorted(strata):
        Random(f"folds {seed} {kinds}").shuffle(strata[kinds])
        for index in strata[kinds]:
            folds[index] = place % num_folds
            place += 1
    return folds


def with_fields_left_out(records: Iterable[SpanRecord]) -> Iterator[SpanRecord]:
    """Yield each row, and after it copies without the fields of some types.

    Of a row with all of a, b and c a copy without a and one without b; with a and b, one without b; with c and one of
    the others, one without c.
    """
    for record in records:
        yield record
        kinds = {span.type for span in record.spans} & {"a", "b", "c"}
        if len(kinds) == 3:
            left_out = ["a", "b"]
        elif len(kinds) == 2:
            left_out = ["c" if "c" in kinds else "b"]
        else:
            left_out = []
        for kind in left_out:
            kept = [segment for segment in segments_of(record) if segment[1] != kind]
            yield record_of(f"{record.id} without {kind}", kept)
