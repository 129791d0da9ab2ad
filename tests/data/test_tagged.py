"""Tagged corpora: tags to spans and back, for both real sets, and lines that are wrong."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from kexue.data.records import Span, SpanRecord
from kexue.data.tagged import read_tagged, write_tagged
from kexue.errors import InputError

BMES = "李 B-NAME\n四 E-NAME\n在 O\n京 S-LOC\n大 B-ORG\n学 M-ORG\n里 E-ORG\n\n无 O\n"
RECORDS = [
    SpanRecord(0, "李四在京大学里", (Span("NAME", "李四", 0), Span("LOC", "京", 3), Span("ORG", "大学里", 4))),
    SpanRecord(1, "无"),
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_both_kinds_of_tags(tmp_path: Path) -> None:
    assert list(read_tagged(write(tmp_path / "x", BMES), ["NAME", "LOC", "ORG"])) == RECORDS
    bio = "1\x30\tO\n李0\tB-PER.NAM\n四1\tI-PER.NAM\n\ufffd\ufffd0\tB-LOC.NOM\n"
    (record,) = read_tagged(write(tmp_path / "y", bio), names="BIO", word_places=True, strict_tags=True)
    assert record == SpanRecord(
        0, "1李四\ufffd\ufffd", (Span("PER.NAM", "李四", 1), Span("LOC.NOM", "\ufffd\ufffd", 3))
    )


def test_written_tags_are_read_again(tmp_path: Path) -> None:
    assert write_tagged(RECORDS, tmp_path / "x") == 2
    assert (tmp_path / "x").read_text(encoding="utf-8") == BMES + "\n"
    write_tagged(RECORDS, tmp_path / "y", names="BIO", separator="\t")
    assert list(read_tagged(tmp_path / "y", names="BIO", strict_tags=True)) == RECORDS


def test_texts_without_tags_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "李\n四 anything\n\n\n\n无\n")
    assert list(read_tagged(path, with_spans=False)) == [SpanRecord(0, "李四"), SpanRecord(1, "无")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("四 E-SONG", "label 'SONG' is not one of NAME, LOC, ORG"),
        ("四 X-NAME", "tag 'X-NAME'; give O, or one of B, M, E, S with a hyphen and a type"),
        ("四 E-", "tag 'E-'; give O"),
        ("四", "'四' is not a token and its tag; write both"),
        (" E-NAME", "is not a token and its tag"),
        ("四" * 350_000, "is not a token and its tag"),
        ("四" * 350_000 + " E-NAME", "text of 350001 characters, at most 1000 are taken"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "x.bmes", f"无 O\n\n李 B-NAME\n{line}\n\n无 O\n")
    at = 3 if "characters" in words else 4
    with pytest.raises(InputError, match=rf"x\.bmes:{at}: .*{words}") as error:
        list(read_tagged(path, ["NAME", "LOC", "ORG"], max_characters=1000))
    assert len(str(error.value)) < 500
    listing = tmp_path / "bad_rows.jsonl"
    kept = list(read_tagged(path, RECORDS and ["NAME"], max_characters=1000, on_bad_row="skip", bad_rows_file=listing))
    assert [record.id for record in kept] == [0, 2]
    assert json.loads(listing.read_text(encoding="utf-8"))["line"] == at


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("李 O\n".encode() + b"\xff O\n")
    with pytest.raises(InputError, match=r"x:2: not UTF-8 \(byte 0xff at byte 1"):
        list(read_tagged(tmp_path / "x"))
    with pytest.raises(InputError, match="no rows, the file is empty; write a token and its tag a line"):
        list(read_tagged(write(tmp_path / "empty", "\n\n")))


@pytest.mark.parametrize(
    ("names", "lines", "line", "spans"),
    [
        ("BIO", ["O", "I-A", "I-A"], 2, [("A", 1, 3)]),
        ("BIO", ["B-A", "I-B", "O"], 2, [("A", 0, 1), ("B", 1, 2)]),
        ("BMES", ["B-A", "O", "O"], 2, [("A", 0, 1)]),
        ("BMES", ["S-A", "E-A", "O"], 2, [("A", 0, 1), ("A", 1, 2)]),
        ("BMES", ["O", "O", "B-A"], 3, [("A", 2, 3)]),
    ],
)
def test_contradictions_are_bad_rows_or_counted(
    names: str, lines: list, line: int, spans: list, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x", "".join(f"字 {tag}\n" for tag in lines))
    with pytest.raises(
        InputError, match=rf"x:{line}: tag '.*' cannot stand after '.*'; correct it, or use strict_tags"
    ):
        list(read_tagged(path, names=names, strict_tags=True))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        (record,) = read_tagged(path, names=names)  # type: ignore[arg-type]
    assert [(span.type, span.start, span.end) for span in record.spans] == spans
    assert "1 tags contradict the one before them" in caplog.text


@pytest.mark.parametrize(
    ("name", "number", "odd", "options"),
    [
        ("ner_resume/train.char.bmes.gz", 2500, 2, {"names": "BMES"}),
        ("ner_resume/dev.char.bmes", 462, 0, {"names": "BMES"}),
        ("ner_weibo/weiboNER_2nd_conll.train.gz", 1324, 10, {"names": "BIO", "word_places": True}),
        ("ner_weibo/weiboNER_2nd_conll.dev", 264, 0, {"names": "BIO", "word_places": True}),
    ],
)
def test_all_real_tags_come_back(
    name: str, number: int, odd: int, options: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, name).is_file():
        pytest.skip("needs real data: set KEXUE_DATA")
    records = list(read_tagged(Path(root, name), **options))
    assert len(records) == number
    assert (f"{odd} tags contradict" in caplog.text) == (odd > 0)
    write_tagged(records, tmp_path / "again", names=options["names"])
    assert list(read_tagged(tmp_path / "again", names=options["names"], strict_tags=True)) == records
    open_ = gzip.open if name.endswith("gz") else open
    with open_(Path(root, name), "rt", encoding="utf-8") as file:
        tags = [line.split()[-1] for line in file if line.strip()]
    again = [line.split(" ")[-1] for line in (tmp_path / "again").read_text(encoding="utf-8").splitlines() if line]
    if len(tags) == len(again):  # not where a token is more than a character
        assert sum(a != b for a, b in zip(tags, again, strict=True)) <= odd
