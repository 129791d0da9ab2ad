"""Questions from files in the published forms: right ones as records, wrong ones named by file and question."""

import gzip
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from kexue.data.baselines import SentenceOverlap
from kexue.data.generators.reading_passages import reading_passages
from kexue.data.records import Answer, ReadingRecord
from kexue.data.squad import read_squad, write_answers
from kexue.data.webqa import read_webqa, write_answer_lines
from kexue.errors import InputError

CONTEXT = "白云山在广州，主峰海拔382米。白云山很美。"
READERS = {"squad": read_squad, "webqa": read_webqa}
BIG = "长" * 2**20


def squad(*questions: Any, context: Any = CONTEXT) -> dict[str, Any]:
    return {"data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]}


def question(name: Any = "Q1", text: Any = "白云山", start: Any = 0, **more: Any) -> dict[str, Any]:
    return {"id": name, "question": "哪座山？", "answers": [{"text": text, "answer_start": start}], **more}


def webqa(answers: Any, evidence: Any = CONTEXT, name: str = "Q1") -> dict[str, Any]:
    return {name: {"question": "哪座山？", "evidences": {f"{name}#00": {"answer": answers, "evidence": evidence}}}}


def write(path: Path, content: Any, zipped: bool = False) -> Path:
    raw = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_answers_stand_where_the_text_is(tmp_path: Path, zipped: bool) -> None:
    """As stated; at the nearest place where the statement is off; at every place for -1."""
    content = squad(
        question("a", "白云山", 16),
        question("b", "白云山", 12),
        question("c", "白云山", -1),
        question("d", "", -1, is_impossible=True, type="in-doc"),
        question("e", "382", 11, is_impossible=False),
    )
    records = list(read_squad(write(tmp_path / "x.json", content, zipped)))
    assert [[answer.start for answer in record.answers] for record in records] == [[16], [16], [0, 16], [], [11]]
    assert all(CONTEXT[answer.start : answer.end] == answer.text for record in records for answer in record.answers)
    assert [record.texts for record in records] == [("白云山",)] * 3 + [(), ("382",)]
    assert records[0] == ReadingRecord("a", "哪座山？", (CONTEXT,), (Answer("白云山", 16),))


def test_webqa_answers_stand_in_any_evidence_or_in_none(tmp_path: Path) -> None:
    content = webqa(["白云山"]) | webqa(["白云峰"], name="Q2") | webqa(["no_answer"], name="Q3")
    content["Q1"]["evidences"]["Q1#01"] = {"answer": ["no_answer"], "evidence": "又见白云山"}
    one, two, three = read_webqa(write(tmp_path / "x.json", content))
    assert one.answers == (Answer("白云山", 0, 0), Answer("白云山", 16, 0), Answer("白云山", 2, 1))
    assert two.answers == (Answer("白云峰", None),)
    assert three.answers == ()


BAD = {
    "no id": (squad({"question": "x"}), "question 0 of paragraph 0: key 'id' is missing"),
    "id is a number": (squad(question(7)), "question 0 of paragraph 0: 'id' is 7; give a string"),
    "empty question": (squad(question(question="")), "question 'Q1': 'question' is empty"),
    "no answers": (squad(question(answers=[])), "question 'Q1': 'answers' is empty.*is_impossible"),
    "empty span": (squad(question(text="")), "question 'Q1': 'text' is empty"),
    "outside": (squad(question(start=99)), "question 'Q1': .*start at 99, outside the context; it occurs at 0"),
    "negative": (squad(question(start=-2)), "question 'Q1': .*start at -2, outside"),
    "other text": (squad(question(text="黄山")), "question 'Q1': answer '黄山' does not occur in the context"),
    "flag": (squad(question(is_impossible="no")), "question 'Q1': 'is_impossible' is 'no'; give true or false"),
    "twice": (squad(question(), question()), "question 'Q1': the id 'Q1' is taken already"),
    "no object": (squad("Q"), "question 0 of paragraph 0: an entry of 'qas' is 'Q'; give an object"),
    "no context": (squad(question(), context=None), "question 'Q1': 'context' is None; give a string"),
    "half of a pair": (squad(question(question="\ud83d")), "question 'Q1': 'question' holds half of a surrogate"),
    "1 MB": (
        squad(question(text=BIG)),
        "question 'Q1': answer '长+ does not occur in the context|question 'Q1': answer",
    ),
    "no qas": ({"data": [{"paragraphs": [{"context": "x"}]}]}, "paragraph 0: key 'qas' is missing"),
    "webqa: no evidence": ({"Q1": {"question": "x", "evidences": {}}}, "question 'Q1': 'evidences' is empty"),
    "webqa: a number": (webqa([3]), "question 'Q1': an entry of 'answer' is 3"),
    "webqa: a string": (webqa("白云山"), "question 'Q1': 'answer' is '白云山'; give a list"),
    "webqa: no object": ({"Q1": 3}, "question 'Q1': an entry of 'the file' is 3; give an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_question_is_named_or_skipped(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    read = read_webqa if "data" not in content else read_squad
    raw = json.dumps(content).encode()
    with pytest.raises(InputError, match=message) as error:
        list(read(write(tmp_path / "x.json", raw)))
    assert str(error.value).startswith(f"{tmp_path / 'x.json'}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500

    good = webqa(["白云山"], name="good") if read is read_webqa else None
    both = {**content, **good} if good else {"data": content["data"] + squad(question("good"))["data"]}
    listing = tmp_path / "bad.jsonl"
    for _ in range(2):  # a run that goes on reads its data again
        records = list(
            read(write(tmp_path / "x.json", json.dumps(both).encode()), on_bad_row="skip", bad_rows_file=listing)
        )
        assert records[-1].id == "good"
        (entry,) = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    assert entry["file"] == str(tmp_path / "x.json")
    assert f"{entry['name']}: {entry['reason']}" in str(error.value)
    assert len(entry["row"]) < 2100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"data": [', r"x\.json:1: not a whole JSON document \(Expecting value at column 11\)"),
        (b'{"data":\n"\xe9"}', r"x\.json:2: not UTF-8 \(byte 0xe9"),
        (gzip.compress(b"{}" * 99)[:-9], r"x\.json: the gzip stream breaks"),
        (b"[" * 100_000, r"x\.json: not a JSON document|x\.json:1: "),
        (b"[]", r"x\.json: an entry of 'the file' is \[\]; give an object"),
        (b"", r"x\.json:1: not a whole JSON document"),
        (b'{"data": []}', r"x\.json: no usable questions, it holds none"),
        (b'{"data": [{"paragraphs": [{"qas": [3]}]}]}', r"no usable questions, all 1 were skipped"),
        (b'{"a": 1, "a": {}}', r"key 'data' is missing|all 2 were skipped"),
        (None, "is a directory|no such file"),
    ],
)
def test_a_file_that_is_no_document(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_squad(path, on_bad_row="skip"))


def test_ids_that_stand_twice_in_an_object_are_found(tmp_path: Path) -> None:
    one = json.dumps(webqa(["白云山"]))[1:-1]
    path = write(tmp_path / "x.json", f"{{{one}, {one}}}".encode())
    with pytest.raises(InputError, match="question 'Q1': the id 'Q1' is there twice"):
        list(read_webqa(path))
    inner = b'{"Q1": {"question": "x", "evidences": {"a": {}, "a": {}}}}'
    with pytest.raises(InputError, match="question 'Q1': 'evidences' has 'a' twice"):
        list(read_webqa(write(path, inner)))


def test_questions_to_be_answered_need_no_answers_and_no_words(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "", "answers": 3}, {"id": "b", "question": "谁？"}]
    path = write(tmp_path / "x.json", squad(*rows, context=""))
    assert [(record.id, record.passages, record.answers) for record in read_squad(path, with_answers=False)] == [
        ("a", ("",), ()),
        ("b", ("",), ()),
    ]


def test_answers_are_written_in_both_forms(tmp_path: Path) -> None:
    records = [ReadingRecord("b", "", ("甲\t乙\n",), (Answer("甲\t乙\n", 0),)), ReadingRecord("a", "", ("x",))]
    assert write_answers(records, tmp_path / "a.json", "no answer") == 2
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert list(found.items()) == [("b", "甲\t乙\n"), ("a", "no answer")]
    assert write_answer_lines(records, tmp_path / "a.txt") == 2
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "b\t甲 乙\na\t\n"


def test_generated_questions_are_answered_by_their_passages_or_not() -> None:
    def take(**options: Any) -> Iterator[ReadingRecord]:
        return islice(reading_passages(**options), 300)

    records = list(take(num_passages=3, unanswerable=0.25))
    assert records == list(take(num_passages=3, unanswerable=0.25))
    assert len({record.passages[0] for record in records}) == 300
    assert 0.15 < sum(not record.answers for record in records) / 300 < 0.35
    for record in records:
        assert len(record.passages) == 3
        for answer in record.answers:
            assert answer.start is not None
            assert record.passages[answer.passage][answer.start : answer.end] == answer.text
    assert all(record.answers for record in take(unanswerable=0.0))


def test_the_baseline_takes_the_sentence_with_most_of_the_question() -> None:
    record = ReadingRecord("a", "主峰海拔多少米", ("白云山在广州。主峰海拔382米！主峰", "海拔高"))
    answer, share = SentenceOverlap().find(record)
    assert answer == Answer("主峰海拔382米", 7)
    assert share == 5 / 7
    assert SentenceOverlap().find(ReadingRecord("a", "x", ("", "。"))) == (None, 0.0)


def test_real_files_are_read_whole() -> None:
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "reading_comprehension").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    folder = Path(root, "reading_comprehension")
    counts = {
        "cmrc2018_dev.json": (211, 0),
        "cmrc2018_train.json.gz": (767, 0),
        "dureader_checklist_dev.json": (300, 150),
        "dureader_robust_dev.json": (150, 0),
        "dureader_robust_train.json.gz": (699, 0),
        "webqa_dev.json": (300, 0),
        "webqa_train.json.gz": (1700, 0),
    }
    for name, wanted in counts.items():
        read = read_webqa if name.startswith("webqa") else read_squad
        records = list(read(folder / name, on_bad_row="skip"))
        assert (len(records), sum(not record.answers for record in records)) == wanted, name
        for record in records:
            for answer in record.answers:
                if answer.start is not None:
                    assert record.passages[answer.passage][answer.start : answer.end] == answer.text
