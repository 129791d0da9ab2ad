"""A run that needs more memory than there is ends in one line with what the planner says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kexue.cli import exhausted
from kexue.cli import main as cli
from kexue.lightning_modules.imaging import DigitsMultitaskModule

FAST = ["debug=fast", "trainer.enable_model_summary=false", "trainer.accelerator=cpu", "logger=csv"]


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the real allocator of the CPU refuse the second step."""
    step = DigitsMultitaskModule.training_step

    def ask_for_too_much(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and self._trainer is not None:
            torch.empty(10**16)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DigitsMultitaskModule, "training_step", ask_for_too_much)


@pytest.mark.usefixtures("greedy")
def test_the_planner_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exhausted, "_device", lambda _: ("h100", 40e9))
    assert cli.main(["fit", *FAST, f"run_dir={tmp_path / 'run'}"]) == 2
    captured = capsys.readouterr().err
    line = captured.splitlines()[-1]
    assert line.startswith("kexue: out of memory at step 1, cpu: strategy=single trainer.devices=1 needs ")
    assert " of 37.3 GiB by kexue plan; " in line
    assert "Traceback" not in captured
    assert "can't allocate memory" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.usefixtures("greedy")
def test_where_nothing_fits_the_reason_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exhausted, "_device", lambda _: ("h100", 1e6))
    assert cli.main(["fit", *FAST, f"run_dir={tmp_path / 'run'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory at step 1, cpu: nothing fits: the smallest, " in line


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**16)
    assert exhausted.is_out_of_memory(caught.value)
    assert exhausted.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert exhausted.is_out_of_memory(MemoryError())
    assert not exhausted.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not exhausted.is_out_of_memory(ValueError("out of memory"))
