"""The readers on two processes: ZeRO 2 trains as DDP does, goes on where it stopped, and bf16 stays near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

CELLS = {
    ("mrc", "ddp", "32-true"),
    ("mrc", "zero", "32-true"),
    ("mrc", "zero", "bf16-mixed"),
    ("dgcnn", "ddp", "32-true"),
    ("dgcnn", "zero", "32-true"),
    ("dgcnn", "zero", "bf16-mixed"),
}


def train_all(folder: str) -> dict[tuple[str, str, str], Any]:
    """Two epochs of every cell, and the second of them again from a checkpoint."""
    import pytorch_lightning as pl
    import torch

    from kexue.data.passage_rows import PassageBatches
    from kexue.data.reading import ReadingDataModule
    from kexue.data.reading_windows import WindowBatches
    from kexue.lightning_modules.extraction import DGCNN, Lic2020MRC
    from kexue.strategies import DDP, Zero

    tiny = {"dim": 16, "num_layers": 1, "num_heads": 2, "feedforward_dim": 32, "dropout": 0.1, "abstains": True}
    batches: dict[str, Any] = {"mrc": WindowBatches(80, max_question=24), "dgcnn": PassageBatches(64)}

    def fit(name: str, strategy: str, precision: Any, epochs: int, resume: str | None = None) -> Any:
        pl.seed_everything(0, verbose=False)
        data = ReadingDataModule(4, batches=batches[name], num_generated=40, num_passages=2, unanswerable=0.25)
        data.prepare()
        data.set_records("train", data.records("train")[:16])
        arguments = data.model_arguments()
        module = Lic2020MRC(**arguments, **tiny) if name == "mrc" else DGCNN(**arguments, dim=8, unknown_rate=0.1)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDP() if strategy == "ddp" else Zero(stage=2),
            precision=precision,
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return trainer, module

    found = {}
    for number, (name, strategy, precision) in enumerate(sorted(CELLS)):
        trainer, module = fit(name, strategy, precision, 2)
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        found[name, strategy, precision] = metrics, [p.sum().item() for p in module.parameters()]
        if (strategy, precision) == ("zero", "32-true"):
            half, path = fit(name, strategy, precision, 1)[0], f"{folder}/{number}.ckpt"
            half.save_checkpoint(path)
            _, resumed = fit(name, strategy, precision, 2, path)
            assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))
            if name == "mrc":
                assert torch.equal(module.threshold, resumed.threshold)
    return found


@pytest.mark.slow
def test_readers_on_two_processes(tmp_path: Path) -> None:
    """Both processes have the same figures, over all questions, and so the same threshold."""
    ranks = run_ranks(train_all, 2, str(tmp_path))
    assert ranks[0] == ranks[1]
    found = ranks[0]
    assert set(found) == CELLS
    for name in ("mrc", "dgcnn"):
        ddp, zero, bf16 = (
            found[name, *cell] for cell in (("ddp", "32-true"), ("zero", "32-true"), ("zero", "bf16-mixed"))
        )
        assert zero[0] == pytest.approx(ddp[0], rel=1e-4, abs=1e-5)
        assert zero[1] == pytest.approx(ddp[1], rel=1e-4, abs=1e-5)
        assert bf16[0]["val/loss"] == pytest.approx(ddp[0]["val/loss"], rel=0.1)
        assert bf16[1] != ddp[1]
