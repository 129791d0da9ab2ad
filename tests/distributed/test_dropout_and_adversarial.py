"""Multi-sample dropout, FGM and R-Drop on every base: the numbers of DDP, masks of each process's own, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cells import BASES, MODULES, PlainModule, Rows, differences, make_strategy, train
from ranks import run_ranks
from torch import Tensor, nn

from kexue.strategies import FGM, ActivationCheckpointing, MultiSampleDropout, RDrop, multi_sample_dropout

pytestmark = pytest.mark.slow

# Small parameters would stay whole at stage 3, and nothing would be shown.
DIVIDE = {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}}}
TECHNIQUES = {
    "multi_sample": lambda module: [MultiSampleDropout(3, 0.5, head="bert.classifier" if module == "bert" else None)],
    "fgm": lambda module: [FGM(0.5)],
    "fgm_recomputed": lambda module: [FGM(0.5), ActivationCheckpointing(blocks=MODULES[module].block_names)],
    "r_drop": lambda module: [RDrop(2.0)],
}
SEEN: list[Any] = []


class Offering(PlainModule):
    """Offers `head`, `task_losses` and logits; every process has the same random numbers in every step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(5 + batch_idx)

    @property
    def head(self) -> nn.Module:
        return self.out

    def features(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.mean(1)

    def task_losses(self, features: Tensor, batch: Any) -> dict[str, Tensor]:
        SEEN.append((features.detach() == 0).numpy())
        return {"label": nn.functional.cross_entropy(self.head(features), batch["labels"])}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = self.features(batch["ids"])
        losses = self.task_losses(features, batch)
        self.losses.append(losses["label"].item())
        return {"loss": losses["label"], "losses": losses, "logits": self.head(features)}


class Resumable(Offering):
    """The same with random numbers that go on from step to step, so that a resumed run has to restore them."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass


MODULES.update(offering=Offering, resumable=Resumable)


def run_cells(cells: dict[Any, tuple[str, str, str, dict[str, Any]]]) -> dict[Any, Any]:
    results = {}
    for key, (base, technique, module, options) in cells.items():
        SEEN.clear()
        strategy = make_strategy(base, TECHNIQUES[technique](module), **(DIVIDE if base == "zero_3" else {}))
        results[key] = train(base, module=module, stock=strategy, **options)
        results[key]["seen"] = list(SEEN)
    return results


CELLS = [
    *[("fgm", module) for module in ("plain", "shared", "bert")],
    ("fgm_recomputed", "shared"),
    ("multi_sample", "offering"),
    ("multi_sample", "bert"),
    ("r_drop", "offering"),
]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[Any, Any]]:
    options = {"optimizer": "sgd", "epochs": 1, "rows": 16}
    cells = {}
    for base in BASES:
        for technique, module in CELLS:
            dropout = 0.0 if technique.startswith("fgm") else 0.2
            cells[base, technique, module] = base, technique, module, {**options, "dropout": dropout}
    return run_ranks(run_cells, 2, cells)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
@pytest.mark.parametrize("base", BASES[1:])
def test_zero_equals_ddp(base: str, cell: tuple[str, str], two_ranks: list[dict[Any, Any]]) -> None:
    found, expected = two_ranks[0][(base, *cell)], two_ranks[0][("ddp", *cell)]
    assert differences(found, expected)[1] <= 1e-6
    assert found["losses"][-1] == pytest.approx(expected["losses"][-1], abs=1e-6)


def test_fgm_does_not_depend_on_how_the_batch_is_divided(two_ranks: list[dict[Any, Any]]) -> None:
    options = {"optimizer": "sgd", "epochs": 1, "rows": 16}
    one = run_ranks(run_cells, 1, {m: ("single", "fgm", m, options) for m in ("plain", "shared", "bert")})[0]
    for module, run in one.items():
        losses, weights = differences(two_ranks[0]["ddp", "fgm", module], run)
        assert max(losses, weights) <= 2e-5


@pytest.mark.parametrize("base", BASES)
def test_processes_draw_masks_of_their_own_from_one_seed(base: str, two_ranks: list[dict[Any, Any]]) -> None:
    first, second = (ranks[base, "multi_sample", "offering"]["seen"] for ranks in two_ranks)
    assert len(first) == len(second) == 4 * 3  # 4 batches, 3 samples
    for a, b in zip(first, second, strict=True):
        assert 0.1 < np.mean(a != b) < 0.9
    assert differences(*(ranks[base, "multi_sample", "offering"] for ranks in two_ranks)) == (0.0, 0.0)


def one_step() -> tuple[float, np.ndarray]:
    """The loss of one step under DDP and the head's weights after it."""
    run = run_cells({0: ("ddp", "multi_sample", "offering", {"optimizer": "sgd", "epochs": 1, "rows": 4})})[0]
    return run["losses"][0], run["weights"]["out.weight"]


def test_the_loss_is_the_mean_over_processes_and_samples() -> None:
    """One process computes the same from both processes' masks."""
    found, weights = run_ranks(one_step, 2)[0]
    pl.seed_everything(11, verbose=False)
    model = Offering(optimizer="sgd")
    rows = Rows(4)
    losses = []
    for rank in range(2):
        batch = {"ids": rows.ids[rank::2], "labels": rows.labels[rank::2]}
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) + rank)
        samples = multi_sample_dropout(model.features(batch["ids"]), 3, 0.5, generator)
        losses += [model.task_losses(sample, batch)["label"] for sample in samples.view(3, 2, -1)]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert found == pytest.approx(loss.item(), abs=1e-6)
    assert model.out.weight.grad is not None
    after = model.out.weight - model.lr * model.out.weight.grad
    assert abs(after.detach().numpy() - weights).max() < 1e-6


SLOW = [pytest.param(base, marks=pytest.mark.slow) for base in ("ddp", "zero_1", "zero_2")]


@pytest.mark.parametrize("base", ["single", *SLOW, "zero_3"])
def test_resumed_equals_uninterrupted_bit_for_bit(base: str, tmp_path: Path) -> None:
    options = {"optimizer": "adamw", "dropout": 0.2, "shuffle": True, "rows": 16}
    cells: dict[Any, Any] = {}
    for technique in ("multi_sample", "fgm", "r_drop"):
        path = str(tmp_path / f"{technique}.ckpt")
        cells[technique, "four"] = base, technique, "resumable", {**options, "epochs": 4}
        cells[technique, "two"] = base, technique, "resumable", {**options, "epochs": 2, "save": path}
        cells[technique, "resumed"] = base, technique, "resumable", {**options, "epochs": 4, "resume": path}
        path = str(tmp_path / f"{technique}-mid.ckpt")
        saving = {**options, "epochs": 4, "save": path, "save_at_step": 6, "max_steps": 7}
        cells[technique, "mid"] = base, technique, "resumable", saving
        cells[technique, "resumed mid-epoch"] = base, technique, "resumable", {**options, "epochs": 4, "resume": path}
    runs = run_ranks(run_cells, 1 if base == "single" else 2, cells)[0]
    for technique in ("multi_sample", "fgm", "r_drop"):
        for point in ("resumed", "resumed mid-epoch"):
            assert differences(runs[technique, point], runs[technique, "four"]) == (0.0, 0.0), (technique, point)
