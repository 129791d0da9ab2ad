"""Every kind of file a person may give by mistake is named, with its line, in one line."""

import errno
import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from kexue.data import rows
from kexue.data.files import read_text, write_rows
from kexue.data.rows import RowError, read_rows
from kexue.errors import InputError

GOOD = b'{"id": "a"}\n'


def name_of(row: dict) -> str:
    if not isinstance(row.get("id"), str):
        raise RowError("key 'id' is missing")
    return row["id"]


def read(path: Path, **options) -> list[str]:
    return list(read_rows(path, name_of, identity=lambda name: name, **options))


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (GOOD + b'{"id": "b", "te', 2, ["not a whole JSON object", "one JSON object a line"]),
        (GOOD + b'{"id": "b"} {"id": "c"}\n', 2, ["Extra data at column 13"]),
        (GOOD + b"\n" + '{"id": "é"}\n'.encode("latin-1"), 3, ["not UTF-8 (byte 0xe9 at byte 9", "save"]),
        ('{"id": "a"}\n'.encode("utf-16"), 1, ["not UTF-8 (byte 0xff"]),
        (b"[\n" + GOOD, 1, ["not a whole JSON object"]),
        (b'["a"]\n', 1, ["a JSON list and not an object"]),
        (b"[" * 100_000 + b"\n", 1, ["one JSON object a line"]),
        (b'{"id": ' + b"1" * 5000 + b"}\n", 1, ["one JSON object a line"]),
        (GOOD + b"{}\n", 2, ["key 'id' is missing"]),
        (GOOD + b"\n\n" + GOOD, 4, ["'a' stands in line 1 already"]),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, content: bytes, line: int, words: list[str]) -> None:
    path, listing = tmp_path / "rows.json", tmp_path / "run" / "bad_rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: ")
    assert "\n" not in message
    assert all(word in message for word in words)

    path.write_bytes(content + b'\n{"id": "last"}\n')
    assert read(path, on_bad_row="skip", bad_rows_file=listing)[-1] == "last"
    entries = [json.loads(text) for text in listing.read_text(encoding="utf-8").splitlines()]
    assert (entries[0]["file"], entries[0]["line"]) == (str(path), line)
    assert entries[0]["reason"] in message
    assert len(entries[0]["row"]) < 2100


def test_skipped_rows_are_summed_up_once_and_not_listed_twice(tmp_path: Path, caplog) -> None:
    path, listing = tmp_path / "rows.json", tmp_path / "bad_rows.jsonl"
    path.write_bytes(GOOD + b"{}\n{}\n" + b'{"id": "b"}\n{"x": "' + b"y" * 9000 + b'"}\n')
    listing.write_text('{"file": "cut', encoding="utf-8")
    listing.write_text("", encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="kexue"):
        assert read(path, on_bad_row="skip", bad_rows_file=listing) == ["a", "b"]
    assert [r.getMessage() for r in caplog.records] == [f"{path}: skipped 3 of 5 rows, reasons in {listing}"]
    assert read(path, on_bad_row="skip", bad_rows_file=listing) == ["a", "b"]
    entries = [json.loads(text) for text in listing.read_text(encoding="utf-8").splitlines()]
    assert [entry["line"] for entry in entries] == [2, 3, 5]
    assert entries[2]["row"].endswith("... (9009 characters)")


def test_without_a_listing_each_skipped_row_is_logged(tmp_path: Path, caplog) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(GOOD + b"{}\n")
    with caplog.at_level(logging.WARNING, logger="kexue"):
        assert read(path, on_bad_row="skip") == ["a"]
    assert f"{path}:2 skipped: key 'id' is missing" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"")])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.json: no rows, the file is empty"):
        read(path)


def test_nothing_but_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"{}\n{}\n")
    with pytest.raises(InputError, match="no usable rows, all 2 were skipped"):
        read(path, on_bad_row="skip")


def test_missing_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "duee_train.json").write_bytes(GOOD)
    with pytest.raises(InputError, match=r"duee_trian\.json: no such file; did you mean duee_train\.json\?"):
        read(tmp_path / "duee_trian.json")
    with pytest.raises(InputError, match=r"there is no .*/none; .* holds duee_train\.json"):
        read(tmp_path / "none" / "x.json")
    with pytest.raises(InputError, match=r"is a directory; give a file in it, for example duee_train\.json"):
        read(tmp_path)
    with pytest.raises(InputError, match="on_bad_row='ignore': use raise or skip"):
        read(tmp_path / "duee_train.json", on_bad_row="ignore")


def test_gzip_and_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    text = b"\xef\xbb\xbf" + GOOD + b'{"id": "b"}\r\n{"id": "c"}'
    for content in (text, gzip.compress(text)):
        path.write_bytes(content)
        assert read(path) == ["a", "b", "c"]
    path.write_bytes(gzip.compress(b'{"id": "a"}\n' + b" \n" * 9999)[:-20])
    with pytest.raises(InputError, match="the gzip stream breaks here"):
        read(path, on_bad_row="skip")


def test_an_endless_line_is_passed_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 2**20)
    path = tmp_path / "rows.json"
    path.write_bytes(GOOD + b'{"id": "' + b"x" * (3 * 2**20) + b'"}\n{"id": "b"}\n')
    with pytest.raises(InputError, match=":2: the line is longer than 1 MiB"):
        read(path)
    assert read(path, on_bad_row="skip") == ["a", "b"]


def test_reading_is_streaming(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(GOOD + b"broken\n")
    assert next(iter(read_rows(path, name_of))) == "a"


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "new" / "out.json"
    assert write_rows([{"id": "é"}, {"id": "中"}], path) == 2
    assert path.read_text(encoding="utf-8") == '{"id": "é"}\n{"id": "中"}\n'

    def broken_off():
        yield {"id": "other"}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_rows(broken_off(), path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"out\.json: cannot be written \(No space left on device\)"):
        write_rows([{"id": "other"}], path)
    assert [entry.name for entry in path.parent.iterdir()] == ["out.json"]
    assert "中" in path.read_text(encoding="utf-8")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        write_rows([{}], tmp_path / "file" / "out.json")
    with pytest.raises(InputError, match="is not a file that can be replaced"):
        write_rows([{}], tmp_path)


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path) == "a\r\nb"
    path.write_bytes("a\nbé\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"vocab\.txt:2: not UTF-8 \(byte 0xe9 at byte 2 of the line\)"):
        read_text(path)
