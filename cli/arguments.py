"""The words of `kexue test` and `kexue predict` that are not keys of the config."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import InputError


def take(args: list[str], names: Mapping[str, str | None]) -> tuple[dict[str, str], list[str]]:
    """Separate `name=value` words of the command from overrides of the config.

    Args:
        args: words of the command line.
        names: what the command knows, with defaults; None for a word that must be given.

    Returns:
        The values, and all other words.

    Raises:
        InputError: a needed word is missing.
    """
    values: dict[str, str] = {}
    others = []
    for word in args:
        name, equals, value = word.partition("=")
        if equals and name in names:
            values[name] = value
        else:
            others.append(word)
    for name, default in names.items():
        if not values.setdefault(name, default or ""):
            raise InputError(f"{name}={'FOLDER' if name == 'run' else 'FILE'} is missing; see --help")
    return values, others
