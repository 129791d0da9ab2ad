"""Relations over tokens, over characters, and as they are counted."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ...data.records import Argument, Mention, Relation, RelationRecord
from ...nn.decoding import merge_windows
from ...nn.decoding.relations import PlainRelation

Statement = tuple[str, tuple[str, frozenset[tuple[str, str]]]]
"""What a relation says, by its texts alone: predicate, and subject with all slots of the object."""


def records_of(batch: dict[str, Any], decoded: Iterable[Iterable[PlainRelation]]) -> list[RelationRecord]:
    """The records of a batch with what was found in the tokens of their windows, put together, each said once."""
    windows: list[list[Any]] = [[] for _ in batch["records"]]
    for owner, offsets, found in zip(batch["owners"], batch["offsets"], decoded, strict=True):
        text = batch["records"][owner].text
        relations = [relation_of(text, offsets, plain) for plain in found]
        windows[owner].append(((offsets[1][0], offsets[-2][1]), [(_extent(each), each) for each in relations]))
    return [
        replace(record, relations=without_repeated(relation for _, relation in merge_windows(group)))
        for record, group in zip(batch["records"], windows, strict=True)
    ]


def relation_of(text: str, offsets: Sequence[tuple[int, int]], plain: PlainRelation) -> Relation:
    """A relation over tokens as one over the characters of the text."""
    predicate, (first, last), slots = plain
    start = offsets[first][0]
    spans = [(slot, offsets[begin][0], offsets[end][1]) for slot, (begin, end) in slots]
    return Relation(
        predicate,
        Mention(text[start : offsets[last][1]], start),
        tuple(Argument(slot, text[begin:end], begin) for slot, begin, end in spans),
    )


def plain_relation(relation: Relation) -> Statement:
    """What a relation says; an object counts as a whole, positions do not count."""
    return relation.predicate, (
        relation.subject.text,
        frozenset((slot.role, slot.text) for slot in relation.object),
    )


def plain_relations(record: RelationRecord) -> list[Statement]:
    """Relations of a record as `TypedScores` takes them."""
    return [plain_relation(relation) for relation in record.relations]


def without_repeated(relations: Iterable[Relation]) -> tuple[Relation, ...]:
    """The relations without those that say what an earlier one has said, of other places of the text."""
    return tuple({plain_relation(relation): relation for relation in reversed(list(relations))}.values())[::-1]


def _extent(relation: Relation) -> tuple[int, int]:
    """From the first character of its spans to the last one's end."""
    spans = (relation.subject, *relation.object)
    return min(span.start for span in spans), max(span.end for span in spans)
