"""What is recomputed of a block: all of it, all but what some operations result in, or as a plan says.

Source: T. Chen et al. "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); V. Korthikanti et al.
"Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..errors import InputError
from ..nn.flops import KEPT_PRODUCTS, flops_of, is_product
from .recompute_regions import Region
from .recompute_tape import Key, Operation, Tape

WIDE = 3
SMALLEST_OFFLOADED = 1024


class Recompute:
    """Stands in for a block's `forward`: recomputes while training with gradients, is the plain forward otherwise.

    Args:
        block: whose forward.
        policy: what is recomputed.
    """

    def __init__(self, block: nn.Module, policy: Policy) -> None:
        self.block, self.policy = block, policy
        self.forward = block.forward
        self.norms = [module for module in block.modules() if isinstance(module, _NormBase)]
        self.iterated = list(_spectral_norms(block))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and self.block.training):
            return self.forward(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if type(value).__name__.endswith("Cache"):
                raise InputError(
                    f"ActivationCheckpointing: {type(self.block).__name__} was given a {type(value).__name__} while "
                    "training, which would grow twice; train without it (use_cache=False)."
                )
        # A compiler follows no second run of which the statistics are frozen.
        plain = torch.compiler.is_compiling() and not self.norms and not self.iterated
        options = self.policy.compiled() if plain else None
        if options is None:
            return _run_eagerly(self, args, kwargs)  # pyright: ignore[reportCallIssue]
        return checkpoint(self.forward, *args, use_reentrant=False, **options, **kwargs)  # pyright: ignore[reportCallIssue]

    def second_run(self) -> AbstractContextManager:
        """What is entered around each second run of a run that is about to begin."""
        if not self.norms and not self.iterated:
            return nullcontext()
        # Asked for now: a module that is moved to another device has other buffers.
        return FrozenStatistics(self.norms, [getattr(module, name) for module, name in self.iterated])


class FrozenStatistics:
    """Keeps a second run from counting a batch twice, in norms with running values and in spectral norms.

    In training mode the output of BatchNorm and InstanceNorm does not depend on the running values: a momentum of 0
    leaves them where they are, and the layer still saves the same tensors for its backward pass. A spectral norm takes
    its next iteration from where it was before the first run, and is then put where it has come to since.

    Args:
        norms: of the block.
        iterated: vectors of its spectral norms.
    """

    def __init__(self, norms: Sequence[_NormBase], iterated: Sequence[Tensor]) -> None:
        self.norms, self.iterated = norms, iterated
        self.start = [vector.clone() for vector in iterated]

    def __enter__(self) -> None:
        self.reached = [vector.clone() for vector in self.iterated]
        for vector, start in zip(self.iterated, self.start, strict=True):
            vector.copy_(start)
        tracked = [norm for norm in self.norms if norm.track_running_stats and norm.training]
        self.before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in tracked]  # type: ignore[union-attr]
        for norm in tracked:
            norm.momentum = 0.0

    def __exit__(self, *error: Any) -> None:
        for norm, momentum, batches in self.before:
            norm.momentum = momentum  # type: ignore[assignment]
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]
        for vector, reached in zip(self.iterated, self.reached, strict=True):
            vector.copy_(reached)


def _spectral_norms(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Owners and names of the vectors that spectral norms in a block iterate, of both of torch's forms."""
    for module in block.modules():
        if isinstance(module, _SpectralNorm):
            yield from ((module, "_u"), (module, "_v"))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                yield from ((module, f"{hook.name}_{vector}") for vector in "uv")


