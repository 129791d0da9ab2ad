"""CCKS 2019's format: what is read is checked against text and knowledge base, and comes back as it was."""

import copy
import gzip
import json
import os
from pathlib import Path

import pytest

from kexue.data.ccks_linking import entity_row, link_row, read_knowledge, read_links, write_answers
from kexue.data.records import NIL, Entity, Link, LinkRecord
from kexue.errors import InputError

ROW = {
    "text_id": "1",
    "text": "😀 李娜的歌和李娜",
    "mention_data": [
        {"kb_id": "7", "mention": "李娜", "offset": "2"},
        {"kb_id": "NIL", "mention": "李娜", "offset": "7"},
    ],
}
RECORD = LinkRecord("1", "😀 李娜的歌和李娜", (Link("李娜", 2, "7", "人物"), Link("李娜", 7, NIL)))
ENTRY = {
    "alias": ["Li Na"],
    "subject_id": "7",
    "subject": "李娜",
    "type": ["人物"],
    "data": [{"predicate": "职业", "object": "歌手"}, {"predicate": "备注", "object": ""}],
}
ENTITY = Entity("7", "李娜", ("Li Na",), ("人物",), (("职业", "歌手"), ("备注", "")))
TYPES = {"7": "人物", "8": None}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def changed(row: dict, *keys, value=...) -> dict:
    """A row with one value replaced, or taken out."""
    row = copy.deepcopy(row)
    *way, last = keys
    place = row
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return row


def test_rows_become_records_and_rows_again(tmp_path: Path) -> None:
    assert list(read_links(write(tmp_path / "x.json", ROW), TYPES.__getitem__)) == [RECORD]
    assert link_row(RECORD) == ROW
    assert list(read_knowledge(write(tmp_path / "kb.json", ENTRY))) == [ENTITY]
    assert entity_row(ENTITY) == ENTRY


M = ("mention_data", 0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            changed(ROW, *M, "offset", value="3"),
            "start at 3, where the text has '娜的'; it occurs at 2, 7",
        ),
        (changed(ROW, *M, "offset", value="99"), "start at 99, where the text has ''; it occurs at 2, 7"),
        (changed(ROW, *M, "offset", value="9" * 5000), "start at 9+, where the text has ''"),
        (changed(ROW, *M, "offset", value="-2"), "'offset' is '-2'; give the 0-based place"),
        (changed(ROW, *M, "offset", value=2), "'offset' is 2; give a string"),
        (changed(ROW, *M, "mention", value=""), "'mention' is empty"),
        (changed(ROW, *M, "mention", value="姚明"), "it does not occur in the text"),
        (changed(ROW, *M, "kb_id", value="77"), "kb_id '77' of '李娜' is not in the knowledge base; .* or write NIL"),
        (changed(ROW, *M, "kb_id"), "key 'kb_id' is missing"),
        (changed(ROW, "mention_data", 1, "offset", value="2"), "'李娜' at 2 is there twice"),
        (changed(ROW, "mention_data", 0, value="李娜"), "an entry of 'mention_data' is '李娜'"),
        (changed(ROW, "mention_data"), "key 'mention_data' is missing; give a list"),
        (changed(ROW, "text", value=""), "'text' is empty"),
        (changed(ROW, "text_id"), "key 'text_id' is missing"),
        (changed(ROW, "text_id", value="0"), "'0' stands in line 1 already"),
        (changed(ROW, "text", value="长" * 350_000), "text of 350000 characters, at most 50 are trained on"),
    ],
    ids=range(16),
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = write(tmp_path / "x.json", {**ROW, "text_id": "0"}, row)
    with pytest.raises(InputError, match=rf"x\.json:2: .*{words}") as error:
        list(read_links(path, TYPES.__getitem__, max_characters=50))
    assert "\n" not in str(error.value)
    listing = tmp_path / "bad_rows.jsonl"
    options = {"max_characters": 50, "on_bad_row": "skip", "bad_rows_file": listing}
    assert len(list(read_links(path, TYPES.__getitem__, **options))) == 1
    assert json.loads(listing.read_text(encoding="utf-8"))["line"] == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (changed(ENTRY, "subject_id"), "key 'subject_id' is missing"),
        (changed(ENTRY, "subject", value=""), "'subject' is empty"),
        (changed(ENTRY, "alias", value="Li Na"), "'alias' is 'Li Na'; give a list"),
        (changed(ENTRY, "alias", 0, value=3), "'alias' is 3; give a string"),
        (changed(ENTRY, "alias", 0, value="长" * 350_000), "a name of 350000 characters .*use at most 1000"),
        (changed(ENTRY, "type"), "key 'type' is missing"),
        (changed(ENTRY, "data", 0, value="歌手"), "an entry of 'data' is '歌手'"),
        (changed(ENTRY, "data", 0, "object"), "key 'object' is missing"),
        (changed(ENTRY, "data", 0, "predicate", value=""), "'predicate' is empty"),
        (changed(ENTRY, "subject_id", value="0"), "'0' stands in line 1 already"),
    ],
    ids=range(10),
)
def test_a_wrong_entry_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = write(tmp_path / "kb.json", {**ENTRY, "subject_id": "0"}, row)
    with pytest.raises(InputError, match=rf"kb\.json:2: .*{words}"):
        list(read_knowledge(path))
    assert len(list(read_knowledge(path, on_bad_row="skip"))) == 1


def test_rows_to_predict_on_need_no_mentions(tmp_path: Path) -> None:
    rows = {"text_id": "a", "text": "甲"}, {"text_id": "b", "text": "乙", "mention_data": "anything"}
    found = list(read_links(write(tmp_path / "x.json", *rows), with_links=False))
    assert found == [LinkRecord("a", "甲"), LinkRecord("b", "乙")]


def test_empty_aliases_are_none(tmp_path: Path) -> None:
    (entity,) = read_knowledge(write(tmp_path / "kb.json", changed(ENTRY, "alias", value=["", "娜"])))
    assert entity.aliases == ("娜",)


def test_answers_have_the_form_of_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert write_answers([RECORD, LinkRecord("2", "无")], path) == 2
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [ROW, {"text_id": "2", "text": "无", "mention_data": []}]


def test_all_real_rows_are_read_and_come_back() -> None:
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "entity_linking").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    folder = Path(root) / "entity_linking"
    entities = list(read_knowledge(folder / "kb_data.gz"))
    with gzip.open(folder / "kb_data.gz", "rt", encoding="utf-8") as file:
        assert [entity_row(entity) for entity in entities] == [json.loads(line) for line in file]
    types = {entity.id: None for entity in entities}
    for name, number in (("train.json.gz", 3000), ("dev.json", 500)):
        records = list(read_links(folder / name, types.__getitem__))
        assert len(records) == number
        opened = gzip.open if name.endswith("gz") else open
        with opened(folder / name, "rt", encoding="utf-8") as file:
            assert [link_row(record) for record in records] == [json.loads(line) for line in file]
    assert len(list(read_links(folder / "ccks2019_develop_text_only.json", with_links=False))) == 1000
