"""Lookahead: k steps forward, 1 step back.

Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (arXiv 1907.08610).  Checked against: the
paper's loop written plainly, in float64 (tests/strategies/test_lookahead.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .technique import Technique

SLOW = "lookahead_slow"
STEP = "lookahead_step"


@torch.no_grad()
def lookahead_sync(fast: Sequence[Tensor], slow: Sequence[Tensor], alpha: float) -> None:
    """Move the slow weights towards the fast ones and put the fast ones there, in place.

    `slow += alpha * (fast - slow)`, then `fast = slow`: two calls per device and dtype, however many tensors there are.

    Args:
        fast: The weights that the inner optimiser moves.
        slow: Their slow copies, same shapes.
        alpha: Share of the way, 0 to 1.
    """
    buckets: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for f, s in zip(fast, slow, strict=True):
        bucket = buckets[f.device, f.dtype]
        bucket[0].append(f)
        bucket[1].append(s)
    for fasts, slows in buckets.values():
        torch._foreach_lerp_(slows, fasts, alpha)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(fasts, slows)  # pyright: ignore[reportPrivateImportUsage]


class LookaheadOptimizer(Optimizer):
    """Any torch optimiser with a slow copy of the weights; a real `Optimizer`, so schedulers and scalers accept it.

    `state`, `param_groups` and `defaults` are the inner optimiser's own. The slow copy and a step counter live in
    `state[p]`, made from `p` right before its first step: ZeRO therefore partitions and saves them like any other
    state, a checkpoint without them starts anew from the loaded weights, and a parameter that joins late, has no
    gradient, or is stepped on its own (as ZeRO does per sub-group) counts its own steps.

    Args:
        inner: The optimiser that takes the steps.
        k: Inner steps between two synchronisations.
        alpha: Share of the way that the slow weights move, 0 to 1; 1 is the inner optimiser.
    """

    def __init__(self, inner: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        _check(k, alpha)
        self.inner = inner
        self.k = k
        self.alpha = alpha
        # Optimizer.__init__ would make groups of its own; this sets up the hook tables and nothing else.
        super().__setstate__({})

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        # ZeRO steps one group at a time by assigning the list.
        self.inner.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take an inner step, and synchronise the parameters that have now taken k of them."""
        state = self.inner.state
        parameters = [p for group in self.inner.param_groups for p in group["params"]]
        # Kept aside until after the step: optimisers initialise a parameter's state only while it is empty.
        fresh = {p: p.detach().clone() for p in parameters if p.requires_grad and SLOW not in state.get(p, ())}
        result = self.inner.step(closure)
        fast, slow = [], []
        for p in parameters:
            if p.grad is None:  # judged after the step, since the closure runs the backward pass inside it
                continue
            entry = state[p]
            if p in fresh:
                entry[SLOW], entry[STEP] = fresh[p], 0
            entry[STEP] += 1
            if entry[STEP] % self.k == 0:
                fast.append(p)
                slow.append(entry[SLOW])
        lookahead_sync(fast, slow, self.alpha)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their slow copies start at their own first step."""
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimiser's state, which holds the slow weights and counters."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with or without slow weights; without, they start anew from the current weights."""
        self.inner.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "k": self.k, "alpha": self.alpha}

    def __repr__(self) -> str:
        return f"LookaheadOptimizer(k={self.k}, alpha={self.alpha}, inner={self.inner!r})"


class Lookahead(Technique):
    """Wrap each optimiser of a run in `LookaheadOptimizer`. Card: docs/cards/lookahead.md.

    Args:
        k: Inner steps between two synchronisations, 1 or more.
        alpha: Share of the way that the slow weights move, 0 to 1.

    Raises:
        ValueError: If k or alpha is out of range.
    """

    def __init__(self, k: int = 5, alpha: float = 0.5) -> None:
        _check(k, alpha)
        self.k = k
        self.alpha = alpha

    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        return LookaheadOptimizer(optimizer, k=self.k, alpha=self.alpha)


def _check(k: int, alpha: float) -> None:
    if k < 1:
        raise ValueError(f"Lookahead(k={k}): use 1 or more.")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"Lookahead(alpha={alpha}): use a number from 0 to 1.")
