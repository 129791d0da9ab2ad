"""Rows by first-fit, and batches that hold every token of every example exactly once."""

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from kexue.data.base import HostList, KexueDataModule
from kexue.data.packing import PackingCollator, even_fit, first_fit, packed_shape, padding_ratio
from kexue.errors import InputError
from kexue.strategies import SingleDevice


def lengths_of(count: int, longest: int = 60, seed: int = 0) -> list[int]:
    random_ = random.Random(seed)
    return [random_.randint(1, longest) for _ in range(count)]


def plain_first_fit(lengths: list[int], budget: int) -> list[list[int]]:
    """The textbook's loop: (row, offset) of each sequence."""
    starts, used = [[0, 0] for _ in lengths], []
    for sequence in sorted(range(len(lengths)), key=lambda sequence: (-lengths[sequence], sequence)):
        for row in range(len(used) + 1):
            if row == len(used):
                used.append(0)
            if used[row] + lengths[sequence] <= budget:
                starts[sequence] = [row, used[row]]
                used[row] += lengths[sequence]
                break
    return starts


CASES = [(count, budget, seed) for count in (1, 2, 7, 32, 100) for budget in (60, 61, 128, 10_000) for seed in (0, 1)]


@pytest.mark.parametrize(("count", "budget", "seed"), CASES)
def test_first_fit_is_the_textbook_loop(count: int, budget: int, seed: int) -> None:
    lengths = lengths_of(count, seed=seed)
    assert first_fit(lengths, budget).tolist() == plain_first_fit(lengths, budget)


@pytest.mark.parametrize("fit", [first_fit, even_fit])
@pytest.mark.parametrize(("count", "budget", "seed"), CASES)
def test_rows_are_filled_without_gap_or_overlap(fit, count: int, budget: int, seed: int) -> None:
    lengths = np.array(lengths_of(count, seed=seed))
    starts = fit(lengths, budget)
    rows, width = packed_shape(starts, lengths)
    assert set(starts[:, 0]) == set(range(rows))
    for row in range(rows):
        taken = [range(offset, offset + n) for (at, offset), n in zip(starts, lengths, strict=True) if at == row]
        tokens = sorted(chain(*taken))
        assert tokens == list(range(len(tokens)))
        assert len(tokens) <= width <= budget
    assert fit(lengths.tolist(), budget).tolist() == starts.tolist()


@pytest.mark.parametrize(("count", "budget", "seed"), CASES)
def test_even_rows_are_no_more_and_no_longer(count: int, budget: int, seed: int) -> None:
    lengths = np.array(lengths_of(count, seed=seed))
    plain, even = (packed_shape(fit(lengths, budget), lengths) for fit in (first_fit, even_fit))
    assert even[0] <= plain[0]
    assert even[1] <= plain[1]
    assert even[1] >= max(lengths.max(), lengths.sum() / even[0])


def test_even_rows_share_what_is_left_over() -> None:
    lengths = np.full(128, 10)
    assert packed_shape(first_fit(lengths, 512), lengths) == (3, 510)
    assert packed_shape(even_fit(lengths, 512), lengths) == (3, 430)


def test_ties_keep_the_order() -> None:
    assert first_fit([4, 4, 4], 8).tolist() == [[0, 0], [0, 4], [1, 0]]
    assert first_fit([2, 3, 2, 3], 5).tolist() == [[0, 3], [0, 0], [1, 3], [1, 0]]


def test_a_sequence_that_fills_the_budget_fits_and_a_longer_one_is_named() -> None:
    assert first_fit([3, 8], 8).tolist() == [[1, 0], [0, 0]]
    with pytest.raises(InputError, match=r"sequence 1 of the batch has 9 tokens and a row budget=8; set budget=9"):
        even_fit([3, 9], 8)


def test_nothing_and_empty_sequences_have_a_place() -> None:
    assert first_fit([], 4).shape == even_fit([], 4).shape == (0, 2)
    assert even_fit([0, 4, 0], 4).tolist() == [[0, 4], [0, 0], [0, 4]]
    assert packed_shape(even_fit([0, 0], 4), np.array([0, 0])) == (1, 0)


