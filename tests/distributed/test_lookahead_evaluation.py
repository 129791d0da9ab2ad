"""Lookahead evaluates and saves its slow weights, on every base, and training does not notice.

k = 4 and a validation after each of 12 steps: most of them, and the checkpoint after step 6, lie inside a cycle.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cells import RANK, WORLD, PlainModule, differences, full_weights, loader, make_strategy
from ranks import run_ranks
from torch.optim import Optimizer

from kexue.strategies import Lookahead, LookaheadOptimizer, load_weights
from kexue.strategies.lookahead import SLOW

pytestmark = pytest.mark.slow

# Parameters that are gathered for every use, in several sub-groups, each stepped on its own; stage 3 keeps a model as
# small as this one gathered otherwise.
SHARDED = {"sub_group_size": 500, "config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
BASES: dict[str, dict[str, Any]] = {
    "ddp": {"base": "ddp"},
    "zero_1": {"base": "zero_1"},
    "zero_2": {"base": "zero_2"},
    "zero_3_sharded": {"base": "zero_3", "strategy": SHARDED},
}
MORE: dict[str, dict[str, Any]] = {
    "zero_3": {"base": "zero_3"},
    "zero_2_offload": {"base": "zero_2", "strategy": {"offload_optimizer": True}},
    "zero_3_offload": {"base": "zero_3", "strategy": {"offload_optimizer": True, "offload_parameters": True}},
    "ddp_bf16": {"base": "ddp", "precision": "bf16-true"},
    "zero_2_bf16": {"base": "zero_2", "precision": "bf16-true"},
    "zero_3_bf16": {"base": "zero_3", "precision": "bf16-true", "strategy": SHARDED},
}
VARIANTS = BASES | MORE
on_all = pytest.mark.parametrize("variant", [*BASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
K, SAVED_AT, STEPS = 4, 6, 12


class Validated(PlainModule):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.validations: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = torch.nn.functional.cross_entropy(self(batch["ids"]).float(), batch["labels"])
        self.validations.append(loss.item())

    test_step = validation_step


class SaveAt(pl.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.path)


class CopiesBeforeSharding(LookaheadOptimizer):
    """Deliberately wrong: it copies the parameters that it is constructed with."""

    def __init__(self, inner: Optimizer, k: int, alpha: float) -> None:
        super().__init__(inner, k, alpha)
        self.copies = [p.detach().clone() for group in inner.param_groups for p in group["params"]]
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        result = self.inner.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            with torch.no_grad():
                parameters = [p for group in self.param_groups for p in group["params"]]
                for p, copy in zip(parameters, self.copies, strict=True):
                    copy.lerp_(p, self.alpha)
                    p.copy_(copy)
        return result


class OneCounter(LookaheadOptimizer):
    """Deliberately wrong: it counts its calls, which ZeRO makes for each sub-group."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._look(taking := [], fresh := {})
        self.inner.step()
        for p, entry in taking:
            if entry is None:
                self.inner.state[p].update(fresh[id(p)])
        self.count += 1
        if self.count % self.k == 0:
            self._synchronise([p for group in self.param_groups for p in group["params"]])
        return result


WRONG = {"copies": CopiesBeforeSharding, "counter": OneCounter}


class Wrong(Lookahead):
    def __init__(self, which: str) -> None:
        super().__init__(k=K, evaluate="fast")
        self.which = which

    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        return WRONG[self.which](optimizer, k=K, alpha=0.5)


