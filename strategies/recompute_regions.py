"""A region of recomputation: a block that runs again in the backward pass, but for results that are kept or not needed.

While a block runs forward, a `Tape` follows where values come from. When the block is done, the region knows what the
backward pass will ask for: the tensors that autograd saves, and what draws random numbers or decides what runs. Of the
results to keep, those that are asked for are kept; a product that is not asked for is left out of the second run, where
not-a-numbers stand in for its result. Its random numbers are passed over in both cases, so that those after it are
drawn as before.

torch has `create_selective_checkpoint_contexts` for the first half. It leaves no product out, keeps results that nobody
asks for, and takes one backward pass only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .recompute_tape import Key, Operation, Tape, address, needed, tensors_in, traits_of

Keep = Callable[[Operation], bool]


class Region:
    """One run of a block, to be run again in its backward pass.

    Args:
        block: that runs.
        keep: says of a product whether its result is to be kept.
        marked: names of operations besides products that `keep` is asked about.
    """

    def __init__(self, block: nn.Module, keep: Keep, marked: Set[str] = frozenset()) -> None:
        self.keep, self.marked = keep, marked
        self._tape = Tape(block, marked)
        self._results: dict[Key, _Result] = {}  # of products that do not run again

    def contexts(
        self, again: AbstractContextManager
    ) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
        """What `torch.utils.checkpoint.checkpoint(context_fn=...)` takes.

        Args:
            again: entered around each second run, of which there may be several.
        """
        return lambda: (_Recorder(self, self._tape), _Replayer(self, again))

    def finish(self) -> Tape:
        """Decide what is kept and what is left out, once the block has run; returns what ran."""
        tape, self._tape = self._tape, Tape(nn.Module())  # its storages are not to be held
        products = tape.products
        kept = {n for n, product in enumerate(products) if self._results[product.key].tensors and not product.spoiled}
        again, used = needed(tape.roots(), [product.needs for product in products], kept)
        for number, product in enumerate(products):
            if number in again:
                del self._results[product.key]
            else:
                self._results[product.key].settle(number in used, product.changes)
        return tape

    def take(self, operation: Operation, random: _Random | None) -> None:
        """Take in a product that has run.

        Args:
            operation: it.
            random: the random numbers after it, if it has drawn some.
        """
        leaves, spec = tree_flatten(operation.result)
        forms = [_Form.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # The tensors themselves: autograd has still to see them, and one detached here would not tell of changes.
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)] if self.keep(operation) else []
        self._results[operation.key] = _Result(forms, spec, random, tensors)

    @property
    def has_results(self) -> bool:
        """Whether anything stands for a product in a second run: else it is a plain one."""
        return bool(self._results)

    def result(self, key: Key) -> _Result | None:
        """What stands for a product in a second run; None if it has to run."""
        return self._results.get(key)


class _Eager(TorchDispatchMode):
    """A mode that a compiler never sees, which spares each operation a wrapper that says so."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Recorder(_Eager):
    """The first run."""

    def __init__(self, region: Region, tape: Tape) -> None:
        super().__init__()
        self.region, self.tape = region, tape
        self.hooks = ExitStack()

    def __enter__(self) -> _Recorder:
        # The hooks of the checkpoint around this region, which do not keep what autograd saves.
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[misc]
        tape = self.tape

        def note_and_pack(tensor: Tensor) -> Any:
            tape.note_saved(tensor)
            return pack(tensor)

        super().__enter__()
        self.hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(note_and_pack, unpack))
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traits = traits_of(func)
        draws = traits is not None and traits.draws and traits.is_marked(self.region.marked)
        before = _Random(next(tensors_in(args)).device) if draws else None
        result = func(*args, **kwargs)
        operation = self.tape.note(func, args, kwargs, result)
        if operation is not None:
            self.region.take(operation, None if before is None else before.change())
        return result


class _Replayer(_Eager):
    """The second run, of which there may be several."""

    def __init__(self, region: Region, again: AbstractContextManager) -> None:
        super().__init__()
        self.region, self.again = region, again
        self.counts: Counter[str] = Counter()
        self.changes: dict[int, int] = {}  # by storage of a kept result: changes in place that it has behind it
        self.followed = True

    def __enter__(self) -> _Replayer:
        self.counts.clear()
        self.changes.clear()
        self.again.__enter__()
        self.followed = self.region.has_results
        if self.followed:
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.followed:
            super().__exit__(*error)
        self.again.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        traits = traits_of(func)
        if traits is None:
            pass
        elif traits.is_marked(self.region.marked):
            found = self.region.result(traits.next_key(self.counts))
            if found is not None:
                result = found.replay()
                if found.changes:
                    self.changes[address(result)] = found.changes
                return result
        elif traits.is_in_place and self.changes and self.changes.get(address(args[0]), 0):
            self.changes[address(args[0])] -= 1
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

    def blank(self) -> Tensor:
        """A tensor of this form that shows if it is used."""
        tensor = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return tensor.fill_(torch.nan) if self.dtype.is_floating_point else tensor.zero_()


@dataclass
class _Result:
    """The result of a product that does not run again.

    Attributes:
        leaves: its parts, of tensors the form.
        spec: how they go together.
        random: the random numbers after it; None where it draws none.
        tensors: those to keep, while the block runs.
        saved: what holds them from then on; None where nobody asks for the result. Its node alone would not do: before
            torch 2.13, that lets go of them when the tensor that it belongs to is gone.
        changes: how often a kept result is going to be changed in place, which has happened to it already.
    """

    leaves: list[Any]
    spec: Any
    random: _Random | None
    tensors: list[Tensor]
    saved: Any = None
    changes: int = 0

    def settle(self, keep: bool, changes: int) -> None:
        """Keep the tensors, or nothing of them, once the block has run."""
        if keep:
            # Saved as autograd saves: its hooks see them, and it notices if one is changed before it is used.
            tensors = [tensor.detach() for tensor in self.tensors]
            self.saved = _Saved.apply(torch.empty(0, requires_grad=True), *tensors)
            self.changes = changes
        self.tensors = []

    def replay(self) -> Any:
        """The result as kept, or made up; random numbers go on as after the product."""
        if self.random is not None:
            self.random.restore()
        if self.saved is None:
            leaves = [leaf.blank() if isinstance(leaf, _Form) else leaf for leaf in self.leaves]
        else:
            tensors = iter(self.saved.grad_fn.saved_tensors)
            leaves = [next(tensors) if isinstance(leaf, _Form) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


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
