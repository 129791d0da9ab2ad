"""WordPiece and RoFormer's words: pieces, spans in the text as given, files, and what jieba adds."""

import json
import pickle
import sys
from pathlib import Path

import pytest
from tokenizers import normalizers

from kexue.data.tokenizers import RoFormerTokenizer, WordPieceTokenizer, text_of
from kexue.data.tokenizers.roformer import CHARACTER_OR_RUN
from kexue.errors import InputError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "i", "##i", "##\u0307", "e", "##e", "play", "##ing", "##s", "the", "中", "国", "中国", "人", "𠮷", ",", ".",
    "3", "14", "[", "]", "sep", "ᄒ", "##ᅡ", "##ᆫ", "한", "e\u0301"
]  # fmt: skip


def pieces(tokenizer: WordPieceTokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    ids, spans = tokenizer.encode(text)
    assert (ids[0], ids[-1], spans[0], spans[-1]) == (tokenizer.cls_id, tokenizer.sep_id, (0, 0), (0, 0))
    return [(tokenizer.token_of(index), span) for index, span in zip(ids[1:-1], spans[1:-1], strict=True)]


@pytest.fixture(params=[WordPieceTokenizer, RoFormerTokenizer])
def scheme(request: pytest.FixtureRequest) -> type[WordPieceTokenizer]:
    return request.param


def test_words_and_characters(scheme: type[WordPieceTokenizer]) -> None:
    tokenizer = scheme([*SPECIAL, *WORDS])
    assert pieces(tokenizer, "Playings") == [("play", (0, 4)), ("##ing", (4, 7)), ("##s", (7, 8))]
    assert pieces(tokenizer, "人𠮷, 国") == [("人", (0, 1)), ("𠮷", (1, 2)), (",", (2, 3)), ("国", (4, 5))]
    assert tokenizer.encode("") == tokenizer.encode(" \t\u3000")
    assert pieces(tokenizer, "") == []
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id, len(tokenizer)) == (0, 1, 4, 5 + len(WORDS))


def test_spans_lie_in_the_text_as_given() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL, *WORDS])
    assert pieces(tokenizer, "Ii İ") == [("i", (0, 1)), ("##i", (1, 2)), ("i", (3, 4))]
    assert pieces(tokenizer, "e\u0301e\u0301 é") == [("e", (0, 2)), ("##e", (2, 4)), ("e", (5, 6))]
    assert pieces(tokenizer, "한\u0301") == [("ᄒ", (0, 1)), ("##ᅡ", (0, 1)), ("##ᆫ", (0, 2))]
    assert pieces(tokenizer, "❤\ufe0f\ufe0f国") == [("[UNK]", (0, 3)), ("国", (3, 4))]
    assert pieces(tokenizer, "中\u0301 国") == [("中", (0, 2)), ("国", (3, 4))]
    assert pieces(tokenizer, "ﬁ Ａ") == [("[UNK]", (0, 1)), ("[UNK]", (2, 3))]
    assert pieces(tokenizer, "\u0301 e") == [("e", (2, 3))]


def test_dropped_characters_stay_outside_or_inside_never_at_the_edge() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL, *WORDS])
    assert pieces(tokenizer, "\ufeffpl\u200bay\x00ing\ufffd") == [("play", (1, 6)), ("##ing", (7, 10))]
    assert pieces(tokenizer, "\ufeff\u200b\ue000") == []


def test_options() -> None:
    vocabulary = [*SPECIAL, *WORDS]
    kept = WordPieceTokenizer(vocabulary, strip_accents=False)
    assert pieces(kept, "İ 한 e\u0301") == [("i", (0, 1)), ("##\u0307", (0, 1)), ("한", (2, 3)), ("e\u0301", (4, 6))]
    cased = WordPieceTokenizer(vocabulary, lowercase=False)
    assert not cased.strip_accents
    assert pieces(cased, "The the") == [("[UNK]", (0, 3)), ("the", (4, 7))]
    assert len({WordPieceTokenizer(vocabulary).fingerprint(), kept.fingerprint(), cased.fingerprint()}) == 3


def test_unknown_words_keep_their_span(scheme: type[WordPieceTokenizer]) -> None:
    tokenizer = scheme([*SPECIAL, *WORDS])
    assert pieces(tokenizer, "playx 龘 " + "i" * 100) == [
        ("[UNK]", (0, 5)),
        ("[UNK]", (6, 7)),
        ("i", (8, 9)),
        *(("##i", (place, place + 1)) for place in range(9, 108)),
    ]
    assert pieces(tokenizer, "i" * 101) == [("[UNK]", (0, 101))]


