"""Several runs of one module in one process."""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from cells import ACCELERATOR, BASES, RANK, WORLD, PlainModule, full_weights, loader, make_strategy


def many_runs(folder: str) -> dict[str, Any]:
    """Fit, validate, test, predict, fit on, and test a saved checkpoint, all in one process and on each base.

    Buckets of gradients fill in the middle of a backward pass, as those of large modules do.
    """
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {}
    for base in BASES:
        pl.seed_everything(3, verbose=False)
        model = PlainModule(optimizer="sgd")
        trainer = pl.Trainer(
            accelerator=ACCELERATOR,
            devices=WORLD,
            strategy=make_strategy(base, [], **({"reduce_bucket_size": 300} if "zero" in base else {})),
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        train, rest = loader(RANK, WORLD, 24, 4), loader(RANK, WORLD, 24, 4)
        trainer.fit(model, train, rest)
        found = {"fit": trainer.callback_metrics["val/loss"].item()}
        path = f"{folder}/{base}.ckpt"
        trainer.save_checkpoint(path)
        found["validate"] = trainer.validate(model, rest, verbose=False)[0]["val/loss"]
        found["test"] = trainer.test(model, rest, verbose=False)[0]["val/loss"]
        found["predictions"] = torch.cat(trainer.predict(model, loader(RANK, WORLD, 24, 4))).tolist()  # type: ignore[arg-type]
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, train, rest)
        found["fit_on"] = trainer.callback_metrics["val/loss"].item()
        found["weights"] = {name: value.sum().item() for name, value in full_weights(model).items()}
        found["test_saved"] = trainer.test(model, rest, ckpt_path=path, verbose=False)[0]["val/loss"]
        results[base] = found
    return results
