"""Byte-level byte pairs: exact decoding, spans of whole characters, files."""

import json
import pickle
from pathlib import Path

import pytest

from kexue.data.tokenizers import ByteLevelBPETokenizer
from kexue.data.tokenizers.bpe import BYTES, END
from kexue.errors import InputError

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("ä", "¸"), ("ä¸", "Ń")]
VOCABULARY = [END, *sorted(BYTES), *("".join(pair) for pair in MERGES)]


@pytest.fixture
def tokenizer() -> ByteLevelBPETokenizer:
    return ByteLevelBPETokenizer(VOCABULARY, MERGES)


def tokens(tokenizer: ByteLevelBPETokenizer, text: str) -> list[str]:
    return [tokenizer.token_of(index) for index in tokenizer.encode(text)[0]]


def test_merges_and_spans(tokenizer: ByteLevelBPETokenizer) -> None:
    assert tokens(tokenizer, "hello hello") == ["hello", "Ġhello"]
    assert tokenizer.encode("hello hello")[1] == [(0, 5), (5, 11)]
    assert tokenizer.encode("") == ([], [])
    assert tokenizer.encode(" ")[1] == [(0, 1)]


def test_part_of_a_character_has_the_span_of_the_whole(tokenizer: ByteLevelBPETokenizer) -> None:
    assert tokenizer.encode("中丙a")[1] == [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert tokenizer.encode("𠮷")[1] == [(0, 1)] * 4
    end_and_start = ("Ń", "ä¸")
    across = ByteLevelBPETokenizer([*VOCABULARY, "Ńä¸"], [*MERGES[:-1], end_and_start])
    assert across.encode("中中")[1] == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("text", ["中 国\n", "e\u0301👨\u200d👩", "\x00\ufffd\ufeff\u2028", END + "x", "  two  "])
def test_decoding_is_exact(tokenizer: ByteLevelBPETokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)[0]) == text


def test_the_end_of_text_is_never_text(tokenizer: ByteLevelBPETokenizer) -> None:
    ids, _ = tokenizer.encode(END)
    assert tokenizer.end_id not in ids
    assert tokenizer.decode([*tokenizer.encode("a")[0], tokenizer.end_id]) == "a"
    assert tokenizer.decode(tokenizer.encode("中")[0][:-1] + tokenizer.encode("丙")[0][:1]) == "\ufffd"
    special = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert special == (None,) * 5


def test_files(tmp_path: Path, tokenizer: ByteLevelBPETokenizer) -> None:
    tokenizer.save(tmp_path)
    content = {
        "added_tokens": [{"id": 0, "content": END}, {"id": len(VOCABULARY), "content": "<|user|>"}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(VOCABULARY)}, "merges": MERGES},
    }
    (tmp_path / "new.json").write_text(json.dumps(content), encoding="utf-8")
    content["model"]["merges"] = [" ".join(pair) for pair in MERGES]
    (tmp_path / "old.json").write_text(json.dumps(content), encoding="utf-8")
    same = [ByteLevelBPETokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))]
    assert {again.fingerprint() for again in same} == {tokenizer.fingerprint()}
    for name in ("new.json", "old.json"):
        same.append(ByteLevelBPETokenizer.from_json(tmp_path / name))
        assert same[-1].id_of("<|user|>") == len(VOCABULARY)
        assert len(same[-1].encode("<|user|>")[0]) == len("<|user|>")
    for again in same:
        assert again.merges == tokenizer.merges
        assert again.encode("hello 中国") == tokenizer.encode("hello 中国")


def test_wrong_input_is_named(tmp_path: Path, tokenizer: ByteLevelBPETokenizer) -> None:
    with pytest.raises(InputError, match=r"lacks <\|endoftext\|> Z; it needs the 256 bytes"):
        ByteLevelBPETokenizer([token for token in VOCABULARY if token not in (END, "Z")], [])
    with pytest.raises(InputError, match=r"holds 'hell' 2 times"):
        ByteLevelBPETokenizer([*VOCABULARY, "hell"], [])
    with pytest.raises(InputError, match=r"the result of the merge 'x' 'y'"):
        ByteLevelBPETokenizer(VOCABULARY, [("x", "y")])
    with pytest.raises(InputError, match=r"id_of\('中'\): not in the vocabulary; use encode for text"):
        tokenizer.id_of("中")
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tokenizer.encode_batch(["a", "\udc00"])
    tokenizer.save(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nhe\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"merges\.txt:3: 'he' is not a merge"):
        ByteLevelBPETokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 2}', encoding="utf-8")
    with pytest.raises(InputError, match=r"vocab\.json: the ids of the 2 tokens are not 0 to 1, each once"):
        ByteLevelBPETokenizer.load(tmp_path)
    content = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Metaspace"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"pre_tokenizer\.type='Metaspace': only 'ByteLevel' can be read"):
        ByteLevelBPETokenizer.from_json(tmp_path / "tokenizer.json")
