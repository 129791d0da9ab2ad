"""DuEE's format: what is read is checked against text and schema, and comes back as it was."""

import copy
import json
import os
from pathlib import Path

import pytest

from kexue.data.duee import answer_row, event_row, labels_of, read_events, read_schema, write_answers
from kexue.data.records import TRIGGER_ROLE, Argument, Event, EventRecord
from kexue.errors import InputError

SCHEMA = {"组织关系-裁员": ["时间", "裁员方", "裁员人数"]}
ROW = {
    "text": "😀 云科公司裁员400人",
    "id": "r1",
    "event_list": [
        {
            "event_type": "组织关系-裁员",
            "trigger": "裁员",
            "trigger_start_index": 6,
            "arguments": [
                {"argument_start_index": 2, "role": "裁员方", "argument": "云科公司", "alias": []},
                {"argument_start_index": 8, "role": "裁员人数", "argument": "400人", "alias": []},
            ],
            "class": "组织关系",
        }
    ],
}
RECORD = EventRecord(
    "r1",
    "😀 云科公司裁员400人",
    (
        Event(
            "组织关系-裁员",
            (Argument(TRIGGER_ROLE, "裁员", 6), Argument("裁员方", "云科公司", 2), Argument("裁员人数", "400人", 8)),
        ),
    ),
)


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
    assert list(read_events(write(tmp_path / "x.json", ROW), SCHEMA)) == [RECORD]
    assert event_row(RECORD) == ROW
    assert RECORD.events[0].trigger == Argument(TRIGGER_ROLE, "裁员", 6)
    assert [argument.end for argument in RECORD.events[0].arguments] == [8, 6, 12]


E = ("event_list", 0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (changed(*E, "trigger_start_index", value=7), "'裁员' .* start at 7, where the text has '员4'; it occurs at 6"),
        (changed(*E, "arguments", 1, "argument_start_index", value=-4), "'400人' .* start at -4.*occurs at 8"),
        (changed(*E, "arguments", 0, "argument", value="腾讯"), "it does not occur in the text"),
        (changed(*E, "event_type", value="组织关系-加盟"), "event type '组织关系-加盟' is not in the schema"),
        (changed(*E, "arguments", 0, "role", value="买方"), "role '买方' is not one of .*use one of .*'裁员方'"),
        (changed(*E, "arguments", 0, "argument", value=""), "'argument' is empty"),
        (changed(*E, "trigger", value=""), "'trigger' is empty"),
        (changed("text", value=""), "'text' is empty"),
        (changed("text"), "key 'text' is missing"),
        (changed("id"), "key 'id' is missing"),
        (changed("event_list"), "key 'event_list' is missing; give a list"),
        (changed(*E, "event_type"), "key 'event_type' is missing"),
        (changed(*E, "trigger"), "key 'trigger' is missing"),
        (changed(*E, "trigger_start_index"), "key 'trigger_start_index' is missing; give a whole number"),
        (changed(*E, "arguments"), "key 'arguments' is missing"),
        (changed(*E, "arguments", 0, "role"), "key 'role' is missing"),
        (changed("id", value=7), "'id' is 7; give a string"),
        (changed("text", value=None), "'text' is None; give a string"),
        (changed("text", value="\ud83d裁员"), "half of a surrogate pair"),
        (changed("event_list", value={}), "'event_list' is {}; give a list"),
        (changed("event_list", 0, value="裁员"), "an entry of 'event_list' is '裁员'; give an object"),
        (changed(*E, "arguments", 0, value=[]), "an entry of 'arguments' is"),
        (changed(*E, "trigger_start_index", value=True), "'trigger_start_index' is True; give a whole number"),
        (changed(*E, "trigger_start_index", value=6.0), "'trigger_start_index' is 6.0"),
        (changed("event_list", value=[{"event_type": "组织关系-裁员", "arguments": []}]), "neither a trigger nor"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**ROW, "id": "r0"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"x\.json:2: .*{words}") as error:
        list(read_events(path, SCHEMA))
    assert "\n" not in str(error.value)
    listing = tmp_path / "bad_rows.jsonl"
    assert len(list(read_events(path, SCHEMA, on_bad_row="skip", bad_rows_file=listing))) == 1
    assert json.loads(listing.read_text(encoding="utf-8"))["line"] == 2


def test_rows_to_predict_on_need_no_events(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", {"id": "a", "text": "甲"}, {"id": "b", "text": "乙", "event_list": "anything"})
    assert list(read_events(path, SCHEMA, with_events=False)) == [EventRecord("a", "甲"), EventRecord("b", "乙")]


def test_texts_beyond_the_length_and_repeated_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=":1: text of 12 characters, at most 11 are read; raise max_length"):
        list(read_events(write(tmp_path / "x.json", ROW), SCHEMA, max_characters=11))
    with pytest.raises(InputError, match=":2: 'r1' stands in line 1 already"):
        list(read_events(write(tmp_path / "x.json", ROW, ROW), SCHEMA))


def test_events_without_a_trigger(tmp_path: Path) -> None:
    event = {"event_type": "组织关系-裁员", "arguments": ROW["event_list"][0]["arguments"]}
    (record,) = read_events(write(tmp_path / "x.json", changed("event_list", value=[event])), SCHEMA)
    assert record.events[0].trigger is None
    assert "trigger" not in event_row(record)["event_list"][0]


def test_answers_leave_the_trigger_out(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert write_answers([RECORD, EventRecord("r2", "无")], path) == 2
    first, second = path.read_text(encoding="utf-8").splitlines()
    arguments = [{"role": "裁员方", "argument": "云科公司"}, {"role": "裁员人数", "argument": "400人"}]
    assert json.loads(first) == {"id": "r1", "event_list": [{"event_type": "组织关系-裁员", "arguments": arguments}]}
    assert json.loads(second) == answer_row(EventRecord("r2", "无")) == {"id": "r2", "event_list": []}
    assert "云科公司" in first


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"event_type": "A"}, "key 'role_list' is missing"),
        ({"event_type": "A", "role_list": [{}]}, "key 'role' is missing"),
        ({"event_type": "A", "role_list": ["x"]}, "an entry of 'role_list'"),
        ({"event_type": "A", "role_list": [{"role": "x"}, {"role": "x"}]}, "each once"),
        ({"event_type": "A", "role_list": [{"role": TRIGGER_ROLE}]}, "none named"),
        ({"event_type": "B", "role_list": []}, "'B' stands in line 1 already"),
    ],
)
def test_a_wrong_schema_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = write(tmp_path / "s.json", {"event_type": "B", "role_list": [{"role": "x"}]}, row)
    with pytest.raises(InputError, match=rf"s\.json:2: .*{words}"):
        read_schema(path)


def test_labels_put_the_trigger_first() -> None:
    assert labels_of({"A": ["x", "y"], "B": []}) == [["A", TRIGGER_ROLE], ["A", "x"], ["A", "y"], ["B", TRIGGER_ROLE]]


def test_all_real_rows_are_read_and_come_back() -> None:
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "event_extraction_duee").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    folder = Path(root) / "event_extraction_duee"
    schema = read_schema(folder / "duee_event_schema.json")
    assert (len(schema), len(labels_of(schema))) == (65, 282)
    for name, number in (("duee_train.json", 892), ("duee_dev.json", 150)):
        records = list(read_events(folder / name, schema))
        assert len(records) == number
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        assert [event_row(record) for record in records] == rows
