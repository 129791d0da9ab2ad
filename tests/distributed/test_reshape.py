"""A run goes on on other processes and other bases: the same losses, and every row of the epoch seen once.

The uninterrupted run has the same rows in every step on any number of processes; what differs is the order in which
float32 numbers are summed. After 8 steps losses and weights differ by at most 2e-5, the tolerance of
`test_matrix.py` between one process and two.
"""

from __future__ import annotations

import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import MODULES, RANK, WORLD, PlainModule, differences, make_strategy, run_all
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from kexue.data.sampling import LengthBucketSampler

TOLERANCE = 2e-5
BASES = ("ddp", "zero_1", "zero_2", "zero_3")
# The global batch is 6 rows on one, two and three processes; 4 batches an epoch.
COMMON = {"epochs": 2, "batch": 6, "shuffle": True}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lookahead": ("lookahead", {"optimizer": "adamw", "scheduler": True}),
    "ema": ("ema", {"optimizer": "adamw", "scheduler": True, "clip": 0.5}),
    "momentum": ("none", {"module": "momentum"}),
}
# 3 is inside an epoch and inside Lookahead's cycle of 2, 4 the end of an epoch.
SAVED_AT = (3, 4)


class Momentum(PlainModule):
    """SGD with momentum over two groups, a tied pair, a frozen layer and a buffer that moves."""

    steps: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tied = nn.Linear(16, 50, bias=False)
        self.tied.weight = self.embed.weight
        self.layers[0].inner[0].requires_grad_(False)  # type: ignore[index]
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        bias = [p for name, p in self.named_parameters() if name.endswith("bias")]  # one of them is frozen
        rest = [p for name, p in self.named_parameters() if not name.endswith("bias") and p.requires_grad]
        groups = [{"params": rest}, {"params": bias, "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


MODULES["momentum"] = Momentum


def train_all(cells: dict[Any, Any]) -> dict[Any, Any]:
    """`run_all` in a process that has read this file, with its module."""
    return run_all(cells)


def cell(base: str, recipe: str, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    technique, recipe_options = RECIPES[recipe]
    return (base, technique), {**COMMON, **recipe_options, **options}


def place(folder: Path, world: int, base: str, recipe: str, at: int) -> str:
    return str(folder / f"{world}-{base}-{recipe}-{at}.ckpt")


def saving(folder: Path, world: int, keys: list[tuple[str, str, int]]) -> dict[Any, Any]:
    """Uninterrupted runs, each saving once."""
    return {
        ("whole", world, base, recipe, at): cell(
            base, recipe, save=place(folder, world, base, recipe, at), save_at_step=at
        )
        for base, recipe, at in keys
    }


def going_on(folder: Path, before: int, keys: list[tuple[str, str, str, int]]) -> dict[Any, Any]:
    return {
        (before, source, target, recipe, at): cell(target, recipe, resume=place(folder, before, source, recipe, at))
        for source, target, recipe, at in keys
    }


def check(found: dict[Any, Any], whole: dict[Any, Any]) -> None:
    """Each resumed run against the uninterrupted one that saved its checkpoint."""
    for (before, source, target, recipe, at), run in found.items():
        reference = whole["whole", before, source, recipe, at]
        assert not isinstance(run, str), (before, source, target, recipe, at, run)
        assert len(run["losses"]) == 8 - at, (source, target, recipe, at)
        assert run["step"] == 8
        assert max(differences(run, reference)) <= TOLERANCE, (before, source, target, recipe, at)
        if recipe == "momentum":
            assert run["buffers"]["steps"] == 8


@pytest.mark.slow
def test_from_two_processes_to_one(tmp_path: Path) -> None:
    """The quick core: every base is read, a directory and a file are written to."""
    sources = [("ddp", "lookahead", 3), ("zero_2", "ema", 3), ("zero_3", "momentum", 4)]
    whole = run_ranks(train_all, 2, saving(tmp_path, 2, sources))[0]
    keys = [
        ("ddp", "single", "lookahead", 3),
        ("ddp", "zero_3", "lookahead", 3),
        ("zero_2", "single", "ema", 3),
        ("zero_3", "zero_2", "momentum", 4),
    ]
    check(run_ranks(train_all, 1, going_on(tmp_path, 2, keys))[0], whole)


ALL = [(base, recipe, at) for base in BASES for recipe in RECIPES for at in SAVED_AT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshape")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[Any, Any]:
    return run_ranks(train_all, 2, saving(folder, 2, ALL), timeout=800)[0]


@pytest.mark.slow
def test_two_to_three(folder: Path, two: dict[Any, Any]) -> None:
    keys = [(base, base, recipe, at) for base, recipe, at in ALL]
    keys += [("ddp", "zero_3", recipe, 3) for recipe in RECIPES] + [("zero_3", "ddp", recipe, 3) for recipe in RECIPES]
    check(run_ranks(train_all, 3, going_on(folder, 2, keys), timeout=800)[0], two)


@pytest.mark.slow
def test_two_to_one_and_one_to_two(folder: Path, two: dict[Any, Any]) -> None:
    keys = [(base, "single" if base == "ddp" else base, recipe, at) for base, recipe, at in ALL]
    keys += [(base, "single", recipe, 3) for base in BASES[1:] for recipe in RECIPES]
    sources = [("single" if base == "ddp" else base, recipe, at) for base, recipe, at in ALL]
    runs = run_ranks(train_all, 1, going_on(folder, 2, keys) | saving(folder, 1, sources), timeout=800)[0]
    whole = {key: run for key, run in runs.items() if key[0] == "whole"}
    check({key: run for key, run in runs.items() if key[0] != "whole"}, two)
    keys = [(source, "ddp" if source == "single" else source, recipe, at) for source, recipe, at in sources]
    keys += [("single", base, recipe, 3) for base in BASES[1:] for recipe in RECIPES]
    check(run_ranks(train_all, 2, going_on(folder, 1, keys), timeout=800)[0], whole)


@pytest.mark.slow
def test_across_bases_on_the_same_processes_bit_for_bit(folder: Path, two: dict[Any, Any]) -> None:
    keys = [
        (source, target, recipe, 3)
        for source in BASES
        for target in BASES
        for recipe in ("lookahead", "momentum")
        if source != target
    ]
    found = run_ranks(train_all, 2, going_on(folder, 2, keys), timeout=800)[0]
    check(found, two)
    for (_, source, target, recipe, at), run in found.items():
        assert differences(run, two["whole", 2, source, recipe, at]) == (0.0, 0.0), (source, target, recipe)


# Which rows are seen


class Numbers(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Tensor:
        return torch.tensor(index)


class Witness(pl.LightningModule):
    """Notes which rows it is given in each epoch."""

    def __init__(self, save_after: int | None, path: str) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.save_after, self.path = save_after, path
        self.rows: dict[int, list[list[int]]] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rows.setdefault(self.current_epoch, []).append(batch.tolist())
        return self.net(batch.float()[:, None]).mean()

    def on_train_batch_end(self, *_: Any) -> None:
        if sum(map(len, self.rows.values())) == self.save_after:
            self.trainer.save_checkpoint(self.path)
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Own(Sampler):
    """A sampler that nobody knows."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count // WORLD

    def __iter__(self) -> Any:
        return iter(range(RANK, self.count, WORLD))


def make_loader(kind: str, count: int, batch: int) -> DataLoader:
    data = Numbers(count)
    if kind == "buckets":
        lengths = [(7 * row) % 31 for row in range(count)]
        return DataLoader(data, batch_size=None, sampler=LengthBucketSampler(lengths, batch))
    if kind == "own":
        return DataLoader(data, batch_size=batch, sampler=Own(count))
    if WORLD == 1:
        return DataLoader(data, batch_size=batch, shuffle=True)
    sampler = DistributedSampler(data, num_replicas=WORLD, rank=RANK, shuffle=True, seed=3)
    return DataLoader(data, batch_size=batch, sampler=sampler)


def witness(legs: list[dict[str, Any]]) -> list[tuple[dict[int, list[list[int]]], list[str]]]:
    """Run legs; return the rows of this process by epoch and batch, and what was warned of."""
    results = []
    for leg in legs:
        pl.seed_everything(1, verbose=False)
        model = Witness(leg.get("save_after"), leg.get("save", ""))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=WORLD,
            strategy=make_strategy("single" if WORLD == 1 else "ddp", []),
            max_epochs=2,
            accumulate_grad_batches=leg.get("accumulate", 1),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, make_loader(leg["kind"], leg["count"], leg["batch"]), ckpt_path=leg.get("resume"))
        said = [str(w.message) for w in caught if "goes on elsewhere" in str(w.message)]
        results.append((model.rows, said))
    return results


def rows_of(runs: list[list[Any]], leg: int, epoch: int) -> list[int]:
    """Rows that all processes saw in an epoch of a leg."""
    return list(chain.from_iterable(batch for rank in runs for batch in rank[leg][0].get(epoch, [])))


KINDS = ("buckets", "torch")
COUNT = 61


@pytest.mark.slow
def test_every_row_is_seen_once_over_three_numbers_of_processes(tmp_path: Path) -> None:
    """2 processes with batches of 5, then 3 with batches of 4, then 1 with batches of 6, in one epoch."""
    path = {(kind, leg): str(tmp_path / f"{kind}-{leg}.ckpt") for kind in (*KINDS, "own") for leg in range(3)}
    first = [
        {"kind": kind, "count": COUNT, "batch": 5, "save_after": 2, "save": path[kind, 0]} for kind in (*KINDS, "own")
    ]
    two = run_ranks(witness, 2, first)
    second = [
        {**leg, "batch": 4, "resume": path[leg["kind"], 0], "save": path[leg["kind"], 1], "save_after": 1}
        for leg in first
    ]
    three = run_ranks(witness, 3, second)
    third = [{"kind": leg["kind"], "count": COUNT, "batch": 6, "resume": path[leg["kind"], 1]} for leg in first]
    # And once more on the processes that were there: inside an epoch that has been dealt anew.
    again = [{**leg, "save": path[leg["kind"], 2], "save_after": 2} for leg in third[:2]]
    resumed = [{**leg, "resume": path[leg["kind"], 2], "save": "", "save_after": None} for leg in again]
    one = run_ranks(witness, 1, third + again + resumed)
    for leg, _kind in enumerate(KINDS):
        before = rows_of(two, leg, 0) + rows_of(three, leg, 0)
        seen = before + rows_of(one, leg, 0)
        assert sorted(set(seen)) == list(range(COUNT))
        assert len(seen) == COUNT
        assert sorted(rows_of(one, leg, 1)) == list(range(COUNT))
        assert len(one[0][leg][0][1]) == -(-COUNT // 6)
        parts = rows_of(one, 3 + leg, 0), rows_of(one, 5 + leg, 0)
        assert parts[0]
        assert parts[1]
        assert sorted([*before, *parts[0], *parts[1]]) == list(range(COUNT))
        for runs in (three, one):
            assert all(len(rank[leg][1]) == (rank is runs[0]) for rank in runs)
            assert "random numbers" in runs[0][leg][1][0]
            assert "order of the rows" not in runs[0][leg][1][0]
    assert "some rows come twice" in three[0][2][1][0]
    assert len(rows_of(one, 2, 0)) == COUNT - 24  # 20 rows count as 1 batch of 12; with the next, 4 batches of 6


@pytest.mark.slow
def test_a_shuffling_loader_of_one_process_goes_on_on_two(tmp_path: Path) -> None:
    path = str(tmp_path / "one.ckpt")
    leg = {"kind": "torch", "count": COUNT, "batch": 4}
    one = run_ranks(witness, 1, [{**leg, "save": path, "save_after": 3, "accumulate": 2}])
    two = run_ranks(witness, 2, [{**leg, "resume": path}])
    # The third batch opened a window of two, so it comes again.
    before, after = list(chain.from_iterable(one[0][0][0][0][:2])), rows_of(two, 0, 0)
    assert sorted(set(before + after)) == list(range(COUNT))
    assert len(before + after) == COUNT + 1  # 53 rows on two processes
