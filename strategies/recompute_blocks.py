"""Which modules of a network are its blocks: by its own word, by class, or by name."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence

from torch import nn

from ..errors import InputError

Blocks = str | type[nn.Module]


def find_blocks(module: nn.Module, blocks: Blocks | Sequence[Blocks] | None = None) -> list[nn.Module]:
    """Find the repeated units of a module, each once, outermost only.

    Args:
        module: Any module.
        blocks: A class, a class name (`"BertLayer"`), a pattern of module names (`"encoder.layer.*"`), or several of
            these. None asks `module.blocks()`.

    Returns:
        The matching modules in the order of `named_modules`; a block inside another one is left to the outer.

    Raises:
        InputError: If nothing matches; the message lists the repeated classes of the module.
    """
    if blocks is None:
        if not callable(getattr(module, "blocks", None)):
            raise InputError(
                f"ActivationCheckpointing(blocks=None): {type(module).__name__} has no blocks(); name them, "
                f"such as ActivationCheckpointing(blocks={_suggestion(module)})."
            )
        return list(dict.fromkeys(module.blocks()))  # type: ignore[operator]
    wanted = [blocks] if isinstance(blocks, str | type) else list(blocks)
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for name, child in module.named_modules():
        if name and child not in inside and any(_matches(name, child, which) for which in wanted):
            found.append(child)
            inside.update(child.modules())
    if not found:
        raise InputError(
            f"ActivationCheckpointing(blocks={blocks!r}): nothing in {type(module).__name__} matches; "
            f"use a class, a class name or a pattern of module names, such as {_suggestion(module)}."
        )
    return found


def _matches(name: str, child: nn.Module, which: Blocks) -> bool:
    if isinstance(which, type):
        return isinstance(child, which)
    return type(child).__name__ == which or fnmatch.fnmatchcase(name, which)


def _suggestion(module: nn.Module) -> str:
    """Name the class most likely meant: the repeated one that holds the most parameters of its own kind."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for child in module.modules():
        if child is not module and any(True for _ in child.children()):
            counts[type(child).__name__] += 1
            sizes[type(child).__name__] += sum(p.numel() for p in child.parameters())
    repeated = [name for name, _ in sizes.most_common() if counts[name] > 1]
    return repr(repeated[0]) if repeated else '"net.layers.*"'