def fit(
    base: str,
    *,
    validate: bool = False,
    save: str | None = None,
    resume: str | None = None,
    steps: int = STEPS,
    precision: Any = "32-true",
    strategy: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    dropout: float = 0.2,
    wrong: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    pl.seed_everything(11, verbose=False)
    model = Validated(optimizer=optimizer, dropout=dropout)
    technique = Lookahead(k=K, **options) if wrong is None else Wrong(wrong)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=make_strategy(base, [technique], **(strategy or {})),
        max_steps=steps,
        precision=precision,
        val_check_interval=1 if validate else None,
        limit_val_batches=1.0 if validate else 0,
        callbacks=[] if save is None else [SaveAt(save)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    torch.manual_seed(100 + RANK)
    # An iterator over a loader draws a number; here not from the generator that the dropout masks come from.
    evaluation = loader(0, 1, 8, 8, generator=torch.Generator())
    trainer.fit(model, loader(RANK, WORLD, 24, 4), evaluation, ckpt_path=resume)
    result: dict[str, Any] = {"losses": model.losses, "validations": model.validations, "weights": full_weights(model)}
    states = [entry for optimizer in technique._optimizers for entry in optimizer.state.values()]
    result["copied"] = sum(entry[SLOW].numel() for entry in states if SLOW in entry)
    trainer.test(model, evaluation, verbose=False)
    result["test"] = model.validations[-1]
    return result


def fit_all(folder: str, variants: list[str]) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for variant in variants:
        options, path = VARIANTS[variant], f"{folder}/{variant}.ckpt"
        cells: dict[str, dict[str, Any]] = {
            "slow": {},
            "validated": {"validate": True, "save": path},
            "fast": {"evaluate": "fast"},
            "synced": {"evaluate": "fast", "steps": K},
            "resumed slow": {"resume": path},
            "resumed fast": {"resume": path, "evaluate": "fast"},
            "short slow": {"steps": SAVED_AT},
            "short fast": {"steps": SAVED_AT, "evaluate": "fast"},
        }
        if "precision" not in options:
            cells |= {mode: {"pullback": mode} for mode in ("pullback", "reset")}
        if variant in BASES:
            cells |= {which: {"optimizer": "sgd", "wrong": which} for which in WRONG}
            cells["right"] = {"optimizer": "sgd"}
        for name, cell in cells.items():
            try:
                results[variant, name] = fit(**(options | cell))
            except Exception as error:
                results[variant, name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lookahead")


@pytest.fixture(scope="module")
def base_runs(folder: Path) -> dict[Any, Any]:
    return run_ranks(fit_all, 2, str(folder), list(BASES), timeout=800)[0]


@pytest.fixture(scope="module")
def more_runs(folder: Path) -> dict[Any, Any]:
    return run_ranks(fit_all, 2, str(folder), list(MORE), timeout=800)[0]


@pytest.fixture
def runs(variant: str, base_runs: dict[Any, Any], request: pytest.FixtureRequest) -> dict[Any, Any]:
    return base_runs | (request.getfixturevalue("more_runs") if variant in MORE else {})


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


@on_all
def test_training_does_not_notice(variant: str, runs: dict[Any, Any]) -> None:
    """Neither validations and checkpoints inside a cycle nor the choice of weights change a bit."""
    slow, validated, fast = (runs[variant, name] for name in ("slow", "validated", "fast"))
    assert len(slow["losses"]) == STEPS
    assert slow["losses"] == validated["losses"] == fast["losses"]
    assert equal(slow["weights"], validated["weights"])


@on_all
def test_validation_sees_the_slow_weights(variant: str, runs: dict[Any, Any]) -> None:
    """They stand still inside a cycle: the start up to step 3, then the weights of the last synchronisation."""
    found = runs[variant, "validated"]["validations"][:STEPS]
    for start, stop in ((0, K - 1), (K - 1, 2 * K - 1), (2 * K - 1, 3 * K - 1)):
        assert len(set(found[start:stop])) == 1
    assert len(set(found)) == 4
    assert runs[variant, "validated"]["test"] == found[-1]


@on_all
def test_the_checkpoint_holds_the_slow_weights(variant: str, runs: dict[Any, Any], folder: Path) -> None:
    """Step 6 is inside a cycle that began at step 4, when slow and fast were equal."""
    exported = load_weights(folder / f"{variant}.ckpt")
    low = "precision" in VARIANTS[variant]  # stage 3 exports its float32 weights
    exported = {name: (w.bfloat16() if low else w).float().numpy() for name, w in exported.items()}
    assert equal(exported, runs[variant, "synced"]["weights"])


@pytest.mark.parametrize("evaluate", ["slow", "fast"])
@on_all
def test_resumed_inside_a_cycle_goes_on_exactly(variant: str, evaluate: str, runs: dict[Any, Any]) -> None:
    resumed, whole = runs[variant, f"resumed {evaluate}"], runs[variant, evaluate]
    assert resumed["losses"] == whole["losses"][SAVED_AT:]
    assert equal(resumed["weights"], whole["weights"])


@on_all
def test_the_fit_leaves_the_weights_asked_for(variant: str, runs: dict[Any, Any]) -> None:
    """After 6 steps, inside a cycle; 12 end with a synchronisation, where the two are equal."""
    slow, fast = runs[variant, "short slow"], runs[variant, "short fast"]
    assert equal(slow["weights"], runs[variant, "synced"]["weights"])
    assert not equal(fast["weights"], slow["weights"])
    assert fast["test"] != slow["test"]
    assert equal(runs[variant, "slow"]["weights"], runs[variant, "fast"]["weights"])


@pytest.mark.parametrize("mode", ["slow", "pullback", "reset", "short slow", "short fast"])
@pytest.mark.parametrize(
    "variant",
    ["zero_1", "zero_2", "zero_3_sharded"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("zero_3", "zero_2_offload", "zero_3_offload")],
)
def test_zero_equals_ddp(variant: str, mode: str, runs: dict[Any, Any]) -> None:
    assert max(differences(runs[variant, mode], runs["ddp", mode])) <= 1e-6
    if mode in ("pullback", "reset"):
        assert differences(runs[variant, mode], runs[variant, "slow"])[1] > 1e-4


@on_all
def test_a_process_copies_what_it_holds(variant: str, runs: dict[Any, Any]) -> None:
    total = sum(weight.size for weight in runs[variant, "slow"]["weights"].values())
    held = total if VARIANTS[variant]["base"] == "ddp" else total / 2
    assert held <= runs[variant, "slow"]["copied"] <= held + 20  # parts are padded to a common size


def test_one_process_goes_on_where_two_stopped(tmp_path: Path) -> None:
    """After step 6, the end of an epoch and the middle of a cycle."""
    path = str(tmp_path / "two.ckpt")
    whole = run_ranks(fit, 2, "ddp", dropout=0.0, save=path)[0]
    resumed = run_ranks(fit, 1, "single", dropout=0.0, resume=path)[0]
    assert len(resumed["losses"]) == STEPS - SAVED_AT
    assert max(np.abs(resumed["weights"][name] - whole["weights"][name]).max() for name in whole["weights"]) <= 2e-5


def test_wrong_rules_are_found_out(base_runs: dict[Any, Any]) -> None:
    """What the test above guards against. Both rules are right where there is one process, or DDP."""
    right = base_runs["ddp", "right"]
    for which in WRONG:
        assert max(differences(base_runs["ddp", which], right)) <= 1e-6
    for base in ("zero_1", "zero_2", "zero_3_sharded"):
        assert max(differences(base_runs[base, "right"], right)) <= 1e-6
        wrong = base_runs[base, "copies"]
        assert isinstance(wrong, str) or differences(wrong, right)[1] > 1e-4
    assert differences(base_runs["zero_3_sharded", "counter"], right)[1] > 1e-4
