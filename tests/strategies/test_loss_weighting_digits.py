"""What loss weighting is for: digits_multitask as it is badly scaled, trained as benchmarks/loss_weighting.py does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.delitem(sys.modules, "loss_weighting", raising=False)
        import loss_weighting  # type: ignore[import-not-found]

        yield loss_weighting


@pytest.mark.slow
def test_equal_weights_lose_a_task_that_the_right_rules_keep(benchmark: Any) -> None:
    data = benchmark.DigitsDataModule()
    runs = benchmark.contenders(benchmark.prior_losses(data))
    names = ["digit alone", "parity alone", "pixel_sum alone", "equal", "prior"]
    found = {name: benchmark.train(runs[name], seed=0) for name in names}
    assert benchmark.lost(found["prior"], found) == []
    assert {"digit", "parity"} <= set(benchmark.lost(found["equal"], found))
    assert found["equal"]["digit"] < found["digit alone"]["digit"] - 0.1  # by far
