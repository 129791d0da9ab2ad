"""Loss weighting on every base: two processes equal one on the union of their batches, and runs resume exactly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cells import BASES, RANK, WORLD, full_weights, make_strategy
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from kexue.strategies import LossWeighting
from kexue.strategies.loss_weighting import processes

pytestmark = pytest.mark.slow

TASKS = ("kind", "size", "noise")
REFERENCE = {"kind": 1.1, "size": 900.0, "noise": 0.05}
RULES: dict[str, dict[str, Any]] = {
    "fixed": {"weights": {"kind": 1.0, "size": 1e-3, "noise": 2.0}},
    "initial": {"reference_batches": 3},
    "prior": {"reference": REFERENCE},
    "real_time": {},
    "geometric_mean": {},
    "generalised_mean": {"gamma": 0.3},
    "uncertainty": {},
    "imtl_l": {},
    "dwa": {},
    "random": {},
    "gradient_norm": {},
    "mgda": {},
    "pcgrad": {},
    "cagrad": {},
    "imtl_g": {},
    "gradnorm": {},
    "priority": {"main": "kind"},
    "torchjd": {"aggregator": "PCGrad"},  # which draws from the global generator, another one on every process
}
STATEFUL = {
    "dwa": {},
    "uncertainty": {"smoothing": 0.8},
    "gradnorm": {"smoothing": 0.5, "every_n_steps": 2},
    "initial": {"reference_batches": 15},
    "pcgrad": {},
}


class Rows(Dataset):
    """Fixed random rows for three tasks whose losses differ by orders of magnitude; some rows have no size."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, 6, generator=generator)
        self.kind = torch.randint(0, 3, (count,), generator=generator)
        self.size = 30 * self.x.sum(1) + 5
        self.noise = 0.2 * torch.randn(count, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # In batches of 4 rows: the first of three is whole, the second lacks the odd rows, those of the second process,
        # the third has none at all.
        known = index // 4 % 3 == 0 or (index // 4 % 3 == 1 and index % 2 == 0)
        row = {"x": self.x[index], "kind": self.kind[index], "size": self.size[index], "noise": self.noise[index]}
        return {**row, "known": torch.tensor(known)}


class Tasks(pl.LightningModule):
    """Written as anyone would: an encoder, a head for all tasks, a step that returns its losses."""

    def __init__(self, dropout: float = 0.0, gaps: bool = False) -> None:
        super().__init__()
        self.gaps = gaps
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 5))
        self.seen: list[dict[str, float]] = []

    def losses_of(self, scores: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = {"kind": nn.functional.cross_entropy(scores[:, :3], batch["kind"])}
        known = batch["known"] if self.gaps else torch.ones_like(batch["known"])
        if known.any():
            losses["size"] = nn.functional.mse_loss(scores[known, 3] * 10, batch["size"][known])
        return losses | {"noise": nn.functional.mse_loss(scores[:, 4], batch["noise"])}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        scores = self.head(self.encoder(batch["x"]))
        losses = self.losses_of(scores, batch)
        return {"loss": torch.stack(list(losses.values())).sum() + 0 * scores.sum(), "losses": losses}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Offering(Tasks):
    """The same, with `task_losses`."""

    def task_losses(self, features: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.scores = self.head(features)
        return self.losses_of(self.scores, batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        losses = self.task_losses(self.encoder(batch["x"]), batch)
        return {"loss": torch.stack(list(losses.values())).sum() + 0 * self.scores.sum(), "losses": losses}


class Watch(pl.Callback):
    """Notes the weights of every batch, and saves once: in the middle of an epoch, or after the second one."""

    def __init__(self, technique: LossWeighting, save: str | None, save_at: int | None) -> None:
        self.technique, self.save, self.save_at = technique, save, save_at
        self.weights: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.weights.append(self.technique._state.weights.tolist())
        if len(self.weights) == self.save_at:
            trainer.save_checkpoint(self.save)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if self.save is not None and self.save_at is None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.save)


def train(
    base: str,
    rule: str,
    *,
    module: str = "offering",
    epochs: int | None = None,
    accumulate: int = 1,
    resume: str | None = None,
    save: str | None = None,
    save_at: int | None = None,
    local: bool = False,
    dropout: float = 0.0,
    gaps: bool = False,
    precision: Any = "32-true",
    **options: Any,
) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    pl.seed_everything(11, verbose=False)
    model = {"offering": Offering, "plain": Tasks}[module](dropout, gaps)
    technique = LossWeighting(rule, **options)
    # Gathered parameters of the small head would otherwise stay: this is stage 3 as large heads see it.
    extra = {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if base == "zero_3" else {}
    watch = Watch(technique, save, save_at)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=make_strategy(base, [technique], **extra),
        max_epochs=epochs or (3 if rule == "dwa" else 2),  # which begins in the third epoch
        accumulate_grad_batches=accumulate,
        precision=precision,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    torch.manual_seed(100 + RANK)
    rows = Rows(24)
    sampler = DistributedSampler(rows, num_replicas=WORLD, rank=RANK, shuffle=False)
    loader = DataLoader(rows, batch_size=4 // WORLD, sampler=sampler)
    whole = processes.total
    try:
        if local:  # deliberately wrong: every process goes by what it has itself
            processes.total = lambda values: values * WORLD
        trainer.fit(model, loader, ckpt_path=resume)
    finally:
        processes.total = whole
    state = {name: buffer.tolist() for name, buffer in technique._state.named_buffers()}
    return {"alphas": np.array(watch.weights), "weights": full_weights(model), "state": state}


def run_all(cells: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for key, (args, kwargs) in cells.items():
        try:
            results[key] = train(*args, **kwargs)
        except Exception as error:
            results[key] = f"{type(error).__name__}: {error}"
    return results


def distance(run: Any, reference: Any) -> tuple[float, float]:
    """The largest relative difference of the weights of losses, and the largest of the model's weights."""
    assert not isinstance(run, str), run
    assert not isinstance(reference, str), reference
    count = min(len(run["alphas"]), len(reference["alphas"]))
    a, b = run["alphas"][-count:], reference["alphas"][-count:]
    alphas = (np.abs(a - b) / np.maximum(np.abs(b), 1e-3 * np.abs(b).max(0))).max()
    return float(alphas), max(abs(run["weights"][k] - w).max() for k, w in reference["weights"].items())


# Cells that both one process and two train; each has its counterpart for `features` and `parameters`.
CELLS: dict[Any, dict[str, Any]] = {
    **{(rule, "features"): options for rule, options in RULES.items()},
    **{(rule, "parameters"): {**RULES[rule], "gradients": "parameters"} for rule in ("mgda", "pcgrad", "gradnorm")},
    **{(rule, "plain"): {**RULES[rule], "module": "plain"} for rule in ("real_time", "mgda", "priority")},
    **{(rule, "gaps"): {**RULES[rule], "gaps": True} for rule in ("real_time", "uncertainty", "mgda", "gradnorm")},
    ("uncertainty", "accumulated"): {"accumulate": 2, "smoothing": 0.5},
    ("real_time", "bf16"): {"precision": "bf16-mixed"},
    ("mgda", "bf16"): {"precision": "bf16-mixed"},
}
# What a base has to do with is the sums over processes, the gradients, and the state: DDP trains every rule, and the
# stages of ZeRO one of a kind (stages 1 and 2 differ in the gradients, which a rule sees before they are divided).
ONE_OF_A_KIND = ("real_time", "random", "uncertainty", "dwa", "mgda", "pcgrad", "gradnorm")
REFUSED = [key for key in CELLS if key[1] == "parameters" or key in (("mgda", "plain"), ("priority", "plain"))]
PAIRS = [("ddp", key) for key in CELLS]
PAIRS += [("zero_3", key) for key in CELLS if key not in REFUSED and (key[0] in ONE_OF_A_KIND or key[1] != "features")]
PAIRS += [("zero_1", ("uncertainty", "accumulated")), ("zero_1", ("mgda", "features")), ("zero_1", ("mgda", "plain"))]
PAIRS += [("zero_2", key) for key in CELLS if key[0] in ("uncertainty", "mgda") and key[1] not in ("gaps", "bf16")]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[Any, Any]]:
    cells: dict[Any, Any] = {(base, *key): ((base, key[0]), CELLS[key]) for base, key in PAIRS}
    for key in REFUSED:
        cells["zero_3", *key] = (("zero_3", key[0]), CELLS[key])
    for rule in ("real_time", "mgda"):
        cells["local", rule] = (("ddp", rule), {"local": True})
        for base in ("ddp", "zero_2", "zero_3"):
            cells["dropout", rule, base] = ((base, rule), {"dropout": 0.3})
    return run_ranks(run_all, 2, cells, timeout=800)


@pytest.fixture(scope="module")
def one_rank() -> dict[Any, Any]:
    return run_ranks(run_all, 1, {key: (("single", key[0]), options) for key, options in CELLS.items()})[0]


@pytest.mark.parametrize(("base", "key"), PAIRS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_two_processes_equal_one_on_the_union_batch(
    base: str, key: tuple[str, str], two_ranks: list[dict[Any, Any]], one_rank: dict[Any, Any]
) -> None:
    first, second = (ranks[(base, *key)] for ranks in two_ranks)
    assert distance(first, second) == (0.0, 0.0)
    alphas, weights = distance(first, one_rank[key])
    low = key[1] == "bf16"  # rounding to 8 bits happens elsewhere in half a batch
    assert alphas <= (0.2 if low else 2e-3)
    assert weights <= (0.05 if low else 2e-4)


@pytest.mark.parametrize("key", REFUSED, ids="-".join)
def test_what_stage_3_cannot_do_is_explained_before_training(
    key: tuple[str, str], two_ranks: list[dict[Any, Any]]
) -> None:
    for ranks in two_ranks:
        message = ranks[("zero_3", *key)]
        assert message.startswith("InputError: LossWeighting(")
        assert "ZeRO stage 3 divides the parameters" in message
        assert ("gradients='features'" in message) == (key[1] == "parameters")
        assert "strategy=zero_2" in message


@pytest.mark.parametrize("rule", ["real_time", "mgda"])
def test_weights_of_single_processes_would_fail_these_tests(
    rule: str, two_ranks: list[dict[Any, Any]], one_rank: dict[Any, Any]
) -> None:
    first, second = (ranks["local", rule] for ranks in two_ranks)
    assert distance(first, second)[0] > 0.01
    assert distance(first, one_rank[rule, "features"])[0] > 0.01


@pytest.mark.parametrize("rule", ["real_time", "mgda"])
@pytest.mark.parametrize("base", ["zero_2", "zero_3"])
def test_a_head_with_dropout_draws_the_same_masks(rule: str, base: str, two_ranks: list[dict[Any, Any]]) -> None:
    """Stage 3 runs the head once for every task; the masks are those of the run that is trained on."""
    alphas, weights = distance(two_ranks[0]["dropout", rule, base], two_ranks[0]["dropout", rule, "ddp"])
    assert alphas <= 1e-3
    assert weights <= 1e-4


def _resume_cells(base: str, folder: Path) -> dict[Any, Any]:
    cells: dict[Any, Any] = {}

    def add(name: str, rule: str, **options: Any) -> None:
        path, where = str(folder / f"{base}-{name}.ckpt"), options.pop("save_at", None)
        cells[base, name, "whole"] = ((base, rule), {**options, "epochs": 4, "save": path, "save_at": where})
        cells[base, name, "resumed"] = ((base, rule), {**options, "epochs": 4, "resume": path})

    # Inside an epoch and inside a window of accumulated batches.
    add("middle", "uncertainty", accumulate=4, smoothing=0.8, save_at=9)
    for rule in STATEFUL if base == "ddp" else ["gradnorm"] if base == "zero_3" else []:
        add(rule, rule, **STATEFUL[rule], dropout=0.2)
    return cells


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("resume")
    two = {key: cell for base in BASES for key, cell in _resume_cells(base, folder).items()}
    return {**run_ranks(run_all, 2, two, timeout=800)[0], **run_ranks(run_all, 1, _resume_cells("single", folder))[0]}


@pytest.mark.parametrize("base", ["single", *BASES])
def test_resumed_equals_uninterrupted_bit_for_bit(base: str, resumed: dict[Any, Any]) -> None:
    names = [name for own, name, kind in resumed if own == base and kind == "whole"]
    assert "middle" in names
    for name in names:
        after, whole = resumed[base, name, "resumed"], resumed[base, name, "whole"]
        assert len(after["alphas"]) < len(whole["alphas"]), name
        assert distance(after, whole) == (0.0, 0.0), name
        # Text, in which NaN (not known yet) equals itself.
        assert repr(after["state"]) == repr(whole["state"]), name