def test_many_sequences_take_little_time() -> None:
    lengths = np.array(lengths_of(3000))
    starts = even_fit(lengths, 512)
    rows, width = packed_shape(starts, lengths)
    assert rows * width < 1.01 * lengths.sum()


def test_padding_ratio() -> None:
    batches = [[1, 3], [4, 4]]
    assert padding_ratio(batches) == (2 * 3 + 2 * 4) / 12
    assert padding_ratio(batches, budget=4) == 1
    assert padding_ratio(batches, budget=8) == 1
    assert padding_ratio([[3, 2, 2]], budget=4) == 8 / 7


def example(index: int, length: int) -> dict[str, Any]:
    """Tokens that say where they come from: 100 * example + position."""
    ids = [100 * index + position for position in range(length)]
    return {
        "text": f"text {index}",
        "ids": ids,
        "labels": torch.tensor(ids) + 1 if ids else torch.tensor([], dtype=torch.long),
        "segments": np.array(ids, dtype=np.int32) % 2,
        "weights": np.array(ids) / 2,
        "kept": [token % 3 == 0 for token in ids],
        "score": index / 4,
        "category": index,
        "box": np.full((2, 3), index),
        "spans": [(0, 1)] * index,
    }


PADDING = {"ids": 7, "labels": -100, "segments": 0, "weights": 0.5, "kept": False}
LENGTHS = [3, 9, 1, 4, 4, 2, 8]


def test_every_token_exactly_once() -> None:
    examples = [example(index, length) for index, length in enumerate(LENGTHS)]
    batch = PackingCollator(12, PADDING)(examples)
    assert next(iter(batch)) == "lengths"
    assert batch["ids"].shape == (3, 11)  # 31 tokens
    real = batch["sequences"] != 0
    assert real.sum() == batch["num_tokens"] == sum(LENGTHS)
    assert sorted(batch["ids"][real].tolist()) == sorted(chain(*(given["ids"] for given in examples)))
    for given, (row, start), length in zip(examples, batch["starts"].tolist(), batch["lengths"], strict=True):
        place = row, slice(start, start + length)
        for name in PADDING:
            assert batch[name][place].tolist() == list(given[name])
        assert batch["positions"][place].tolist() == list(range(length))
        assert len(set(batch["sequences"][place].tolist())) == 1
    for name, padding in PADDING.items():
        assert set(batch[name][~real].tolist()) <= {padding}
    assert not batch["positions"][~real].any()
    for row in batch["sequences"]:  # 1, 2, ... from the left, then padding
        numbers = row[row != 0]
        assert row[: len(numbers)].tolist() == sorted(numbers.tolist())
        assert set(numbers.tolist()) == set(range(1, int(numbers.max()) + 1))


def test_types_and_order_of_the_fields() -> None:
    examples = [example(index, length) for index, length in enumerate(LENGTHS)]
    batch = PackingCollator(12, PADDING)(examples)
    types = {name: batch[name].dtype for name in (*PADDING, "sequences", "positions", "starts", "lengths")}
    assert types.pop("weights") == torch.float32
    assert types.pop("kept") == torch.bool
    assert set(types.values()) == {torch.int64}
    assert batch["lengths"].tolist() == LENGTHS
    assert batch["category"].tolist() == list(range(7))
    assert batch["score"].dtype == torch.float32
    assert batch["box"].shape == (7, 2, 3)
    assert batch["box"][:, 0, 0].tolist() == list(range(7))
    assert batch["text"] == HostList(f"text {index}" for index in range(7))
    assert batch["spans"] == HostList(given["spans"] for given in examples)


