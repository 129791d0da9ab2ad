"""Files of JSON or other lines, or of tagged tokens: a wrong row is named by file and line, none is lost silently."""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from ..errors import InputError
from .files import explain_write_errors, not_utf8, require_file

log = logging.getLogger(__name__)

T = TypeVar("T")
OnBadRow = Literal["raise", "skip"]
MAX_ROW_BYTES = 16 * 2**20
"""A line beyond this is a whole document on one line, not a row; it is passed over without being held in memory."""
MAX_RAW_CHARACTERS = 2000
"""How much of a skipped row is kept in the list of bad rows."""
_JSON_NAMES = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


class RowError(ValueError):
    """What is wrong with one row and what to do about it; the reader adds file and line.

    Args:
        reason: one line.
        offset: in a row of several lines, lines from its first to the wrong one.
    """

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.offset = offset


def read_rows(
    path: str | Path,
    parse: Callable[[dict[str, Any]], T],
    *,
    identity: Callable[[T], str] | None = None,
    number_key: str | None = None,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[T]:
    """Stream a file with one JSON object a line (UTF-8, with or without a byte-order mark; gzip is recognised).

    Args:
        path: the file.
        parse: turns one object into a record, or raises `RowError`.
        identity: gives the name (id, type) of a record, which no second row may have.
        number_key: a key under which rows that lack it get their number, from 0 and with bad rows counted.
        on_bad_row: "raise" stops at the first bad row; "skip" leaves it out and says so.
        bad_rows_file: with "skip", the file to which bad rows are added, as JSON lines of `file`, `line`, `reason` and
            `row`. A row that stands there already (a resumed run reads its data again) is not added twice.

    Yields:
        Records in the order of the file.

    Raises:
        InputError: no such file, a bad row with `on_bad_row="raise"`, a broken gzip stream, or not one usable row.
    """

    def parse_line(number: int, raw: bytes) -> T:
        row = _object(raw)
        return parse(row if number_key is None else {number_key: number, **row})

    return _records(path, _lines, parse_line, "one JSON object a line", identity, on_bad_row, bad_rows_file)


def read_blocks(
    path: str | Path,
    parse: Callable[[int, list[str]], T],
    *,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[T]:
    """Stream a file of blocks of lines with empty lines between them, as tagged corpora have it; as `read_rows` does.

    Args:
        path: the file.
        parse: turns number (from 0, bad ones counted) and lines of a block into a record, or raises `RowError`.
        on_bad_row: "raise" or "skip", a block being a row.
        bad_rows_file: see `read_rows`; the line is the wrong one where the error says it, else the block's first.

    Yields:
        Records in the order of the file.

    Raises:
        InputError: see `read_rows`.
    """

    def parse_block(number: int, raw: bytes) -> T:
        lines = raw.split(b"\n")
        if sum(map(len, lines)) > MAX_ROW_BYTES:
            raise RowError(f"the sentence is longer than {MAX_ROW_BYTES // 2**20} MiB; put an empty line between two")
        texts = []
        for offset, line in enumerate(lines):
            try:
                texts.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RowError(not_utf8(error), offset) from error
        return parse(number, texts)

    return _records(path, _blocks, parse_block, "a token and its tag a line", None, on_bad_row, bad_rows_file)


def read_lines(
    path: str | Path,
    parse: Callable[[int, str], T],
    *,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[T]:
    """Stream a file of one row a line in a format of its own, as `read_rows` does.

    Args:
        path: the file.
        parse: turns number (from 0, bad ones counted) and text of a line into a record, or raises `RowError`.
        on_bad_row: "raise" or "skip".
        bad_rows_file: see `read_rows`.

    Yields:
        Records in the order of the file.

    Raises:
        InputError: see `read_rows`.
    """

    def parse_line(number: int, raw: bytes) -> T:
        if len(raw) > MAX_ROW_BYTES:
            raise RowError(f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB; write one row a line")
        try:
            return parse(number, raw.rstrip(b"\r\n").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(not_utf8(error)) from error

    return _records(path, _lines, parse_line, "one row a line", None, on_bad_row, bad_rows_file)


def _records(
    path: str | Path,
    rows_of: Callable[[Path], Iterator[tuple[int, bytes]]],
    parse: Callable[[int, bytes], T],
    format_: str,
    identity: Callable[[T], str] | None,
    on_bad_row: OnBadRow,
    bad_rows_file: str | Path | None,
) -> Iterator[T]:
    path = require_file(path)
    bad_rows = BadRows(path, on_bad_row, bad_rows_file)
    first_line: dict[str, int] = {}
    num_rows = num_good = 0
    for line, raw in rows_of(path):
        num_rows += 1
        try:
            record = parse(num_rows - 1, raw)
            if identity is not None:
                name = identity(record)
                if (earlier := first_line.setdefault(name, line)) != line:
                    raise RowError(f"{name!r} stands in line {earlier} already; give every row its own")
        except RowError as error:
            bad_rows.reject(line + error.offset, str(error), raw)
            continue
        num_good += 1
        yield record
    if num_rows == 0:
        raise InputError(f"{path}: no rows, the file is empty; write {format_}")
    bad_rows.summarise(num_rows)
    if num_good == 0:
        raise InputError(f"{path}: no usable rows, all {num_rows} were skipped; use on_bad_row=raise to see why")


def value_of(row: dict[str, Any], key: str, kind: type) -> Any:
    """Return `row[key]` if it is of exactly this type (true is no number); a string is neither empty nor broken.

    Raises:
        RowError: it is not.
    """
    if key not in row:
        raise RowError(f"key {key!r} is missing; give {_JSON_NAMES[kind]}")
    value = row[key]
    if type(value) is not kind:
        raise RowError(f"{key!r} is {value!r:.60}; give {_JSON_NAMES[kind]}")
    if kind is str:
        if not value:
            raise RowError(f"{key!r} is empty; give some text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise RowError(f"{key!r} holds half of a surrogate pair; write the character whole")
    return value


def object_of(value: Any, where: str) -> dict[str, Any]:
    """Return an entry of the list `where` if it is an object.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, dict):
        raise RowError(f"an entry of {where!r} is {value!r:.60}; give an object")
    return value


def list_bad_rows(listing: str | Path, file: str | Path | None) -> None:
    """Say of rows that were skipped when something was made of a file, and add them, each once, to another list.

    Args:
        listing: what `read_rows` wrote at that time.
        file: the list of this run; None: only say so.
    """
    entries = Path(listing).read_text(encoding="utf-8").splitlines()
    log.warning("%s: %d bad rows were skipped when this was made, reasons in it", listing, len(entries))
    if file is None:
        return
    file = Path(file)
    with explain_write_errors(file):
        known = set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as target:
            target.writelines(f"{entry}\n" for entry in entries if entry not in known)


class BadRows:
    """Raises at a bad row, or files it and counts it.

    Args:
        source: the file that is read.
        on_bad_row: "raise" or "skip".
        file: where skipped rows are listed; None logs them.

    Raises:
        InputError: another value of `on_bad_row`.
    """

    def __init__(self, source: Path, on_bad_row: OnBadRow, file: str | Path | None) -> None:
        if on_bad_row not in ("raise", "skip"):
            raise InputError(f"on_bad_row={on_bad_row!r}: use raise or skip")
        self.source = source
        self.on_bad_row = on_bad_row
        self.file = Path(file) if file is not None else None
        self.num_skipped = 0
        self._filed: set[tuple[str, int | str]] | None = None

    def reject(self, place: int | str, reason: str, raw: bytes) -> None:
        """Say of a row, by its line or (in a file that is one document) by its name, why it cannot be used."""
        where = f"{self.source}:{place}" if isinstance(place, int) else f"{self.source}: {place}"
        if self.on_bad_row == "raise":
            raise InputError(f"{where}: {reason}")
        self.num_skipped += 1
        if self.file is None:
            log.warning("%s skipped: %s", where, reason)
            return
        if self._filed is None:
            self._filed = self._already_filed(self.file)
        if (str(self.source), place) in self._filed:
            return
        row = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
        if len(row) > MAX_RAW_CHARACTERS:
            row = f"{row[:MAX_RAW_CHARACTERS]}... ({len(row)} characters)"
        key = "line" if isinstance(place, int) else "name"
        entry = {"file": str(self.source), key: place, "reason": reason, "row": row}
        with explain_write_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def summarise(self, num_rows: int) -> None:
        """Say once how many rows were skipped."""
        if self.num_skipped:
            where = f", reasons in {self.file}" if self.file is not None else ""
            log.warning("%s: skipped %d of %d rows%s", self.source, self.num_skipped, num_rows, where)

    @staticmethod
    def _already_filed(file: Path) -> set[tuple[str, int | str]]:
        filed = set()
        if file.is_file():
            for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
                    entry = json.loads(text)
                    filed.add((entry["file"], entry["line"] if "line" in entry else entry["name"]))
        return filed


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, bytes) of the lines that are not blank."""
    return ((line, raw) for line, raw in _all_lines(path) if raw.strip())


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, lines without the last line break) of runs of lines that are not empty.

    Of a block beyond the size of a row, only so much is held as shows that it is too long.
    """
    first, block, size = 0, [], 0
    for line, raw in _all_lines(path):
        raw = raw.rstrip(b"\r\n")
        if raw.strip():
            first, size = (first if block else line), size + len(raw)
            if size - len(raw) <= MAX_ROW_BYTES:
                block.append(raw)
        elif block:
            yield first, b"\n".join(block)
            block, size = [], 0
    if block:
        yield first, b"\n".join(block)


def _all_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    line = 0
    try:
        with path.open("rb") as plain:
            compressed = plain.peek(2)[:2] == b"\x1f\x8b"
            file: BinaryIO = gzip.GzipFile(fileobj=plain) if compressed else plain  # type: ignore[assignment]
            while raw := file.readline(MAX_ROW_BYTES + 1):
                line += 1
                rest = raw
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_ROW_BYTES + 1)
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield line, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{line + 1}: the gzip stream breaks here ({error}); fetch the file again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error


def _object(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_ROW_BYTES:
        raise RowError(f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB; write one JSON object a line")
    try:
        content = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(not_utf8(error)) from error
    except json.JSONDecodeError as error:
        where = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise RowError(f"not a whole JSON object ({where}); write one JSON object a line") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"not a JSON object that can be read ({error}); write one JSON object a line") from error
    if not isinstance(content, dict):
        raise RowError(f"a JSON {type(content).__name__} and not an object; write one JSON object a line")
    return content
