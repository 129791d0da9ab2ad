"""Lookahead: k steps forward, 1 step back.

Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (arXiv 1907.08610).  Checked against: the
paper's loop written plainly, in float64, and the rules of pytorch_optimizer 4.1 and timm 1.0
(tests/strategies/test_lookahead.py, test_lookahead_peers.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from .swap import exchange_state, pieces
from .technique import Technique

Pullback = Literal["none", "reset", "pullback"]

SLOW = "lookahead_slow"
STEP = "lookahead_step"
MOMENTA = ("momentum_buffer", "exp_avg")
"""Buffers that carry a direction: `pullback="reset"` clears them.

Second moments stay: beside a step count that goes on, a cleared one would make Adam's next step up to
1/sqrt(1 - beta2) = 32 times as long.
"""
BUFFERS = (*MOMENTA, "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta")
"""Buffers that `pullback="pullback"` pulls back."""


@torch.no_grad()
def lookahead_sync(fast: Sequence[Tensor], slow: Sequence[Tensor], alpha: float) -> None:
    """Move the slow weights towards the fast ones and put the fast ones there, in place.

    `slow += alpha * (fast - slow)`, then `fast = slow`. On a GPU two calls per dtype, however many tensors there are;
    on a CPU piece by piece, so that the second operation finds in the cache what the first has written.

    Args:
        fast: The weights that the inner optimiser moves.
        slow: Their slow copies, same shapes.
        alpha: Share of the way, 0 to 1.
    """
    buckets: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for f, s in zip(fast, slow, strict=True):
        if f.device.type == "cpu":
            for f_piece, s_piece in pieces(f, s):
                f_piece.copy_(s_piece.lerp_(f_piece, alpha))
        else:
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
        pullback: What a synchronisation does to the inner optimiser's buffers: "none" keeps them, "reset" sets the
            momenta to zero, "pullback" gives every buffer a slow copy that it is moved with, as the weights are.

    Raises:
        ValueError: If k, alpha or pullback is out of range; at the first synchronisation, if the inner optimiser has
            no buffers for `pullback`.
    """

    def __init__(self, inner: Optimizer, k: int = 5, alpha: float = 0.5, pullback: Pullback = "none") -> None:
        _check(k, alpha, pullback)
        self.inner = inner
        self.k = k
        self.alpha = alpha
        self.pullback: Pullback = pullback
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
        taking: list[tuple[Tensor, Any]] = []
        # Kept aside until after the step: optimisers initialise a parameter's state only while it is empty.
        fresh: dict[int, dict[str, Any]] = {}
        if closure is None:
            self._look(taking, fresh)
            result = self.inner.step()
        else:

            def with_copies() -> Any:
                result = closure()  # the backward pass: only now is it known which parameters take part
                self._look(taking, fresh)
                return result

            result = self.inner.step(with_copies)
        state, k = self.inner.state, self.k
        due = []
        for p, entry in taking:
            if entry is None:
                entry = state[p]
                entry.update(fresh[id(p)])
            entry[STEP] = step = entry[STEP] + 1
            if step % k == 0:
                due.append(p)
        if due:
            self._synchronise(due)
        return result

    def _look(self, taking: list[tuple[Tensor, Any]], fresh: dict[int, dict[str, Any]]) -> None:
        """List the parameters that take part with what is known of each, once: looking a tensor up takes its time.

        Of those whose first step comes now, copy weights and buffers; nothing is known of them.
        """
        state = self.inner.state
        taking.clear()
        for group in self.inner.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                entry = state.get(p)
                if entry is not None and SLOW in entry:
                    taking.append((p, entry))
                    continue
                taking.append((p, None))
                if id(p) not in fresh:
                    fresh[id(p)] = {SLOW: p.detach().clone(), STEP: 0}
                    if self.pullback == "pullback":
                        fresh[id(p)] |= {_slow(name): buffer.clone() for name, buffer in self._buffers(p, BUFFERS)}

    def _buffers(self, p: Tensor, names: Iterable[str]) -> list[tuple[str, Tensor]]:
        entry = self.inner.state.get(p, {})
        # SGD without momentum keeps None there; RMSprop and Adam leave a buffer out that they do not need.
        return [(name, entry[name]) for name in names if isinstance(entry.get(name), Tensor)]

    def _synchronise(self, due: list[Tensor]) -> None:
        state = self.inner.state
        fast, slow = list(due), [state[p][SLOW] for p in due]
        if self.pullback != "none":
            buffers = [
                (state[p], name, buffer)
                for p in due
                for name, buffer in self._buffers(p, MOMENTA if self.pullback == "reset" else BUFFERS)
            ]
            if not buffers:
                raise ValueError(
                    f"Lookahead(pullback={self.pullback!r}): {type(self.inner).__name__} keeps no buffers for it; "
                    "use pullback='none', or give the optimiser momentum."
                )
            for entry, name, buffer in buffers:
                if self.pullback == "reset":
                    buffer.zero_()
                else:
                    if _slow(name) not in entry:  # a buffer that its first step has made was zero before
                        entry[_slow(name)] = torch.zeros_like(buffer)
                    fast.append(buffer)
                    slow.append(entry[_slow(name)])
        lookahead_sync(fast, slow, self.alpha)

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Put the slow weights into the parameters for as long as the context is open, without a third copy."""
        exchange_state(self, SLOW)
        try:
            yield
        finally:
            exchange_state(self, SLOW)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their slow copies start at their own first step."""
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimiser's state, which holds the slow weights and counters."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.inner.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with or without slow weights; without, they start anew from the current weights."""
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.inner.load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "k": self.k, "alpha": self.alpha, "pullback": self.pullback}

    def __repr__(self) -> str:
        return f"LookaheadOptimizer(k={self.k}, alpha={self.alpha}, pullback={self.pullback!r}, inner={self.inner!r})"


