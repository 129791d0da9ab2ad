"""Whether the weights of a folder are those of a Transformer, and one message about all that is not."""

import difflib
import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ....errors import InputError
from ..config import TransformerConfig
from .files import Weights
from .layouts import Layout

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check(
    folder: Path,
    layout: Layout,
    weights: Weights,
    entries: Mapping[str, str],
    wanted: Mapping[str, tuple[int, ...]],
    config: TransformerConfig,
) -> None:
    """Compare the entries of the files with what is wanted.

    Args:
        folder: for the message.
        layout: of the files.
        weights: their tensors.
        entries: name in the layout's tables to name in the files.
        wanted: name in the layout's tables to shape.
        config: of the Transformer.

    Raises:
        InputError: something is missing, has no place, another shape, or another value than it must have.
    """
    computed = {name: tensor for name, make in layout.computed.items() if (tensor := make(config)) is not None}
    expected = {**{name: tuple(tensor.shape) for name, tensor in computed.items()}, **wanted}
    missing = {name: shape for name, shape in wanted.items() if name not in entries}
    unused, reshaped, untrue = {}, {}, {}
    for name, there in entries.items():
        shape = weights.shape(there)
        if name in expected:
            if shape != expected[name]:
                reshaped[there] = f"{shape} there, {expected[name]} here"
            elif name in computed and not torch.allclose(weights[there].float(), computed[name], rtol=0, atol=1e-4):
                untrue[there] = "differs from what the config gives"
        elif layout.head_of(name) not in (None, *config.heads):
            continue  # of a head that is not built
        elif name in layout.twins:
            original = entries[layout.twins[name]]
            if not torch.equal(weights[there], weights[original]):
                untrue[there] = f"differs from {original}, to which it is tied"
        elif not any(fnmatchcase(name, pattern) for pattern in layout.buffers):
            unused[there] = shape
    if not (missing or unused or reshaped or untrue):
        return
    sentences = []
    if missing:
        there = [name for name, _ in fold(unused)]
        near = {name: difflib.get_close_matches(name, there, n=1) for name, _ in fold(missing)}
        hints = {name: f" (there: {found[0]})" if found else "" for name, found in near.items()}
        sentences.append(f"missing: {', '.join(f'{name} {shape}{hints[name]}' for name, shape in fold(missing))}")
    for title, found in (("without a place", unused), ("of another shape", reshaped), ("wrong", untrue)):
        if found:
            sentences.append(f"{title}: {', '.join(f'{name} {what}' for name, what in fold(found))}")
    if foreign := sorted({pattern for name in unused if (pattern := _of_another_task(name, layout))}):
        sentences.append(f"to leave out what is of another task, add ignore=({', '.join(map(repr, foreign))},)")
    raise InputError(f"{folder} does not hold the weights of this {layout.name!r} Transformer; {'; '.join(sentences)}")


def _of_another_task(name: str, layout: Layout) -> str | None:
    """A pattern for a name that starts like none of the layout's."""
    rest = name.removeprefix(layout.prefix)
    first = rest.split(".")[0]
    return None if first in layout.first_parts else f"{name.removesuffix(rest)}{first}.*"


def fold(entries: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names with what is said of them, those that differ only in numbers as one: "h.0-11.ln_1.weight"."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for name, said in entries.items():
        groups.setdefault((_NUMBER.sub("*", name), said), []).append(name)
    folded = []
    for (_, said), names in groups.items():
        columns = [sorted(set(column)) for column in zip(*map(_numbers, names), strict=True)]
        if len(names) == math.prod(map(len, columns)):
            ranges = map(_range, columns)
            names = [_NUMBER.sub(lambda _, ranges=ranges: next(ranges), names[0])]
        folded += [(name, said) for name in names]
    return folded


def _numbers(name: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(name)]


def _range(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
