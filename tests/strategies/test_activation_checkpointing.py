"""Activation checkpointing: the same numbers, less stored, nothing renamed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kexue.errors import InputError
from kexue.strategies import checkpoint_blocks, find_blocks, restore_blocks


class Block(nn.Module):
    def __init__(self, dim: int, dropout: float = 0.1, batch_norm: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm = nn.BatchNorm1d(dim) if batch_norm else nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0, extra: Tensor | None = None) -> tuple[Tensor, None]:
        self.calls += 1
        hidden = self.dropout(nn.functional.gelu(self.up(self.norm(x))))
        return x + scale * self.down(hidden), None


class Net(nn.Module):
    def __init__(self, depth: int = 12, shared: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.layers = nn.ModuleList([Block(16, **kwargs) for _ in range(1 if shared else depth)])
        self.depth = depth

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(self.depth):
            x, _ = self.layers[i % len(self.layers)](x, scale=0.5, extra=None)
        return x


def step(net: Net, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """One training step under a fixed seed; returns loss, gradients, buffers, and bytes saved for backward."""
    torch.manual_seed(5)
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    net.zero_grad()
    x = torch.randn(32, 16)
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        loss = net(x).float().pow(2).mean()
    loss.backward()
    return {
        "loss": loss.item(),
        "grads": [p.grad.clone() for p in net.parameters() if p.grad is not None],
        "buffers": {name: b.clone() for name, b in net.named_buffers()},
        "bytes": sum(saved.values()),
        "noise": torch.rand(3),
    }


def pair(**kwargs: Any) -> tuple[Net, Net]:
    torch.manual_seed(0)
    plain = Net(**kwargs)
    recomputed = copy.deepcopy(plain)
    checkpoint_blocks(recomputed.blocks())
    return plain, recomputed


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["loss"] == b["loss"]
    assert all(torch.equal(x, y) for x, y in zip(a["grads"], b["grads"], strict=True))
    assert all(torch.equal(a["buffers"][name], b["buffers"][name]) for name in a["buffers"])
    assert torch.equal(a["noise"], b["noise"])  # the stream of random numbers goes on where it would have


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["plain", "shared", "batch_norm", "frozen_embedding"])
def test_loss_gradients_statistics_and_random_numbers_are_equal(kind: str, dtype: torch.dtype | None) -> None:
    plain, recomputed = pair(shared=kind == "shared", batch_norm=kind == "batch_norm")
    if kind == "frozen_embedding":
        for net in (plain, recomputed):
            net.embed.requires_grad_(False)
    for _ in range(2):
        assert_equal(step(plain, dtype), step(recomputed, dtype))


def test_without_the_random_state_the_same_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import kexue.strategies.recompute_policies as module

    plain, recomputed = pair(dropout=0.5)
    original = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: original(*a, preserve_rng_state=False, **k))
    with pytest.raises(AssertionError):
        assert_equal(step(plain), step(recomputed))


def test_a_spectral_norm_in_a_module_that_is_moved_iterates_once() -> None:
    """Moving replaces its vectors, as a strategy does after techniques have been attached."""
    torch.manual_seed(0)
    x, found = torch.randn(4, 8, dtype=torch.float64), []
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    for recomputed in (False, True):
        block = copy.deepcopy(layer)
        if recomputed:
            checkpoint_blocks([block])
        block.double()
        block(x).square().sum().backward()
        found.append([*block.buffers(), *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_frozen_statistics_batch_norm_would_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    import kexue.strategies.recompute_policies as module

    plain, recomputed = pair(batch_norm=True)
    monkeypatch.setattr(module, "FrozenStatistics", lambda *_: nullcontext())
    with pytest.raises(AssertionError):
        assert_equal(step(plain), step(recomputed))


def test_stored_bytes_and_flops() -> None:
    plain, recomputed = pair(depth=12)
    assert step(plain)["bytes"] >= 5 * step(recomputed)["bytes"]
    flops = []
    for net in (plain, recomputed):
        with FlopCounterMode(display=False) as counter:
            step(net)
        flops.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        x = torch.randn(32, 16)
        for block in plain.blocks():
            x, _ = block(x)
    # A block is two equal matrix products. Recomputation stops at the last tensor that the backward pass needs, which
    # is the second product's input.
    assert flops[1] - flops[0] == forward.get_total_flops() // 2


def test_two_calls_a_step_in_training_and_one_otherwise() -> None:
    _, net = pair(depth=3)
    step(net)
    assert [block.calls for block in net.blocks()] == [2, 2, 2]
    net(torch.randn(2, 16)).sum()
    assert [block.calls for block in net.blocks()] == [3, 3, 3]
    with torch.no_grad():
        net(torch.randn(2, 16))
    net.eval()(torch.randn(2, 16)).sum().backward()
    assert [block.calls for block in net.blocks()] == [5, 5, 5]


def test_nothing_is_renamed_and_it_comes_off_again() -> None:
    plain, recomputed = pair()
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in recomputed.named_modules()]
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in recomputed.named_parameters()]
    assert all(isinstance(block, Block) for block in recomputed.blocks())
    recomputed.load_state_dict(plain.state_dict(), strict=True)
    for clone in (copy.deepcopy(recomputed), pickle.loads(pickle.dumps(recomputed))):
        assert_equal(step(clone), step(plain))
        assert clone.layers[0].calls == 2  # the copy recomputes its own blocks, not the original's
        plain.layers[0].calls = 0
    with pytest.raises(ValueError, match="checkpointed already"):
        checkpoint_blocks(recomputed.blocks())
    restore_blocks(recomputed.blocks())
    assert not any("forward" in block.__dict__ for block in recomputed.blocks())


def test_blocks_are_found_by_method_class_name_and_pattern() -> None:
    net = Net(depth=3)
    expected = list(net.layers)
    for which in (None, Block, "Block", "layers.*", ["layers.0", "layers.[12]"]):
        assert find_blocks(net, which) == expected
    assert find_blocks(nn.Sequential(net, net), Net) == [net]  # shared: one entry
    with pytest.raises(InputError, match=r"nothing in Net matches.*'Block'"):
        find_blocks(net, "BertLayer")
    with pytest.raises(InputError, match=r"has no blocks\(\)"):
        find_blocks(nn.Sequential(net))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_compiled_blocks_give_the_same_numbers(batch_norm: bool) -> None:
    plain, recomputed = pair(depth=2, dropout=0.0, batch_norm=batch_norm)
    compiled = torch.compile(recomputed, backend="aot_eager")
    torch.manual_seed(5)
    x = torch.randn(32, 16)
    for net in (plain, compiled):
        net(x).pow(2).mean().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    for a, b in zip(plain.buffers(), recomputed.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
