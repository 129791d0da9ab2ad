"""Gold cells of GPLinker's score matrices: which (label, start, end) cells of a text are positive.

Source: https://kexue.fm/archives/8926 (GPLinker for event extraction).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from ..errors import InputError
from .records import Argument, EventRecord

Cell = tuple[int, int, int]
"""(label, row, column): the label is the index of a (type, role) pair, or 0 where there is one matrix only."""


@dataclass(frozen=True, slots=True)
class EventTargets:
    """Positive cells of the three matrices; each list is sorted and without repetition.

    Attributes:
        arguments: (label, first token, last token) of every argument; the last token is inclusive.
        heads: (0, i, j) with i <= j, the first tokens of two arguments of one event.
        tails: (0, i, j) with i <= j, the last tokens of two arguments of one event.
    """

    arguments: list[Cell]
    heads: list[Cell]
    tails: list[Cell]


def event_targets(
    record: EventRecord,
    token_starts: Mapping[int, int],
    token_ends: Mapping[int, int],
    label_ids: Mapping[tuple[str, str], int],
) -> EventTargets:
    """Turn the gold events of a record into the positive cells of the argument, head-link and tail-link matrices.

    Two arguments that share one span (one word in two roles) link that span to itself: a cell on the diagonal.

    Args:
        record: text with its gold events.
        token_starts: character position where a token begins -> index of that token.
        token_ends: character position after a token's last character -> index of that token.
        label_ids: (event type, role) -> label.

    Raises:
        InputError: an argument's borders are not borders of tokens, or its (type, role) is not among the labels.
    """
    arguments: set[Cell] = set()
    heads: set[Cell] = set()
    tails: set[Cell] = set()
    for event in record.events:
        spans = []
        for argument in dict.fromkeys(event.arguments):
            start, end = _tokens_of(record, argument, token_starts, token_ends)
            label = label_ids.get((event.type, argument.role))
            if label is None:
                raise InputError(
                    f"record {record.id!r}: role {argument.role!r} of event type {event.type!r} is not among the "
                    "labels; use the schema that the rows were written with"
                )
            arguments.add((label, start, end))
            spans.append((start, end))
        for (start, end), (other_start, other_end) in combinations(spans, 2):
            heads.add((0, min(start, other_start), max(start, other_start)))
            tails.add((0, min(end, other_end), max(end, other_end)))
    return EventTargets(sorted(arguments), sorted(heads), sorted(tails))


def _tokens_of(
    record: EventRecord, argument: Argument, token_starts: Mapping[int, int], token_ends: Mapping[int, int]
) -> tuple[int, int]:
    start, end = token_starts.get(argument.start), token_ends.get(argument.end)
    if start is None or end is None:
        raise InputError(
            f"record {record.id!r}: argument {argument.text!r} at {argument.start} is not made of whole tokens; "
            "use a tokenizer of single characters, or leave the row out"
        )
    return start, end
