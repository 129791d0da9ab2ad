"""The collectives of CPU processes against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks


def collect(seed: int) -> dict[str, Any]:
    """Gather and reduce-scatter with ours and torch's, at once and asynchronously."""
    import torch
    import torch.distributed as dist

    from kexue.strategies import gloo

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed + rank)
    part, whole = torch.randn(5, 2), torch.randn(5 * world, 2)
    found: dict[str, Any] = {}
    for asynchronous in (False, True):
        for name, module in (("ours", gloo), ("torch", dist)):
            gathered, reduced = torch.empty(5 * world, 2), torch.empty(5, 2)
            for work in (
                module.all_gather_into_tensor(gathered, part, async_op=asynchronous),
                module.reduce_scatter_tensor(reduced, whole.clone(), async_op=asynchronous),
            ):
                if asynchronous:
                    work.wait()
            found[f"{name} {asynchronous}"] = (gathered.tolist(), reduced.tolist())
    in_place = torch.full((world,), -1.0)
    in_place[rank] = rank
    gloo.all_gather_into_tensor(in_place, in_place[rank : rank + 1])
    found["in place"] = in_place.tolist()
    average = torch.empty(1)
    gloo.reduce_scatter_tensor(average, torch.arange(world, dtype=torch.float32) + rank, op=dist.ReduceOp.AVG)
    found["average"] = average.item()
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_same_results_as_torch(world: int) -> None:
    for rank, found in enumerate(run_ranks(collect, world, 3)):
        for asynchronous in (False, True):
            ours, torchs = found[f"ours {asynchronous}"], found[f"torch {asynchronous}"]
            assert ours[0] == torchs[0]
            assert [x for row in ours[1] for x in row] == pytest.approx([x for row in torchs[1] for x in row], abs=1e-6)
        assert found["in place"] == list(range(world))
        assert found["average"] == pytest.approx(rank + (world - 1) / 2)
