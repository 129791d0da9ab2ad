"""CLUENER's format: what is read is checked against its text, comes back as it was, and is answered as it asks."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kexue.data.cluener import cluener_row, read_cluener, write_cluener
from kexue.data.records import Span, SpanRecord, without_overlaps
from kexue.data.rows import read_rows
from kexue.errors import InputError

ROW: dict[str, Any] = {
    "text": "😀小李和小李在北京",
    "label": {"name": {"小李": [[1, 2], [4, 5]]}, "address": {"北京": [[7, 8]]}},
}
RECORD = SpanRecord(0, ROW["text"], (Span("name", "小李", 1), Span("name", "小李", 4), Span("address", "北京", 7)))
TYPES = ["address", "name"]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_becomes_a_record_and_a_row_again(tmp_path: Path) -> None:
    assert list(read_cluener(write(tmp_path / "x.json", ROW), TYPES)) == [RECORD]
    assert cluener_row(RECORD) == {"id": 0, **ROW}
    assert [span.end for span in RECORD.spans] == [3, 6, 9]


def test_answers_are_written_as_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    repeated = SpanRecord(5, RECORD.text, (*RECORD.spans, RECORD.spans[0]))
    assert write_cluener([repeated, SpanRecord("b", "无")], path) == 2
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert first == '{"id": 5, "label": {"name": {"小李": [[1, 2], [4, 5]]}, "address": {"北京": [[7, 8]]}}}'
    assert json.loads(second) == {"id": "b", "label": {}}


def labelled(**label: Any) -> dict[str, Any]:
    return {**copy.deepcopy(ROW), "label": label}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (labelled(name={"小李": [[1, 9]]}), r"'小李' is said to be at \[1, 9\], where there is no such place"),
        (labelled(name={"小李": [[-1, 2]]}), "no such place; it occurs at"),
        (labelled(name={"小李": [[2, 3]]}), r"the text has '李和'; it occurs at \[1, 2\], \[4, 5\]"),
        (labelled(name={"小李": [[2, 1]]}), "there is no such place"),
        (labelled(name={"小王": [[1, 2]]}), "the text has '小李'; it does not occur in the text"),
        (labelled(name={"": [[1, 0]]}), "name has '' at .* give the text of a span"),
        (labelled(name={"小李": []}), r"name has '小李' at \[\]; give the text of a span"),
        (labelled(name={"小李": [[1, 2, 3]]}), r"give \[start, end\], whole numbers, the end inclusive"),
        (labelled(name={"小李": [[True, 2]]}), "whole numbers"),
        (labelled(name={"小李": [1, 2]}), "'小李' is at 1; give"),
        (labelled(name=["小李"]), "an entry of 'label of name'"),
        (
            labelled(song={"小李": [[1, 2]]}),
            "label 'song' is not one of address, name; correct it or add it to data.types",
        ),
        ({"text": "无"}, "key 'label' is missing; give an object"),
        ({"label": {}}, "key 'text' is missing"),
        ({**ROW, "text": ""}, "'text' is empty"),
        ({**ROW, "id": 0}, "'0' stands in line 1 already"),
        ({**ROW, "id": None}, "'id' is None; give a string"),
        ({**ROW, "text": "长" * 400_000}, "text of 400000 characters, at most 1000 are taken; raise max_characters"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = write(tmp_path / "x.json", ROW, row, ROW)
    with pytest.raises(InputError, match=rf"x\.json:2: .*{words}") as error:
        list(read_cluener(path, TYPES, max_characters=1000))
    assert len(str(error.value)) < 500
    listing = tmp_path / "bad_rows.jsonl"
    kept = list(read_cluener(path, TYPES, max_characters=1000, on_bad_row="skip", bad_rows_file=listing))
    assert [record.id for record in kept] == [0, 2], "a row that is skipped keeps its number"
    assert [json.loads(line)["line"] for line in listing.read_text(encoding="utf-8").splitlines()] == [2]


def test_rows_without_spans_and_with_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", {"id": 7, "text": "甲"}, {"id": "b", "text": "乙", "label": "anything"})
    assert list(read_cluener(path, with_spans=False)) == [SpanRecord(7, "甲"), SpanRecord("b", "乙")]


def test_of_overlapping_spans_the_longest_stays() -> None:
    long, inner, crossing, apart = Span("a", "一二三", 0), Span("b", "二", 1), Span("c", "三四", 2), Span("b", "四", 3)
    assert without_overlaps([inner, crossing, apart, long]) == (long, apart)


def test_all_real_rows_come_back() -> None:
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "ner_cluener").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    for name, number in (("train.json.gz", 5000), ("dev.json", 500)):
        path = Path(root, "ner_cluener", name)
        rows = list(read_rows(path, lambda row: row))
        assert [cluener_row(record) for record in read_cluener(path)] == [{"id": i, **r} for i, r in enumerate(rows)]
        assert len(rows) == number
