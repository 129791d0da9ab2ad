"""Lookahead against a plain loop, its formulas, and the ways in which other implementations go wrong."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import MODULES, loader
from torch import Tensor, nn

from kexue.strategies import Lookahead, LookaheadOptimizer, SingleDevice, lookahead_sync

INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def backward(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
    loss.backward()
    return loss


def reference(inner: str, k: int, alpha: float, steps: int) -> list[Tensor]:
    """The paper's loop, written plainly."""
    model = net()
    optimizer = INNER[inner](model.parameters())
    slow = [p.detach().clone() for p in model.parameters()]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if step % k == 0:
            with torch.no_grad():
                for p, phi in zip(model.parameters(), slow, strict=True):
                    phi += alpha * (p - phi)
                    p.copy_(phi)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("inner", INNER)
def test_equals_the_plain_loop(inner: str, k: int, alpha: float) -> None:
    model = net()
    optimizer = LookaheadOptimizer(INNER[inner](model.parameters()), k=k, alpha=alpha)
    for step in range(1, 12):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    for p, expected in zip(model.parameters(), reference(inner, k, alpha, 11), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


def test_first_sync_counts_from_the_weights_before_the_first_step() -> None:
    """A slow copy made at the first sync instead makes that sync do nothing."""
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = LookaheadOptimizer(torch.optim.SGD([p], lr=0.1), k=1, alpha=0.5)
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == pytest.approx(0.95)


def test_noise_free_quadratic_shrinks_by_the_closed_form() -> None:
    rate, curvature, k, alpha = 0.1, 2.0, 5, 0.5
    p = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = LookaheadOptimizer(torch.optim.SGD([p], lr=rate), k=k, alpha=alpha)
    for _ in range(3 * k):
        p.grad = curvature * p.detach().clone()
        optimizer.step()
    r = 1 - rate * curvature
    assert p.item() == pytest.approx(3.0 * (1 - alpha * (1 - r**k)) ** 3, rel=1e-12)


def test_noisy_quadratic_has_the_steady_variance_of_the_paper() -> None:
    """As a share of SGD's: alpha^2 (1 - r^2k) / (alpha^2 (1 - r^2k) + 2 alpha (1 - alpha) (1 - r^k)), after syncs."""
    rate, curvature, k, alpha, runs = 0.2, 1.0, 5, 0.5, 40_000
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(runs, dtype=torch.float64))
    optimizer = LookaheadOptimizer(torch.optim.SGD([p], lr=rate), k=k, alpha=alpha)
    for _ in range(20 * k):
        p.grad = curvature * p.detach() + torch.randn(runs, dtype=torch.float64)
        optimizer.step()
    r = 1 - rate * curvature
    sgd = rate**2 / (1 - r**2)
    share = alpha**2 * (1 - r ** (2 * k))
    expected = sgd * share / (share + 2 * alpha * (1 - alpha) * (1 - r**k))
    assert p.detach().var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / runs))


def test_closures_run_the_backward_pass_inside_the_step() -> None:
    model = net()
    optimizer = LookaheadOptimizer(INNER["adam"](model.parameters()), k=3, alpha=0.5)
    for step in range(1, 12):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            return backward(model, step)

        assert optimizer.step(closure) is not None
    for p, expected in zip(model.parameters(), reference("adam", 3, 0.5, 11), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


def test_parameters_that_join_late_or_skip_steps_count_their_own() -> None:
    first, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = LookaheadOptimizer(torch.optim.SGD([first, frozen], lr=1.0), k=2, alpha=0.5)
    first.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(2)
    optimizer.step()  # first: -2, synced to -1; late: -1, one step
    assert first.tolist() == [-1.0, -1.0]
    assert late.tolist() == [-1.0, -1.0]
    first.grad = None
    optimizer.step()  # late: -2, synced to -1; first does not move
    assert first.tolist() == [-1.0, -1.0]
    assert late.tolist() == [-1.0, -1.0]
    assert frozen.tolist() == [1.0, 1.0]
    assert "lookahead_slow" not in optimizer.state.get(frozen, {})


@pytest.mark.parametrize("inner", INNER)
def test_saved_in_mid_cycle_and_loaded_goes_on_exactly(inner: str) -> None:
    model = net()
    optimizer = LookaheadOptimizer(INNER[inner](model.parameters()), k=5)
    for step in range(1, 8):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    twin = net(seed=1)
    twin_optimizer = LookaheadOptimizer(INNER[inner](twin.parameters()), k=5)
    twin.load_state_dict(saved[0])
    twin_optimizer.load_state_dict(saved[1])
    for step in range(8, 17):
        for m, o in ((model, optimizer), (twin, twin_optimizer)):
            o.zero_grad()
            backward(m, step)
            o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_without_slow_weights_starts_them_from_the_loaded_ones() -> None:
    """A copy made in the constructor would pull the loaded model half-way back to its random start."""
    model = net()
    plain = INNER["adam"](model.parameters())
    backward(model, 1)
    plain.step()
    twin = net(seed=1)
    optimizer = LookaheadOptimizer(INNER["adam"](twin.parameters()), k=1, alpha=0.0)
    twin.load_state_dict(model.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    backward(twin, 2)
    optimizer.step()  # alpha = 0 and k = 1: back to where the slow copy was made
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_is_an_optimizer_for_schedulers_and_scalers() -> None:
    model = net().float()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = LookaheadOptimizer(inner, k=1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(torch.full((2, 4), float("inf"))).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # gradients are not finite: the step, and with it the sync, is skipped
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not any("lookahead_step" in state for state in optimizer.state.values())
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.05)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]


def test_memory_is_one_copy_of_the_parameters() -> None:
    model = net()
    optimizer = LookaheadOptimizer(INNER["sgd"](model.parameters()), k=2)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    assert held == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sync_takes_as_few_calls_as_the_device_likes(device: str) -> None:
    """Beside the CPU all tensors of a dtype go at once; on it each goes through the cache on its own."""
    shapes = [((3,), torch.float32), ((2,), torch.float64), ((1,), torch.float32)]
    fast = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    slow = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    with torch.profiler.profile() as profile:
        lookahead_sync(fast, slow, 0.25)
    calls = {event.key: event.count for event in profile.key_averages()}
    if device == "meta":
        assert calls["aten::_foreach_lerp_"] == 2
        assert calls["aten::_foreach_copy_"] == 2
    else:
        assert calls["aten::lerp_"] == 3
        assert all(t.eq(0.25).all() for t in fast + slow)


def test_sync_goes_through_large_and_strided_tensors_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = [torch.randn(7, 5), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)]
    slow = [torch.randn(7, 5), torch.randn(2, 3, 4, 5)]
    expected = [torch.lerp(s, f, 0.3) for f, s in zip(fast, slow, strict=True)]
    monkeypatch.setattr("kexue.strategies.swap.PIECE", 4)
    lookahead_sync(fast, slow, 0.3)
    assert all(torch.equal(t, e) for t, e in zip(fast + slow, expected + expected, strict=True))


