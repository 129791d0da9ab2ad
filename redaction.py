"""Secrets: which names and values of a config or an environment are such, and how they stay out of what is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "(hidden)"
"""What stands in place of a secret."""

_IN_ENVIRONMENT = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_ALWAYS = re.compile(
    r"(secret|password|passwd|credentials?|(api|access|private|auth|wandb|hub|hf)_?(key|token))s?$|^token$",
    re.IGNORECASE,
)
_BY_VALUE = re.compile(r"(key|token)s?$", re.IGNORECASE)
_MARK = re.compile(r"\[.*\]|<.*>")  # "[PAD]" and "</s>": tokens of a text
_SHORTEST_VALUE = 8  # shorter values of the environment are words such as "true", which stand everywhere
_SHORTEST_KEY = 16


def is_secret(name: str, value: object) -> bool:
    """Tell whether an entry of a config is a secret, by its name, and where the name says little by its value.

    `api_key` and `password` always are; a `sort_key` or a `pad_token` is only if it looks like a generated key.
    """
    if not isinstance(value, str) or not value or value == HIDDEN or _MARK.fullmatch(value):
        return False
    if _ALWAYS.search(name):
        return True
    if _BY_VALUE.search(name) and len(value) >= _SHORTEST_KEY and not re.search(r"[\s/.]", value):
        return True
    return any(secret in value for secret in environment_secrets())


def is_secret_variable(name: str) -> bool:
    """Tell whether an environment variable of this name holds a secret."""
    return bool(_IN_ENVIRONMENT.search(name))


def environment_secrets() -> list[str]:
    """Values of environment variables that are named like secrets, the longest first; paths are none."""
    values = {value for name, value in os.environ.items() if is_secret_variable(name)}
    return sorted((v for v in values if len(v) >= _SHORTEST_VALUE and not v.startswith("/")), key=len, reverse=True)


def hide(text: str) -> str:
    """Replace every secret of the environment in a text."""
    for secret in environment_secrets():
        text = text.replace(secret, HIDDEN)
    return text


def secrets_in(node: object, key: str = "") -> Iterator[str]:
    """Dotted keys of nested dicts and lists whose values are secrets."""
    for name, child in _children(node):
        dotted = f"{key}.{name}" if key else name
        if is_secret(name, child):
            yield dotted
        yield from secrets_in(child, dotted)


def without_secrets(node: Any) -> Any:
    """Return nested dicts and lists with each secret replaced; nothing is changed in place."""
    if isinstance(node, Mapping):
        return {k: HIDDEN if is_secret(str(k), v) else without_secrets(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [HIDDEN if is_secret("", child) else without_secrets(child) for child in node]
    return node


def _children(node: object) -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        yield from ((str(name), child) for name, child in node.items())
    elif isinstance(node, list | tuple):
        yield from ((str(index), child) for index, child in enumerate(node))
