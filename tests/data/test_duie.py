"""DuIE's format: what is read is checked against text and schema, and comes back as it was."""

import copy
import gzip
import json
import os
from pathlib import Path

import pytest

from kexue.data.duie import (
    PredicateTypes,
    labels_of,
    read_relations,
    read_schema,
    relation_row,
    schema_row,
    write_answers,
)
from kexue.data.records import VALUE_SLOT, Argument, Mention, Relation, RelationRecord
from kexue.errors import InputError

SCHEMA = {
    "饰演": PredicateTypes("娱乐人物", {VALUE_SLOT: "人物", "inWork": "影视作品"}),
    "作者": PredicateTypes("图书作品", {VALUE_SLOT: "人物"}),
}
ROW = {
    "text": "😀 李青在《青衣》中饰演青衣",
    "spo_list": [
        {
            "predicate": "饰演",
            "object_type": {"inWork": "影视作品", "@value": "人物"},
            "subject_type": "娱乐人物",
            "object": {"inWork": "青衣", "@value": "青衣"},
            "subject": "李青",
        }
    ],
}
PLAYS = Relation("饰演", Mention("李青", 2), (Argument(VALUE_SLOT, "青衣", 6), Argument("inWork", "青衣", 6)))
RECORD = RelationRecord("0", "😀 李青在《青衣》中饰演青衣", (PLAYS,))


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def changed(*keys, value=...) -> dict:
    """ROW with one value replaced, or taken out."""
    row = copy.deepcopy(ROW)
    *way, last = keys
    place = row
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return row


def test_a_row_becomes_a_record_and_a_row_again(tmp_path: Path) -> None:
    assert list(read_relations(write(tmp_path / "x.json", ROW), SCHEMA)) == [RECORD]
    assert relation_row(RECORD, SCHEMA) == ROW
    assert (PLAYS.subject.end, PLAYS.object[0].end) == (4, 8)


def test_the_place_of_a_text_that_occurs_twice(tmp_path: Path) -> None:
    """By itself the first; or the one where subject and value, and value and other slots, are nearest."""
    text = "李青和张白，张白著《青衣》，李青评《李青传》"
    row = {"text": text, "spo_list": [{"predicate": "作者", "subject": "青衣", "object": {"@value": "张白"}}]}
    path = write(tmp_path / "x.json", row)
    for occurrences, start in (("first", 3), ("all", 3), ("nearest", 6)):
        (record,) = read_relations(path, occurrences=occurrences)
        assert record.relations == (Relation("作者", Mention("青衣", 10), (Argument(VALUE_SLOT, "张白", start),)),)
    with pytest.raises(InputError, match="occurrences='last': use one of first, nearest, all"):
        read_relations(path, occurrences="last")


