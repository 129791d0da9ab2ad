"""A region of recomputation, operation by operation: results that are kept, and products that nobody asks for again.

While a block runs forward, `Region` follows which product each storage comes from. When the block is done it knows what
the backward pass will ask for: the tensors that autograd saves, and what draws random numbers or decides what runs.
Results to keep that are asked for are kept; a product that is not asked for is left out of the second run, where
not-a-numbers stand in for its result. Its random numbers are passed over in both cases, so that those after it are
drawn as before.

Source: T. Chen et al. "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); V. Korthikanti et al.
"Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), for keeping by operation.  Checked
against: plain training, bit for bit (tests/strategies/test_activation_checkpointing_policies.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..nn.flops import flops_of, is_product

Key = tuple[str, int]
"""Name of an operation, and how many of that name ran before it in the region."""

Keep = Callable[["Operation"], bool]

ALLOCATED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "zeros",
    "zeros_like",
    "new_zeros",
}
SHAPED = {"ones_like", "full_like", "new_full", "new_ones", "rand_like", "randn_like", "randint_like"}
"""Operations that read no values: those that leave the filling to others, and those that fill."""
CHANGING = {torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded}
DECIDING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


class Operation(NamedTuple):
    """An operation that has run: what it is, its place, and what went in and came out."""

    function: Any
    key: Key
    args: tuple[Any, ...]
    result: Any


@dataclass
class Product:
    """A product, or another operation whose result may be kept.

    Attributes:
        key: its name and place.
        needs: the products that its operands come from, by number.
        storages: of its result, with their bytes.
        flops: counted where the region measures.
        changes: how often the result was changed in place before anything read it, as by a bias that is added; kept
            is what comes of it.
    """

    key: Key
    needs: frozenset[int]
    storages: dict[int, int]
    flops: int = 0
    changes: int = 0


@dataclass
class Tape:
    """What ran in a region: its products, and what each storage comes from.

    Attributes:
        products: in the order in which they ran.
        sources: for each storage, the products that its values depend on without another product between.
        asked: products whose values decide more than values: which random numbers are drawn, what runs, what is sent.
        saved: storages that autograd saves, with their bytes; without parameters where the region measures.
        spoiled: products whose result was changed in place after something had read it.
        opaque: something ran that cannot be followed, so every product counts as asked for.
    """

    products: list[Product] = field(default_factory=list)
    sources: dict[int, frozenset[int]] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    saved: dict[int, int] = field(default_factory=dict)
    spoiled: set[int] = field(default_factory=set)
    opaque: bool = False

    def roots(self) -> frozenset[int]:
        """The products that the backward pass asks for directly."""
        if self.opaque:
            return frozenset(range(len(self.products)))
        return frozenset(self.asked).union(*(self.sources.get(storage, NONE) for storage in self.saved))


NONE: frozenset[int] = frozenset()


def needed(roots: frozenset[int], needs: list[frozenset[int]], kept: frozenset[int]) -> tuple[set[int], set[int]]:
    """Which products run again and which kept results are used.

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
    return again, used


