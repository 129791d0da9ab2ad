"""Files read whole and written whole, with errors that name them and say what to do."""

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import InputError


def write_rows(rows: Iterable[dict[str, Any]], path: str | Path) -> int:
    """Write one JSON object a line, whole or not at all; see `write_lines`."""
    return write_lines((json.dumps(row, ensure_ascii=False) for row in rows), path)


def write_lines(lines: Iterable[str], path: str | Path) -> int:
    """Write lines, whole or not at all: beside the file first, then moved into its place.

    Returns:
        The number of lines written.

    Raises:
        InputError: the place cannot be written to.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file that can be replaced; give the name of a file to write")
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    num_lines = 0
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("w", encoding="utf-8", newline="\n") as file:
                for line in lines:
                    file.write(line + "\n")
                    num_lines += 1
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return num_lines


def read_text(path: str | Path) -> str:
    """Read a small text file whole (UTF-8, byte-order mark dropped, newlines kept as they are).

    Raises:
        InputError: no such file, or bytes that are not UTF-8.
    """
    path = require_file(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: {not_utf8(error)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def require_file(path: str | Path) -> Path:
    """Return the path of an existing file, or say what is there instead.

    Raises:
        InputError: a folder, or nothing (then with the names next to it that look alike).
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give a file in it, for example {_some_names(path)}")
    if path.exists():
        return path
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    names = sorted(entry.name for entry in missing.parent.iterdir()) if os.access(missing.parent, os.R_OK) else []
    alike = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.5)
    what = "no such file" if missing == path else f"there is no {missing}"
    hint = f"did you mean {' or '.join(alike)}?" if alike else f"{missing.parent} holds {_some_names(missing.parent)}"
    raise InputError(f"{path}: {what}; {hint}")


def not_utf8(error: UnicodeDecodeError) -> str:
    """Say where bytes are not UTF-8."""
    byte = error.object[error.start]
    column = error.start - (error.object.rfind(b"\n", 0, error.start) + 1)
    return f"not UTF-8 (byte 0x{byte:02x} at byte {column + 1} of the line); save the file as UTF-8"


def _some_names(folder: Path, limit: int = 5) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return "nothing that can be listed"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "nothing"


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error inside the block into a line that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another place or make room there"
        ) from error
