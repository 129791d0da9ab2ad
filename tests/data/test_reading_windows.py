"""Windows of questions and passages: answers are marked inside the passage only, and come back as they were."""

from itertools import islice, pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from kexue.data.generators.reading_passages import reading_passages
from kexue.data.reading import ReadingDataModule
from kexue.data.reading_windows import WindowBatches, answer_tokens
from kexue.data.records import Answer, ReadingRecord
from kexue.data.squad import places_of
from kexue.data.tokenizers import CharTokenizer, Tokenizer, WordPieceTokenizer
from kexue.errors import InputError

RECORDS = list(islice(reading_passages(num_passages=2, unanswerable=0.2), 60))
TEXTS = [text for record in RECORDS for text in (record.question, *record.passages)]
CHARACTERS = CharTokenizer.from_texts(TEXTS, lowercase=True, half_width=True)
ALPHABETS = {
    "ascii": "abcXYZ 0129.,-",
    "chinese": "白云山的海拔是多少米，。",
    "other": "ＡＢ１２éÉσΣς😀👍🏽\u200b\u200d\ufeff\t\n\x07\x85𠮷㐂龘İß\u0301",
}
DROPPED = "\u200b\u200d\ufeff\x07\x85\u0301"
"""Control and format characters, and a mark without a letter before it: no token of BERT's stands for these."""


def pieces() -> WordPieceTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-éσ"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters), "ab", "##bc", "012"]
    return WordPieceTokenizer([*tokens, *"白云山的海拔是多少米，。"])


def batch_of(records: list[ReadingRecord], tokenizer: Tokenizer = CHARACTERS, **options: Any) -> dict[str, Any]:
    return WindowBatches(**{"max_length": 48, "max_question": 20, **options}).collator(tokenizer)(records)


def test_rows_are_question_and_window() -> None:
    batch = batch_of(RECORDS[:8], mark_shared=True)
    assert batch["ids"].shape == batch["mask"].shape == batch["places"].shape == batch["segments"].shape
    assert batch["mask"].sum() == batch["num_tokens"]
    assert len(batch["owners"]) == len(batch["windows"]) == len(batch["ids"]) > 16
    seen: dict[tuple[int, int], set[int]] = {}
    for row, window in enumerate(batch["windows"]):
        record = batch["records"][int(batch["owners"][row])]
        passage = record.passages[window.passage]
        start, end = window.spans[0][0], window.spans[-1][1]
        length = len(record.question)
        wanted = [CHARACTERS.cls_id, *CHARACTERS.encode(record.question)[0][1:-1], CHARACTERS.sep_id]
        wanted += [*CHARACTERS.encode(passage[start:end])[0][1:-1], CHARACTERS.sep_id]
        assert batch["ids"][row, : len(wanted)].tolist() == wanted
        assert batch["mask"][row].sum() == len(wanted) <= 48
        assert batch["places"][row].nonzero().flatten().tolist() == list(range(length + 2, len(wanted) - 1))
        segments = batch["segments"][row, : len(wanted)].tolist()
        assert segments[: length + 2] == [0] * (length + 2)
        asked = {CHARACTERS.id_of(character) for character in record.question} - {CHARACTERS.unk_id}
        assert segments[length + 2 : -1] == [
            1 + (CHARACTERS.id_of(character) in asked) for character in passage[start:end]
        ]
        seen.setdefault((int(batch["owners"][row]), window.passage), set()).update(range(start, end))
    lengths = {(o, p): len(text) for o, record in enumerate(RECORDS[:8]) for p, text in enumerate(record.passages)}
    assert {key: len(places) for key, places in seen.items()} == lengths, "something of a passage is in no window"


def test_every_answer_is_whole_in_a_window_and_none_is_in_the_question() -> None:
    """Windows without an answer point to [CLS]; an answer that the question repeats is marked in the passage alone."""
    repeated = ReadingRecord("r", "白云山高还是泰山高", ("泰山高。白云山不高" * 9,))
    answers = tuple(Answer("泰山", start) for start in places_of("泰山", repeated.passages[0]))
    records = [*RECORDS, ReadingRecord("r", repeated.question, repeated.passages, answers)]
    batch = batch_of(records)
    found: dict[int, set[Answer]] = {}
    for row, (window, targets) in enumerate(zip(batch["windows"], batch["targets"].tolist(), strict=True)):
        owner = int(batch["owners"][row])
        record = records[owner]
        for first, last in targets:
            if first > 0:
                assert batch["places"][row, first : last + 1].all()
                start, end = window.characters(first, last)
                found.setdefault(owner, set()).add(
                    Answer(record.passages[window.passage][start:end], start, window.passage)
                )
        listed = [target for target in targets if target != [-1, -1]]
        assert listed
        if [0, 0] in listed:
            assert listed == [[0, 0]]
            whole = (window.spans[0][0], window.spans[-1][1])
            for answer in record.answers:
                inside = answer.passage == window.passage and whole[0] <= answer.start and answer.end <= whole[1]
                assert not inside
    assert all(found.get(owner, set()) == set(record.answers) for owner, record in enumerate(records))


