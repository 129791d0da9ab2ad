"""Taking a saved optimiser apart and putting it together again, without processes; and the order of rows as data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from kexue.errors import InputError
from kexue.strategies.reshape import Elements, Fragment, SavedOptimizer, shares
from kexue.strategies.resume import another_random_state, random_state, set_random_state
from kexue.strategies.row_order import entries, plan_of, rest, same_steps


def elements(*shape: int, cuts: int = 1) -> Elements:
    values = torch.arange(float(torch.Size(shape).numel()))
    return Elements(shape, values.tensor_split(cuts))


@pytest.mark.parametrize("cuts", [1, 2, 5])
def test_any_part_is_copied_out_of_any_pieces(cuts: int) -> None:
    value = elements(3, 4, cuts=cuts)
    assert torch.equal(value.whole(), torch.arange(12.0).view(3, 4))
    for start in range(12):
        for end in range(start + 1, 13):
            out = torch.full((end - start,), -1.0)
            value.copy_into(out, start)
            assert torch.equal(out, torch.arange(float(start), float(end)))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_cover_each_parameter_once(world: int) -> None:
    sizes = {"a": 5, "b": 1, "c": 12}
    size_of_flat = sum(-(-size // world) for size in sizes.values())
    for name, size in sizes.items():
        parts = [part for rank in range(world) for part in shares(sizes, rank, world) if part.name == name]
        assert [element for part in parts for element in range(part.start, part.start + part.count)] == [*range(size)]
        assert all(part.offset + part.count <= size_of_flat for part in parts)


def test_what_a_parameter_lacks_is_its_weight_or_zero() -> None:
    weights = {"a": elements(4), "b": elements(2)}
    state = {"a": {"exp_avg": elements(4), "slow": elements(4), "step": torch.tensor(3.0), "none": None}}
    saved = SavedOptimizer([{"lr": 0.5, "params": ["a", "b"]}], state)
    flat = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([flat], lr=1.0)
    flats = [(flat, [Fragment("a", 1, 3, 0), Fragment("b", 0, 2, 3)])]
    found = saved.flat_state_dict(optimizer, flats, weights, ["slow"])
    assert found["param_groups"][0]["lr"] == 0.5
    entries_of_flat = found["state"][0]
    assert entries_of_flat["exp_avg"].tolist() == [1, 2, 3, 0, 0]
    assert entries_of_flat["slow"].tolist() == [1, 2, 3, 0, 1]
    assert entries_of_flat["step"] == 3
    assert entries_of_flat["none"] is None


def test_different_steps_are_said_and_other_shapes_refused() -> None:
    flat = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([flat], lr=1.0)
    flats = [(flat, [Fragment("a", 0, 1, 0), Fragment("b", 0, 1, 1)])]
    saved = SavedOptimizer([{"params": ["a", "b"]}], {"a": {"step": 3}, "b": {"step": 5}})
    with pytest.warns(UserWarning, match="from 3 to 5"):
        assert saved.flat_state_dict(optimizer, flats, {}, [])["state"][0]["step"] == 5
    saved.state = {"a": {"row": torch.zeros(3)}, "b": {}}
    with pytest.raises(InputError, match="'row' of a has another shape"):
        saved.flat_state_dict(optimizer, flats, {}, [])


def test_other_groups_are_refused() -> None:
    model = nn.Linear(2, 2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=1.0)
    with pytest.raises(InputError, match=r"groups of \[2\] parameters, this one of \[1, 1\]"):
        SavedOptimizer([{"params": ["weight", "bias"]}]).state_dict(optimizer, names)


def test_another_process_has_random_numbers_of_its_own() -> None:
    torch.manual_seed(1)
    state, drawn = random_state(), []
    for rank in (1, 2, 1):
        set_random_state(another_random_state(state, rank))
        drawn.append(torch.rand(3).tolist())
    set_random_state(state)
    assert drawn[0] == drawn[2] != drawn[1] != torch.rand(3).tolist()


def loader(processes: int, rank: int, batch: int, rows: int = 23, **options: Any) -> DataLoader:
    sampler = DistributedSampler(range(rows), num_replicas=processes, rank=rank, **options)  # type: ignore[arg-type]
    return DataLoader(range(rows), batch_size=batch, sampler=sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", [True, False])
def test_torchs_sampler_goes_on_with_the_rows_that_are_left(shuffle: bool) -> None:
    old = [loader(2, rank, 3, shuffle=shuffle) for rank in range(2)]
    for each in old:
        each.sampler.set_epoch(4)  # type: ignore[attr-defined]
    seen = [row for each in old for batch in list(each)[:2] for row in batch.tolist()]
    new = [loader(3, rank, 2, shuffle=shuffle) for rank in range(3)]
    leg = {"plan": plan_of(old[0], 2), "batches": 2, "epoch_start": None, "reused": False}
    left = rest([leg], new[0], 3)
    assert left is not None
    assert sorted(seen + left) == list(range(23))
    dealt = [row for rank, each in enumerate(new) for batch in entries(each, left, 3, rank) for row in batch]
    assert set(dealt) == set(left)
    assert len(dealt) == 12  # 11 rows on three processes
    # 2 x 3 rows a step are 3 x 2, if there are as many steps: 23 rows make 4 either way.
    assert same_steps(plan_of(old[0], 2), plan_of(new[0], 3))
    assert not same_steps(plan_of(old[0], 2), plan_of(loader(3, 0, 3, shuffle=shuffle), 3))
    assert rest([leg], loader(3, 0, 2, rows=24, shuffle=shuffle), 3) is None  # other data


@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(data, batch_size=2, sampler=RandomSampler(data, replacement=True)),
        lambda data: DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator()),
        lambda data: DataLoader(data, batch_sampler=[[0], [1, 2]]),
        lambda data: [1, 2],
    ],
    ids=["replacement", "generator", "batches", "list"],
)
def test_an_order_that_nobody_can_make_again_is_unknown(make: Any) -> None:
    assert plan_of(make(range(9)), 1)["kind"] == "unknown"
    assert plan_of(DataLoader(range(9), batch_size=2, shuffle=True), 2)["kind"] == "unknown"  # type: ignore[arg-type]
