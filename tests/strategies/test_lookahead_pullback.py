"""What a synchronisation does to the inner optimiser's buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.strategies import LookaheadOptimizer

INNER: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], tuple[str, ...]]] = {
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), ("momentum_buffer",)),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), ("exp_avg", "exp_avg_sq")),
    "amsgrad": (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "fused": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), ("exp_avg", "exp_avg_sq")),
    "nadam": (lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True), ("exp_avg", "exp_avg_sq")),
    "rmsprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
        ("momentum_buffer", "square_avg", "grad_avg"),
    ),
}
K, ALPHA = 3, 0.4


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # The last one has no dimension: nor has Adam's step count, which is no buffer.
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in [(3, 2), (4,), ()]]


def set_gradients(ps: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) + 2 * p.detach()


def reference(inner: str, mode: str, steps: int, alias: bool = False) -> list[Tensor]:
    """The paper's rule, written plainly; `alias` keeps the live buffer for a copy of it, as the authors' code does."""
    make, names = INNER[inner]
    ps = parameters()
    optimizer = make(ps)
    slow = [p.detach().clone() for p in ps]
    slow_buffers: dict[tuple[int, str], Tensor] = {}
    for step in range(1, steps + 1):
        set_gradients(ps, step)
        optimizer.step()
        if step % K:
            continue
        for i, p in enumerate(ps):
            slow[i] = slow[i] + ALPHA * (p.detach() - slow[i])
            p.data.copy_(slow[i])
            state = optimizer.state[p]
            for name in names:
                if mode == "pullback":
                    old = slow_buffers.get((i, name), torch.zeros_like(p))
                    state[name].copy_(ALPHA * state[name] + (1 - ALPHA) * old)
                    slow_buffers[i, name] = state[name] if alias else state[name].clone()
                elif name in ("exp_avg", "momentum_buffer"):
                    state[name].zero_()
    return [p.detach() for p in ps]


def run(inner: str, mode: Any, steps: int) -> tuple[list[nn.Parameter], LookaheadOptimizer]:
    ps = parameters()
    optimizer = LookaheadOptimizer(INNER[inner][0](ps), k=K, alpha=ALPHA, pullback=mode)
    for step in range(1, steps + 1):
        set_gradients(ps, step)
        optimizer.step()
    return ps, optimizer


@pytest.mark.parametrize("mode", ["reset", "pullback"])
@pytest.mark.parametrize("inner", INNER)
def test_equals_the_plain_rule(inner: str, mode: str) -> None:
    ps, _ = run(inner, mode, 11)
    for p, expected in zip(ps, reference(inner, mode, 11), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("inner", INNER)
def test_slow_buffers_are_copies(inner: str) -> None:
    """An alias of the live buffer makes every pull-back after the first do nothing, and the test above fail."""
    ps, optimizer = run(inner, "pullback", 2 * K)
    for p in ps:
        entry = optimizer.state[p]
        for name in INNER[inner][1]:
            assert torch.equal(entry[name], entry[f"lookahead_slow_{name}"])
            assert entry[name].data_ptr() != entry[f"lookahead_slow_{name}"].data_ptr()
    wrong = reference(inner, "pullback", 11, alias=True)
    assert max((a - b).abs().max() for a, b in zip(wrong, reference(inner, "pullback", 11), strict=True)) > 1e-4


def test_none_keeps_no_copy_of_a_buffer() -> None:
    ps, optimizer = run("adam", "none", 4)
    assert set(optimizer.state[ps[0]]) == {"step", "exp_avg", "exp_avg_sq", "lookahead_slow", "lookahead_step"}


def test_reset_does_not_lengthen_adams_steps() -> None:
    """With the second moment cleared as well, the next step would be 0.1 / sqrt(0.001) = 3.2 times the rate."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = LookaheadOptimizer(torch.optim.Adam([p], lr=1.0), k=50, alpha=1.0, pullback="reset")
    moves = []
    for _ in range(60):
        before = p.item()
        p.grad = torch.ones(1)
        optimizer.step()
        moves.append(abs(p.item() - before))
    assert max(moves) <= 1.001
    assert moves[50] == pytest.approx(0.1, rel=0.01)  # the momentum starts again


# Not NAdam: torch loads its float32 product of momenta in the parameter's dtype.
@pytest.mark.parametrize("inner", [name for name in INNER if name != "nadam"])
def test_saved_in_mid_cycle_and_loaded_goes_on_exactly(inner: str) -> None:
    ps, optimizer = run(inner, "pullback", 4)
    saved = copy.deepcopy(([p.detach() for p in ps], optimizer.state_dict()))
    twins = [nn.Parameter(p) for p in saved[0]]
    twin = LookaheadOptimizer(INNER[inner][0](twins), k=K, alpha=ALPHA, pullback="pullback")
    twin.load_state_dict(saved[1])
    for step in range(5, 12):
        for parameters_, o in ((ps, optimizer), (twins, twin)):
            set_gradients(parameters_, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(ps, twins, strict=True))


def test_buffers_of_a_checkpoint_without_lookahead_are_where_the_slow_ones_start() -> None:
    ps = parameters()
    plain = INNER["momentum"][0](ps)
    set_gradients(ps, 1)
    plain.step()
    optimizer = LookaheadOptimizer(INNER["momentum"][0](ps), k=1, alpha=0.0, pullback="pullback")
    optimizer.load_state_dict(plain.state_dict())
    before = [plain.state[p]["momentum_buffer"].clone() for p in ps]
    set_gradients(ps, 2)
    optimizer.step()  # alpha = 0 and k = 1: back to where the copies were made
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], b) for p, b in zip(ps, before, strict=True))


@pytest.mark.parametrize("mode", ["reset", "pullback"])
def test_an_optimizer_without_buffers_is_explained(mode: Any) -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = LookaheadOptimizer(torch.optim.SGD([p], lr=0.1), k=1, pullback=mode)
    p.grad = torch.ones(1)
    with pytest.raises(ValueError, match="SGD keeps no buffers for it; use pullback='none'"):
        optimizer.step()
