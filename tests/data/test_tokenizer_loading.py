"""Which tokenizer a folder holds, and vocabularies cut to a task."""

import json
from pathlib import Path

import pytest

from kexue.data.tokenizers import (
    ByteLevelBPETokenizer,
    CharTokenizer,
    PairTokenizer,
    RoFormerTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    load_tokenizer,
    vocabulary_subset,
)
from kexue.data.tokenizers.bpe import BYTES, END
from kexue.errors import InputError

PIECES = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "国", "中国", "人", "play", "##ing", "##s"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("o", "h"), ("ä", "¸"), ("ä¸", "Ń")]
BYTE_PAIRS = [*sorted(BYTES), *("".join(pair) for pair in MERGES), END]
PAIR_SCHEMES: list[PairTokenizer] = [
    CharTokenizer.from_texts(["中国人"]),
    WordPieceTokenizer(PIECES, lowercase=False),
    RoFormerTokenizer(PIECES),
]
SCHEMES: list[Tokenizer] = [*PAIR_SCHEMES, ByteLevelBPETokenizer(BYTE_PAIRS, MERGES)]


def named(tokenizer: Tokenizer) -> str:
    return type(tokenizer).__name__


def write(folder: Path, **files: dict) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("tokenizer", SCHEMES, ids=named)
def test_what_was_saved_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    for place in (tmp_path, *tmp_path.iterdir()):
        if place.name != "tokenizer_config.json":
            again = load_tokenizer(place)
            assert type(again) is type(tokenizer)
            assert again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, WordPieceTokenizer(PIECES)),
        ({"tokenizer_config": {"do_lower_case": False}}, WordPieceTokenizer(PIECES, lowercase=False)),
        ({"config": {"model_type": "bert"}}, WordPieceTokenizer(PIECES)),
        ({"config": {"model_type": "roformer"}}, RoFormerTokenizer(PIECES)),
        ({"tokenizer_config": {"tokenizer_class": "RoFormerTokenizerFast"}}, RoFormerTokenizer(PIECES)),
        # the character-based RoFormer is published like this
        (
            {"tokenizer_config": {"tokenizer_class": "BertTokenizer"}, "config": {"model_type": "roformer"}},
            WordPieceTokenizer(PIECES),
        ),
    ],
)
def test_published_folders(tmp_path: Path, files: dict[str, dict], expected: WordPieceTokenizer) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    write(tmp_path, **files)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(expected)
    assert again.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(
    ("peer", "tokenizer"),
    [
        ("BertTokenizerFast", SCHEMES[1]),
        ("RoFormerTokenizerFast", SCHEMES[2]),
        ("GPT2TokenizerFast", SCHEMES[3]),
    ],
)
def test_what_transformers_saves(tmp_path: Path, peer: str, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "ours")
    getattr(transformers, peer).from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_tokenizer(tmp_path / "theirs")
    assert type(again) is type(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"looked for vocab\.txt, vocab\.json, merges\.txt, tokenizer\.json; give a folder with one of them"),
        ({"vocab": {}}, r"merges\.txt: no such file"),
        ({"tokenizer": {"model": {"type": "Unigram"}}}, r"model\.type='Unigram': only WordPiece and byte-level BPE"),
        ({"tokenizer": {}}, r"model\.type=None"),
        (
            {"vocab": {}, "tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}},
            r"tokenizer_config\.json: tokenizer_class=RobertaTokenizer: use a model with one of BertTokenizer,",
        ),
        (
            {"vocab": {}, "tokenizer_config": {"add_prefix_space": True}},
            r"add_prefix_space=True: only False can be read",
        ),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, files: dict[str, dict], words: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)


def test_a_file_of_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n".join(PIECES), encoding="utf-8")
    with pytest.raises(InputError, match=r"words\.txt'\): looked for vocab\.txt"):
        load_tokenizer(tmp_path / "words.txt")


@pytest.mark.parametrize("tokenizer", SCHEMES, ids=named)
def test_a_subset_encodes_its_texts_as_before(tokenizer: Tokenizer) -> None:
    texts = ["中国人 plays", "hello中", "人人x"]
    smaller, kept = vocabulary_subset(tokenizer, texts)
    assert kept == sorted(set(kept))
    assert len(smaller) == len(kept) <= len(tokenizer)
    assert [smaller.token_of(i) for i in range(len(smaller))] == [tokenizer.token_of(i) for i in kept]
    for text in texts:
        ids, spans = smaller.encode(text)
        assert ([kept[index] for index in ids], spans) == tokenizer.encode(text)


def test_a_subset_keeps_ids_and_frequent_tokens() -> None:
    tokenizer = WordPieceTokenizer(PIECES)
    smaller, kept = vocabulary_subset(tokenizer, ["人中人", "playing", PIECES.index("##s")], min_count=2)
    assert [PIECES[i] for i in kept] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "人", "##s"]
    assert smaller.options == tokenizer.options
    assert smaller.fingerprint() != tokenizer.fingerprint()
    with pytest.raises(InputError, match="id 99 is not in the vocabulary"):
        vocabulary_subset(tokenizer, [99])


def test_a_subset_of_byte_pairs_keeps_what_its_tokens_are_made_of() -> None:
    tokenizer = ByteLevelBPETokenizer(BYTE_PAIRS, MERGES)
    smaller, kept = vocabulary_subset(tokenizer, [tokenizer.id_of("hello")])
    assert [tokenizer.token_of(i) for i in kept[256:]] == ["he", "ll", "hell", "hello", END]
    assert list(smaller.merges) == MERGES[:4]
    assert smaller.decode(smaller.encode("hello 中国 oh")[0]) == "hello 中国 oh"


@pytest.mark.parametrize("tokenizer", PAIR_SCHEMES, ids=named)
def test_pairs_go_on_where_the_first_text_ends(tokenizer: PairTokenizer) -> None:
    ids, segments, spans = tokenizer.encode_pair("中国", "人")
    first, second = tokenizer.encode("中国"), tokenizer.encode("人")
    assert (ids, spans) == (first[0] + second[0][1:], first[1] + second[1][1:])
    assert segments == [0] * len(first[0]) + [1] * (len(second[0]) - 1)
