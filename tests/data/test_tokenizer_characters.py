"""One token a character, at the same place, whatever the characters are."""

import pickle
from pathlib import Path

import pytest

from kexue.data.tokenizers.characters import SPECIAL_TOKENS, CharTokenizer, normalise
from kexue.errors import InputError

ODD = "a\n\r\t \u3000\u2028\x00\ufeff\u200d😀é\u0301𠮷\\[UNK]中Ａ﹪ﬁİ\U000e0001\x85"


def test_every_character_is_a_token_at_its_place() -> None:
    tokenizer = CharTokenizer.from_texts([ODD])
    ids, offsets = tokenizer.encode(ODD)
    assert (ids[0], ids[-1], offsets[0], offsets[-1]) == (tokenizer.cls_id, tokenizer.sep_id, (0, 0), (0, 0))
    assert offsets[1:-1] == [(i, i + 1) for i in range(len(ODD))]
    assert "".join(tokenizer.vocabulary[index] for index in ids[1:-1]) == ODD
    assert tokenizer.vocabulary[:4] == SPECIAL_TOKENS
    assert tokenizer.pad_id == 0
    assert len(tokenizer) == 4 + len(set(ODD))
    assert tokenizer.encode("") == ([tokenizer.cls_id, tokenizer.sep_id], [(0, 0), (0, 0)])


@pytest.mark.parametrize("options", [{}, {"lowercase": True, "half_width": True}])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, options: dict) -> None:
    tokenizer = CharTokenizer.from_texts([ODD], **options)
    tokenizer.save(tmp_path / "assets")
    again = CharTokenizer.load(tmp_path / "assets")
    assert again.vocabulary == tokenizer.vocabulary
    assert (again.lowercase, again.half_width) == (tokenizer.lowercase, tokenizer.half_width)
    assert again.encode(ODD) == tokenizer.encode(ODD)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert len((tmp_path / "assets" / "vocab.txt").read_text(encoding="utf-8").splitlines()) == len(tokenizer)


def test_normal_forms_never_move_offsets() -> None:
    changed = [normalise(character, True, True) for character in ODD]
    assert all(len(character) == 1 for character in changed)
    assert normalise("Ａ", True, True) == "a"
    assert normalise("Ａ", False, True) == "A"
    assert normalise("ﬁ", True, True) == "ﬁ"  # would become two
    assert normalise("İ", True, False) == "İ"  # likewise
    tokenizer = CharTokenizer.from_texts(["ab1"], lowercase=True, half_width=True)
    assert tokenizer.encode("ＡB１")[0] == tokenizer.encode("ab1")[0]
    assert len(tokenizer.encode(ODD)[0]) == len(ODD) + 2
    assert tokenizer.fingerprint() != CharTokenizer(tokenizer.vocabulary).fingerprint()


def test_rare_characters_are_unknown_and_order_is_fixed() -> None:
    tokenizer = CharTokenizer.from_texts(["bbaac", "b"], min_count=2)
    assert tokenizer.vocabulary == (*SPECIAL_TOKENS, "b", "a")
    assert tokenizer.encode("cz")[0][1:-1] == [tokenizer.unk_id] * 2
    assert CharTokenizer.from_texts(["c", "aabbb"], min_count=2).vocabulary == tokenizer.vocabulary
    assert CharTokenizer.from_texts(["Aa"], min_count=2, lowercase=True).vocabulary[4:] == ("a",)


def test_a_given_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("[PAD]\r\n[unused1]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\n中\r\n##中\r\nthe\r\n\\\r\n".encode())
    tokenizer = CharTokenizer.from_vocab(path)
    assert tokenizer.encode("中the\\")[0] == [3, 5, 2, 2, 2, 8, 4]
    assert len(tokenizer) == 9


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[PAD]\n[SEP]\na\n", r"vocab\.txt: the vocabulary lacks \[UNK\], \[CLS\]; add each"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na\n", r"holds 'a' 2 times"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n\na\n", r"vocab\.txt:5: an empty line"),
        ("", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
    ],
)
def test_a_wrong_vocabulary_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "vocab.txt").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        CharTokenizer.from_vocab(tmp_path / "vocab.txt")


def test_broken_assets_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        CharTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json: not the options of a tokenizer"):
        CharTokenizer.load(tmp_path)


def test_what_all_tokenizers_share() -> None:
    tokenizer = CharTokenizer(["[MASK]", *SPECIAL_TOKENS, "中", "国", "the"])
    assert (tokenizer.mask_id, tokenizer.pad_id) == (0, 1)
    assert CharTokenizer.from_texts(["a"]).mask_id is None
    ids, segments, spans = tokenizer.encode_pair("中国", "国")
    assert ids == [3, 5, 6, 4, 6, 4]
    assert segments == [0, 0, 0, 0, 1, 1]
    assert spans == [(0, 0), (0, 1), (1, 2), (0, 0), (0, 1), (0, 0)]
    assert tokenizer.decode([*ids, 1, 1]) == "中国国"
    assert tokenizer.decode(tokenizer.encode("中x")[0]) == "中[UNK]"
    assert (tokenizer.token_of(7), tokenizer.id_of("国"), tokenizer.id_of("x")) == ("the", 6, 2)
    assert tokenizer.encode_batch(["中", ""]) == [tokenizer.encode("中"), tokenizer.encode("")]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("index", [-1, 8])
def test_an_id_outside_is_named(index: int) -> None:
    tokenizer = CharTokenizer(["[MASK]", *SPECIAL_TOKENS, "中", "国", "the"])
    with pytest.raises(InputError, match=rf"id {index} is not in the vocabulary; its ids go from 0 to 7"):
        tokenizer.token_of(index)
