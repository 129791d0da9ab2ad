"""A budget of bytes: met, at no more FLOPs than any uniform policy, and told as it is."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from kexue.errors import InputError
from kexue.nn.flops import flop_counter
from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import (
    FGM,
    ActivationCheckpointing,
    Full,
    RDrop,
    Selective,
    SingleDevice,
    cheapest,
    checkpoint_blocks,
    follow_plan,
    measured_costs,
    restore_blocks,
)
from kexue.strategies.recompute_budget import MOST_ENUMERATED, options_of, parse_budget
from kexue.strategies.recompute_plan import CallCost, Plan, ProductCost, StepCosts
from kexue.strategies.recompute_tape import needed

SHARES = (0.12, 0.25, 0.4, 0.6, 0.8)


class Alive(TorchDispatchMode):
    """Bytes of all storages made inside that are still alive, whoever holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self, module: nn.Module) -> int:
        own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
        return sum(n for key, (ref, n) in self.made.items() if key not in own and not ref.expired())


def encoder(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    config = {"vocab_size": 50, "dim": 32, "num_layers": 6, "num_heads": 4, "feedforward_dim": 128} | changes
    return Transformer(TransformerConfig(**config)).train()


IDS = torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(1))


def step(module: Transformer) -> None:
    module(IDS).square().mean().backward()


def counts(module: Transformer) -> tuple[int, int]:
    """FLOPs of a step, and bytes alive between forward and backward pass."""
    with flop_counter() as flops:
        with Alive() as alive:
            loss = module(IDS).square().mean()
            size = alive.bytes(module)
        loss.backward()
    return flops.get_total_flops(), size


def under(module: Transformer, apply: Callable[[list[nn.Module]], None]) -> tuple[int, int]:
    blocks = list(module.blocks())
    apply(blocks)
    found = counts(module)
    restore_blocks(blocks)
    return found


def planned(module: Transformer, plan: Plan) -> tuple[int, int]:
    def apply(blocks: list[nn.Module]) -> None:
        checkpoint_blocks(blocks)
        follow_plan(blocks, plan)

    return under(module, apply)


