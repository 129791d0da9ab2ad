"""What ran in a block: its products, and which of them the values of every storage come from.

Source: V. Korthikanti et al. "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), for
keeping by operation.  Checked against: plain training, bit for bit, and FLOP counts
(tests/strategies/test_activation_checkpointing_policies.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..nn.flops import is_product

Key = tuple[str, int]
"""Name of an operation, and how many of that name ran before it in the block."""

# Operations that read no values: those that leave the filling to others, and those that fill.
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
ALLOCATE |= {"zeros", "zeros_like", "new_zeros"}
FILL = {"ones_like", "full_like", "new_full", "new_ones", "rand_like", "randn_like", "randint_like"}
# Operations whose values may decide shapes, what runs next, or which random numbers are drawn.
DECIDE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
NONE: frozenset[int] = frozenset()


class Traits(NamedTuple):
    """What an operation is, whatever it is given.

    Attributes:
        name: without its overload; with the namespace unless it is torch's own.
        is_product: it counts FLOPs.
        is_view: its result is what it was given, seen otherwise.
        is_in_place: it changes the values of its first argument and nothing else, as `add_` does.
        written: places and names of the arguments that it writes to.
        draws: random numbers.
        decides: its values may decide more than values; of an operation that is not torch's own, it is not known.
    """

    name: str
    is_product: bool
    is_view: bool
    is_in_place: bool
    written: tuple[tuple[int, str], ...]
    draws: bool
    decides: bool

    def is_marked(self, names: Set[str]) -> bool:
        """Whether it is followed on its own: it makes something new, and is a product or one of these names."""
        return not self.written and (self.is_product or self.name in names)

    def next_key(self, counts: Counter[str]) -> Key:
        """Its name and place, counted in `counts`."""
        counts[self.name] += 1
        return self.name, counts[self.name] - 1


@cache
def traits_of(function: Any) -> Traits | None:
    """The traits of an operation; None if it cannot be followed."""
    if not isinstance(function, torch._ops.OpOverload):
        return None
    schema, tags, own = function._schema, function.tags, function.namespace == "aten"
    name = function.overloadpacket.__name__
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    alone = [place for place, _ in written] == [0] and len(schema.returns) == 1
    draws = torch.Tag.nondeterministic_seeded in tags
    return Traits(
        name=name if own else f"{function.namespace}.{name}",
        is_product=is_product(function),
        is_view=not written and any(returned.alias_info is not None for returned in schema.returns),
        is_in_place=alone and torch.Tag.inplace_view not in tags and not draws,
        written=written,
        draws=draws,
        decides=function.namespace not in ("aten", "prims") or not DECIDE.isdisjoint(tags),
    )


class Operation(NamedTuple):
    """An operation that has run: what it is, its place, and what went in and came out."""

    function: Any
    key: Key
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass
class Product:
    """A product, or another operation whose result may be kept.

    Attributes:
        key: its name and place.
        needs: the products that its operands come from, by number.
        storages: of its result, with their bytes.
        changes: how often the result was changed in place before anything read it, as by a bias that is added; what
            comes of it is its result.
        spoiled: the result was changed in place after something had read it, so it cannot be kept.
    """

    key: Key
    needs: frozenset[int]
    storages: dict[int, int]
    changes: int = 0
    spoiled: bool = False


class Tape:
    """Follows the operations of a block while it runs forward.

    Args:
        block: whose parameters and buffers are no activations.
        marked: names of operations that are followed on their own, as products are.

    Attributes:
        products: in the order in which they ran; their place there is their number.
    """

    def __init__(self, block: nn.Module, marked: Set[str] = frozenset()) -> None:
        self.marked = marked
        self._divided = divided_tensors(block)
        self.products: list[Product] = []
        # For each storage, the products that its values depend on without another between.
        self._sources: dict[int, frozenset[int]] = {}
        self._saved: dict[int, int] = {}  # storages that autograd saves, with their bytes
        self._asked: set[int] = set()  # products whose values decide more than values
        self._opaque = False  # something ran that cannot be followed
        self._counts: Counter[str] = Counter()
        self._outside: set[int] = set()  # storages that were there before
        self._unfilled: set[int] = set()
        self._read: set[int] = set()
        self._seen: dict[int, StorageWeakRef] = {}  # holds the addresses, so that none is given to another storage

    def roots(self) -> frozenset[int]:
        """The products that the backward pass asks for directly: all of them, if some could not be followed."""
        if self._opaque:
            return frozenset(range(len(self.products)))
        return NONE.union(self._asked, *(self._sources.get(storage, NONE) for storage in self._saved))

    def kept(self) -> dict[int, int]:
        """Storages made by the block that autograd saves, with their bytes."""
        made = self._sources.keys() - self._outside
        return {storage: size for storage, size in self._saved.items() if storage in made}

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Operation | None:
        """Follow an operation that has run; returns it if it is the newest of `products`."""
        traits = traits_of(function)
        if traits is None:
            self._opaque = True
            return None
        if traits.is_view:
            return None
        made = self._storages((result,))
        if traits.name in ALLOCATE or traits.name in FILL:
            self._sources.update(dict.fromkeys(made, NONE))
            if traits.name in ALLOCATE:
                self._unfilled.update(made)
            return None
        read = self._storages((*args, *kwargs.values()))
        self._outside.update(storage for storage in read if storage not in self._sources)
        values = NONE.union(*(self._sources.get(storage, NONE) for storage in read))
        if traits.written:
            written = [args[i] if i < len(args) else kwargs.get(name) for i, name in traits.written]
            self._note_change(traits, self._storages(written), read.keys(), values)
            return None
        if not made or not made.keys() <= read.keys():  # not only another view
            self._note_reading(read)
        if traits.is_marked(self.marked):
            operation = Operation(function, traits.next_key(self._counts), args, kwargs, result)
            self._sources.update(dict.fromkeys(made, frozenset((len(self.products),))))
            self.products.append(Product(operation.key, values, made))
            return operation
        if function is torch.ops.aten.native_dropout.default:  # its mask takes only the shape
            output, mask = (self._storages((part,)) for part in result)
            self._sources.update(dict.fromkeys(output, values))
            self._sources.update(dict.fromkeys(mask, NONE))
            return None
        if not made or traits.decides:
            self._asked |= values
        for storage in made:
            self._sources[storage] = self._sources.get(storage, NONE) | values
        return None

    def note_saved(self, tensor: Tensor) -> None:
        """Follow that autograd saves a tensor."""
        storages = self._storages((tensor,))
        if self._are_gathered(self._sources.keys() & storages.keys()):
            return
        self._saved.update(storages)
        self._note_reading(storages)

    def _note_change(self, traits: Traits, changed: dict[int, int], read: Set[int], values: frozenset[int]) -> None:
        """Follow an operation that writes into what is there."""
        read = read - changed.keys()
        self._read |= read
        if not self._outside.isdisjoint(changed) or (traits.decides and read):  # the former, such as a buffer
            self._asked |= values
        unread = self._read.isdisjoint(changed) and traits.is_in_place
        for storage in changed:
            before = self._sources.get(storage, NONE)
            makers = [product for product in map(self.products.__getitem__, before) if storage in product.storages]
            if makers and unread and makers[0].storages.keys() == changed.keys():
                makers[0].changes += 1
                makers[0].needs |= values - before
            else:
                for product in makers:
                    product.spoiled = True
                self._sources[storage] = before | values
        self._unfilled -= changed.keys()

    def _note_reading(self, storages: dict[int, int]) -> None:
        self._read.update(storages)
        unfilled = self._unfilled.intersection(storages)
        if unfilled and not self._are_gathered(unfilled):
            self._opaque = True  # a kernel that was not seen has filled it

    def _are_gathered(self, allocated: Set[int]) -> bool:
        """Whether storages made within the block are parameters: ZeRO stage 3 gathers them there."""
        if not allocated or not self._divided:
            return False
        return allocated <= {address(tensor) for tensor in self._divided}

    def _storages(self, values: Any) -> dict[int, int]:
        """Storages of all tensors in nested lists, with their bytes."""
        found: dict[int, int] = {}
        for tensor in tensors_in(values):
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                self._opaque = True
                continue
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = StorageWeakRef(storage)
        return found


def divided_tensors(block: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a block of which ZeRO stage 3 has divided some; none where it has divided nothing."""
    found = list(block.parameters())
    return [*found, *block.buffers()] if any(hasattr(parameter, "ds_id") for parameter in found) else []


def needed(
    roots: Iterable[int], needs: Sequence[frozenset[int]], kept: Set[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """Which products run again, and which kept results are used.

    Args:
        roots: products asked for.
        needs: for each product, those that its operands come from.
        kept: products whose result would be there.
    """
    again: set[int] = set()
    used: set[int] = set()
    waiting = list(roots)
    while waiting:
        product = waiting.pop()
        if product in kept:
            used.add(product)
        elif product not in again:
            again.add(product)
            waiting.extend(needs[product])
    return frozenset(again), frozenset(used)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def address(tensor: Tensor) -> int:
    """Of a tensor's storage."""
    return tensor.untyped_storage()._cdata
