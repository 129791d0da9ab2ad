"""A knowledge base in a file: built once, opened in place, and what counts as a mention in texts."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks

from kexue.data import knowledge as knowledge_module
from kexue.data.baselines import EntityDictionary
from kexue.data.ccks_linking import entity_row
from kexue.data.generators.linked_sentences import linked_entities, linked_sentences
from kexue.data.knowledge import KnowledgeBase, description, lookup_form
from kexue.data.lexicon import MentionLexicon
from kexue.data.records import NIL, Entity, Link, LinkRecord
from kexue.errors import InputError

SINGER = Entity("7", "李娜", ("Li Na",), ("人物",), (("职业", "歌手"),))
PLAYER = Entity("12", "李娜", (), ("人物",), (("职业", "网球运动员"),))
BOOK = Entity("30", "《青春》", ("青春",))


def base() -> KnowledgeBase:
    return KnowledgeBase.build([SINGER, PLAYER, BOOK])


def write_rows(path: Path, entities: list[Entity]) -> Path:
    path.write_text("".join(json.dumps(entity_row(entity)) + "\n" for entity in entities), encoding="utf-8")
    return path


def check(found: KnowledgeBase) -> None:
    assert len(found) == 3
    assert [found.entity(number) for number in range(3)] == [PLAYER, BOOK, SINGER]  # ids are strings
    assert found.numbers(["30", "8", "7"]).tolist() == [1, -1, 2]
    name, alias, book, other = found.names.numbers(
        [lookup_form(n) for n in ("李娜", "LI na", "《青春》", "青")]
    ).tolist()
    assert found.bearers(name).tolist() == [0, 2]
    assert found.bearers(alias).tolist() == [2]
    assert found.bearers(book).tolist() == [1]
    assert other == -1
    assert found.types == ["人物"]
    assert [found.type_of(name) for name in ("7", "30")] == ["人物", None]
    with pytest.raises(KeyError):
        found.type_of("8")
    assert found.character_counts()["娜"] == 2


def test_entities_by_name_and_by_id() -> None:
    check(base())
    assert description(SINGER) == "职业：歌手\n名称：李娜、Li Na"


def test_a_file_is_mapped_and_travels_by_name(tmp_path: Path) -> None:
    path = tmp_path / "kb.safetensors"
    base().save(path)
    opened = KnowledgeBase.open(path)
    check(opened)
    assert all(isinstance(array.base, np.ndarray) and not array.flags.owndata for array in opened.arrays.values())
    assert len(pickle.dumps(opened)) < 500
    check(pickle.loads(pickle.dumps(opened)))
    check(pickle.loads(pickle.dumps(base())))
    opened.save(path)
    opened.save(tmp_path / "again.safetensors")
    check(KnowledgeBase.open(tmp_path / "again.safetensors"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.safetensors", "kb.safetensors"]


def test_broken_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "kb.safetensors"
    base().save(path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-100], "not a whole file of arrays"),
        (whole[:50], "not a whole file"),
        (b"\0", "not a whole"),
        (whole.replace(b'"version":"1"', b'"version":"0"'), "holds .*delete it"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"kb\.safetensors: {message}"):
            KnowledgeBase.open(path)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kexue.data.arrays.os.fsync", full)
    with pytest.raises(InputError, match=r"kb\.safetensors: cannot be written \(No space left"):
        base().save(tmp_path / "kb.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_built_once_and_again_when_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = knowledge_module.read_knowledge
    monkeypatch.setattr(knowledge_module, "read_knowledge", lambda path, **kw: reads.append(path) or read(path, **kw))
    source, cache = write_rows(tmp_path / "kb.json", [SINGER, PLAYER, BOOK]), tmp_path / "cache"
    for _ in range(2):
        check(KnowledgeBase.cached(source, cache))
    assert len(reads) == 1
    write_rows(source, [SINGER, PLAYER])
    assert len(KnowledgeBase.cached(source, cache)) == 2
    assert len(reads) == 2
    with source.open("a", encoding="utf-8") as file:
        file.write('{"subject_id": "9"}\n')
    with pytest.raises(InputError, match=r"kb\.json:3: key 'data' is missing"):
        KnowledgeBase.cached(source, cache)
    for listing in (tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "two.jsonl"):
        options = {"on_bad_row": "skip", "bad_rows_file": listing}
        assert len(KnowledgeBase.cached(source, cache, **options)) == 2
        (row,) = map(json.loads, listing.read_text(encoding="utf-8").splitlines())
        assert (row["file"], row["line"]) == (str(source), 3)
    assert len(reads) == 4
    with pytest.raises(InputError, match="key 'data' is missing"):
        KnowledgeBase.cached(source, cache)  # what was skipped for one run is not passed over for another


def open_cached(folder: str) -> tuple[int, int, str]:
    """What a process finds, how often it has read the rows, and which file it has mapped."""
    reads = []
    read = knowledge_module.read_knowledge

    def slowly(path, **options):
        import time

        reads.append(path)
        time.sleep(1)
        return read(path, **options)

    knowledge_module.read_knowledge = slowly
    found = KnowledgeBase.cached(Path(folder) / "kb.json", Path(folder) / "cache")
    return len(found), len(reads), str(found.path)


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    write_rows(tmp_path / "kb.json", [SINGER, PLAYER, BOOK])
    one, other = run_ranks(open_cached, 2, str(tmp_path))
    assert one[0] == other[0] == 3
    assert sorted((one[1], other[1])) == [0, 1]
    assert one[2] == other[2]


def texts(word: str, times: int, meant: int) -> list[LinkRecord]:
    """Texts that hold a name, in some of them as a mention."""
    rows = []
    for number in range(times):
        links = (Link(word, 0, "7"),) if number < meant else ()
        rows.append(LinkRecord(f"{word}{number}", f"{word}的事{number}", links))
    return rows


@pytest.mark.parametrize(
    ("times", "meant", "pruned"),
    [(4, 0, True), (3, 0, False), (10, 1, True), (9, 1, False), (0, 0, False), (16, 2, True), (15, 2, False)],
)
def test_names_that_are_hardly_meant_are_left_out(times: int, meant: int, pruned: bool) -> None:
    """Dropped at (not meant + 1) / (meant + 1) >= 5."""
    lexicon = MentionLexicon.fit(base(), texts("李娜", times, meant))
    assert lexicon.pruned == (["李娜"] if pruned else [])
    assert [word[:2] for word in lexicon.words(["和李娜, li na"])[0]] == ([] if pruned else [(1, 3)]) + [(5, 10)]
    assert MentionLexicon.fit(base(), texts("李娜", times, meant), None).pruned == []


def test_a_text_counts_once_and_nil_is_nobody() -> None:
    twice = [LinkRecord("a", "李娜和李娜和李娜和李娜和李娜")]
    assert MentionLexicon.fit(base(), twice).pruned == []
    nil = [LinkRecord(f"{i}", f"{i}李娜", (Link("李娜", len(str(i)), NIL),)) for i in range(4)]
    assert MentionLexicon.fit(base(), nil).pruned == ["李娜"]
    partly = [LinkRecord(f"{i}", f"李娜{i}李娜", (Link("李娜", 0, "7"),)) for i in range(9)]
    assert MentionLexicon.fit(base(), partly).pruned == []


def test_candidates_and_the_most_frequent_entity(tmp_path: Path) -> None:
    rows = [LinkRecord(str(i), "李娜", (Link("李娜", 0, entity),)) for i, entity in enumerate(["7", "7", "12", "99"])]
    lexicon = MentionLexicon.fit(base(), rows)
    lexicon.save(tmp_path / "lexicon.json")
    for each in (lexicon, MentionLexicon.load(tmp_path / "lexicon.json", base())):
        name = int(each.knowledge.names.numbers(["李娜"])[0])
        assert each.candidates(name) == [2]
        assert each.candidates(name, 1) == [2, 0]
        assert each.candidates(name, 3) == [0, 2]
        assert each.most_frequent(name) == 2
        assert each.most_frequent(int(each.knowledge.names.numbers(["青春"])[0])) == 1
    found = EntityDictionary(lexicon).predict(LinkRecord("x", "《青春》与李娜"))
    assert found.links == (Link("青春", 1, "30", None), Link("李娜", 5, "7", "人物"))
    for wrong in ("[]", "{}", '{"pruned": 3, "annotated": {}}'):
        (tmp_path / "lexicon.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(InputError, match=r"lexicon\.json: not what a lexicon saves"):
            MentionLexicon.load(tmp_path / "lexicon.json", base())


def test_generated_texts_are_ambiguous_and_annotated_in_place() -> None:
    entities, stream = linked_entities(), linked_sentences(3)
    rows = [next(stream) for _ in range(1000)]
    assert rows[:50] == [row for row, _ in zip(linked_sentences(3), range(50), strict=False)]
    assert len({row.text for row in rows}) == 1000
    known = {entity.id: entity for entity in entities}
    links = [(row, link) for row in rows for link in row.links]
    assert all(row.text[link.start : link.end] == link.text for row, link in links)
    assert all(link.text in (known[link.entity].name, *known[link.entity].aliases) for _, link in links if link.type)
    lexicon = MentionLexicon.fit(KnowledgeBase.build(entities), rows)
    assert "比赛" in lexicon.pruned
    bearers = [
        len(lexicon.knowledge.bearers(word.name)) for row in lexicon.words([r.text for r in rows]) for word in row
    ]
    assert np.mean(np.array(bearers) > 1) > 0.5
    assert 0.05 < np.mean([link.entity == NIL for _, link in links]) < 0.2


def test_the_dictionary_on_real_rows(tmp_path: Path) -> None:
    """All mentions are names; pruning costs two of the training texts and takes away half of the wrong words."""
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "entity_linking").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    from kexue.data.linking import LinkDataModule

    data = LinkDataModule(root=root, cache_dir=str(tmp_path))
    data.setup("fit")
    for ratio, expected in ((None, (500, 554)), (5.0, (500, 510))):
        lexicon = MentionLexicon.fit(data._knowledge(), data.records("train"), ratio)
        rows = [(EntityDictionary(lexicon).predict(row), row) for row in data.records("val")]
        right = sum(len(set(found.links) & set(row.links)) for found, row in rows)
        assert (right, sum(len(found.links) for found, _ in rows)) == expected