def test_one_row_is_as_long_as_its_tokens() -> None:
    batch = PackingCollator(512, {"ids": 0})([{"ids": [1, 2]}, {"ids": [3, 4, 5]}])
    assert batch["ids"].tolist() == [[3, 4, 5, 1, 2]]
    assert batch["sequences"].tolist() == [[1, 1, 1, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["starts"].tolist() == [[0, 3], [0, 0]]


def test_empty_sequences_take_no_room() -> None:
    batch = PackingCollator(4, PADDING)([example(index, length) for index, length in enumerate([0, 3, 0])])
    assert batch["ids"].tolist() == [[100, 101, 102]]
    assert batch["lengths"].tolist() == [0, 3, 0]
    assert PackingCollator(4, {"ids": 0})([{"ids": []}, {"ids": []}])["ids"].shape == (1, 0)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"ids": [1] * 9, "labels": [1] * 9}], "sequence 0 of the batch has 9 tokens and a row budget=8"),
        (
            [{"ids": [1, 2], "labels": [1]}],
            "example 0 of the batch has ids of 2, labels of 1; give ids, labels",
        ),
        ([{"ids": [1], "labels": [1]}, {"ids": [1]}], "example 1 of the batch has ids of 1; give ids, labels"),
        (
            [{"ids": [[1]], "labels": [1]}],
            r"ids is int64 of shape \(1, 1\); with padding=0 it takes one int64",
        ),
        ([{"ids": [1], "labels": [0.5]}], r"labels is float64 of shape \(1,\); with padding=-100 it takes one int64"),
        ([{"ids": [1], "labels": [1], "starts": 0}], "the fields ids, labels, starts; .* none of them sequences"),
        ([{"ids": [1], "labels": [1], "x": 0}, {"ids": [1], "labels": [1]}], "give all examples the same ones"),
        (
            [{"ids": [1], "labels": [1], "x": np.zeros(n)} for n in (1, 2)],
            r"field x has shapes \(1,\), \(2,\) in one batch; name it in padding if",
        ),
        ([{"ids": [1], "labels": [1], "x": x} for x in (1, None)], r"field x has shapes \(\), object in one batch"),
    ],
)
def test_wrong_examples_are_explained(examples: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackingCollator(8, {"ids": 0, "labels": -100})(examples)


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(InputError, match=r"PackingCollator\(budget=0\): use 1 or more"):
        PackingCollator(0, {"ids": 0})
    with pytest.raises(InputError, match="name the fields of tokens, as in"):
        PackingCollator(8, {})
    with pytest.raises(InputError, match="none of them sequences, positions"):
        PackingCollator(8, {"ids": 0, "positions": 0})


class Examples(KexueDataModule):
    """Numbered examples of different lengths."""

    def prepare(self) -> None: ...

    def model_arguments(self) -> dict[str, Any]:
        return {}

    def read_split(self, split: str) -> list[dict[str, Any]]:
        return [{"ids": [index] * length, "number": index} for index, length in enumerate(lengths_of(40))]

    def collator(self) -> PackingCollator:
        return PackingCollator(64, {"ids": -1})

    def length(self, record: dict[str, Any]) -> int:
        return len(record["ids"])


def test_worker_processes_give_the_same_batches() -> None:
    alone, helped = (list(Examples(8, num_workers=workers).train_dataloader()) for workers in (0, 2))
    assert len(alone) == 5
    for one, other in zip(alone, helped, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


class Recorder(pl.LightningModule):
    """Notes the ids of every step, and saves where it is told to."""

    def __init__(self, save_at: int = 0, path: Any = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.save_at, self.path = save_at, path
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.seen.append(batch["ids"].tolist())
        return self.layer(batch["ids"].float().mean()[None]).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-5)


def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path) -> None:
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    runs = []
    for save_at, resume in ((7, None), (0, tmp_path / "seven.ckpt")):
        runs.append(Recorder(save_at, tmp_path / "seven.ckpt"))
        trainer = pl.Trainer(accelerator="cpu", max_epochs=2, strategy=SingleDevice(), **quiet)
        trainer.fit(runs[-1], datamodule=Examples(8), ckpt_path=resume)
    whole, resumed = (run.seen for run in runs)
    assert len(whole) == 10
    assert resumed == whole[7:]
