"""EMA on every base: the same average, evaluated, saved and resumed, while training does not notice."""

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

from kexue.strategies import EMA, load_weights

pytestmark = pytest.mark.slow

# Several sub-groups, each stepped on its own, of parameters that are gathered for every use.
SHARDED = {"sub_group_size": 500, "config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
OFFLOADED = {"offload_optimizer": True}
BASES: dict[str, dict[str, Any]] = {
    "ddp": {"base": "ddp"},
    "zero_1": {"base": "zero_1"},
    "zero_2": {"base": "zero_2"},
    "zero_3": {"base": "zero_3"},
    "zero_3_sharded": {"base": "zero_3", "strategy": SHARDED},
}
MORE: dict[str, dict[str, Any]] = {
    "zero_2_offload": {"base": "zero_2", "strategy": OFFLOADED},
    "zero_3_offload": {"base": "zero_3", "strategy": OFFLOADED | {"offload_parameters": True}},
    "zero_2_bf16": {"base": "zero_2", "precision": "bf16-true"},
    "zero_3_bf16": {"base": "zero_3", "precision": "bf16-true", "strategy": SHARDED},
}
VARIANTS = BASES | MORE
on_all = pytest.mark.parametrize("variant", [*BASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
DECAY, SAVED_AT, STEPS = 0.6, 5, 12


class Validated(PlainModule):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dropout=0.2, **kwargs)
        self.validations: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validations.append(torch.nn.functional.cross_entropy(self(batch["ids"]).float(), batch["labels"]).item())

    test_step = validation_step


class Watch(pl.Callback):
    """Notes the weights that train after every step, and saves once."""

    def __init__(self, save: str | None) -> None:
        self.save, self.weights = save, []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(full_weights(pl_module))
            if self.save is not None and trainer.global_step == SAVED_AT:
                trainer.save_checkpoint(self.save)


def fit(
    base: str,
    *,
    techniques: bool = True,
    validate: bool = False,
    save: str | None = None,
    resume: str | None = None,
    precision: Any = "32-true",
    strategy: dict[str, Any] | None = None,
    accumulate: int = 1,
) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    pl.seed_everything(11, verbose=False)
    model, watch = Validated(), Watch(save)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=make_strategy(base, [EMA(DECAY)] if techniques else [], **(strategy or {})),
        max_epochs=2,
        precision=precision,
        accumulate_grad_batches=accumulate,
        val_check_interval=1 if validate else None,
        limit_val_batches=1.0 if validate else 0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    torch.manual_seed(100 + RANK)
    evaluation = loader(0, 1, 8, 8, generator=torch.Generator())
    trainer.fit(model, loader(RANK, WORLD, 24, 4), evaluation, ckpt_path=resume)
    result = {"losses": model.losses, "validations": model.validations, "weights": full_weights(model)}
    result["trained"] = watch.weights
    trainer.test(model, evaluation, verbose=False)
    result["test"] = model.validations[-1]
    return result


def fit_all(folder: str, variants: list[str]) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for variant in variants:
        path = f"{folder}/{variant}.ckpt"
        cells: dict[str, dict[str, Any]] = {
            "plain": {"techniques": False},
            "ema": {},
            "validated": {"validate": True, "save": path},
            "resumed": {"resume": path},
            "accumulated": {"accumulate": 4},
        }
        for name, cell in cells.items():
            try:
                results[variant, name] = fit(**(VARIANTS[variant] | cell))
            except Exception as error:
                results[variant, name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ema")


@pytest.fixture(scope="module")
def base_runs(folder: Path) -> dict[Any, Any]:
    return run_ranks(fit_all, 2, str(folder), list(BASES), timeout=800)[0]


@pytest.fixture(scope="module")
def more_runs(folder: Path) -> dict[Any, Any]:
    return run_ranks(fit_all, 2, str(folder), list(MORE), timeout=800)[0]


@pytest.fixture
def runs(variant: str, base_runs: dict[Any, Any], request: pytest.FixtureRequest) -> dict[Any, Any]:
    return base_runs | (request.getfixturevalue("more_runs") if variant in MORE else {})


def average(weights: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The formula, in float64, over the weights after each step."""
    result = {name: w.astype(np.float64) for name, w in weights[0].items()}
    for step, after in enumerate(weights[1:], 1):
        decay = min(DECAY, (1 + step) / (10 + step))
        result = {name: decay * result[name] + (1 - decay) * after[name] for name in result}
    return result


def gap(found: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(np.asarray(found[name]) - expected[name]).max()) for name in expected)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


@on_all
def test_the_fit_leaves_the_average(variant: str, runs: dict[Any, Any]) -> None:
    tolerance = 1e-6 if "precision" not in VARIANTS[variant] else 2e-2  # bf16 shows the float32 average rounded
    found = runs[variant, "ema"]
    assert gap(found["weights"], average(found["trained"])) <= tolerance
    assert gap(found["weights"], found["trained"][-1]) > 1e-3
    accumulated = runs[variant, "accumulated"]
    assert len(accumulated["trained"]) == 4  # windows of 4 and of 2 batches in each of 2 epochs
    assert gap(accumulated["weights"], average(accumulated["trained"])) <= tolerance


@on_all
def test_training_does_not_notice(variant: str, runs: dict[Any, Any]) -> None:
    plain, ema, validated = (runs[variant, name] for name in ("plain", "ema", "validated"))
    assert len(plain["losses"]) == STEPS
    assert plain["losses"] == ema["losses"] == validated["losses"]
    assert all(equal(a, b) for a, b in zip(plain["trained"], validated["trained"], strict=True))
    assert equal(ema["weights"], validated["weights"])


@on_all
def test_validation_sees_the_average(variant: str, runs: dict[Any, Any]) -> None:
    """After every step: the first average is the weights of the first step, then it moves in each."""
    found = runs[variant, "validated"]["validations"]
    model = Validated()
    model.eval()
    batch = next(iter(loader(0, 1, 8, 8)))
    for step in (1, 2, 7, STEPS) if "precision" not in VARIANTS[variant] else ():
        weights = average(runs[variant, "validated"]["trained"][:step])
        model.load_state_dict({name: torch.from_numpy(w).float() for name, w in weights.items()})
        model.validation_step(batch, 0)
        assert found[step - 1] == pytest.approx(model.validations[-1], abs=1e-6)
    assert len(set(found[:STEPS])) == STEPS
    assert runs[variant, "validated"]["test"] == found[STEPS - 1]


@on_all
def test_the_checkpoint_exports_the_average(variant: str, runs: dict[Any, Any], folder: Path) -> None:
    exported = {name: w.float().numpy() for name, w in load_weights(folder / f"{variant}.ckpt").items()}
    tolerance = 1e-6 if "precision" not in VARIANTS[variant] else 2e-2
    assert gap(exported, average(runs[variant, "validated"]["trained"][:SAVED_AT])) <= tolerance


@on_all
def test_resumed_goes_on_exactly(variant: str, runs: dict[Any, Any]) -> None:
    resumed, whole = runs[variant, "resumed"], runs[variant, "ema"]
    assert resumed["losses"] == whole["losses"][SAVED_AT:]
    assert equal(resumed["weights"], whole["weights"])


@on_all
def test_zero_equals_ddp(variant: str, runs: dict[Any, Any]) -> None:
    if "precision" in VARIANTS[variant]:
        pytest.skip("bf16 parameters round differently")
    for cell in ("ema", "accumulated"):
        assert max(differences(runs[variant, cell], runs["ddp", cell])) <= 1e-6
