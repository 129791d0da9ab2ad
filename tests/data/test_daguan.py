"""The Daguan cup's format and its rows: what is read comes back, folds are even, votes of equals change nothing."""

import gzip
import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from kexue.data.daguan import read_daguan, segments_of, write_daguan
from kexue.data.daguan_2019 import DaguanCorpusDataModule, DaguanDataModule
from kexue.data.folds import stratified_folds, with_fields_left_out
from kexue.data.generators.anonymous_sentences import anonymous_sentences
from kexue.data.generators.entity_sentences import entity_sentences
from kexue.data.records import Span, SpanRecord
from kexue.data.span_dictionary import SpanDictionary
from kexue.data.tokenizers.numbers import NumberTokenizer
from kexue.data.votes import vote_on_spans
from kexue.errors import InputError

LINE = "13_7_502/o  4/a  88_13/b  88/b"
RECORD = SpanRecord(0, "13_7_502_4_88_13_88", (Span("a", "4", 9), Span("b", "88_13", 11), Span("b", "88", 17)))


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def plain(record: SpanRecord) -> list[tuple[str, int, int]]:
    return [(span.type, span.start, span.end) for span in record.spans]


def test_a_line_becomes_a_record_and_a_line_again(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", LINE, "5/c", "5_6/o")
    records = list(read_daguan(path, "abc"))
    assert records == [RECORD, SpanRecord(1, "5", (Span("c", "5", 0),)), SpanRecord(2, "5_6")]
    assert all(record.text[span.start : span.end] == span.text for record in records for span in record.spans)
    assert write_daguan(records, tmp_path / "y.txt") == 3
    assert (tmp_path / "y.txt").read_text("utf-8") == path.read_text("utf-8")
    unlabelled = write(tmp_path / "z.txt", "13_7_502", LINE)
    assert list(read_daguan(unlabelled, with_spans=False)) == [SpanRecord(0, "13_7_502"), SpanRecord(1, RECORD.text)]


def test_of_overlapping_answers_the_longest_is_written(tmp_path: Path) -> None:
    record = SpanRecord(0, "1_2_3", (Span("a", "1_2", 0), Span("b", "2", 2), Span("a", "1_2", 0)))
    write_daguan([record], tmp_path / "y.txt")
    assert (tmp_path / "y.txt").read_text("utf-8") == "1_2/a  3/o\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1_2/d", "label 'd' is not one of a, b, c; correct it or add it to data.types"),
        ("1_2", "segment '1_2' has no label; write numbers, a slash and a label, such as 4_17/a"),
        ("1_2/", "has no label"),
        ("1_2/o 3/a", "'2/o 3' is not a number; write numbers with _ between, and two blanks"),
        ("1_2/o   3/a", "' 3' is not a number; write numbers with _ between"),
        ("/a", "'' is not a number"),
        ("1__2/a", "'' is not a number"),
        ("1_x/a", "'x' is not a number"),
        ("1_٣/a", "'٣' is not a number"),
        ("1_" * 400_000 + "1/o", "text of 800003 characters, at most 1000 are taken; raise max_characters"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "x.txt", LINE, line, "5/c")
    with pytest.raises(InputError, match=rf"x\.txt:2: .*({words})") as error:
        list(read_daguan(path, "abc", max_characters=1000))
    assert len(str(error.value)) < 500
    listing = tmp_path / "bad_rows.jsonl"
    kept = list(read_daguan(path, "abc", max_characters=1000, on_bad_row="skip", bad_rows_file=listing))
    assert [record.id for record in kept] == [0, 2], "a line that is skipped keeps its number"
    assert [json.loads(entry)["line"] for entry in listing.read_text(encoding="utf-8").splitlines()] == [2]


def test_numbers_are_tokens() -> None:
    tokenizer = NumberTokenizer.from_texts([RECORD.text, "4"], min_count=2)
    assert tokenizer.vocabulary == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "13", "4", "88")
    assert tokenizer.encode("4_130_13") == ([2, 6, 1, 5, 3], [(0, 0), (0, 1), (2, 5), (6, 8), (0, 0)])
    assert tokenizer.decode([2, 6, 1, 5, 3]) == "4_[UNK]_13"


def test_the_dictionary_finds_whole_numbers_only() -> None:
    words = SpanDictionary.fit([RECORD], "_")
    assert plain(words.predict(SpanRecord(1, "14_4_88_131_88_13"))) == [("a", 3, 4), ("b", 5, 7), ("b", 12, 17)]
    assert words.predict(SpanRecord(1, "188_130_44")).spans == ()
    assert SpanDictionary.fit([RECORD], "_").tags(RECORD.text, {"a": 0, "b": 1}) == [0] * len(RECORD.text)
    tags = words.tags("88_13_4", {"a": 0, "b": 1})
    assert [tags[start] for start in (0, 3, 6)] == [5, 7, 4]


def test_generated_sentences_are_the_built_in_ones_as_numbers() -> None:
    rows, words = list(islice(anonymous_sentences(), 300)), list(islice(entity_sentences(), 300))
    numbers: dict[str, str] = {}
    for row, plain_row in zip(rows, words, strict=True):
        found = row.text.split("_")
        assert len(found) == len(plain_row.text)
        for character, number in zip(plain_row.text, found, strict=True):
            assert numbers.setdefault(character, number) == number
        assert len(row.spans) == sum(span.type in ("name", "company", "address") for span in plain_row.spans)
    assert len(set(numbers.values())) == len(numbers)


