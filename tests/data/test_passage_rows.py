"""Features of words, words themselves, and batches of questions apart from their passages."""

import json
import os
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from kexue.data.generators.reading_passages import reading_passages
from kexue.data.passage_rows import PassageBatches
from kexue.data.reading import ReadingDataModule
from kexue.data.reading_features import edit_distance, passage_features, set_likeness
from kexue.data.records import Answer, ReadingRecord
from kexue.data.tokenizers import CharTokenizer, WordTokenizer, load_tokenizer
from kexue.data.tokenizers.words import words_of
from kexue.errors import InputError

QUESTION = ["白云山", "的", "海拔", "是", "多少", "？"]
PASSAGE = ["白云山", "坐落", "在", "广州", "，", "主峰", "海拔", "3", "8", "2", "米"]
RECORDS = list(islice(reading_passages(num_passages=3, unanswerable=0.2), 30))
CHARACTERS = CharTokenizer.from_texts(text for record in RECORDS for text in (record.question, *record.passages))


def test_features_of_the_worked_example() -> None:
    """The figures that the article gives for 白云山的海拔是多少？ and one passage."""
    likeness, distance = set_likeness(QUESTION, PASSAGE), edit_distance(QUESTION, PASSAGE)
    assert likeness.round(2).tolist() == pytest.approx([0.12, 0.11, 0.10, *[0.09] * 6, 0.10, 0.0])
    assert likeness[0] == 0.125
    assert distance.round(2).tolist() == [*[0.83] * 4, 1, 1, 1, 0.83, 1, 1, 1]
    (found,) = passage_features(QUESTION, [PASSAGE])
    assert found.shape == (11, 8)
    assert found[:, 0].tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert found[:, 1].tolist() == [0] * 11
    assert found[:, 2].tolist() == likeness.tolist()
    assert found[:, 3].tolist() == distance.tolist()
    characters = [*"".join(QUESTION)], [*"".join(PASSAGE)]
    spread = set_likeness(*characters)
    assert found[0, 6] == pytest.approx(spread[:3].mean())
    assert found[-1, 7] == edit_distance(*characters)[-1]
    assert found[0, 4:6].tolist() == [1, 0]


def levenshtein(one: list[str], other: list[str]) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def test_features_by_plain_python() -> None:
    random = Random(0)
    for _ in range(40):
        question = random.choices("abcd", k=random.randint(1, 7))
        passages = [random.choices(["a", "b", "cd", "e", "ef"], k=random.randint(0, 12)) for _ in range(4)]
        found = passage_features(question, passages)
        half = len(question) // 2
        for number, (passage, features) in enumerate(zip(passages, found, strict=True)):
            assert features.shape == (len(passage), 8)
            for place, word in enumerate(passage):
                window = passage[max(0, place - half) : max(0, place - half + len(question))]
                assert features[place, 0] == (word in question)
                assert features[place, 1] == sum(word in p for n, p in enumerate(passages) if n != number) / 4
                union = set(question) | set(window)
                assert features[place, 2] == pytest.approx(len(set(question) & set(window)) / len(union))
                assert features[place, 3] == pytest.approx(levenshtein(question, window) / len(question))
                assert features[place, 4] == pytest.approx(np.mean([c in question for c in word]))
    four_of_ten = passage_features(["x"], [["甲"]] * 5 + [["乙"]] * 5)
    assert four_of_ten[0][0, 1] == 0.4


def test_words_are_cut_and_numbers_one_by_one(tmp_path: Path) -> None:
    pytest.importorskip("rjieba")
    text = "白云山的海拔是ABC 382.5米？\n国　大é学"
    spans = words_of(text)
    words = [text[start:end] for start, end in spans]
    assert words == ["白云山", "的", "海拔", "是", *"ABC", *"382.5", "米", "？", "国", "大", "é", "学"]
    assert "".join(words) == "".join(text.split())
    tokenizer = WordTokenizer.from_texts(["白云山的海拔", "海拔a"], min_count=1)
    ids, found = tokenizer.encode("白云山海拔A多少")
    assert [tokenizer.token_of(index) for index in ids] == ["[CLS]", "白云山", "海拔", "a", "[UNK]", "[SEP]"]
    assert found[1:-1] == [(0, 3), (3, 5), (5, 6), (6, 8)]
    assert tokenizer.decode(ids) == "白云山海拔a[UNK]"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, WordTokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode_batch(["海拔"]) == [tokenizer.encode("海拔")]
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="not that of a WordTokenizer"):
        WordTokenizer.load(tmp_path)


def batch_of(records: list[ReadingRecord], **options: Any) -> dict[str, Any]:
    return PassageBatches(**options).collator(CHARACTERS)(records)