@pytest.mark.parametrize("kind", ["characters", "pieces"])
def test_answers_of_any_text_come_back(kind: str) -> None:
    """In Chinese and ASCII every span of whole tokens is reproduced; elsewhere no character of an answer is lost."""
    random = Random(0)
    for number in range(300):
        names = ["ascii", "chinese"] if number % 2 else list(ALPHABETS)
        text = "".join(random.choice(ALPHABETS[random.choice(names)]) for _ in range(random.randint(1, 60)))
        tokenizer = pieces() if kind == "pieces" else CharTokenizer.from_texts([text], lowercase=True)
        spans = tokenizer.encode(text)[1][1:-1]
        assert all(first < last for first, last in spans), "a token without characters"
        assert all(one[1] <= other[0] or (one == other and one[1] - one[0] == 1) for one, other in pairwise(spans))
        inside = {place for span in spans for place in range(*span)}
        left_out = {text[place] for place in range(len(text)) if place not in inside}
        assert not left_out if kind == "characters" else left_out <= {*" \t\n", *DROPPED}
        start = random.randrange(len(text))
        end = random.randint(start + 1, len(text))
        answers = answer_tokens(ReadingRecord("a", "", (text,), (Answer(text[start:end], start),)), 0, spans)
        covered = [place for place in range(start, end) if any(a <= place < b for a, b in spans)]
        assert len(answers) == bool(covered)
        if covered:
            ((first, last),) = answers
            assert spans[first][0] <= covered[0] <= covered[-1] < spans[last][1]
            assert spans[first][1] > start
            assert spans[last][0] < end
            whole = {a for a, _ in spans}, {b for _, b in spans}
            if start in whole[0] and end in whole[1]:
                assert text[spans[first][0] : spans[last][1]] == text[start:end]


def test_empty_passages_and_long_questions_have_rows(caplog: pytest.LogCaptureFixture) -> None:
    records = [ReadingRecord("a", "问" * 31, ("",)), ReadingRecord("b", "", ("白云山",))]
    batch = batch_of(records)
    assert batch["ids"].shape == (2, 23)
    assert batch["places"].sum(1).tolist() == [0, 3]
    assert batch["targets"].tolist() == [[[0, 0]]] * 2
    assert "of a question of 31 tokens the first 20 are read" in caplog.text


def module(**options: Any) -> ReadingDataModule:
    return ReadingDataModule(8, batches=WindowBatches(48, max_question=20), num_generated=40, **options)


def test_generated_splits_are_apart_and_assets_stand_in_for_them(tmp_path: Path) -> None:
    data = module(unanswerable=0.5, num_passages=2)
    data.setup("fit")
    data.setup("test")
    assert data.num_rows() == {"train": 40, "val": 4, "test": 4}
    assert len({record.passages[0] for split in ("train", "val", "test") for record in data.records(split)}) == 48
    assert data.model_arguments() == {"vocab_size": len(data.get_tokenizer()), "num_segments": 2, "max_length": 48}
    data.save_assets(tmp_path)
    again = module()
    again.load_assets(tmp_path)
    assert again.fingerprint() == data.fingerprint()
    assert next(iter(data.train_dataloader()))["ids"].shape[0] > 8
    whole = [record for batch in data.train_dataloader() for record in batch["records"]]
    assert sorted(record.id for record in whole) == sorted(record.id for record in data.records("train"))


def test_a_dev_file_is_divided_by_passage(tmp_path: Path) -> None:
    rows = [
        f'{{"context": "第{n}段", "qas": [{{"id": "{n}{k}", "question": "问", "answers": '
        f'[{{"text": "段", "answer_start": -1}}]}} ]}}'
        for n in range(10)
        for k in "ab"
    ]
    (tmp_path / "dev.json").write_text(f'{{"data": [{{"paragraphs": [{", ".join(rows)}]}}]}}', encoding="utf-8")
    data = module(root=str(tmp_path), dev_file="dev.json", dev_parts=[3, 1, 1])
    data.setup("fit")
    data.setup("test")
    assert data.num_rows() == {"train": 12, "val": 4, "test": 4}
    passages = [{record.passages for record in data.records(split)} for split in ("train", "val", "test")]
    assert [len(part) for part in passages] == [6, 2, 2]
    assert len(set.union(*passages)) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "xml"}, "data.format='xml': use one of squad, webqa"),
        ({"num_generated": 3}, "data.num_generated=3"),
        ({"num_passages": 0}, "data.num_passages=0"),
        ({"unanswerable": 2.0}, "data.unanswerable=2.0"),
        ({"dev_parts": [1, 1]}, r"data.dev_parts=\[1, 1\]: use three"),
        ({"root": "x"}, r"data.train_files=\[\]: name at least one"),
        ({"dev_parts": [1, 1, 1], "test_file": "x"}, "data.test_file=x"),
        ({"root": "/nowhere", "train_files": ["x"]}, "data.root=/nowhere: no such folder.*data.root=null"),
        (
            {"root": str(Path(__file__).parent), "train_files": ["test_squat.py"]},
            "no such file; did you mean test_squad",
        ),
    ],
)
def test_wrong_values_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReadingDataModule(**{"batches": WindowBatches(), "num_generated": 40, **options}).prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_question": 0}, "max_question=0"),
        ({"max_length": 40}, "max_length=40: use 68 or more"),
        ({"max_length": 128, "stride": 62}, r"data.batches\(size=61, stride=62\)"),
    ],
)
def test_wrong_windows_are_explained(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WindowBatches(**options)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"data.tokenizer: it has no \[CLS\]"):
        WindowBatches().collator(SimpleNamespace(cls_id=None, sep_id=None))  # type: ignore[arg-type]
