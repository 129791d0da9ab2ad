"""The files in which vocabularies come."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..files import read_text

VOCAB_FILE = "vocab.txt"
BPE_VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def read_lines(path: str | Path) -> list[str]:
    r"""Read the lines of a file; only `\n` and `\r\n` end one, since other line separators are tokens of vocabularies.

    Raises:
        InputError: no such file, or bytes that are not UTF-8.
    """
    lines = read_text(path).split("\n")
    if not lines[-1]:
        del lines[-1]
    return [line.removesuffix("\r") for line in lines]


def read_vocabulary(path: str | Path) -> list[str]:
    """Read one token a line.

    Raises:
        InputError: no such file, not UTF-8, an empty line.
    """
    vocabulary = read_lines(path)
    if "" in vocabulary:
        raise InputError(f"{path}:{vocabulary.index('') + 1}: an empty line; write one token a line")
    return vocabulary


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        InputError: no such file, not UTF-8, not a JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); take the file as it was published") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; take the file as it was published")
    return value


def in_order(ids: Mapping[str, Any], path: str | Path) -> list[str]:
    """Turn tokens with their ids into a list in the order of the ids.

    Raises:
        InputError: the ids are not 0, 1, 2 ...
    """
    tokens = {index: token for token, index in ids.items() if isinstance(index, int)}
    if tokens.keys() != set(range(len(ids))):
        raise InputError(f"{path}: the ids of the {len(ids)} tokens are not 0 to {len(ids) - 1}, each once")
    return [tokens[index] for index in range(len(ids))]


def read_scheme(path: str | Path, wanted: Mapping[str, tuple[Any, ...]]) -> tuple[list[str], dict[str, Any]]:
    """Read a `tokenizer.json`. Tokens added to its vocabulary are tokens like the others.

    Args:
        path: the file.
        wanted: the values that are understood for names such as "model.type", None where the name may be missing.

    Returns:
        The vocabulary in the order of its ids, and the whole content.

    Raises:
        InputError: the file is missing or broken, or a value is another one.
    """
    content = read_object(path)
    for name, values in wanted.items():
        part, key = name.split(".")
        given = (content.get(part) or {}).get(key)
        if given not in values:
            raise InputError(f"{path}: {name}={given!r}: only {values[0]!r} can be read")
    vocabulary = content["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise InputError(f"{path}: model.vocab is missing; take the file as it was published")
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    return in_order(vocabulary | added, path), content


def write_object(value: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
