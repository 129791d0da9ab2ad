"""The positive cells of a record, by hand and back again."""

import pytest

from kexue.data.records import (
    TRIGGER_ROLE,
    VALUE_SLOT,
    Argument,
    Event,
    EventRecord,
    Mention,
    Relation,
    RelationRecord,
)
from kexue.data.targets import EventTargets, RelationTargets, event_targets, relation_targets
from kexue.errors import InputError

TEXT = "甲乙分别获刑二年和三年"
LABELS = {("判刑", TRIGGER_ROLE): 0, ("判刑", "被告"): 1, ("判刑", "刑期"): 2}
TRIGGER = Argument(TRIGGER_ROLE, "获刑", 4)


def sentence(person: Argument, term: Argument) -> Event:
    return Event("判刑", (TRIGGER, person, term))


RECORD = EventRecord(
    "r",
    TEXT,
    (
        sentence(Argument("被告", "甲", 0), Argument("刑期", "二年", 6)),
        sentence(Argument("被告", "乙", 1), Argument("刑期", "三年", 9)),
    ),
)
STARTS = {place: place + 1 for place in range(len(TEXT))}
ENDS = {place + 1: place + 1 for place in range(len(TEXT))}


def test_cells_of_two_events_that_share_a_trigger() -> None:
    assert event_targets(RECORD, STARTS, ENDS, LABELS) == EventTargets(
        arguments=[(0, 5, 6), (1, 1, 1), (1, 2, 2), (2, 7, 8), (2, 10, 11)],
        heads=[(0, 1, 5), (0, 1, 7), (0, 2, 5), (0, 2, 10), (0, 5, 7), (0, 5, 10)],
        tails=[(0, 1, 6), (0, 1, 8), (0, 2, 6), (0, 2, 11), (0, 6, 8), (0, 6, 11)],
    )


def test_one_span_in_two_roles_is_linked_to_itself() -> None:
    event = Event("判刑", (Argument("被告", "甲", 0), Argument("刑期", "甲", 0)))
    targets = event_targets(EventRecord("r", TEXT, (event,)), STARTS, ENDS, LABELS)
    assert targets == EventTargets([(1, 1, 1), (2, 1, 1)], heads=[(0, 1, 1)], tails=[(0, 1, 1)])


def test_repetitions_and_lone_arguments_make_no_link() -> None:
    event = Event("判刑", (TRIGGER, TRIGGER))
    targets = event_targets(EventRecord("r", TEXT, (event, event)), STARTS, ENDS, LABELS)
    assert targets == EventTargets([(0, 5, 6)], [], [])
    assert event_targets(EventRecord("r", TEXT), STARTS, ENDS, LABELS) == EventTargets([], [], [])


def test_what_cannot_be_expressed_is_named() -> None:
    with pytest.raises(InputError, match="record 'r': argument '二年' at 6 is not made of whole tokens"):
        event_targets(RECORD, STARTS, {end: token for end, token in ENDS.items() if end != 8}, LABELS)
    with pytest.raises(InputError, match="role '刑期' of event type '判刑' is not among the labels"):
        event_targets(RECORD, STARTS, ENDS, {key: label for key, label in LABELS.items() if key[1] != "刑期"})


DUIE = [["饰演", VALUE_SLOT], ["饰演", "inWork"], ["作者", VALUE_SLOT]]
FILM = "甲在乙乙演丁丁"
STATED = RelationRecord(
    "r",
    FILM,
    (
        Relation("饰演", Mention("甲", 0), (Argument(VALUE_SLOT, "丁", 5), Argument("inWork", "乙乙", 2))),
        Relation("作者", Mention("乙乙", 2), (Argument(VALUE_SLOT, "甲", 0),)),
    ),
)
FILM_STARTS = {place: place + 1 for place in range(len(FILM))}
FILM_ENDS = {place + 1: place + 1 for place in range(len(FILM))}


def test_cells_of_relations() -> None:
    """Links have a direction, and a slot is also linked from its value (number 3, after the labels)."""
    assert relation_targets(STATED, FILM_STARTS, FILM_ENDS, DUIE) == RelationTargets(
        entities=[(0, 1, 1), (0, 3, 4), (1, 1, 1), (1, 3, 4), (1, 6, 6)],
        heads=[(0, 1, 6), (1, 1, 3), (2, 3, 1), (3, 6, 3)],
        tails=[(0, 1, 6), (1, 1, 4), (2, 4, 1), (3, 6, 4)],
        triples=[(0, 1, 1, 6, 6), (1, 1, 1, 3, 4), (2, 3, 4, 1, 1)],
    )


def test_cells_of_every_occurrence() -> None:
    targets = relation_targets(STATED, FILM_STARTS, FILM_ENDS, DUIE, every_occurrence=True)
    assert [cell for cell in targets.heads if cell[0] in (0, 3)] == [(0, 1, 6), (0, 1, 7), (3, 6, 3), (3, 7, 3)]
    assert set(targets.entities) == {(0, 1, 1), (0, 3, 4), (1, 1, 1), (1, 3, 4), (1, 6, 6), (1, 7, 7)}


def test_relations_that_cannot_be_expressed_are_named() -> None:
    with pytest.raises(InputError, match="slot 'inWork' of predicate '饰演' is not among the labels"):
        relation_targets(STATED, FILM_STARTS, FILM_ENDS, [["饰演", VALUE_SLOT]])
    with pytest.raises(InputError, match="mention '甲' at 0 is not made of whole tokens"):
        relation_targets(STATED, {}, FILM_ENDS, DUIE)