@pytest.mark.parametrize("max_length", [256, 40])
def test_rows_hold_whole_passages_and_all_answers(max_length: int) -> None:
    """Every place where an answer stands is marked in each row that holds it whole; other rows have none."""
    batch = batch_of(RECORDS, max_length=max_length, features=True)
    assert batch["features"].shape == (*batch["ids"].shape, 8)
    assert batch["num_tokens"] == batch["mask"].sum() + batch["question_mask"].sum()
    found: dict[int, set[Answer]] = {}
    seen: dict[tuple[int, int], set[int]] = {}
    for row, window in enumerate(batch["windows"]):
        owner = int(batch["owners"][row])
        record = RECORDS[owner]
        start, end = window.spans[0][0], window.spans[-1][1]
        text = record.passages[window.passage][start:end]
        assert batch["ids"][row, : len(text)].tolist() == CHARACTERS.encode(text)[0][1:-1]
        assert batch["mask"][row].sum() == batch["places"][row].sum() == batch["lengths"][row].sum() == len(text)
        seen.setdefault((owner, window.passage), set()).update(range(start, end))
        whole = [a for a in record.answers if a.passage == window.passage and start <= a.start and a.end <= end]
        assert batch["starts"][row].nonzero().flatten().tolist() == sorted({a.start - start for a in whole})
        assert batch["ends"][row].nonzero().flatten().tolist() == sorted({a.end - 1 - start for a in whole})
        found.setdefault(owner, set()).update(whole)
    assert all(len(places) == len(RECORDS[o].passages[p]) for (o, p), places in seen.items())
    assert all(found[owner] == set(record.answers) for owner, record in enumerate(RECORDS))


def test_empty_texts_and_letters_that_count_half() -> None:
    batch = batch_of([ReadingRecord("a", "", ("", "3米a。"))], half_ascii=True, features=True)
    assert batch["questions"].shape == (1, 1)
    assert batch["question_mask"].tolist() == [[False]]
    assert batch["mask"].sum(1).tolist() == [0, 4]
    assert batch["lengths"].tolist() == [[0, 0, 0, 0], [0.5, 1, 0.5, 1]]
    assert np.isfinite(batch["features"].numpy()).all()


@pytest.mark.parametrize("length", [10, 32, 33, 100])
def test_a_visit_shows_one_row_of_one_passage(length: int) -> None:
    """The beginning, or of a passage longer than half a row sometimes a piece from half a row to a whole one."""
    passages = tuple("".join(map(chr, range(0x4E00 + 500 * n, 0x4E00 + 500 * n + length))) for n in range(3))
    answers = tuple(Answer(text[7:9], 7, n) for n, text in enumerate(passages))
    record = ReadingRecord("a", "问", passages, answers)
    collate = PassageBatches(64, visits="one").collator(CharTokenizer.from_texts(passages), training=True)
    torch.manual_seed(0)
    firsts, visited = [], set()
    for _ in range(300):
        batch = collate([record, record])
        assert batch["owners"].tolist() == [0, 1]
        for row, window in enumerate(batch["windows"]):
            first, last = window.spans[0][0], window.spans[-1][1]
            visited.add(window.passage)
            firsts.append((first, last))
            assert [end - start for start, end in window.spans] == [1] * (last - first)
            inside = first <= 7 and last >= 9
            assert batch["starts"][row].nonzero().flatten().tolist() == ([7 - first] if inside else [])
            assert batch["ends"][row].nonzero().flatten().tolist() == ([8 - first] if inside else [])
    assert visited == {0, 1, 2}
    beginning = (0, min(length, 64))
    pieces = [piece for piece in firsts if piece != beginning]
    assert all(first >= 0 and 32 <= last - first <= 64 and last <= length for first, last in pieces)
    if length <= 32:
        assert not pieces
    else:
        assert 100 < len(pieces) < 400
    if length == 100:
        assert {min(f for f, _ in pieces), max(b for _, b in pieces)} == {0, 100}
        assert {min(b - f for f, b in pieces), max(b - f for f, b in pieces)} == {32, 64}
    evaluating = PassageBatches(64, visits="one").collator(CharTokenizer.from_texts(passages))
    assert len(evaluating([record])["windows"]) >= 3


