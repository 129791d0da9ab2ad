"""Policies of recomputation over two processes: the numbers of plain training on every base, one plan on all ranks."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import BASES, MODULES, RANK, WORLD, _mean_over_ranks, differences, full_weights, loader, make_strategy
from ranks import run_ranks

from kexue.strategies import ActivationCheckpointing

pytestmark = pytest.mark.slow

POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "selective": {"policy": "selective"},
    "narrow, every second": {"policy": "selective", "keep": "narrow", "every": 2},
    "offload": {"policy": "offload"},
    "budget": {"policy": "budget", "budget": 0.6},
}
CELLS = [("plain", policy) for policy in POLICIES] + [(module, "budget") for module in ("shared", "bert")]
CELLS += [("transformer", policy) for policy in ("full", "selective", "budget")]


def train(base: str, module: str, policy: str | None) -> dict[str, Any]:
    """Train a cell; ranks draw different dropout masks."""
    pl.seed_everything(11, verbose=False)
    options = {"config": {"num_layers": 2}} if module == "transformer" else {}
    model = MODULES[module](dropout=0.2, **options)
    techniques: list[Any] = []
    if policy is not None:
        techniques = [ActivationCheckpointing(blocks=model.block_names, **POLICIES[policy])]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=WORLD,
            strategy=make_strategy(base, techniques),
            max_epochs=2,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        torch.manual_seed(100 + RANK)
        trainer.fit(model, loader(RANK, WORLD, 24, 4))
        written = sorted(Path(folder).glob("recompute_plan.json"))
        saved = json.loads(written[0].read_text()) if written else None
    plan = getattr(techniques[0], "_plan", None) if techniques else None
    return {
        "losses": _mean_over_ranks(model.losses, WORLD),
        "weights": full_weights(model),
        "plan": None if plan is None else plan.as_dict(),
        "saved": saved,
    }


def train_all(cells: list[Any]) -> dict[Any, Any]:
    warnings.filterwarnings("ignore")
    results: dict[Any, Any] = {}
    for cell in cells:
        try:
            results[cell] = train(*cell)
        except Exception as error:
            results[cell] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    plain = [(module, None) for module in dict.fromkeys(module for module, _ in CELLS)]
    cells = [(base, *cell) for base in BASES for cell in plain + CELLS]
    return run_ranks(train_all, 2, cells, timeout=800)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
@pytest.mark.parametrize("base", BASES)
def test_equal_to_plain_training(base: str, cell: tuple[str, str], ranks: list[dict[Any, Any]]) -> None:
    for results in ranks:
        assert differences(results[(base, *cell)], results[base, cell[0], None]) == (0.0, 0.0)


@pytest.mark.parametrize("module", ["plain", "shared", "bert", "transformer"])
@pytest.mark.parametrize("base", BASES)
def test_one_plan_on_all_ranks(base: str, module: str, ranks: list[dict[Any, Any]]) -> None:
    first, second = (results[base, module, "budget"] for results in ranks)
    assert first["plan"] == second["plan"] == first["saved"]
    assert second["saved"] is None
    assert first["plan"]["kept_bytes"] <= first["plan"]["budget_bytes"]
    assert first["plan"]["kept_bytes"] < first["plan"]["plain_bytes"]
    # ZeRO stage 3 computes with gathered weights and adds biases apart: other operations, the same choice.
    on_ddp = ranks[0]["ddp", module, "budget"]["plan"]
    for name in ("kept_bytes", "again_bytes", "recomputed_flops"):
        assert [call[name] for call in first["plan"]["calls"]] == [call[name] for call in on_ddp["calls"]]


def plan_of(folder: str) -> Any:
    """The plan of a run whose ranks have batches of different sizes."""
    model = MODULES["plain"]()
    technique = ActivationCheckpointing(blocks=model.block_names, policy="budget", budget=0.6)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=make_strategy("ddp", [technique]),
        max_steps=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, loader(RANK, WORLD, 24, 4 if RANK else 16))
    assert technique._plan is not None
    return technique._plan.as_dict()


def test_the_largest_batch_decides(tmp_path: Path) -> None:
    first, second = run_ranks(plan_of, 2, str(tmp_path))
    assert first == second
    (alone,) = run_ranks(plan_of, 1, str(tmp_path))
    assert first["plain_bytes"] == pytest.approx(alone["plain_bytes"] / 2, rel=1e-3)
