"""Lookahead against the rules of two other implementations, written out here, with the difference to each named.

Where the packages are installed, what is written out here is held against them.

pytorch_optimizer 4.1: equal for one process. It copies the weights when it is constructed, so that weights loaded later
are pulled half-way back, and counts steps per group, which under ZeRO stage 3 are several to a step.
timm 1.0: copies the weights at the first synchronisation, which is therefore none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.strategies import LookaheadOptimizer

INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
K, ALPHA, STEPS = 3, 0.4, 14


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in [(3, 2), (4,)]]


def set_gradients(ps: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) + 2 * p.detach()


@torch.no_grad()
def pytorch_optimizer_rule(ps: list[nn.Parameter], inner: Any, steps: range, pullback: str = "none") -> list[Tensor]:
    slow = [p.detach().clone() for p in ps]
    slow_momentum = [torch.zeros_like(p) for p in ps]
    counter = 0
    for step in steps:
        set_gradients(ps, step)
        inner.step()
        counter += 1
        if counter < K:
            continue
        counter = 0
        torch._foreach_lerp_(ps, slow, weight=1.0 - ALPHA)
        torch._foreach_copy_(slow, ps)
        if pullback == "pullback":
            buffers = [inner.state[p]["momentum_buffer"] for p in ps]
            torch._foreach_lerp_(buffers, slow_momentum, weight=1.0 - ALPHA)
            torch._foreach_copy_(slow_momentum, buffers)
        elif pullback == "reset":
            for p in ps:
                inner.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return [p.detach().clone() for p in ps]


@torch.no_grad()
def timm_rule(ps: list[nn.Parameter], inner: Any, steps: range) -> list[Tensor]:
    slow: list[Tensor] = []
    for count, step in enumerate(steps, 1):
        set_gradients(ps, step)
        inner.step()
        if count % K == 0:
            slow = slow or [p.detach().clone() for p in ps]
            for p, s in zip(ps, slow, strict=True):
                s.add_(p - s, alpha=ALPHA)
                p.copy_(s)
    return [p.detach().clone() for p in ps]


def ours(ps: list[nn.Parameter], inner: Any, steps: range, pullback: Any = "none") -> list[Tensor]:
    optimizer = LookaheadOptimizer(inner, k=K, alpha=ALPHA, pullback=pullback)
    for step in steps:
        set_gradients(ps, step)
        optimizer.step()
    return [p.detach().clone() for p in ps]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("inner", INNER)
def test_equals_pytorch_optimizer(inner: str) -> None:
    first, second = parameters(), parameters()
    mine = ours(first, INNER[inner](first), range(1, STEPS))
    assert difference(mine, pytorch_optimizer_rule(second, INNER[inner](second), range(1, STEPS))) < 1e-14


@pytest.mark.parametrize("pullback", ["reset", "pullback"])
def test_equals_pytorch_optimizers_pullback_of_sgd(pullback: str) -> None:
    first, second = parameters(), parameters()
    mine = ours(first, INNER["momentum"](first), range(1, STEPS), pullback)
    theirs = pytorch_optimizer_rule(second, INNER["momentum"](second), range(1, STEPS), pullback)
    assert difference(mine, theirs) < 1e-14


@pytest.mark.parametrize("inner", INNER)
def test_timm_is_the_inner_optimizer_for_one_cycle_and_lookahead_from_there(inner: str) -> None:
    first, second = parameters(), parameters()
    optimizer = INNER[inner](first)
    for step in range(1, K + 1):
        set_gradients(first, step)
        optimizer.step()
    mine = ours(first, optimizer, range(K + 1, STEPS))
    assert difference(mine, timm_rule(second, INNER[inner](second), range(1, STEPS))) < 1e-14
    third = parameters()
    assert difference(mine, ours(third, INNER[inner](third), range(1, STEPS))) > 1e-3


def theirs(package: str) -> Any:
    """The class of a package; of timm one file alone, since the rest asks for torchvision."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed (pip install --no-deps {package})")
    if package == "pytorch_optimizer":
        return importlib.import_module(package).Lookahead
    file = Path(found.submodule_search_locations[0]) / "optim" / "lookahead.py"
    spec = importlib.util.spec_from_file_location("timm_lookahead", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lookahead


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("package", ["pytorch_optimizer", "timm"])
def test_the_rules_are_those_of_the_packages(package: str, inner: str) -> None:
    first, second = parameters(), parameters()
    optimizer = theirs(package)(INNER[inner](first), k=K, alpha=ALPHA)
    for step in range(1, STEPS):
        set_gradients(first, step)
        optimizer.step()
    rule = pytorch_optimizer_rule if package == "pytorch_optimizer" else timm_rule
    assert difference([p.detach() for p in first], rule(second, INNER[inner](second), range(1, STEPS))) < 1e-14
