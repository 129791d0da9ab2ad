"""Batches of texts with typed spans: from files of all formats and generated, in windows, with a dictionary."""

import json
import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from kexue.data.cluener import cluener_row, read_cluener
from kexue.data.generators.entity_sentences import TYPES, entity_sentences
from kexue.data.ner import NerDataModule
from kexue.data.records import Span, SpanRecord
from kexue.data.span_dictionary import SpanDictionary
from kexue.data.tagged import read_tagged, write_tagged
from kexue.errors import InputError

FILES = {
    "cluener": {"train_file": "ner_cluener/train.json.gz", "dev_file": "ner_cluener/dev.json"},
    "resume": {"train_file": "ner_resume/train.char.bmes.gz", "dev_file": "ner_resume/dev.char.bmes"},
    "weibo": {
        "train_file": "ner_weibo/weiboNER_2nd_conll.train.gz",
        "dev_file": "ner_weibo/weiboNER_2nd_conll.dev",
    },
}
NOTHING = {"overlapping": [], "cut by windows": []}


def check_batch(batch: dict[str, Any], types: list[str]) -> None:
    """Decode every cell back to the text and compare it with the records, window by window."""
    found: list[set[Span]] = [set() for _ in batch["records"]]
    for row, (owner, offsets) in enumerate(zip(batch["owners"], batch["offsets"], strict=True)):
        text = batch["records"][owner].text
        assert batch["mask"][row].sum() == len(offsets)
        assert not batch["mask"][row, len(offsets) :].any()
        for kind, first, last in batch["span_labels"][row].tolist():
            if kind >= 0:
                start, end = offsets[first][0], offsets[last][1]
                found[owner].add(Span(types[kind], text[start:end], start))
    assert batch["num_tokens"] == batch["mask"].sum()
    assert found == [set(record.spans) for record in batch["records"]]


@pytest.mark.parametrize("options", [{}, {"max_length": 20, "stride": 5}, {"row_budget": 64, "dictionary": True}])
def test_batches_hold_the_gold_spans(options: dict[str, Any]) -> None:
    data = NerDataModule(7, num_generated=40, **options)
    data.setup("fit")
    assert data.types == TYPES
    rows = 0
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            check_batch(batch, data.types)
            assert batch["ids"].shape[1] <= options.get("max_length", 256)
            assert ("starts" in batch) == ("row_budget" in options)
            assert ("segments" in batch) == ("dictionary" in options)
            rows += len(batch["ids"])
    assert (rows > 48) == ("max_length" in options)


def test_splits_of_generated_sentences_do_not_overlap() -> None:
    data = NerDataModule(num_generated=300)
    texts = [{record.text for record in data.records(split)} for split in ("train", "val", "test")]
    assert [len(part) for part in texts] == [300, 30, 30]
    assert len(set.union(*texts)) == 360
    assert all(r.text[s.start : s.end] == s.text for r in data.records("train") for s in r.spans)


def test_what_tags_and_windows_cannot_show_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    data = NerDataModule(2, max_length=6, stride=4, types=["a", "b"])
    inner = SpanRecord(0, "一二三四", (Span("a", "一二三", 0), Span("b", "二", 1)))
    cut = SpanRecord(1, "一二三四五六七", (Span("a", "三四五六", 2), Span("b", "一", 0)))
    data.set_records("train", [inner, cut])
    data.set_records("val", [inner])
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert data.not_representable("train") == {
        "overlapping": [(inner, [inner.spans[1]])],
        "cut by windows": [(cut, [cut.spans[0]])],
    }
    assert "1 training spans overlapping, the first: Span(type='b', text='二', start=1) in row 0" in caplog.text
    batch = data.collator()([inner, cut])
    assert batch["owners"] == [0, 1, 1]
    assert batch["span_labels"].tolist()[0] == [[0, 1, 3], [1, 2, 2]]
    assert batch["flat_labels"].tolist() == [[[0, 1, 3]], [[1, 1, 1]], [[-1, -1, -1]]]


def test_the_dictionary_does_not_know_what_a_text_itself_brought() -> None:
    rows = [
        SpanRecord(0, "李四到京", (Span("name", "李四", 0), Span("place", "京", 3))),
        SpanRecord(1, "京里无人", (Span("place", "京", 0),)),
        SpanRecord(2, "李四", (Span("name", "李四", 0),)),
    ]
    words, ids = SpanDictionary.fit(rows), {"name": 0, "place": 1}
    assert words.tags("李四到京", ids) == [1, 3, 0, 8]
    assert words.predict(SpanRecord(9, "京李四")).spans == (Span("place", "京", 0), Span("name", "李四", 1))
    alone = SpanDictionary.fit(rows[:1])
    assert alone.tags("李四到京", ids) == [0, 0, 0, 0]
    assert alone.tags("李四来", ids) == [1, 3, 0]


