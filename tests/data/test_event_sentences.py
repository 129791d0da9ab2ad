"""The built-in generator: exact offsets, a rich stream, the same for one seed; and the plain baseline on it."""

from itertools import islice

import pytest

from kexue.data.baselines import ArgumentDictionary, TriggerDictionary
from kexue.data.generators.event_sentences import SCHEMA, event_sentences
from kexue.data.records import TRIGGER_ROLE, Argument, Event, EventRecord

RECORDS = list(islice(event_sentences(3), 4000))


def test_every_argument_lies_where_it_says_and_in_the_schema() -> None:
    for record in RECORDS:
        for event in record.events:
            assert event.trigger is not None
            assert event.arguments[0] == event.trigger
            assert len(event.arguments) >= 2
            for argument in event.arguments:
                assert record.text[argument.start : argument.end] == argument.text
                assert argument.role in [TRIGGER_ROLE, *SCHEMA[event.type]]


def test_the_stream_is_rich() -> None:
    events = [event for record in RECORDS for event in record.events]
    assert len(SCHEMA) >= 6
    assert all(3 <= len(roles) <= 5 for roles in SCHEMA.values())
    assert {event.type for event in events} == set(SCHEMA)
    used = {(event.type, argument.role) for event in events for argument in event.arguments}
    assert {(event_type, role) for event_type, roles in SCHEMA.items() for role in roles} <= used
    assert len({record.text for record in RECORDS}) == len({record.id for record in RECORDS}) == len(RECORDS)
    counts = [len(record.events) for record in RECORDS]
    assert min(counts.count(0), counts.count(1), counts.count(2)) > len(RECORDS) // 10
    assert len({argument.text for event in events for argument in event.arguments}) > 3000


def test_arguments_are_shared_within_and_between_types() -> None:
    pairs = [(record.events[0], record.events[1]) for record in RECORDS if len(record.events) == 2]
    shared = {
        (first.type == second.type, first.trigger == second.trigger)
        for first, second in pairs
        if {(a.start, a.end) for a in first.arguments} & {(a.start, a.end) for a in second.arguments}
    }
    assert shared == {(True, True), (True, False), (False, False)}
    assert any(
        [a.role for a in event.arguments].count("结婚双方") == 2 for record in RECORDS for event in record.events
    )


def test_the_same_seed_gives_the_same_sentences() -> None:
    assert list(islice(event_sentences(3), 100)) == RECORDS[:100]
    assert [record.text for record in islice(event_sentences(4), 100)] != [record.text for record in RECORDS[:100]]


def test_trigger_dictionary_predicts_types_by_their_words() -> None:
    record = EventRecord("a", "甲公司裁员，宣布大裁员", (Event("裁员", (Argument(TRIGGER_ROLE, "裁员", 3),)),))
    other = EventRecord("b", "大裁员", (Event("裁员", (Argument(TRIGGER_ROLE, "大裁员", 0),)), Event("无", ())))
    dictionary = TriggerDictionary.fit([record, other])
    assert dictionary.triggers == {"裁员": {"裁员", "大裁员"}}
    assert dictionary.predict(record).events == (Event("裁员", (Argument(TRIGGER_ROLE, "大裁员", 8),)),)
    assert dictionary.predict(EventRecord("c", "无事")) == EventRecord("c", "无事")


def test_argument_dictionary_adds_the_longest_known_words() -> None:
    def layoff(*words: tuple[str, int]) -> Event:
        return Event("裁员", (Argument(TRIGGER_ROLE, "裁员", 3), *(Argument("机构", *word) for word in words)))

    records = [
        EventRecord("a", "甲公司裁员", (layoff(("甲公司", 0)),)),
        EventRecord("b", "乙公司裁员", (layoff(("公司", 1)),)),
    ]
    dictionary = ArgumentDictionary.fit(records)
    assert dictionary.predict(records[0]).events == (layoff(("甲公司", 0)),)
    assert dictionary.predict(records[1]).events == (layoff(("公司", 1)),)
    assert dictionary.predict(EventRecord("c", "甲公司无事")).events == ()


def test_the_dictionary_falls_short_on_generated_sentences() -> None:
    """Words that elsewhere name an event make it wrong; only context tells."""
    dictionary = TriggerDictionary.fit(RECORDS[:2000])
    correct = predicted = gold = 0
    for record in RECORDS[2000:]:
        found = {event.type for event in dictionary.predict(record).events}
        wanted = {event.type for event in record.events}
        correct, predicted, gold = correct + len(found & wanted), predicted + len(found), gold + len(wanted)
    assert correct / gold == pytest.approx(1.0, abs=0.01)
    assert correct / predicted < 0.96
