"""Batches of entity linking from files and from the generator, the assets of a run, and wrong settings."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kexue.data.ccks_linking import entity_row, link_row
from kexue.data.generators.linked_sentences import linked_entities, linked_sentences
from kexue.data.knowledge import KnowledgeBase
from kexue.data.lexicon import MentionLexicon
from kexue.data.link_batches import LinkCollator, entry_of, match_features
from kexue.data.linking import LinkDataModule
from kexue.data.records import NIL, Entity, Link, LinkRecord
from kexue.data.segmentation import segmenter, word_of_each_character
from kexue.data.tokenizers import CharTokenizer
from kexue.data.word_vectors import WordVectors
from kexue.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A small data set in the layout of the real one."""
    place = tmp_path / "data" / "entity_linking"
    place.mkdir(parents=True)
    stream = linked_sentences(1)
    for name, number in (("train.json", 40), ("dev.json", 8)):
        rows = [json.dumps(link_row(next(stream)), ensure_ascii=False) for _ in range(number)]
        (place / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    with gzip.open(place / "kb_data.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(entity_row(entity)) + "\n" for entity in linked_entities())
    return str(place.parent)


def from_files(root: str, **options: Any) -> LinkDataModule:
    return LinkDataModule(
        7, root=root, train_file="entity_linking/train.json", cache_dir=str(Path(root, "cache")), **options
    )


def check_batch(batch: dict[str, Any], data: LinkDataModule, training: bool) -> None:
    """Everything in a batch, read back as places of the texts."""
    mask, records = batch["mask"], batch["records"]
    rows, length = mask.shape
    assert batch["ids"].shape == mask.shape
    assert mask.sum(1).tolist() == [len(record.text) for record in records]
    assert (batch["ids"][~mask] == 0).all()
    assert batch["borders"].shape == batch["labels"].shape == (rows, length, 2)
    assert not batch["borders"][~mask].any()
    pairs = batch["pairs"].tolist()
    assert batch["features"].shape == (len(pairs), length, 3)
    assert len(batch["mentions"]) == len(batch["judged"]) == len(batch["right"]) == len(pairs)
    assert all(batch["mask"][row, first : last + 1].all() for row, first, last, _ in pairs)
    assert not batch["features"].any(-1)[~mask[batch["pairs"][:, 0]]].any()
    words = data.collator().lexicon.words([record.text for record in records])
    for row, record in enumerate(records):
        gold = {(link.start, link.end - 1): link.entity for link in record.links if link.entity != NIL}
        starts, ends = (set(batch["labels"][row, :, k].nonzero()[:, 0].tolist()) for k in range(2))
        assert (starts, ends) == ({first for first, _ in gold}, {last for _, last in gold})
        borders = [set(batch["borders"][row, :, k].nonzero()[:, 0].tolist()) for k in range(2)]
        assert borders == [{word.start for word in words[row]}, {word.end - 1 for word in words[row]}]
        places = {(first, last) for text, first, last, _ in pairs if text == row}
        assert places <= (set(gold) if training else {(word.start, word.end - 1) for word in words[row]})
    for (row, first, last, entity), judged, right in zip(pairs, batch["judged"], batch["right"], strict=True):
        record = records[row]
        meant = {(link.start, link.end - 1): link.entity for link in record.links if link.entity != NIL}
        assert bool(judged) == ((first, last) in meant)
        assert bool(right) == (meant.get((first, last)) == batch["entities"][entity][0])


@pytest.mark.parametrize("source", ["files", "generator"])
def test_batches_hold_mentions_and_candidates(source: str, root: str) -> None:
    data = from_files(root) if source == "files" else LinkDataModule(7, num_generated=40)
    data.setup("fit")
    assert len(data.records("train")) == 40
    assert data.model_arguments() == {
        "vocab_size": len(data.collator().tokenizer),
        "word_dim": 0,
        "types": ["人物", "作品", "地点", "机构"],
    }
    for batch in data.train_dataloader():
        check_batch(batch, data, training=True)
        assert batch["judged"].all()
    for batch in data.val_dataloader():
        check_batch(batch, data, training=False)


def test_nothing_of_dev_is_learnt(root: str) -> None:
    """Names, candidates and characters follow from the training texts alone, whatever the dev texts hold."""
    before = from_files(root)
    before.setup("fit")
    dev = Path(root, "entity_linking", "dev.json")
    rows = [{"text_id": str(i), "text": f"龘李{i}比赛", "mention_data": []} for i in range(50)]
    dev.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    after = from_files(root)
    after.setup("fit")
    assert len(after.records("val")) == 50
    assert after.fingerprint() == before.fingerprint()
    assert after.lexicon is not None
    assert before.lexicon is not None
    assert (after.lexicon.pruned, after.lexicon.annotated) == (before.lexicon.pruned, before.lexicon.annotated)


def test_a_batch_without_mentions_has_a_pair_that_counts_for_nothing() -> None:
    data = LinkDataModule(num_generated=10)
    for collate in (data.collator(), data.training_collator()):
        batch = collate([LinkRecord("a", "无"), LinkRecord("b", "没有人")])
        assert batch["pairs"].tolist() == [[0, 0, 0, 0]]
        assert batch["mentions"].tolist() == [-1]
        assert not batch["judged"].any()
        assert not batch["right"].any()


def test_candidates_are_limited_and_hold_the_gold_entity() -> None:
    entities = [Entity(str(100 + number), "李娜", (), (), (("编号", str(number)),)) for number in range(9)]
    lexicon = MentionLexicon(KnowledgeBase.build(entities))
    collate = LinkCollator(CharTokenizer.from_texts(["李娜"]), lexicon, max_candidates=3, training=True)
    record = LinkRecord("a", "李娜", (Link("李娜", 0, "107"),))
    assert [name for name, _ in collate([record])["entities"]] == ["107", "100", "101"]
    trained = MentionLexicon.fit(KnowledgeBase.build(entities), [record, LinkRecord("b", "李娜", record.links)])
    collate = LinkCollator(CharTokenizer.from_texts(["李娜"]), trained, max_candidates=3)
    assert [name for name, _ in collate([record])["entities"]] == ["107"]


def test_batches_do_not_depend_on_workers(root: str) -> None:
    def epoch(num_workers: int) -> list[dict[str, Any]]:
        data = from_files(root, num_workers=num_workers)
        data.setup("fit")
        return list(data.train_dataloader())

    for one, other in zip(epoch(0), epoch(2), strict=True):
        assert one["records"] == other["records"]
        assert all(torch.equal(one[key], other[key]) for key in ("ids", "pairs", "features", "entity_ids"))


@pytest.mark.parametrize("text", ["ABC 123,中文 😀x", "", "İ\n龘9", "３月Mix混排"])
@pytest.mark.parametrize("kind", ["characters", "jieba"])
def test_each_character_has_a_word(text: str, kind: Any) -> None:
    words = word_of_each_character(text, segmenter(kind))
    assert len(words) == len(text)
    assert all(character in word for character, word in zip(text, words, strict=True))


def test_features_have_the_length_of_the_text_for_any_lossless_words() -> None:
    knowledge = KnowledgeBase.build(
        [Entity("1", "X", (), (), (("职业", "歌手"), ("作品", "歌手之夜"), ("简介", "很长" * 9)))]
    )
    entry = entry_of(knowledge, 0, "characters")
    text = "歌手之夜与歌手 x职业"
    for size in (1, 2, 3, 99):
        words = word_of_each_character(text, lambda t: [t[i : i + size] for i in range(0, len(t), size)])  # noqa: B023
        assert match_features(text, words, entry).shape == (len(text), 3)
    found = match_features(text, word_of_each_character(text, segmenter("characters")), entry)
    assert ["".join(c for c, hit in zip(text, column, strict=True) if hit) for column in found.T] == [
        "歌手之夜歌手x职业",
        "歌手之夜歌手x职业",
        "歌手之夜歌手",
    ]
    with pytest.raises(InputError, match="has changed the text"):
        word_of_each_character("A b", lambda t: t.lower().split())


def test_capitals_make_no_difference_to_what_is_trained_and_predicted() -> None:
    """Training and prediction see one form of a text; the record keeps its own."""
    entity = Entity("1", "Rio", (), (), (("职业", "DJ"),))
    lexicon = MentionLexicon(KnowledgeBase.build([entity]))
    collate = LinkCollator(CharTokenizer.from_texts(["rio dj"], lowercase=True), lexicon)
    one, other = collate([LinkRecord("a", "RIO DJ")]), collate([LinkRecord("a", "rio dj")])
    assert all(torch.equal(one[key], other[key]) for key in ("ids", "borders", "pairs", "features"))
    assert one["borders"].any()
    assert one["records"][0].text == "RIO DJ"


def test_word_vectors_come_with_the_batch(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("3 2\n歌 1 2\nRio 3 4\nrio 5 6\n", encoding="utf-8")
    data = LinkDataModule(num_generated=10, word_vectors=str(path), cache_dir=str(tmp_path / "cache"))
    assert data.model_arguments()["word_dim"] == 2
    batch = data.collator()([LinkRecord("a", "唱歌 RIO歌")])
    vectors = batch["word_vectors"][batch["words"][0]]
    assert vectors.tolist() == [[0, 0], [1, 2], [0, 0], [3, 4], [3, 4], [3, 4], [1, 2]]
    assert batch["entity_words"].shape == batch["entity_ids"].shape
    assert WordVectors.cached(path, tmp_path / "cache").table(["无"])[1].tolist() == [[0, 0]]
    for content, message in (("歌 1 2\n", ":1: .*begins with NUMBER WIDTH"), ("1 2\n歌 1 b\n", ":2: use a word and 2")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            WordVectors.cached(path, tmp_path / "cache")


def test_assets_stand_in_for_the_training_data(root: str, tmp_path: Path) -> None:
    data = from_files(root)
    data.setup("fit")
    (tmp_path / "assets").mkdir()
    data.save_assets(tmp_path / "assets")
    for path in (Path(root, "entity_linking", "train.json"), Path(root, "entity_linking", "kb_data.gz")):
        path.unlink()
    again = from_files(root)
    again.load_assets(tmp_path / "assets")
    again.setup("test")
    assert again.model_arguments() == data.model_arguments()
    assert again.fingerprint() == data.fingerprint()
    check_batch(next(iter(again.test_dataloader())), again, training=False)
    (tmp_path / "assets" / "lexicon.json").unlink()
    with pytest.raises(InputError, match=r"lexicon\.json: no such file"):
        again.load_assets(tmp_path / "assets")


def test_texts_are_read_and_answers_written(tmp_path: Path) -> None:
    data = LinkDataModule(4, num_generated=10, max_length=5)
    path = tmp_path / "in.json"
    path.write_text(
        '{"text_id": "x", "text": "' + "长" * 900 + '"}\n{"text_id": "y", "text": "短"}\n', encoding="utf-8"
    )
    data.read_inputs(path)
    records = [record for batch in data.predict_dataloader() for record in batch["records"]]
    assert [(record.id, len(record.text)) for record in records] == [("x", 900), ("y", 1)]
    assert data.write_answers(list(reversed(records)), tmp_path / "out.json") == 2
    answers = [json.loads(line) for line in (tmp_path / "out.json").read_text(encoding="utf-8").splitlines()]
    assert [row["text_id"] for row in answers] == ["x", "y"]


def test_long_training_rows_are_bad_rows_and_others_stay(root: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.json:\d+: text of \d+ characters, at most 12 are trained on"):
        from_files(root, max_length=12).prepare()
    listing = tmp_path / "run" / "bad_rows.jsonl"
    data = from_files(root, max_length=12, on_bad_row="skip", bad_rows_file=str(listing))
    data.setup("fit")
    assert max(len(record.text) for record in data.records("train")) <= 12
    assert len(data.records("train")) + len(listing.read_text(encoding="utf-8").splitlines()) == 40
    assert len(data.records("val")) == 8


def test_wrong_places_and_values_are_named(root: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root=.*nowhere: no such folder; .*data\.root=null"):
        LinkDataModule(root=str(tmp_path / "nowhere")).prepare()
    with pytest.raises(InputError, match=r"kb_dat\.gz: no such file; did you mean kb_data\.gz"):
        from_files(root, knowledge_file="entity_linking/kb_dat.gz").prepare()
    wrong_values: list[dict[str, Any]] = [
        {"batch_size": 0},
        {"max_length": 0},
        {"max_candidates": 0},
        {"prune_ratio": 1.0},
        {"num_generated": 1},
        {"words": "whole"},
        {"min_annotations": 0},
        {"stride": 600},
        {"max_description": 0},
    ]
    for wrong in wrong_values:
        with pytest.raises(InputError, match=rf"data\.{next(iter(wrong))}="):
            LinkDataModule(**wrong)


def test_real_data_pass(tmp_path: Path) -> None:
    place = os.environ.get("KEXUE_DATA")
    if not place or not Path(place, "entity_linking").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    data = LinkDataModule(64, root=place, cache_dir=str(tmp_path))
    data.setup("fit")
    assert (len(data.records("train")), len(data.records("val"))) == (3000, 500)
    for batch in data.val_dataloader():
        check_batch(batch, data, training=False)