def test_the_dictionary_takes_the_longest_and_the_most_frequent() -> None:
    words = SpanDictionary({"大学": {"org": 1}, "北京大学": {"org": 1, "place": 2}, "北京": {"place": 5}})
    found = words.predict(SpanRecord(0, "在北京大学和大学"))
    assert found.spans == (Span("place", "北京大学", 1), Span("org", "大学", 6))


def test_assets_stand_in_for_the_training_data(tmp_path: Path) -> None:
    data = NerDataModule(num_generated=40, dictionary=True, lowercase=True)
    data.prepare()
    data.save_assets(tmp_path)
    again = NerDataModule(num_generated=40, dictionary=True)
    again.load_assets(tmp_path)
    assert again.model_arguments() == data.model_arguments()
    assert again.fingerprint() == data.fingerprint()
    unseen = "某地" + next(iter(data.dictionary.counts))  # type: ignore[union-attr]
    batches = [source.collator()([SpanRecord(0, unseen)]) for source in (data, again)]
    assert torch.equal(batches[0]["segments"], batches[1]["segments"])
    assert batches[0]["segments"].any()
    for name, text in (("labels.json", "[1]"), ("labels.json", "x"), ("dictionary.json", "[1]")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=rf"{name}: not a (list|dictionary) of"):
            again.load_assets(tmp_path)
        data.save_assets(tmp_path)


@pytest.mark.parametrize("format_", ["cluener", "resume", "weibo"])
def test_texts_are_read_and_answers_written_in_each_format(format_: Any, tmp_path: Path) -> None:
    data = NerDataModule(4, num_generated=10, format=format_)
    data.prepare()
    gold = list(islice(entity_sentences(7), 3))
    source, output = tmp_path / "in", tmp_path / "out"
    if format_ == "cluener":
        source.write_text("".join(json.dumps(cluener_row(r)) + "\n" for r in gold), encoding="utf-8")
    else:
        names: Any = {"resume": "BMES", "weibo": "BIO"}[format_]
        write_tagged(gold, source, names=names)
        text = source.read_text(encoding="utf-8")
        if format_ == "weibo":
            source.write_text("".join(f"{x[0]}0{x[1:]}" if x.strip() else x for x in text.splitlines(True)), "utf-8")
    data.read_inputs(source)
    data.setup("predict")
    assert list(data.records("predict")) == [SpanRecord(record.id, record.text) for record in gold]
    assert data.write_answers(reversed(gold), output) == 3
    if format_ == "cluener":
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [row["id"] for row in rows] == [0, 1, 2]
        assert rows == [{"id": r.id, "label": cluener_row(r)["label"]} for r in gold]
    else:
        assert list(read_tagged(output, names=names, strict_tags=True)) == gold


def test_wrong_places_and_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root=.*nowhere: no such folder; .*data\.root=null"):
        NerDataModule(root=str(tmp_path / "nowhere")).prepare()
    (tmp_path / "x").write_text('{"text": "无", "label": {}}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.train_file=x: not one span in it"):
        NerDataModule(root=str(tmp_path), train_file="x").prepare()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"format": "conll"}, r"data\.format='conll': use one of cluener, resume, weibo"),
        ({"max_length": 2}, r"data\.max_length - 2, data\.stride: windows\(size=0"),
        ({"stride": 300}, "stride=300"),
        ({"row_budget": 0}, "use 1 or more"),
        ({"num_generated": 1}, "use 10 or more"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            NerDataModule(**options)


@pytest.mark.parametrize("format_", ["cluener", "resume", "weibo"])
def test_all_real_rows_are_shown_to_models(format_: Any) -> None:
    """Nothing is lost but two companies in the name of a book, which tags cannot say (spans can)."""
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, f"ner_{format_}").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    data = NerDataModule(64, root=root, format=format_, **FILES[format_])
    data.setup("fit")
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        check_batch(batch, data.types)
    lost = data.not_representable("train")
    if format_ == "cluener":
        ((record, spans),) = lost.pop("overlapping")
        assert [span.text for span in spans] == ["招商银行", "永隆银行"]
        assert [r for r in read_cluener(Path(root, FILES["cluener"]["train_file"])) if r.id == record.id] == [record]
    assert not any(lost.values())
    assert data.not_representable("val") == NOTHING
