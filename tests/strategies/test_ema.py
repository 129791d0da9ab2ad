"""The average of the weights against the formula, torch's own, and what may happen to a step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import MODULES, loader
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kexue.errors import InputError
from kexue.strategies import EMA, Lookahead, LookaheadOptimizer, SingleDevice, ema_decay, ema_update, load_weights

INNER: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "lookahead": lambda p: LookaheadOptimizer(torch.optim.Adam(p, lr=0.01), k=3),
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


def averages(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    return [optimizer.state[p]["ema"] for p in model.parameters()]


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_equals_the_formula(inner: str, warmup: bool) -> None:
    model = net()
    optimizer = EMA(decay=0.8, warmup=warmup).wrap_optimizer(INNER[inner](model.parameters()))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(1, 12):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        decay = 0.0 if step == 1 else 0.8
        if warmup and step > 1:
            decay = min(0.8, (1 + (step - 1)) / (10 + (step - 1)))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
        for found, e in zip(averages(optimizer, model), expected, strict=True):
            torch.testing.assert_close(found, e, rtol=0, atol=1e-15)


def test_equals_torch_bit_for_bit() -> None:
    model = net().float()
    optimizer = EMA(decay=0.9, warmup=False).wrap_optimizer(INNER["adam"](model.parameters()))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(20):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(step))).sum().backward()
        optimizer.step()
        theirs.update_parameters(model)
    for found, expected in zip(averages(optimizer, model), theirs.module.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_training_does_not_notice() -> None:
    models = net(), net()
    optimizers = EMA().wrap_optimizer(INNER["adam"](models[0].parameters())), INNER["adam"](models[1].parameters())
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_warm_up_and_its_end() -> None:
    assert [ema_decay(step, 0.999) for step in (1, 2, 11)] == pytest.approx([0, 2 / 11, 11 / 20])
    assert ema_decay(9 * 999, 0.999) == pytest.approx(0.999)
    assert ema_decay(10_000, 0.999) == 0.999
    assert [ema_decay(step, 0.999, warmup=False) for step in (1, 2)] == [0, 0.999]


def test_parameters_count_their_own_steps() -> None:
    """One without a gradient has no state, which Adam takes as the sign that its own is still to be made."""
    first, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = EMA(decay=0.5, warmup=False).wrap_optimizer(torch.optim.Adam([first, late], lr=1.0))
    for step in range(4):
        first.grad = torch.ones(2)
        late.grad = torch.ones(2) if step >= 2 else None
        optimizer.step()
        assert ("ema" in optimizer.state[late]) == (step >= 2)
    torch.testing.assert_close(optimizer.state[first]["ema"], torch.tensor([-3.125] * 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.state[late]["ema"], torch.tensor([-1.5] * 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflow_prevents_does_not_count(fused: bool) -> None:
    model = net().float()
    optimizer = EMA().wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((2, 4), value)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert {entry["ema_step"] for entry in optimizer.state.values()} == {steps}


@pytest.mark.parametrize("inner", INNER)
def test_saved_and_loaded_goes_on_exactly(inner: str) -> None:
    runs = []
    for seed in (0, 1):
        model = net(seed)
        runs.append((model, EMA(decay=0.9).wrap_optimizer(INNER[inner](model.parameters()))))
    for step in range(1, 12):
        if step == 6:
            saved = copy.deepcopy([part.state_dict() for part in runs[0]])
            for part, state in zip(runs[1], saved, strict=True):
                part.load_state_dict(state)
        for model, optimizer in runs if step >= 6 else runs[:1]:
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    for a, b in zip(averages(*runs[0][::-1]), averages(*runs[1][::-1]), strict=True):
        assert torch.equal(a, b)


def test_memory_and_work() -> None:
    """One copy of the parameters, and one operation for all of them."""
    model = net()
    optimizer = EMA().wrap_optimizer(INNER["sgd"](model.parameters()))
    backward(model, 0)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert {e.key: e.count for e in profile.key_averages()}["aten::_foreach_lerp_"] == 1
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    assert held == sum(p.numel() for p in model.parameters())


def test_bare_function() -> None:
    average = [torch.zeros(2)]
    ema_update(average, [torch.ones(2)], 0.75)
    assert average[0].tolist() == [0.25, 0.25]
    ema_update([], [], 0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_wrong_decay(decay: float) -> None:
    with pytest.raises(InputError, match="from 0 to below 1"):
        EMA(decay=decay)


def trainer_with(strategy: Any, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, **(options | {"enable_checkpointing": False} | kwargs)
    )


def test_half_precision_weights_are_refused() -> None:
    trainer = trainer_with(SingleDevice([EMA()]), precision="bf16-true", max_steps=1)
    with pytest.raises(InputError, match="bf16-mixed"):
        trainer.fit(MODULES["plain"](), loader(0, 1, 8, 4))


def test_one_set_of_weights_to_evaluate() -> None:
    with pytest.raises(InputError, match="choose one"):
        SingleDevice([Lookahead(), EMA()])
    model = MODULES["plain"]()
    trainer_with(SingleDevice([Lookahead(k=2, evaluate="fast"), EMA()]), max_epochs=1).fit(model, loader(0, 1, 8, 4))


def test_accumulation_counts_windows_and_the_hook_goes(tmp_path: Path) -> None:
    technique, model = EMA(decay=0.5), MODULES["plain"]()
    trainer = trainer_with(SingleDevice([technique]), max_epochs=1, accumulate_grad_batches=4)
    trainer.fit(model, loader(0, 1, 24, 4))
    (optimizer,) = trainer.optimizers
    assert {entry["ema_step"] for entry in optimizer.state.values()} == {2}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    exported = load_weights(tmp_path / "a.ckpt")
    assert all(torch.equal(exported[name], p) for name, p in model.named_parameters())
    optimizer.step()
    assert {entry["ema_step"] for entry in optimizer.state.values()} == {2}