class Region:
    """One run of a block, to be run again in its backward pass.

    Args:
        block: whose parameters and buffers are no activations.
        keep: says of an operation whether its result is to be kept.
        marked: names of operations besides products that `keep` is asked about.
        measure: count FLOPs of the products.

    Attributes:
        tape: what ran, complete once `finish` was called.
    """

    def __init__(
        self,
        block: nn.Module,
        keep: Keep,
        marked: frozenset[str] = frozenset(),
        measure: bool = False,
    ) -> None:
        self.block, self.keep, self.marked, self.measure = block, keep, marked, measure
        self.tape = Tape()
        self.numbers: dict[Key, int] = {}
        self.results: dict[int, _Result] = {}
        self._seen: dict[int, StorageWeakRef] = {}  # holds the addresses, so that none is given to another storage
        self._outside: set[int] = set()
        self._unfilled: set[int] = set()
        self._read: set[int] = set()
        self._counts: Counter[str] = Counter()

    def contexts(
        self, again: AbstractContextManager
    ) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
        """What `torch.utils.checkpoint.checkpoint(context_fn=...)` takes.

        Args:
            again: entered around each second run, of which there may be several.
        """
        return lambda: (_Recorder(self), _Replayer(self, again))

    def finish(self) -> None:
        """Decide what is kept and what is left out, once the block has run."""
        tape = self.tape
        kept = frozenset(number for number, result in self.results.items() if result.tensors is not None)
        again, used = needed(tape.roots(), [product.needs for product in tape.products], kept - tape.spoiled)
        for number in again:
            del self.results[number]
        for number in used:
            result = self.results[number]
            result.changes = tape.products[number].changes
            # Saved as autograd saves: its hooks see them, and it notices if one is changed before it is used.
            tensors = [tensor.detach() for tensor in result.tensors or ()]
            result.saved = _Saved.apply(torch.empty(0, requires_grad=True), *tensors).grad_fn  # type: ignore[union-attr]
        for result in self.results.values():
            result.tensors = None
        if not self.measure:
            self.tape = Tape()
            self._seen.clear()

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, before: Any) -> None:
        """Follow an operation that has run."""
        if not isinstance(function, torch._ops.OpOverload):
            self.tape.opaque = True
            return
        name, sources = _name(function), self.tape.sources
        written = self._storages((result,))
        if name in ALLOCATED or name in SHAPED:
            sources.update(dict.fromkeys(written, NONE))
            if name in ALLOCATED:
                self._unfilled.update(written)
            return
        read = self._storages((*args, *kwargs.values()))
        self._outside.update(storage for storage in read if storage not in sources)
        values = NONE.union(*(sources.get(storage, NONE) for storage in read))
        if function._schema.is_mutable:
            changed = self._storages(_changed(function, args, kwargs))
            self._note_change(function, changed, read.keys() - changed.keys(), values)
            return
        if not written or not written.keys() <= read.keys():  # not only another view
            self._read.update(read)
            self._check_filled(read)
        if self.is_marked(function):
            self._note_product(Operation(function, self._next_key(name), args, result), values, written, kwargs, before)
            return
        if function is torch.ops.aten.native_dropout.default:  # its mask takes only the shape
            output, mask = (self._storages((part,)) for part in result)
            sources.update(dict.fromkeys(output, values))
            sources.update(dict.fromkeys(mask, NONE))
            return
        if not written or _decides(function):
            self.tape.asked |= values
        for storage in written:
            sources[storage] = sources.get(storage, NONE) | values

    def is_marked(self, function: Any) -> bool:
        """Whether an operation is followed on its own: a product, or one that the policy names."""
        if not isinstance(function, torch._ops.OpOverload) or function._schema.is_mutable:
            return False
        return is_product(function) or _name(function) in self.marked

    def pack(self, tensor: Tensor) -> None:
        """Note a tensor that autograd saves."""
        storage = self._storages((tensor,))
        if not self.measure or not storage.keys() <= self._own():
            self.tape.saved.update(storage)
            self._read.update(storage)
            self._check_filled(storage)

    def replay(self, number: int) -> tuple[Any, int]:
        """The result of a product in a second run.

        Returns:
            The result, kept or made up, or `NotImplemented` if the product has to run; and how often it is going to be
            changed in place, which has happened to a kept one.
        """
        result = self.results.get(number)
        if result is None:
            return NotImplemented, 0
        if result.random is not None:
            result.random.restore()
        if result.saved is None:
            return tree_unflatten([_blank(leaf) for leaf in result.leaves], result.spec), 0
        tensors = iter(result.saved.saved_tensors)
        leaves = [next(tensors) if isinstance(leaf, _Form) else leaf for leaf in result.leaves]
        return tree_unflatten(leaves, result.spec), result.changes

    def _note_change(self, function: Any, changed: dict[int, int], read: Set[int], values: frozenset[int]) -> None:
        """Follow an operation that writes into what is there."""
        tape = self.tape
        self._read |= read
        outside = not self._outside.isdisjoint(changed)  # such as a buffer
        if outside or (_decides(function) and read):
            tape.asked |= values
        unread = self._read.isdisjoint(changed) and _is_in_place(function)
        for storage in changed:
            before = tape.sources.get(storage, NONE)
            makers = [number for number in before if storage in tape.products[number].storages]
            if makers and unread and tape.products[makers[0]].storages.keys() == changed.keys():
                product = tape.products[makers[0]]
                product.changes += 1
                product.needs |= values - before
            else:
                tape.spoiled.update(makers)
                tape.sources[storage] = before | values
        self._unfilled -= changed.keys()

    def _note_product(
        self,
        operation: Operation,
        needs: frozenset[int],
        storages: dict[int, int],
        kwargs: dict[str, Any],
        before: _Random | None,
    ) -> None:
        number = len(self.tape.products)
        self.numbers[operation.key] = number
        counted = self.measure and is_product(operation.function)
        flops = flops_of(operation.function, operation.args, kwargs, operation.result) if counted else 0
        self.tape.products.append(Product(operation.key, needs, storages, flops))
        self.tape.sources.update(dict.fromkeys(storages, frozenset((number,))))
        leaves, spec = tree_flatten(operation.result)
        forms = [_Form.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # The tensors themselves: autograd has still to see them, and one detached here would not tell of changes.
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)] if self.keep(operation) else None
        self.results[number] = _Result(forms, spec, None if before is None else before.change(), tensors)

    def _next_key(self, name: str) -> Key:
        self._counts[name] += 1
        return name, self._counts[name] - 1

    def _check_filled(self, storages: dict[int, int]) -> None:
        """Follow no further where a kernel that was not seen has filled something other than gathered weights."""
        found = self._unfilled.intersection(storages)
        if found and found - self._own():
            self.tape.opaque = True

    def _own(self) -> set[int]:
        """Storages of parameters and buffers; under ZeRO stage 3 they come and go while the block runs."""
        return {_address(tensor) for tensor in chain(self.block.parameters(), self.block.buffers())}

    def _storages(self, values: Any) -> dict[int, int]:
        """Storages of all tensors in nested lists, with their bytes."""
        found: dict[int, int] = {}
        for tensor in _tensors(values):
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                self.tape.opaque = True
                continue
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = StorageWeakRef(storage)
        return found