class Policy(ABC):
    """What is recomputed of a block."""

    @abstractmethod
    def run(self, recompute: Recompute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block forward."""

    def compiled(self) -> dict[str, Any] | None:
        """Arguments of torch's `checkpoint` for a compiler to follow; None: the block runs without one."""
        return None


class Full(Policy):
    """Recompute whole blocks, but for products at their end that the backward pass does not need."""

    def run(self, recompute: Recompute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _run_region(Region(recompute.block, lambda operation: False), recompute, args, kwargs)[0]

    def compiled(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Selective(Policy):
    """Keep the results of some operations, recompute the rest.

    Args:
        keep: "products" (matrix products, convolutions and attention kernels), "narrow" (those of them that are not
            cheap for what their result takes, see `is_cheap`), or names of operations, such as ("addmm", "gelu").

    Raises:
        ValueError: there is no such operation.
    """

    keep: str | tuple[str, ...] = "products"

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            if self.keep not in ("products", "narrow"):
                raise ValueError(
                    f"ActivationCheckpointing(keep={self.keep!r}): use 'products', 'narrow', or a list of operations."
                )
            return
        for name in self.keep:
            if not _overloads(name):
                raise ValueError(
                    f"ActivationCheckpointing(keep={list(self.keep)}): torch.ops has no operation {name}; "
                    "use names such as 'mm', 'addmm', 'gelu' or 'mylibrary.op'."
                )

    def run(self, recompute: Recompute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = frozenset() if isinstance(self.keep, str) else frozenset(self.keep)
        return _run_region(Region(recompute.block, self.keeps, names), recompute, args, kwargs)[0]

    def keeps(self, operation: Operation) -> bool:
        """Whether the result of this operation is kept."""
        if not isinstance(self.keep, str):
            return operation.key[0] in self.keep
        return is_product(operation.function) and not (self.keep == "narrow" and is_cheap(operation))

    def compiled(self) -> dict[str, Any] | None:
        if self.keep == "narrow":
            return None
        names = chain.from_iterable(map(_overloads, self.keep))
        kept = KEPT_PRODUCTS if self.keep == "products" else list(names)
        return {"context_fn": partial(create_selective_checkpoint_contexts, kept)}


class Offload(Full):
    """Recompute whole blocks, and keep their inputs in the host's memory."""

    def run(self, recompute: Recompute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(to_host, to_device):
            return super().run(recompute, args, kwargs)

    def compiled(self) -> None:
        """Nothing: a compiler would keep the inputs where they are."""


@dataclass
class Planned(Policy):
    """Follow a plan: for each time that the block is applied in a step, which results are kept.

    Args:
        calls: of a step, in order; the results to keep, or None to recompute nothing. They start anew after the last.
    """

    calls: Sequence[frozenset[Key] | None]
    _next: int = field(default=0, init=False)

    def run(self, recompute: Recompute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept = self.calls[self._next]
        self._next = (self._next + 1) % len(self.calls)
        if kept is None:
            return recompute.forward(*args, **kwargs)
        region = Region(recompute.block, lambda operation: operation.key in kept)
        return _run_region(region, recompute, args, kwargs)[0]


class Measured(Policy):
    """Recompute whole blocks, and tell what each of them did.

    Args:
        note: given the block, what ran in it, and the FLOPs of its products.
    """

    def __init__(self, note: Callable[[nn.Module, Tape, list[int]], None]) -> None:
        self.note = note

    def run(self, recompute: Recompute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flops: list[int] = []

        def count(operation: Operation) -> bool:
            flops.append(flops_of(operation.function, operation.args, operation.kwargs, operation.result))
            return False

        result, tape = _run_region(Region(recompute.block, count), recompute, args, kwargs)
        self.note(recompute.block, tape, flops)
        return result


@torch.compiler.disable
def _run_eagerly(recompute: Recompute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block forward without a compiler, which would not give the same operations twice."""
    return recompute.policy.run(recompute, args, kwargs)


def _run_region(
    region: Region, recompute: Recompute, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tape]:
    """Run a block forward within a region; returns the block's result, and what ran in it."""
    # As positional ones: torch keeps those as autograd does, and tensors among keyword arguments as they are.
    leaves, spec = tree_flatten((args, kwargs))

    def forward(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, spec)
        return recompute.forward(*args, **kwargs)

    contexts = region.contexts(recompute.second_run())
    result = checkpoint(forward, *leaves, use_reentrant=False, context_fn=contexts)
    return result, region.finish()


def is_cheap(operation: Operation) -> bool:
    """Whether a product takes few FLOPs for each value of its result.

    One whose result is more than three times as wide as its first factor; attention at fewer FLOPs than a square linear
    layer on the same values, which is over fewer keys than half the width.
    """
    name, args, result = operation.key[0], operation.args, operation.result
    if "attention" in name:
        query, output = args[0], result[0]
        heads = query.shape[1] if name.startswith("_scaled") else query.shape[-2]
        flops = flops_of(operation.function, args, operation.kwargs, result)
        return flops < 2 * output.numel() * heads * query.shape[-1]
    factor = args[1 if name in ("addmm", "baddbmm") else 0]
    return result.numel() > WIDE * factor.numel()


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Copy a tensor of a GPU to pinned memory, beside what the GPU computes; small ones and those of CPUs stay.

    Returns:
        Where it was, and where it is kept.
    """
    if not tensor.is_cuda or tensor.nbytes < SMALLEST_OFFLOADED:
        return tensor.device, tensor
    stream = _side_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory is not given away before it is copied
    return tensor.device, host


def to_device(kept: tuple[torch.device, Tensor]) -> Tensor:
    """Bring back what `to_host` has kept."""
    device, tensor = kept
    if tensor.device == device:
        return tensor
    torch.cuda.current_stream(device).wait_stream(_side_stream(device))
    return tensor.to(device, non_blocking=True)


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _overloads(name: str) -> list[Any]:
    """All overloads of the operation of this name, aten's unless it has a namespace."""
    namespace, _, operation = name.rpartition(".")
    packet: Any = getattr(getattr(torch.ops, namespace or "aten"), operation, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