def test_some_answers_are_passed_over_in_training() -> None:
    record = ReadingRecord("a", "问", ("甲乙" * 500,), tuple(Answer("甲", n) for n in range(0, 1000, 2)))
    options = PassageBatches(1000, stride=1000, unmarked=0.3)
    torch.manual_seed(0)
    starts, ends = (options.collator(CHARACTERS, training=True)([record])[name][0] for name in ("starts", "ends"))
    assert torch.equal(starts, ends) or (starts.sum(), ends.sum()) != (500, 500)
    assert 320 < starts.sum() < 380
    assert options.collator(CHARACTERS)([record])["starts"].sum() == 500
    with pytest.raises(InputError, match=r"data.batches.unmarked=1.0"):
        PassageBatches(unmarked=1.0)
    with pytest.raises(InputError, match=r"data.batches.visits='some': use one of all, one"):
        PassageBatches(visits="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [None, 4])
def test_each_token_has_the_vector_of_its_word(stride: int | None, tmp_path: Path) -> None:
    pytest.importorskip("rjieba")
    path = tmp_path / "vectors.txt"
    path.write_text("3 2\n海拔 1 2\n广州 3 4\n白云山 5 6\n", encoding="utf-8")
    record = ReadingRecord("a", "白云山的海拔？", ("白云山坐落在广州", "海拔"))
    options = PassageBatches(8, stride, word_vectors=str(path), cache_dir=str(tmp_path / "cache"))
    batch = options.collator(CHARACTERS)([record])
    assert options.model_arguments() == {"num_features": 0, "word_dim": 2}
    assert options.source_files() == [path]
    vector = {"海拔": [1.0, 2.0], "广州": [3.0, 4.0], "白云山": [5.0, 6.0], "": [0.0, 0.0]}
    asked = [vector[word] for word in (*["白云山"] * 3, "", *["海拔"] * 2, "")]
    assert batch["word_vectors"][batch["question_words"][0]].tolist() == asked
    told = {0: [vector[word] for word in (*["白云山"] * 3, *[""] * 3, *["广州"] * 2)], 1: [vector["海拔"]] * 2}
    for row, window in enumerate(batch["windows"]):
        found = batch["word_vectors"][batch["words"][row]].tolist()
        places = [start for start, _ in window.spans]
        assert found[: len(places)] == [told[window.passage][place] for place in places]
        assert found[len(places) :] == [vector[""]] * (len(found) - len(places))


def test_words_of_the_data_module(tmp_path: Path) -> None:
    pytest.importorskip("rjieba")
    batches = PassageBatches(features=True, half_ascii=True)
    data = ReadingDataModule(4, batches=batches, units="words", num_generated=20, num_passages=2)
    data.setup("fit")
    assert data.model_arguments() == {"vocab_size": len(data.get_tokenizer()), "num_features": 8, "word_dim": 0}
    batch = next(iter(data.train_dataloader()))
    assert batch["lengths"].unique().tolist() == [0, 0.5, 1]
    data.save_assets(tmp_path)
    again = ReadingDataModule(4, batches=batches, num_generated=20, num_passages=2)
    again.load_assets(tmp_path)
    assert again.fingerprint() == data.fingerprint()
    with pytest.raises(InputError, match=r"data\.units='letters': use one of characters, words"):
        ReadingDataModule(4, batches=batches, units="letters")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data.batches\(size=0, stride=1\)"):
        PassageBatches(max_length=0)


def test_answer_files_have_a_line_for_each_question(tmp_path: Path) -> None:
    data = ReadingDataModule(4, batches=PassageBatches(), format="webqa", num_generated=20)
    content = {
        name: {"question": "问", "evidences": {"0": {"evidence": text}}} for name, text in (("b", "甲"), ("a", ""))
    }
    (tmp_path / "in.json").write_text(json.dumps(content), encoding="utf-8")
    data.read_inputs(tmp_path / "in.json")
    records = [ReadingRecord("a", "", ()), ReadingRecord("b", "", (), (Answer("甲", 0),))]
    assert data.write_answers(records, tmp_path / "out.txt") == 2
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "b\t甲\na\t\n"


def test_real_questions_have_words_and_features() -> None:
    """200 questions with all they need, through words, features and rows."""
    pytest.importorskip("rjieba")
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "reading_comprehension").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    file = "reading_comprehension/webqa_dev.json"
    data = ReadingDataModule(
        50,
        batches=PassageBatches(features=True, half_ascii=True),
        root=root,
        format="webqa",
        train_files=[file],
        dev_file=file,
        units="words",
        min_count=1,
    )
    data.prepare()
    for batch in islice(data.val_dataloader(), 4):
        features = batch["features"].numpy()
        assert np.isfinite(features).all()
        assert (features >= 0).all()
        assert features[..., [0, 1, 2, 4, 5, 6]].max() <= 1
        told = batch["mask"].numpy()
        for row, window in enumerate(batch["windows"]):
            text = batch["records"][int(batch["owners"][row])].passages[window.passage]
            words = [text[start:end] for start, end in window.spans]
            assert "".join(words) == "".join(text[window.spans[0][0] : window.spans[-1][1]].split())
            assert told[row].sum() == len(words)