@pytest.mark.parametrize("closure", [False, True])
def test_parameters_without_gradients_are_never_copied(closure: bool) -> None:
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = LookaheadOptimizer(torch.optim.Adam([used, unused]), k=2)

    def backward_once() -> Tensor:
        optimizer.zero_grad()
        loss = (used - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        if closure:
            optimizer.step(backward_once)
        else:
            backward_once()
            optimizer.step()
    assert optimizer.state[used]["lookahead_step"] == 3
    assert unused not in optimizer.state


def test_a_closure_called_many_times_a_step_counts_once() -> None:
    model = net()
    optimizer = LookaheadOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4), k=2, alpha=0.0)
    start = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 1)

    optimizer.step(closure)
    assert not all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
    optimizer.step(closure)  # alpha = 0: back to where the first step began
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))


def test_a_step_that_a_scaler_skips_moves_no_counter() -> None:
    model = net().float()
    optimizer = LookaheadOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), k=2, alpha=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    start = [p.detach().clone() for p in model.parameters()]
    for value in (1.0, float("inf"), 1.0):  # the second step is skipped, so the third is the one that synchronises
        optimizer.zero_grad()
        scaler.scale(model(torch.full((2, 4), value)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        back = [torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True)]
        assert not any(back) or optimizer.state[next(model.parameters())]["lookahead_step"] == 2
    assert all(back)


def test_slow_weights_are_there_inside_the_context_only() -> None:
    model = net()
    optimizer = LookaheadOptimizer(INNER["adam"](model.parameters()), k=5)
    start = [p.detach().clone() for p in model.parameters()]
    with optimizer.slow_weights():  # none yet: the weights are what they are
        assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    fast = [p.detach().clone() for p in model.parameters()]
    with optimizer.slow_weights():
        assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
    assert all(torch.equal(p, f) for p, f in zip(model.parameters(), fast, strict=True))


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"k": -1}, {"alpha": -0.1}, {"alpha": 1.1}, {"pullback": "zero"}, {"evaluate": "both"}]
)
def test_values_out_of_range_say_what_is_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"use (1 or more|a number from 0 to 1|'none', 'reset' or|'fast' or 'slow')"):
        Lookahead(**wrong)


class Unfreeze(pl.callbacks.BaseFinetuning):
    """Lets the embedding train from the second epoch on, in a parameter group of its own."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.embed)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.embed, optimizer)


def test_a_group_added_in_the_middle_of_a_run() -> None:
    """By a callback of Lightning, to the wrapped optimiser."""

    class FreeFirst(MODULES["plain"]):  # type: ignore[misc, name-defined]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, fused=True)

    model = FreeFirst()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=SingleDevice([Lookahead(k=4)]),
        max_epochs=3,
        callbacks=[Unfreeze()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = model.embed.weight.detach().clone()
    trainer.fit(model, loader(0, 1, 12, 4))
    state = trainer.optimizers[0].state
    assert len(trainer.optimizers[0].param_groups) == 2
    assert state[model.out.weight]["lookahead_step"] == 9
    late = state[model.embed.weight]  # it took 6 of the 9 steps, so its copy moved once, from where it started
    assert late["lookahead_step"] == 6
    assert not torch.equal(model.embed.weight, start)
    assert not torch.equal(model.embed.weight, late["lookahead_slow"])  # which holds the fast ones after the fit


def test_copies_and_pickles_step_on_their_own() -> None:
    model = net()
    optimizer = LookaheadOptimizer(INNER["adam"](model.parameters()), k=2)
    backward(model, 1)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert isinstance(twin, LookaheadOptimizer)
        assert (twin.k, twin.alpha, twin.pullback) == (2, 0.5, "none")
        parameters = twin.param_groups[0]["params"]
        for p, own in zip(parameters, model.parameters(), strict=True):
            assert p is not own
            p.grad = torch.ones_like(p)
        twin.step()
        assert twin.state[parameters[0]]["lookahead_step"] == 2
        assert torch.equal(parameters[0], twin.state[parameters[0]]["lookahead_slow"])
    assert optimizer.state[next(model.parameters())]["lookahead_step"] == 1
