"""Files that are one JSON document: a wrong item in it is named by file and id, and none disappears silently."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from .files import not_utf8, require_file
from .rows import BadRows, OnBadRow, RowError

T = TypeVar("T")
Item = tuple[str, Any]
"""What an item of a document is called in messages, such as `question 'Q1'`, and its JSON; or the `RowError` in it."""


class Repetitive(dict[str, Any]):
    """An object in which keys are written more than once; it holds the last value of each."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repetitive(pairs)


def read_document(path: str | Path) -> Any:
    """Read a JSON file whole (UTF-8, with or without a byte-order mark; gzip is recognised).

    Raises:
        InputError: no such file, a broken gzip stream, or no JSON; the message names line and column.
    """
    path = require_file(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object_of_pairs)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the gzip stream breaks ({error}); fetch the file again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: {not_utf8(error)}") from error
    except json.JSONDecodeError as error:
        where = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise InputError(f"{path}:{error.lineno}: not a whole JSON document ({where}); fetch the file again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON document that can be read ({error})") from error


def read_items(
    path: str | Path,
    items: Callable[[Any], Iterable[Item]],
    parse: Callable[[Any], T],
    *,
    identity: Callable[[T], str],
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[T]:
    """Read the items of a document.

    Args:
        path: the file.
        items: takes the document apart, or raises `RowError` where it is no such document.
        parse: turns the JSON of one item into a record, or raises `RowError`.
        identity: gives the name of a record, which no second item may have.
        on_bad_row: "raise" stops at the first bad item, "skip" leaves it out and says so.
        bad_rows_file: see `read_rows`; items have a `name` there in place of a line.

    Yields:
        Records in the order of the file.

    Raises:
        InputError: see `read_document`; another kind of document, a bad item with `on_bad_row="raise"`, or not one
            usable item.
    """
    path = require_file(path)
    bad_rows = BadRows(path, on_bad_row, bad_rows_file)
    try:
        found = list(items(read_document(path)))
    except RowError as error:
        raise InputError(f"{path}: {error}") from error
    seen: set[str] = set()
    num_good = 0
    for name, row in found:
        try:
            if isinstance(row, RowError):
                raise row
            record = parse(row)
            if identity(record) in seen:
                raise RowError(f"the id {identity(record)!r} is taken already; give every question its own")
        except RowError as error:
            raw = json.dumps(row, ensure_ascii=False, default=str)
            bad_rows.reject(name, str(error), raw.encode("utf-8", errors="backslashreplace"))
            continue
        seen.add(identity(record))
        num_good += 1
        yield record
    bad_rows.summarise(len(found))
    if num_good == 0:
        reason = f"all {len(found)} were skipped; use on_bad_row=raise to see why" if found else "it holds none"
        raise InputError(f"{path}: no usable questions, {reason}")