def test_text_is_never_a_special_token(scheme: type[WordPieceTokenizer]) -> None:
    tokenizer = scheme([*SPECIAL, *WORDS])
    assert pieces(tokenizer, "[SEP]中") == [("[", (0, 1)), ("sep", (1, 4)), ("]", (4, 5)), ("中", (5, 6))]
    assert not {0, 2, 3, 4} & set(tokenizer.encode("[PAD] [CLS][MASK]")[0][1:-1])


def test_pairs_and_text_of(scheme: type[WordPieceTokenizer]) -> None:
    tokenizer = scheme([*SPECIAL, *WORDS])
    ids, segments, spans = tokenizer.encode_pair("Plays", "人")
    assert [tokenizer.token_of(index) for index in ids] == ["[CLS]", "play", "##s", "[SEP]", "人", "[SEP]"]
    assert segments == [0, 0, 0, 0, 1, 1]
    assert spans == [(0, 0), (0, 4), (4, 5), (0, 0), (0, 1), (0, 0)]
    assert text_of("  Play\u200bS,  Ok ", tokenizer.encode("  Play\u200bS,  Ok ")[1]) == "Play\u200bS,  Ok"
    assert text_of("Plays", spans[1:2]) == "Play"
    assert text_of("Plays", [(0, 0)]) == ""


def test_decoding_writes_readable_text() -> None:
    tokenizer = WordPieceTokenizer([*SPECIAL, *WORDS])
    for text in ("the playings, the play. the", "中国the人, the 3.14", ""):
        assert tokenizer.decode([*tokenizer.encode(text)[0], tokenizer.pad_id]) == text
    assert tokenizer.decode([tokenizer.unk_id, tokenizer.id_of("中"), tokenizer.mask_id or 0]) == "[UNK]中[MASK]"


def test_files(tmp_path: Path, scheme: type[WordPieceTokenizer]) -> None:
    for number, options in enumerate(({}, {"lowercase": False}, {"strip_accents": False})):
        tokenizer = scheme([*SPECIAL, "\u2028", "\x85", *WORDS], **options)
        tokenizer.save(tmp_path / str(number))
        for again in (scheme.load(tmp_path / str(number)), pickle.loads(pickle.dumps(tokenizer))):
            assert type(again) is scheme
            assert (again.vocabulary, again.options) == (tokenizer.vocabulary, tokenizer.options)
            assert again.fingerprint() == tokenizer.fingerprint()
            assert again.encode("İ Playing 中国人 é") == tokenizer.encode("İ Playing 中国人 é")


def test_wrong_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\na\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"vocab\.txt: the vocabulary lacks \[UNK\], \[SEP\]; add each"):
        WordPieceTokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{\n"do_lower_case": tru}', encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer_config\.json:2: not JSON"):
        WordPieceTokenizer.load(tmp_path)
    with pytest.raises(InputError, match="half of a surrogate pair; write the character whole"):
        WordPieceTokenizer([*SPECIAL, *WORDS]).encode("中\ud83d")
    content = {"model": {"type": "WordPiece", "unk_token": "<unk>"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json: model\.unk_token='<unk>': only '\[UNK\]' can be read"):
        WordPieceTokenizer.from_json(tmp_path / "tokenizer.json")


def test_words_of_the_vocabulary_stay_whole() -> None:
    tokenizer = RoFormerTokenizer([*SPECIAL, *WORDS])
    assert pieces(tokenizer, "The 中国人") == [("the", (0, 3)), ("中国", (4, 6)), ("人", (6, 7))]
    assert pieces(tokenizer, "\ufeff中\u200b国 人") == [("中国", (1, 4)), ("人", (5, 6))]
    assert pieces(tokenizer, "中国中国") == [("中国", (0, 2)), ("中国", (2, 4))]
    assert pieces(tokenizer, "中国银行") == [  # one word, which the vocabulary lacks: its characters
        ("中", (0, 1)),
        ("国", (1, 2)),
        ("[UNK]", (2, 3)),
        ("[UNK]", (3, 4)),
    ]
    assert "中国" not in [token for token, _ in pieces(WordPieceTokenizer([*SPECIAL, *WORDS]), "中国")]


def test_the_same_characters_are_chinese_as_in_the_library() -> None:
    split = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and not chr(code).isspace()]
    spaced = split.normalize_str("\n".join(characters)).split("\n")
    chinese = {character for character, text in zip(characters, spaced, strict=True) if text != character}
    assert len(chinese) > 80_000
    alone = {found for found in CHARACTER_OR_RUN.findall("a" + "a".join(characters) + "a") if found in chinese}
    assert alone == chinese
    assert "".join(CHARACTER_OR_RUN.findall("".join(characters))) == "".join(characters)
    others = [character for character in characters if character not in chinese]
    assert CHARACTER_OR_RUN.findall("".join(others)) == ["".join(others)]


def test_without_rjieba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(ImportError, match="pip install rjieba"):
        RoFormerTokenizer([*SPECIAL, *WORDS])