E = ("spo_list", 0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (changed(*E, "subject", value="王红"), "subject '王红' of '饰演' does not occur in the text"),
        (changed(*E, "object", "inWork", value="红衣"), "inWork '红衣' of '饰演' does not occur"),
        (changed(*E, "object", "@value", value=""), "'@value' is empty; give some text"),
        (changed(*E, "subject", value=""), "'subject' is empty"),
        (changed(*E, "object", "@value"), "'object' of '饰演' has no slot '@value'"),
        (
            changed(*E, "object", "inWork"),
            r"object of '饰演' has slots \['@value'\], .* for \['@value', 'inWork'\]",
        ),
        (changed(*E, "object_type", "inWork", value="地点"), "slot 'inWork' of type '地点' is not one of '饰演'"),
        (
            changed(*E, "subject_type", value="人物"),
            "subject of '饰演' has type '人物', in the .* is '娱乐人物'",
        ),
        (changed(*E, "predicate", value="主演"), "predicate '主演' is not in the schema"),
        (changed(*E, "object", value="青衣"), "'object' is '青衣'; give an object"),
        (changed(*E, "predicate"), "key 'predicate' is missing"),
        (changed(*E, "subject"), "key 'subject' is missing"),
        (changed("spo_list", 0, value="青衣"), "an entry of 'spo_list' is '青衣'"),
        (changed("spo_list"), "key 'spo_list' is missing; give a list"),
        (changed("text", value=""), "'text' is empty"),
        (changed("text", value="\ud83d"), "half of a surrogate pair"),
        (changed("text", value="长" * 2**20), "text of 1048576 characters, at most 100 are read"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"x\.json:2: .*{words}") as error:
        list(read_relations(path, SCHEMA, max_characters=100))
    assert "\n" not in str(error.value)
    listing = tmp_path / "bad_rows.jsonl"
    options = {"max_characters": 100, "on_bad_row": "skip", "bad_rows_file": listing}
    assert list(read_relations(path, SCHEMA, **options)) == [RECORD]
    (filed,) = listing.read_text(encoding="utf-8").splitlines()
    assert json.loads(filed)["line"] == 2
    assert len(filed) < 10_000


def test_texts_to_predict_on_need_no_relations_and_may_repeat(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", {"text": "甲"}, {"text": "甲", "spo_list": "anything"})
    assert list(read_relations(path, SCHEMA, with_relations=False)) == [
        RelationRecord("0", "甲"),
        RelationRecord("1", "甲"),
    ]


def test_a_relation_said_twice_is_one(tmp_path: Path) -> None:
    row = changed("spo_list", value=ROW["spo_list"] * 2)
    assert list(read_relations(write(tmp_path / "x.json", row), SCHEMA)) == [RECORD]


def test_answers_have_the_format_of_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert write_answers([RECORD, RelationRecord("1", "无")], SCHEMA, path) == 2
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [ROW, {"text": "无", "spo_list": []}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"predicate": "A", "subject_type": "x"}, "key 'object_type' is missing"),
        ({"predicate": "A", "subject_type": "x", "object_type": {"inWork": "y"}}, "has no slot '@value'"),
        ({"predicate": "A", "object_type": {"@value": "y"}}, "key 'subject_type' is missing"),
        (schema_row("作者", SCHEMA["作者"]), "'作者' stands in line 1 already"),
    ],
)
def test_a_wrong_schema_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = write(tmp_path / "s.json", schema_row("作者", SCHEMA["作者"]), row)
    with pytest.raises(InputError, match=rf"s\.json:2: .*{words}"):
        read_schema(path)


def test_labels_put_the_value_first(tmp_path: Path) -> None:
    rows = [schema_row(predicate, types) for predicate, types in SCHEMA.items()]
    rows[0]["object_type"] = dict(reversed(rows[0]["object_type"].items()))
    schema = read_schema(write(tmp_path / "s.json", *rows))
    assert schema == SCHEMA
    assert labels_of(schema) == [["饰演", VALUE_SLOT], ["饰演", "inWork"], ["作者", VALUE_SLOT]]


def test_all_real_rows_are_read_and_come_back() -> None:
    """Every span of them is found in its text; five relations are said twice in their row."""
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "relation_extraction_duie").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    folder = Path(root) / "relation_extraction_duie"
    schema = read_schema(folder / "duie_schema.json")
    assert (len(schema), len(labels_of(schema))) == (48, 55)
    for name, number, repeated in (("duie_train.json.gz", 4000, 5), ("duie_dev.json", 500, 0)):
        records = list(read_relations(folder / name, schema))
        assert len(records) == number
        with (gzip.open if name.endswith("gz") else open)(folder / name, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        left_out = 0
        for record, row in zip(records, rows, strict=True):
            once = [spo for index, spo in enumerate(row["spo_list"]) if spo not in row["spo_list"][:index]]
            left_out += len(row["spo_list"]) - len(once)
            assert relation_row(record, schema) == {**row, "spo_list": once}
            for relation in record.relations:
                for span in (relation.subject, *relation.object):
                    assert record.text[span.start : span.end] == span.text
        assert left_out == repeated
