"""The promises of the sampler, over many numbers of rows, processes and epochs."""

import random
from itertools import chain, product

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from kexue.data.sampling import LengthBucketSampler
from kexue.errors import InputError


def lengths_of(rows: int) -> list[int]:
    return [random.Random(row).randint(1, 300) for row in range(rows)]


def epoch_of(rows: int, batch_size: int, world: int, epoch: int = 0, **options) -> list[list[list[int]]]:
    """All batches by process and step."""
    epochs = []
    for rank in range(world):
        sampler = LengthBucketSampler(lengths_of(rows), batch_size, num_replicas=world, rank=rank, **options)
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(sampler) == len(epochs[-1])
    return epochs


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_every_row_once_and_equal_steps(world: int, shuffle: bool) -> None:
    for rows, batch_size, epoch in product([8, 9, 31, 64, 257], [1, 2, 3, 32, 1000], [0, 3]):
        epochs = epoch_of(rows, batch_size, world, epoch, shuffle=shuffle)
        batches = [batch for process in epochs for batch in process]
        assert sorted(row for batch in batches for row in batch) == list(range(rows))
        assert len({len(process) for process in epochs}) == 1
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        assert max(sizes) <= batch_size or (batch_size == 1 and max(sizes) == 2 and rows % world)
        steps = len(epochs[0])
        if batch_size > 1:  # no more steps than needed
            assert (steps - 1) * world * batch_size < rows


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_of(100, 8, 2, epoch=1, seed=5)
    random.seed(1)
    torch.manual_seed(1)
    assert epoch_of(100, 8, 2, epoch=1, seed=5) == first
    assert epoch_of(100, 8, 2, epoch=2, seed=5) != first
    assert epoch_of(100, 8, 2, epoch=1, seed=6) != first
    still = epoch_of(100, 8, 2, epoch=1, shuffle=False)
    assert epoch_of(100, 8, 2, epoch=2, shuffle=False) == still


def test_steps_hold_the_same_rows_on_any_number_of_processes() -> None:
    for rows, shuffle in product([100, 257, 1001], [True, False]):
        expected = [sorted(step[0]) for step in zip(*epoch_of(rows, 24, 1, epoch=2, shuffle=shuffle), strict=True)]
        for world in (2, 3, 4):
            epochs = epoch_of(rows, 24 // world, world, epoch=2, shuffle=shuffle)
            assert [sorted(chain(*step)) for step in zip(*epochs, strict=True)] == expected


def test_the_rest_of_an_epoch_is_dealt_to_other_processes() -> None:
    for (before, after), rows, done in product([(1, 2), (2, 1), (2, 3), (5, 2)], [31, 257], [0, 1, 3]):
        lengths = lengths_of(rows)
        olds = [LengthBucketSampler(lengths, 2, num_replicas=before, rank=rank) for rank in range(before)]
        seen = [row for sampler in olds for batch in list(sampler)[:done] for row in batch]
        news = [LengthBucketSampler(lengths, 3, num_replicas=after, rank=rank) for rank in range(after)]
        rest = news[0].rest(olds[0].plan(), done)
        dealt = [sampler.entries(rest, sampler.plan()) for sampler in news]
        assert len({len(batches) for batches in dealt}) == 1
        assert sorted(seen + [row for batches in dealt for batch in batches for row in batch]) == list(range(rows))
        # Once more, from the middle of the rest.
        seen += [row for batches in dealt for batch in batches[:1] for row in batch]
        last = LengthBucketSampler(lengths, 4, num_replicas=1, rank=0).rest(news[0].plan(), 1, rest)
        assert sorted(seen + last) == list(range(rows))


def test_a_rest_smaller_than_the_processes_leaves_none_without_a_batch() -> None:
    samplers = [LengthBucketSampler(lengths_of(9), 2, num_replicas=3, rank=rank) for rank in range(3)]
    dealt = [sampler.entries([4, 7], sampler.plan()) for sampler in samplers]
    assert [len(batches) for batches in dealt] == [1, 1, 1]
    assert {row for batches in dealt for batch in batches for row in batch} == {4, 7}


def test_batches_and_steps_hold_similar_lengths() -> None:
    lengths = lengths_of(4000)
    epochs = epoch_of(4000, 16, 4)
    padded = sum(max(lengths[row] for row in batch) * len(batch) for process in epochs for batch in process)
    assert sum(lengths) / padded > 0.95
    for step in zip(*epochs, strict=True):
        rows = [lengths[row] for batch in step for row in batch]
        assert max(rows) - min(rows) <= 60
    longest = [max(lengths[row] for row in batch) for batch in epoch_of(4000, 16, 1, shuffle=False)[0]]
    assert longest == sorted(longest, reverse=True)
    training = [max(lengths[row] for row in batch) for batch in epochs[0]]
    assert training not in (sorted(training), sorted(training, reverse=True))


def test_many_rows_are_dealt_out_at_once() -> None:
    sampler = LengthBucketSampler([row % 97 for row in range(200_000)], 32)
    assert sum(map(len, sampler)) == 200_000


def test_without_a_process_group_it_is_one_process() -> None:
    sampler = LengthBucketSampler([1] * 10, 4)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank, len(sampler)) == (1, 0, 3)


def test_the_process_group_is_asked_when_used(monkeypatch) -> None:
    sampler = LengthBucketSampler([1] * 10, 2)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    assert (sampler.num_replicas, sampler.rank, len(sampler)) == (4, 3, 2)


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(InputError, match=r"3 rows do not suffice for 4 processes; use trainer\.devices=3"):
        list(LengthBucketSampler([1] * 3, 2, num_replicas=4, rank=0))
    with pytest.raises(InputError, match="batch_size=0"):
        LengthBucketSampler([1], 0)
    with pytest.raises(InputError, match="rank the smaller"):
        LengthBucketSampler([1], 1, num_replicas=2, rank=2)
    with pytest.raises(InputError, match="give both"):
        LengthBucketSampler([1], 1, rank=0)


class Rows(Dataset):
    def __getitem__(self, indices: list[int]) -> torch.Tensor:
        return torch.tensor([[float(index)] for index in indices])

    def __len__(self) -> int:
        return 20


class Recorder(pl.LightningModule):
    """Notes the rows of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[list[float]] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen.append(batch.flatten().tolist())
        return self.layer(batch).mean()

    def predict_step(self, batch: torch.Tensor) -> list[float]:
        return batch.flatten().tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(loader: DataLoader, **options) -> tuple[pl.Trainer, Recorder]:
    recorder = Recorder()
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, **quiet, **options)
    trainer.fit(recorder, loader)
    return trainer, recorder


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_lightning_leaves_it_in_place() -> None:
    loader = DataLoader(Rows(), batch_size=None, sampler=LengthBucketSampler([1] * 20, 6, seed=2))
    trainer, recorder = fit(loader)
    first, second = recorder.seen[:4], recorder.seen[4:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(20))
    assert first != second  # set_epoch was called
    predicted = trainer.predict(recorder, loader)
    assert sorted(chain(*predicted)) == list(range(20))
    fixed = DataLoader(Rows(), batch_size=None, sampler=LengthBucketSampler([1] * 20, 6, shuffle=False))
    _, recorder = fit(fixed, overfit_batches=2)
    assert recorder.seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 2
