"""Gold cells of score matrices over spans: which (label, start, end) cells of a text are positive.

Source: https://kexue.fm/archives/8926 (GPLinker for events), https://kexue.fm/archives/8888 (for relations).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import torch

from ..errors import InputError
from .records import (
    VALUE_SLOT,
    Argument,
    EventRecord,
    Mention,
    Relation,
    RelationRecord,
    Span,
    SpanRecord,
    slot_links,
)

Cell = tuple[int, int, int]
"""(label, row, column): the label is the index of a (type, role) pair, or 0 where there is one matrix only."""
NO_CELL = -1
"""Fills up the cells of a row in a batch; losses leave such cells out."""


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
            start, end = tokens_of(record, argument, token_starts, token_ends)
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


SUBJECT, OBJECT = 0, 1
"""Labels of the entity scores."""


@dataclass(frozen=True, slots=True)
class RelationTargets:
    """Positive cells of the three matrices of relations, and the statements that they came from.

    Attributes:
        entities: (`SUBJECT` or `OBJECT`, first token, last token); every slot of an object is an object.
        heads: (link, i, j), from the first token of a subject to that of an object under the label of predicate and
            slot; and from the first token of a `VALUE_SLOT` to that of another slot, see `slot_links`.
        tails: the same for last tokens.
        triples: (label, subject's first token, its last, object's first, its last).
    """

    entities: list[Cell]
    heads: list[Cell]
    tails: list[Cell]
    triples: list[tuple[int, int, int, int, int]]


def relation_targets(
    record: RelationRecord,
    token_starts: Mapping[int, int],
    token_ends: Mapping[int, int],
    labels: Sequence[Sequence[str]],
    every_occurrence: bool = False,
) -> RelationTargets:
    """Turn the gold relations of a record into the positive cells of the entity, head-link and tail-link matrices.

    Args:
        record: text with its gold relations.
        token_starts: character position where a token begins -> index of that token.
        token_ends: character position after a token's last character -> index of that token.
        labels: [predicate, slot] of each label.
        every_occurrence: a text that occurs several times is positive everywhere, not only where the record says.

    Raises:
        InputError: a span's borders are not borders of tokens, or its [predicate, slot] is not among the labels.
    """
    label_ids = {(predicate, slot): number for number, (predicate, slot) in enumerate(labels)}
    links = slot_links(labels)
    entities: set[Cell] = set()
    heads: set[Cell] = set()
    tails: set[Cell] = set()
    triples: set[tuple[int, int, int, int, int]] = set()

    def places_in(mention: Mention | Argument) -> list[tuple[int, int]]:
        starts = places_of(record.text, mention.text) if every_occurrence else [mention.start]
        return [tokens_of(record, Mention(mention.text, start), token_starts, token_ends) for start in starts]

    def link(number: int, one: tuple[int, int], other: tuple[int, int]) -> None:
        heads.add((number, one[0], other[0]))
        tails.add((number, one[1], other[1]))

    for relation in record.relations:
        subjects = places_in(relation.subject)
        spans = {slot.role: places_in(slot) for slot in relation.object}
        entities |= {(SUBJECT, *span) for span in subjects}
        for slot, objects in spans.items():
            label = _label(record, relation, slot, label_ids)
            entities |= {(OBJECT, *span) for span in objects}
            for one, other in product(subjects, objects):
                link(label, one, other)
                triples.add((label, *one, *other))
            if label in links:
                for one, other in product(spans[VALUE_SLOT], objects):
                    link(links[label], one, other)
    return RelationTargets(sorted(entities), sorted(heads), sorted(tails), sorted(triples))


def places_of(text: str, span: str) -> list[int]:
    """Where a span begins in a text, overlapping places too."""
    return [place for place in range(len(text) - len(span) + 1) if text.startswith(span, place)]


def _label(record: RelationRecord, relation: Relation, slot: str, label_ids: Mapping[tuple[str, str], int]) -> int:
    label = label_ids.get((relation.predicate, slot))
    if label is None:
        raise InputError(
            f"record {record.id!r}: slot {slot!r} of predicate {relation.predicate!r} is not among the labels; use the "
            "schema that the rows were written with"
        )
    return label


def span_cells(
    record: SpanRecord,
    spans: Iterable[Span],
    token_starts: Mapping[int, int],
    token_ends: Mapping[int, int],
    type_ids: Mapping[str, int],
) -> list[Cell]:
    """Positive cells (type, first token, last token) of typed spans, sorted and without repetition.

    Args:
        record: the text that they lie in.
        spans: those wanted.
        token_starts, token_ends: as in `event_targets`.
        type_ids: type -> label.

    Raises:
        InputError: a span's borders are not borders of tokens, or its type is not among the labels.
    """
    cells: set[Cell] = set()
    for span in spans:
        if span.type not in type_ids:
            raise InputError(
                f"record {record.id!r}: type {span.type!r} is not one of {', '.join(type_ids)}; use the types that the "
                "model was trained with"
            )
        cells.add((type_ids[span.type], *tokens_of(record, span, token_starts, token_ends)))
    return sorted(cells)


def tokens_of(
    record: EventRecord | RelationRecord | SpanRecord,
    span: Argument | Mention | Span,
    token_starts: Mapping[int, int],
    token_ends: Mapping[int, int],
) -> tuple[int, int]:
    """First and last token of a piece of a text.

    Raises:
        InputError: its borders are not borders of tokens.
    """
    start, end = token_starts.get(span.start), token_ends.get(span.end)
    if start is None or end is None:
        raise InputError(
            f"record {record.id!r}: {type(span).__name__.lower()} {span.text!r} at {span.start} is not made of whole "
            "tokens; use a tokenizer of single characters, or leave the row out"
        )
    return start, end


def stack_cells(cells: Sequence[Sequence[tuple[int, ...]]], width: int = 3) -> torch.Tensor:
    """Cells of each row as (B, P, width), P at least 1, filled up with `NO_CELL`."""
    stacked = np.full((len(cells), max(1, *map(len, cells)), width), NO_CELL)
    for rows, group in zip(stacked, cells, strict=True):
        if group:
            rows[: len(group)] = group
    return torch.from_numpy(stacked)
