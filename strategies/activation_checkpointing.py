"""Activation checkpointing: keep the inputs of a block, run it again in the backward pass.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174);
Su Jianlin, kexue.fm/archives/7367.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .technique import Technique

Blocks = str | type[nn.Module]


class _Recompute:
    """Stands in for a block's `forward`: recomputes while training with gradients, is the plain forward otherwise."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.forward = block.forward
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
        self.norms = norms
        self.context_fn: Callable[[], tuple[AbstractContextManager, AbstractContextManager]] | None = None
        if norms:
            self.context_fn = self._contexts

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _frozen_statistics(self.norms)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and self.block.training):
            return self.forward(*args, **kwargs)
        if self.context_fn is not None:
            kwargs["context_fn"] = self.context_fn
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def _frozen_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Keep BatchNorm from counting a batch twice: in training mode its output does not depend on the running values.

    A momentum of 0 leaves them where they are; the layer still saves the same tensors for its backward pass.
    """
    tracked = [norm for norm in norms if norm.track_running_stats and norm.training]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in tracked]  # type: ignore[union-attr]
    for norm in tracked:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(tracked, before, strict=True):
            norm.momentum = momentum  # type: ignore[assignment]
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Recompute each of these modules in the backward pass, from now on.

    Only `forward` of the instance changes: names, `state_dict` keys and classes stay. Random numbers are drawn again
    alike, BatchNorm statistics are updated once, evaluation and `no_grad` run as before, and a module used several
    times (shared layers) is one entry here. Undo with `restore_blocks`.

    Args:
        blocks: Modules, none of them twice.

    Raises:
        ValueError: If one of them is checkpointed already.
    """
    for block in blocks:
        if isinstance(block.__dict__.get("forward"), _Recompute):
            name = type(block).__name__
            raise ValueError(f"checkpoint_blocks: a {name} is checkpointed already; call restore_blocks first.")
        block.forward = _Recompute(block)


def restore_blocks(blocks: Sequence[nn.Module]) -> None:
    """Undo `checkpoint_blocks`; modules that are not checkpointed are left alone."""
    for block in blocks:
        recompute = block.__dict__.get("forward")
        if isinstance(recompute, _Recompute):
            del block.__dict__["forward"]
            if recompute.forward != block.forward:  # the instance had a forward of its own
                block.forward = recompute.forward


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


class ActivationCheckpointing(Technique):
    """Recompute whole blocks in the backward pass. Card: docs/cards/activation_checkpointing.md.

    Losses and gradients stay the same numbers; stored activations shrink to the inputs of the blocks, for one more
    forward pass of them.

    Args:
        blocks: Class, class name, pattern of module names, or a list of these; None asks the module's `blocks()`.
    """

    def __init__(self, blocks: Blocks | Sequence[Blocks] | None = None) -> None:
        self.blocks = blocks
        self._attached: list[nn.Module] = []

    def attach(self, module: pl.LightningModule) -> None:
        self._attached = find_blocks(module, self.blocks)
        checkpoint_blocks(self._attached)

    def detach(self, module: pl.LightningModule) -> None:
        restore_blocks(self._attached)
        self._attached = []
