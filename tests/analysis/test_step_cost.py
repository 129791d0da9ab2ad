"""Counting live steps: against hand counts, the autograd graph itself, and the project's own recomputation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kexue.analysis.step_cost import StepCounter, count_steps, state_values
from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import LookaheadOptimizer, checkpoint_blocks, restore_blocks

CONFIG = TransformerConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, feedforward_dim=64, dropout=0.0)


def encoder(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(CONFIG, **changes)).train()


def run(module: nn.Module, batch: Any) -> Callable[[], None]:
    return lambda: module(batch).square().sum().backward()


def saved_in_graph(loss: Tensor, module: nn.Module) -> int:
    """Bytes of all storages that the nodes of a graph hold, without those of parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    held: dict[int, int] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved") else None
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                    held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def test_hand_count() -> None:
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    with StepCounter(module) as counter:
        module(torch.randn(5, 16)).sum().backward()
    assert counter.flops == 2 * 5 * (2 * 16 * 32 + 3 * 32 * 8)  # the input has no gradient
    assert counter.saved_bytes == 4 * 5 * (16 + 32 + 32)


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, {"positions": "relative"}, {"attention": "elu"}], ids=str)
def test_saved_bytes_are_those_in_the_graph(changes: dict[str, Any]) -> None:
    module, ids = encoder(**changes), torch.randint(0, 50, (2, 16))
    with StepCounter(module) as counter:
        module(ids).square().sum()
    loss = module(ids).square().sum()
    assert counter.saved_bytes == pytest.approx(saved_in_graph(loss, module), rel=0.01)


def test_full_recomputation_is_that_of_the_project() -> None:
    module, ids = encoder(norm="post"), torch.randint(0, 50, (2, 16))
    with StepCounter(module, module.blocks(), "full") as ours:
        run(module, ids)()
    blocks = list(module.blocks())
    checkpoint_blocks(blocks)
    with StepCounter(module) as projects:
        run(module, ids)()
    restore_blocks(blocks)
    assert (ours.flops, ours.saved_bytes) == (projects.flops, projects.saved_bytes)


def test_recomputation_trades_bytes_for_flops_and_changes_no_gradient() -> None:
    module, ids = encoder(), torch.randint(0, 50, (2, 16))
    gradients = {}
    for recompute in ("off", "selective", "full"):
        module.zero_grad()
        with StepCounter(module, module.blocks(), recompute):
            run(module, ids)()
        gradients[recompute] = [parameter.grad for parameter in module.parameters()]
    for recompute in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["off"], gradients[recompute], strict=True))
    costs = count_steps(run(module, ids), module, list(module.blocks()))
    assert costs["off"].flops == costs["selective"].flops < costs["full"].flops
    assert costs["off"].saved_bytes > costs["selective"].saved_bytes > costs["full"].saved_bytes
    assert costs["off"].again_bytes == 0 < costs["selective"].again_bytes < costs["full"].again_bytes
    assert costs["full"].peak_bytes < costs["off"].peak_bytes
    assert all("forward" not in vars(block) for block in module.blocks())


def test_fake_tensors_give_the_same_counts() -> None:
    real = encoder()
    expected = count_steps(run(real, torch.randint(0, 50, (2, 16))), real, list(real.blocks()))
    with FakeTensorMode():
        fake = encoder()
        assert count_steps(run(fake, torch.randint(0, 50, (2, 16))), fake, list(fake.blocks())) == expected


def test_fused_dropout_keeps_no_tables() -> None:
    module, ids = encoder(attention_dropout=0.1), torch.randint(0, 50, (2, 64))
    plain = count_steps(run(module, ids), module)["off"]
    fused = count_steps(run(module, ids), module, fused_dropout=True)["off"]
    assert plain.saved_bytes - fused.saved_bytes > 3 * 2 * 4 * 64 * 64 * 4  # layers, rows, heads, a table each
    without = encoder()
    assert fused == count_steps(run(without, ids), without)["off"]


def test_counter_leaves_nothing_behind_after_an_error() -> None:
    module = encoder()
    attend = nn.functional.scaled_dot_product_attention
    with pytest.raises(ValueError, match="stop"), StepCounter(module, module.blocks(), "full", fused_dropout=True):
        raise ValueError("stop")
    assert nn.functional.scaled_dot_product_attention is attend
    assert all("forward" not in vars(block) for block in module.blocks())


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p, lr=0.1), 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
    ],
)
def test_state_values(make: Callable[..., torch.optim.Optimizer], values: int) -> None:
    assert state_values([make(nn.Linear(3, 4).parameters())]) == values


def test_state_values_with_groups_and_lookahead() -> None:
    first, second = nn.Linear(8, 9, bias=False), nn.Linear(8, 3, bias=False)
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "momentum": 0.9}]
    assert state_values([torch.optim.SGD(groups, lr=0.1)]) == 3 / 12
    assert state_values([torch.optim.AdamW(first.parameters())], lambda inner: LookaheadOptimizer(inner, k=5)) == 3
