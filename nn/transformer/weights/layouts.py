"""What a layout of published weights is: names, shapes and config fields, from which reading and writing follow."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..config import Head, TransformerConfig

Table = Mapping[str, str | tuple[str, ...]]
"""Module here to module there, or to several whose rows stand one after another here. `*` is the number of a block;
`{block}` is that number there, `{group}` and `{inner}` are it counted in groups."""


class Address(NamedTuple):
    """Where a parameter is in the published file.

    Attributes:
        names: one name, or those of the parts whose rows make up the parameter.
        transposed: the file has inputs by outputs (the Conv1D of GPT-2).
        head: the head that it belongs to; None in the body.
    """

    names: tuple[str, ...]
    transposed: bool
    head: Head | None


@dataclass(frozen=True)
class Layout:
    """Names, shapes and config fields of one kind of published model.

    Attributes:
        name: `model_type` in config.json.
        prefix: stands before the names of the body and the pooler where a model has other heads.
        body: embeddings and blocks.
        heads: tables of the heads that it can have.
        fields: field of `TransformerConfig` to field of config.json.
        defaults: what a field means that config.json leaves out.
        allowed: values of further fields that change the maths; the first is the default.
        fixed: values of `TransformerConfig` that the layout has; the first is the default.
        positive: counts that must not be 0.
        equal: pairs of widths that are the same.
        classes: class of transformers to the heads that it has.
        causal_classes: those that have another name where tokens see only what is before them.
        transposed: modules whose weights are stored transposed.
        twins: entries that repeat another one.
        computed: entries that follow from the config; None where the config has no such entry.
        buffers: patterns of entries without information.
    """

    name: str
    prefix: str
    body: Table
    heads: Mapping[Head, Mapping[str, str]]
    fields: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    equal: tuple[tuple[str, str], ...] = ()
    classes: Mapping[str, tuple[Head, ...]] = field(default_factory=dict)
    causal_classes: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    twins: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Callable[[TransformerConfig], Tensor | None]] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()

    def address(self, name: str, blocks: Sequence[int], group_size: int = 1) -> Address:
        """Where the parameter `name` is.

        Args:
            name: as in `named_parameters()`.
            blocks: the number of each block there.
            group_size: blocks of a group there.
        """
        module, _, leaf = name.rpartition(".")
        number = re.match(r"layers\.blocks\.(\d+)\.", module)
        block = blocks[int(number[1])] if number else 0
        module = re.sub(r"^layers\.blocks\.\d+", "layers.blocks.*", module)
        head: Head | None = next((head for head, table in self.heads.items() if module in table), None)
        theirs = self.body[module] if head is None else self.heads[head][module]
        numbers = {"block": block, "group": block // group_size, "inner": block % group_size}
        names = tuple(f"{n}.{leaf}".format(**numbers) for n in ((theirs,) if isinstance(theirs, str) else theirs))
        return Address(names, module in self.transposed and leaf == "weight", head)

    def head_of(self, name: str) -> Head | None:
        """The head that an entry of a file belongs to."""
        module = name.rpartition(".")[0]
        for head, table in self.heads.items():
            if module in table.values() or any(name.startswith(f"{start}.") for start in table.values()):
                return head
        return None

    def prefixed(self, name: str, head: Head | None) -> str:
        """The name of an entry in a model with heads."""
        return self.prefix + name if head in (None, "pooler") else name

    @property
    def first_parts(self) -> set[str]:
        """First parts of the names in the tables."""
        tables = (self.body, *self.heads.values())
        names = (name for table in tables for name in table.values())
        return {(name if isinstance(name, str) else name[0]).split(".")[0] for name in names}

    def class_for(self, config: TransformerConfig) -> str | None:
        """The class of transformers that holds most of the config's heads and fewest others, scores before vectors."""
        held = set(config.heads)

        def fit(name: str) -> tuple[int, int, bool]:
            heads = set(self.classes[name])
            return len(held & heads), -len(heads - held), "masked_lm" in held & heads

        best = max(self.classes, key=fit, default=None)
        return self.causal_classes.get(best, best) if best and config.mask == "causal" else best