class Lookahead(Technique):
    """Wrap each optimiser of a run in `LookaheadOptimizer`. Card: docs/cards/lookahead.md.

    Args:
        k: Inner steps between two synchronisations, 1 or more.
        alpha: Share of the way that the slow weights move, 0 to 1.
        pullback: The inner optimiser's buffers at a synchronisation, see `LookaheadOptimizer`.
        evaluate: The weights that validation sees, checkpoints hold as `state_dict` and the fit leaves behind.
            Training is the same to the last bit with either.

    Raises:
        ValueError: If an argument is out of range.
    """

    copies = (SLOW,)

    def __init__(
        self,
        k: int = 5,
        alpha: float = 0.5,
        pullback: Pullback = "none",
        evaluate: Literal["fast", "slow"] = "slow",
    ) -> None:
        _check(k, alpha, pullback)
        if evaluate not in ("fast", "slow"):
            raise ValueError(f"Lookahead(evaluate={evaluate!r}): use 'fast' or 'slow'.")
        self.k = k
        self.alpha = alpha
        self.pullback: Pullback = pullback
        self.evaluate: Literal["fast", "slow"] = evaluate
        self._optimizers: list[Optimizer] = []

    def attach(self, module: pl.LightningModule) -> None:
        self._optimizers = []

    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        optimizer = LookaheadOptimizer(optimizer, self.k, self.alpha, self.pullback)
        self._optimizers.append(optimizer)
        return optimizer

    @property
    def evaluates(self) -> str | None:
        return "slow weights" if self.evaluate == "slow" else None

    def exchange(self, module: pl.LightningModule) -> None:
        for optimizer in self._optimizers:
            exchange_state(optimizer, SLOW)


def _slow(name: str) -> str:
    return f"{SLOW}_{name}"


def _check(k: int, alpha: float, pullback: str) -> None:
    if k < 1:
        raise ValueError(f"Lookahead(k={k}): use 1 or more.")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"Lookahead(alpha={alpha}): use a number from 0 to 1.")
    if pullback not in ("none", "reset", "pullback"):
        raise ValueError(f"Lookahead(pullback={pullback!r}): use 'none', 'reset' or 'pullback'.")
