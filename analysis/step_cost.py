"""What a training step of any module costs, counted while it runs: FLOPs, and activations kept for the backward pass.

Works on real tensors and on fake ones (`torch._subclasses.FakeTensorMode`), which have shapes and no data.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..nn.flops import KEPT_PRODUCTS, flop_counter

Recompute = Literal["off", "selective", "full"]


@dataclass(frozen=True)
class StepCost:
    """Counts of one step.

    Attributes:
        flops: forward and backward pass, and whatever is computed again.
        saved_bytes: distinct storages kept for the backward pass, without parameters and buffers.
        again_bytes: of the block that is computed again, what is not kept anyway.
    """

    flops: int
    saved_bytes: int
    again_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Activations held at most."""
        return self.saved_bytes + self.again_bytes


def count_steps(
    step: Callable[[], Any], module: nn.Module, blocks: Sequence[nn.Module] = (), fused_dropout: bool = False
) -> dict[Recompute, StepCost]:
    """Run a step three times and count it: with nothing, all but products, and everything in the blocks recomputed.

    Args:
        step: runs forward and backward pass.
        module: what is trained.
        blocks: its repeated units; without any, nothing can be recomputed.
        fused_dropout: see `StepCounter`.
    """
    counters: dict[Recompute, StepCounter] = {}
    kinds: tuple[Recompute, ...] = ("off", "selective", "full") if blocks else ("off",)
    for recompute in kinds:
        module.zero_grad(set_to_none=True)
        with StepCounter(module, blocks, recompute, fused_dropout) as counters[recompute]:
            step()
    module.zero_grad(set_to_none=True)
    plain = counters["off"]
    freed = plain.saved_bytes - counters[kinds[-1]].saved_bytes
    costs: dict[Recompute, StepCost] = {}
    for recompute, counter in counters.items():
        share = (plain.saved_bytes - counter.saved_bytes) / freed if freed else 0
        costs[recompute] = StepCost(counter.flops, counter.saved_bytes, round(share * plain.block_bytes))
    return costs


def state_values(
    optimizers: Iterable[Optimizer], wrap: Callable[[Optimizer], Optimizer] = lambda optimizer: optimizer
) -> float:
    """Values that optimisers keep for each trained parameter, 2 for Adam, found by a step on a small parameter.

    Args:
        optimizers: of a module, with all its trained parameters.
        wrap: what is laid around an optimiser.
    """
    values = elements = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            size = sum(parameter.numel() for parameter in group["params"])
            values += size * _probe(optimizer, group, wrap)
            elements += size
    return values / elements if elements else 0.0


def _probe(optimizer: Optimizer, group: dict[str, Any], wrap: Callable[[Optimizer], Optimizer]) -> int:
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    options = {name: group[name] for name in inspect.signature(type(optimizer)).parameters if name in group}
    del options["params"]
    trial = wrap(type(optimizer)([parameter], **options))
    trial.step()
    state = trial.state[parameter].values()
    return sum(value.numel() for value in state if isinstance(value, Tensor) and value.dim()) // parameter.numel()


class StepCounter:
    """Counts what runs inside `with`: forward and backward pass of a module.

    Example:
        with StepCounter(module) as counter:
            module(batch).sum().backward()
        print(counter.flops, counter.saved_bytes)

    Args:
        module: what is trained; its parameters and buffers are no activations.
        blocks: its repeated units.
        recompute: run the blocks again in the backward pass: not at all, all but their products, or wholly.
        fused_dropout: take the dropout of attention weights to be done inside a fused kernel, as on GPUs; the CPU's
            kernel has none, and tables of scores would be counted.

    Attributes:
        block_bytes: the most that one block keeps, where nothing is recomputed.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module] = (),
        recompute: Recompute = "off",
        fused_dropout: bool = False,
    ) -> None:
        self.module, self.blocks, self.recompute = module, list(dict.fromkeys(blocks)), recompute
        self.fused_dropout = fused_dropout
        self.block_bytes = 0
        self._kept: dict[StorageWeakRef, int] = {}
        self._products = _Products(self._keep)
        self._entered: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> "StepCounter":
        self._own = {_reference(t) for t in (*self.module.parameters(), *self.module.buffers())}
        self._flops = self._stack.enter_context(flop_counter())
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
        if self.fused_dropout:
            self._stack.enter_context(_fused_dropout())
        for block in self.blocks:
            if self.recompute == "off":
                for hook in (block.register_forward_pre_hook(self._enter), block.register_forward_hook(self._leave)):
                    self._stack.callback(hook.remove)
            else:
                self._stack.enter_context(_forward_of(block, partial(self._recomputed, block.forward)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def flops(self) -> int:
        """FLOPs so far."""
        return self._flops.get_total_flops()

    @property
    def saved_bytes(self) -> int:
        """Bytes of all storages kept so far."""
        return sum(self._kept.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        reference = _reference(tensor)
        if reference not in self._own:
            self._kept[reference] = tensor.untyped_storage().nbytes()
        return tensor

    def _enter(self, *_: Any) -> None:
        self._entered.append(self.saved_bytes)

    def _leave(self, *_: Any) -> None:
        self.block_bytes = max(self.block_bytes, self.saved_bytes - self._entered.pop())

    def _recomputed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.recompute == "full":
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        contexts = partial(create_selective_checkpoint_contexts, KEPT_PRODUCTS)
        with self._products:
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class _Products(TorchDispatchMode):
    """Tells of the results that selective recomputation keeps; they are not among the tensors that autograd saves."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in KEPT_PRODUCTS:
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor):
                    self.keep(tensor)
        return result


@contextmanager
def _forward_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a block have another forward for a while."""
    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


@contextmanager
def _fused_dropout() -> Iterator[None]:
    """Leave out the dropout of attention weights, so that the CPU takes its fused kernel."""
    attend = functional.scaled_dot_product_attention

    def attend_without(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        return attend(query, key, value, attn_mask, 0.0, *args, **kwargs)

    functional.scaled_dot_product_attention = attend_without
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attend


def _reference(tensor: Tensor) -> StorageWeakRef:
    """Tells storages apart, also those of fake tensors and those that are gone."""
    return StorageWeakRef(tensor.untyped_storage())