KINDS = {
    "pre": {},
    "post": {"norm": "post"},
    "tables of scores": {"attention_dropout": 0.1},
    "no attention dropout": {"attention_dropout": 0.0, "norm": "post"},
    "shared": {"sharing": "all", "num_groups": 2},
    "relative, gated": {"positions": "relative", "gated": True, "dropout": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_five_budgets_are_met_and_no_uniform_policy_is_cheaper(kind: str) -> None:
    module = encoder(**KINDS[kind])
    blocks = list(module.blocks())
    costs = measured_costs(blocks, module, lambda: step(module))
    plain_flops, plain_bytes = counts(module)
    assert costs.plain_bytes == pytest.approx(plain_bytes, rel=0.03)
    uniform = [(plain_flops, plain_bytes)]
    for policy in (Full(), Selective(), Selective("narrow")):
        for every in range(1, len(blocks) + 1):
            uniform.append(under(module, lambda b, e=every, p=policy: checkpoint_blocks(b[::e], p)))
    least = min(size for _, size in uniform)
    for share in SHARES:
        budget = max(int(share * plain_bytes), int(1.05 * least))
        plan = cheapest(costs, budget)
        flops, size = planned(module, plan)
        assert plan.kept_bytes <= budget
        assert size == pytest.approx(plan.kept_bytes, rel=0.03)
        assert 0.9 * budget <= size <= 1.03 * budget or plan.flops == 0
        assert flops - plain_flops == plan.flops
        assert flops <= min(cost for cost, kept in uniform if kept <= budget)


def random_call(generator: random.Random, products: int) -> CallCost:
    made = tuple(
        ProductCost(
            ("mm", number),
            frozenset(n for n in range(number) if generator.random() < 0.4),
            generator.randint(1, 50),
            generator.randint(1, 50),
            generator.random() < 0.9,
        )
        for number in range(products)
    )
    roots = frozenset(n for n in range(products) if generator.random() < 0.6)
    return CallCost(generator.randint(0, 3), made, roots, generator.randint(100, 300))


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_of_all_plans(seed: int) -> None:
    generator = random.Random(seed)
    calls = tuple(random_call(generator, 3) for _ in range(3))
    costs = StepCosts(("a", "b", "c", "d"), calls, base_bytes=40)

    def treatments(call: CallCost) -> list[tuple[int, int]]:
        found = [(call.plain_bytes, 0)]
        keepable = [n for n, product in enumerate(call.products) if product.keepable]
        for size in range(len(keepable) + 1):
            for kept in itertools.combinations(keepable, size):
                again, used = needed(call.roots, [p.needs for p in call.products], frozenset(kept))
                found.append((sum(call.products[n].size for n in used), sum(call.products[n].flops for n in again)))
        return found

    every = [
        (40 + sum(size for size, _ in plan), sum(flops for _, flops in plan))
        for plan in itertools.product(*map(treatments, calls))
    ]
    for budget in range(min(every)[0], costs.plain_bytes + 50, 37):
        plan = cheapest(costs, budget)
        assert plan.kept_bytes <= budget
        assert plan.flops == min(flops for size, flops in every if size <= budget)


def test_many_products_are_dropped_one_by_one() -> None:
    call = random_call(random.Random(3), 3 * MOST_ENUMERATED)
    options = options_of(call)
    assert len(options) > 5
    assert [o.flops for o in options] == sorted((o.flops for o in options), reverse=True)
    assert [o.kept_bytes for o in options] == sorted(o.kept_bytes for o in options)


def test_early_blocks_are_recomputed_first_and_the_peak_is_told() -> None:
    module = encoder()
    costs = measured_costs(list(module.blocks()), module, lambda: step(module))
    plan = cheapest(costs, int(0.7 * costs.plain_bytes))
    again = [option.again_bytes for option in plan.options]
    assert again == sorted(again, reverse=True)
    assert plan.kept_bytes <= plan.peak_bytes < costs.plain_bytes
    full = cheapest(costs, plan.costs.base_bytes)
    assert full.peak_bytes == full.kept_bytes + max(option.again_bytes for option in full.options)


def test_too_little_is_explained() -> None:
    module = encoder()
    costs = measured_costs(list(module.blocks()), module, lambda: step(module))
    with pytest.raises(InputError, match=r"0.0 MiB is too little, .* MiB is the least of .*use budget=0\.\d+ or more"):
        cheapest(costs, 1000)


@pytest.mark.parametrize(
    ("text", "size"), [(0.3, 0.3), (1, 1.0), (5000, 5000), (2e9, 2 * 10**9), ("2GiB", 2**31), ("1.5 gb", 1500000000)]
)
def test_budgets_are_a_share_or_bytes(text: Any, size: float) -> None:
    assert parse_budget(text) == size
    assert type(parse_budget(text)) is type(size)


# In a Trainer


class Module(pl.LightningModule):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = encoder(dropout=0.2, num_layers=3)
        self.automatic_optimization = not manual
        self.losses: list[float] = []

    def blocks(self) -> Any:
        return self.net.blocks()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]
            self.optimizers().zero_grad()  # type: ignore[union-attr]
        return {"loss": loss, "logits": loss[None, None].expand(4, 3)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    techniques: list[Any],
    folder: Path,
    *,
    manual: bool = False,
    max_epochs: int = 1,
    resume: Path | None = None,
    save: Path | None = None,
    **options: Any,
) -> tuple[Module, list[Tensor]]:
    module = Module(manual)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=SingleDevice(techniques),
        max_epochs=max_epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(4)
    trainer.fit(module, DataLoader(torch.randint(0, 50, (12, 16)), batch_size=4), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"manual": True}], ids=str
)
def test_a_run_plans_after_its_first_step(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    technique = ActivationCheckpointing(budget=0.4)
    plain, expected = train([], tmp_path / "plain", **options)
    module, weights = train([technique], tmp_path / "run", **options)
    assert module.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    written = json.loads((tmp_path / "run" / "recompute_plan.json").read_text())
    assert written["kept_bytes"] <= written["budget_bytes"] == int(0.4 * written["plain_bytes"])
    assert [call["block"] for call in written["calls"]] == [f"net.layers.blocks.{i}" for i in range(3)]
    assert written["recomputed_flops"] == sum(call["recomputed_flops"] for call in written["calls"])
    printed = capsys.readouterr().out
    assert "are kept for the backward pass" in printed
    assert "net.layers.blocks.0" in printed
    assert not any("forward" in vars(block) for block in module.blocks())
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("other", [FGM, RDrop])
@pytest.mark.parametrize("last", [False, True])
def test_beside_techniques_that_run_the_step_twice(other: Any, last: bool, tmp_path: Path) -> None:
    budget = ActivationCheckpointing(policy="budget", budget=0.4)
    plain, expected = train([other()], tmp_path / "plain")
    module, weights = train([other(), budget] if last else [budget, other()], tmp_path / "run")
    assert module.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    calls = json.loads((tmp_path / "run" / "recompute_plan.json").read_text())["calls"]
    assert len(calls) == (6 if last else 3)  # behind the other technique, both of its passes count


def test_offloading_on_a_cpu_warns(tmp_path: Path) -> None:
    plain, expected = train([], tmp_path)
    with pytest.warns(UserWarning, match=r"policy='offload'\) has no effect beyond policy='full' on CPUs"):
        module, weights = train([ActivationCheckpointing(policy="offload")], tmp_path)
    assert module.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_resumes_under_another_policy(tmp_path: Path) -> None:
    """A policy is no part of a checkpoint: one epoch without, then one with a budget, are two epochs without."""
    plain, expected = train([], tmp_path / "plain", max_epochs=2)
    train([], tmp_path / "first", save=tmp_path / "epoch.ckpt")
    module, weights = train(
        [ActivationCheckpointing(budget=0.4)], tmp_path, max_epochs=2, resume=tmp_path / "epoch.ckpt"
    )
    assert module.losses == plain.losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