def test_folds_are_even_in_every_set_of_types() -> None:
    rows = list(islice(anonymous_sentences(), 203))
    kinds = [tuple(sorted({span.type for span in row.spans})) for row in rows]
    folds = stratified_folds(rows, 5)
    sizes = Counter(folds)
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for kind, count in Counter(kinds).items():
        shares = Counter(fold for fold, own in zip(folds, kinds, strict=True) if own == kind)
        assert all(count // 5 <= shares[fold] <= count // 5 + 1 for fold in range(5))
    assert stratified_folds(rows, 5) == folds
    held_out: list[Any] = []
    for fold in range(3):
        source = DaguanDataModule(num_generated=40, fold=fold, num_folds=3)
        ids = {split: {row.id for row in source.records(split)} for split in ("train", "val", "test")}  # type: ignore[arg-type]
        assert not ids["train"] & ids["val"]
        assert len(ids["train"] | ids["val"]) == 40
        assert not ids["test"] & (ids["train"] | ids["val"])
        held_out += ids["val"]
    assert sorted(held_out) == list(range(40)), "each row validates once"


def test_copies_lack_the_fields_of_a_type_and_nothing_else(tmp_path: Path) -> None:
    rows = list(read_daguan(write(tmp_path / "x", "1/a  2/o  3/b  4/c", "1/a  2/o  3/b", "1/a  4/c", "1/a  2/o")))
    found = [[f"{text}/{label}" for text, label in segments_of(row)] for row in with_fields_left_out(rows)]
    copies = [found[i] for i in (1, 2, 4, 6)]
    assert copies == [["2/o", "3/b", "4/c"], ["1/a", "2/o", "4/c"], ["1/a", "2/o"], ["1/a"]]
    assert [found[i] for i in (0, 3, 5, 7)] == [[f"{t}/{label}" for t, label in segments_of(row)] for row in rows]
    assert len({row.id for row in with_fields_left_out(rows)}) == 8


def test_votes() -> None:
    rows = list(islice(anonymous_sentences(), 100))
    assert vote_on_spans([rows, rows[::-1], rows], "_") == rows, "a vote of identical models is the identity"
    assert vote_on_spans([rows], "_") == rows

    def said(*spans: Span) -> list[SpanRecord]:
        return [SpanRecord(0, "1_2_3_4", spans)]

    long, short, other = Span("a", "1_2_3", 0), Span("a", "1_2", 0), Span("b", "4", 6)
    assert vote_on_spans([said(long), said(short, other), said(short, other)], "_") == said(short, other)
    assert vote_on_spans([said(long), said(short)], "_") == said(long), "of equal votes the first model's"
    assert vote_on_spans([said(other), said(), said()], "_") == said()
    characters = [SpanRecord(0, "一二三", (Span("a", "一二", 0),))]
    assert vote_on_spans([characters, [SpanRecord(0, "一二三")], characters]) == characters


def test_a_corpus_in_pieces(tmp_path: Path) -> None:
    long = "_".join(map(str, range(100, 123)))
    write(tmp_path / "corpus.txt", long, "1_2", "1_2_3_4_5")
    write(tmp_path / "labels.txt", "7_7_7_7/o  7/a")
    source = DaguanCorpusDataModule(
        2, root=str(tmp_path), train_files=["corpus.txt", "labels.txt"], dev_file="labels.txt", max_length=12
    )
    source.setup("fit")
    texts = [record.text for record in source.records("train")]
    assert texts == ["_".join(map(str, range(a, a + 10))) for a in (100, 110)] + ["1_2_3_4_5", "7_7_7_7_7"]
    assert source.model_arguments() == {"vocab_size": 5 + 20 + 6, "mask_id": 4, "special_ids": [0, 1, 2, 3, 4]}
    batches = list(source.train_dataloader())
    keys = [key for batch in batches for key in batch["row_keys"].tolist()]
    assert len(set(keys)) == len(keys) == 4
    source.save_assets(tmp_path)
    tagger = DaguanDataModule(num_generated=20, vocab_file=str(tmp_path / "vocab.txt"))
    assert tagger.model_arguments()["vocab_size"] == 31
    assert tagger.fingerprint()["vocabulary"] == source.fingerprint()["vocabulary"]
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"vocab\.txt: it lacks \[MASK\]"):
        DaguanCorpusDataModule(num_generated=20, vocab_file=str(tmp_path / "vocab.txt")).prepare()


def test_what_does_not_go_together_is_explained() -> None:
    with pytest.raises(InputError, match=r"data\.augment=true, data\.dictionary=true: .* use one of the two"):
        DaguanDataModule(augment=True, dictionary=True)
    with pytest.raises(InputError, match="DaguanCorpusDataModule cannot put several runs' answers together; give one"):
        DaguanCorpusDataModule().combine([[], []])
    assert len(DaguanDataModule(num_generated=40, augment=True).records("train")) > 50


@pytest.mark.parametrize("options", [{"fold": 5}, {"fold": -1}, {"num_folds": 1}])
def test_wrong_folds_are_explained(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="use 2 folds or more, and one of them from 0, or null"):
        DaguanDataModule(**options)


@pytest.mark.parametrize(("name", "number"), [("train.txt.gz", 1250), ("dev.txt", 250)])
def test_all_real_rows_come_back(name: str, number: int, tmp_path: Path) -> None:
    """Nothing is lost: no two segments of the real rows are "o" side by side, which the records could not say."""
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "daguan_2019").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    path = Path(root, "daguan_2019", name)
    lines = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    assert write_daguan(read_daguan(path, "abc"), tmp_path / "out") == number
    assert (tmp_path / "out").read_text("utf-8") == lines
