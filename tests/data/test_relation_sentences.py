"""The built-in generator: exact offsets, a rich stream, the same for one seed; and the plain baselines on it."""

from itertools import islice

from kexue.data.baselines import RelationDictionary, RelationWords
from kexue.data.generators.relation_sentences import SCHEMA, relation_sentences
from kexue.data.records import VALUE_SLOT, Argument, Mention, Relation, RelationRecord

RECORDS = list(islice(relation_sentences(3), 3000))
RELATIONS = [relation for record in RECORDS for relation in record.relations]


def test_every_span_lies_where_it_says_and_in_the_schema() -> None:
    for record in RECORDS:
        for relation in record.relations:
            assert relation.object[0].role == VALUE_SLOT
            assert {slot.role for slot in relation.object} <= set(SCHEMA[relation.predicate].slots)
            for span in (relation.subject, *relation.object):
                assert record.text[span.start : span.end] == span.text


def test_the_stream_is_rich() -> None:
    used = {(relation.predicate, slot.role) for relation in RELATIONS for slot in relation.object}
    assert used == {(predicate, slot) for predicate, types in SCHEMA.items() for slot in types.slots}
    assert len({record.text for record in RECORDS}) == len({record.id for record in RECORDS}) == len(RECORDS)
    counts = [len(record.relations) for record in RECORDS]
    assert min(counts.count(number) for number in (0, 1, 2, 3)) > len(RECORDS) // 20


def test_spans_are_shared_and_nested_and_objects_have_several_slots() -> None:
    shared = nested = several = 0
    for record in RECORDS:
        subjects = [relation.subject for relation in record.relations]
        values = [relation.object[0].text for relation in record.relations]
        shared += bool({subject.text for subject in subjects} & set(values))
        nested += any(
            subject.start <= value.start and value.end <= subject.end and subject.text != value.text
            for subject in subjects
            for value in (relation.object[0] for relation in record.relations)
        )
        kinds = [(relation.predicate, relation.subject) for relation in record.relations if len(relation.object) > 1]
        several += len(kinds) > len(set(kinds))
    assert min(shared, nested, several) > 50


def test_the_same_seed_gives_the_same_sentences() -> None:
    assert list(islice(relation_sentences(3), 100)) == RECORDS[:100]
    assert [record.text for record in islice(relation_sentences(4), 100)] != [record.text for record in RECORDS[:100]]


def test_the_dictionary_predicts_what_it_has_seen() -> None:
    known = Relation("饰演", Mention("甲", 0), (Argument(VALUE_SLOT, "乙", 3), Argument("inWork", "丙", 1)))
    other = Relation("作者", Mention("丙", 0), (Argument(VALUE_SLOT, "丁", 1),))
    records = [RelationRecord("a", "甲丙演乙", (known,)), RelationRecord("b", "丙丁", (other,))]
    dictionary, words = RelationDictionary.fit(records), RelationWords.fit(records)
    assert dictionary.predict(RelationRecord("c", "乙甲")).relations == ()
    there = (Relation("饰演", Mention("甲", 2), (Argument(VALUE_SLOT, "乙", 1), Argument("inWork", "丙", 0))),)
    assert dictionary.predict(RelationRecord("c", "丙乙甲")).relations == there
    assert words.predict(RelationRecord("c", "乙甲")).relations == (
        Relation("饰演", Mention("甲", 1), (Argument(VALUE_SLOT, "乙", 0),)),
    )
