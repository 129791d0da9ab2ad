"""What a step of blocks costs, and a plan of what is recomputed in it.

Bytes are those of storages that are kept for the backward pass, each once, without parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .recompute_tape import Key, Tape, address


@dataclass(frozen=True)
class ProductCost:
    """A product of a call: its place, what its operands come from, bytes of its result, FLOPs, if it can be kept."""

    key: Key
    needs: frozenset[int]
    size: int
    flops: int
    keepable: bool


@dataclass(frozen=True)
class CallCost:
    """What a block does one of the times that it is applied in a step.

    Attributes:
        block: its number.
        products: in order.
        roots: products that the backward pass asks for directly.
        plain_bytes: kept if nothing is recomputed, besides the inputs.
    """

    block: int
    products: tuple[ProductCost, ...]
    roots: frozenset[int]
    plain_bytes: int


@dataclass(frozen=True)
class StepCosts:
    """What a step does.

    Attributes:
        names: of the blocks.
        calls: of the blocks, in order.
        base_bytes: kept in any case: inputs of the calls, and everything outside the blocks.
    """

    names: tuple[str, ...]
    calls: tuple[CallCost, ...]
    base_bytes: int

    @property
    def plain_bytes(self) -> int:
        """Kept if nothing is recomputed."""
        return self.base_bytes + sum(call.plain_bytes for call in self.calls)


@dataclass(frozen=True)
class Option:
    """A way to treat a call.

    Attributes:
        keep: results that are kept; None recomputes nothing.
        kept_bytes: besides the inputs.
        flops: of what runs again.
        again_bytes: made anew in the backward pass.
    """

    keep: frozenset[Key] | None
    kept_bytes: int
    flops: int
    again_bytes: int


@dataclass(frozen=True)
class Plan:
    """An option for each call.

    Attributes:
        costs: of the step that was measured.
        budget: bytes that were allowed.
        options: one for each call.
    """

    costs: StepCosts
    budget: int
    options: tuple[Option, ...]

    @property
    def kept_bytes(self) -> int:
        """Kept for the backward pass, in and outside the blocks."""
        return self.costs.base_bytes + sum(option.kept_bytes for option in self.options)

    @property
    def flops(self) -> int:
        """FLOPs of all that runs again."""
        return sum(option.flops for option in self.options)

    @property
    def peak_bytes(self) -> int:
        """Held at most: while a call is recomputed, what the calls before it keep is still there."""
        held, peak = self.costs.base_bytes, self.kept_bytes
        for option in self.options:
            held += option.kept_bytes
            peak = max(peak, held + option.again_bytes)
        return peak

    def of_block(self, block: int) -> list[frozenset[Key] | None]:
        """What the calls of a block keep, in order."""
        pairs = zip(self.costs.calls, self.options, strict=True)
        return [option.keep for call, option in pairs if call.block == block]

    def as_dict(self) -> dict[str, Any]:
        """The plan in plain values."""
        forward = sum(product.flops for call in self.costs.calls for product in call.products)
        return {
            "budget_bytes": self.budget,
            "plain_bytes": self.costs.plain_bytes,
            "base_bytes": self.costs.base_bytes,
            "kept_bytes": self.kept_bytes,
            "peak_bytes": self.peak_bytes,
            "forward_flops": forward,
            "recomputed_flops": self.flops,
            "calls": [
                {
                    "block": self.costs.names[call.block],
                    "keep": None if option.keep is None else [list(key) for key in sorted(option.keep)],
                    "kept_bytes": option.kept_bytes,
                    "again_bytes": option.again_bytes,
                    "recomputed_flops": option.flops,
                }
                for call, option in zip(self.costs.calls, self.options, strict=True)
            ],
        }

    def table(self) -> str:
        """The plan as a table, calls with the same treatment in one row."""
        found = self.as_dict()
        share = self.flops / found["forward_flops"] if found["forward_flops"] else 0.0
        lines = [
            f"Activation checkpointing: {mib(self.kept_bytes)} MiB of {mib(self.costs.plain_bytes)} are kept for the "
            f"backward pass (budget {mib(self.budget)}), {mib(self.peak_bytes)} at most with what is made anew; "
            f"{share:.1%} of the blocks' forward FLOPs run again."
        ]
        rows = [("block", "keeps", "MiB kept", "MiB anew", "GFLOPs again")]
        calls = zip(found["calls"], self.options, strict=True)
        for option, group in groupby(calls, key=lambda pair: pair[1]):
            names = list(dict.fromkeys(entry["block"] for entry, _ in group))
            kept = "all" if option.keep is None else ", ".join(f"{name} {place}" for name, place in sorted(option.keep))
            rows.append(
                (
                    names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
                    kept or "inputs",
                    mib(option.kept_bytes),
                    mib(option.again_bytes),
                    f"{option.flops / 1e9:.2f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join(lines)


@dataclass
class Measurement:
    """Collects what a step's blocks do.

    Args:
        blocks: with their names.
    """

    blocks: dict[str, nn.Module]
    _calls: list[tuple[int, Tape, list[int]]] = field(default_factory=list)
    _base: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def note(self, block: nn.Module, tape: Tape, flops: list[int]) -> None:
        """Take in what a block did; see `recompute_policies.Measured`."""
        self._calls.append((list(self.blocks.values()).index(block), tape, flops))

    @contextmanager
    def counting(self, module: nn.Module) -> Iterator[None]:
        """Count what is saved outside the blocks, their inputs included."""

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # Asked each time: under ZeRO stage 3 weights come and go.
            own = {address(t) for t in (*module.parameters(), *module.buffers())}
            if storage._cdata not in own and storage._cdata not in self._base:
                self._base[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def costs(self) -> StepCosts:
        """The costs of the step."""
        calls = []
        for block, tape, flops in self._calls:
            products = tuple(
                ProductCost(product.key, product.needs, self._bytes(product.storages), count, not product.spoiled)
                for product, count in zip(tape.products, flops, strict=True)
            )
            calls.append(CallCost(block, products, tape.roots(), self._bytes(tape.kept())))
        return StepCosts(tuple(self.blocks), tuple(calls), sum(size for _, size in self._base.values()))

    def _bytes(self, storages: dict[int, int]) -> int:
        return sum(size for storage, size in storages.items() if storage not in self._base)


def mib(size: float) -> str:
    """Mebibytes, to be read."""
    return f"{size / 2**20:.1f}"