class _Recorder(TorchDispatchMode):
    """The first run."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region
        self.hooks = ExitStack()

    def __enter__(self) -> _Recorder:
        # The hooks of the checkpoint around this region, which do not keep what autograd saves.
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[misc]
        region = self.region

        def note_and_pack(tensor: Tensor) -> Any:
            region.pack(tensor)
            return pack(tensor)

        super().__enter__()
        self.hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(note_and_pack, unpack))
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        random = self.region.is_marked(func) and torch.Tag.nondeterministic_seeded in func.tags
        before = _Random(next(_tensors(args)).device) if random else None
        result = func(*args, **kwargs)
        self.region.note(func, args, kwargs, result, before)
        return result


class _Replayer(TorchDispatchMode):
    """The second run, of which there may be several."""

    def __init__(self, region: Region, again: AbstractContextManager) -> None:
        super().__init__()
        self.region, self.again = region, again
        self.counts: Counter[str] = Counter()
        self.changes: dict[int, int] = {}

    def __enter__(self) -> _Replayer:
        self.counts.clear()
        self.changes.clear()
        self.again.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.again.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.region.is_marked(func):
            name = _name(func)
            key = name, self.counts[name]
            self.counts[name] += 1
            result, changes = self.region.replay(self.region.numbers.get(key, -1))
            if changes:
                self.changes[_address(result)] = changes
            if result is not NotImplemented:
                return result
        elif self.changes and isinstance(func, torch._ops.OpOverload) and _is_in_place(func):
            address = _address(args[0])
            if self.changes.get(address, 0):
                self.changes[address] -= 1
                return args[0]
        return func(*args, **(kwargs or {}))


class _Saved(torch.autograd.Function):
    """Holds tensors as autograd holds them; never runs backward."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)


class _Form(NamedTuple):
    """Everything of a tensor but its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


@dataclass
class _Result:
    """The result of a product that does not run again.

    Attributes:
        leaves: its parts, of tensors the form.
        spec: how they go together.
        random: the random numbers after it; None where it draws none.
        tensors: those to keep, until `Region.finish`.
        saved: holds them from then on; None where nobody asks for the result.
        changes: see `Product`.
    """

    leaves: list[Any]
    spec: Any
    random: _Random | None
    tensors: list[Tensor] | None
    saved: Any = None
    changes: int = 0


class _Random:
    """The state of a device's random numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = self._now()

    def change(self) -> _Random | None:
        """The state now; None where nothing was drawn since."""
        now = _Random(self.device)
        return None if torch.equal(now.state, self.state) else now

    def restore(self) -> None:
        """Bring the device to this state."""
        if self.device.type == "cpu":
            torch.set_rng_state(self.state)
        else:
            torch.get_device_module(self.device).set_rng_state(self.state, self.device)

    def _now(self) -> Tensor:
        if self.device.type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self.device).get_rng_state(self.device)


def _blank(leaf: Any) -> Any:
    """A tensor of this form that shows if it is used."""
    if not isinstance(leaf, _Form):
        return leaf
    tensor = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype, device=leaf.device)
    return tensor.fill_(torch.nan) if leaf.dtype.is_floating_point else tensor.zero_()


def _name(function: Any) -> str:
    """Name of an operation, without its overload; with the namespace unless it is torch's own."""
    name = function.overloadpacket.__name__
    return name if function.namespace == "aten" else f"{function.namespace}.{name}"


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _changed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _is_in_place(function: Any) -> bool:
    """Whether an operation changes the values of its first argument and nothing else, as `add_` does."""
    schema = function._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    return sum(written) == 1 and written[0] and len(schema.returns) == 1 and CHANGING.isdisjoint(function.tags)


def _decides(function: Any) -> bool:
    """Whether values may decide more than values: shapes, what runs next, random numbers, what is sent."""
    return function.namespace not in ("aten", "prims") or not DECIDING.isdisjoint(function.tags)
