"""Real questions: a model that is never wrong answers them through windows and vote; 20 are learnt by heart."""

import functools
import os
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from kexue.data.reading import ReadingDataModule
from kexue.data.reading_windows import WindowBatches
from kexue.lightning_modules.extraction.lic2020_mrc import Lic2020MRC
from kexue.nn.decoding import AnswerScores

FILES = {
    "cmrc2018_dev.json": (211, []),
    "cmrc2018_train.json.gz": (767, ["TRIAL_405_QUERY_0"]),
    "dureader_checklist_dev.json": (300, ["21c1c6372c1e5207ca1c609cb72b7c73", "449807039916adc984034586c8f191e2"]),
    "dureader_robust_dev.json": (150, []),
    "dureader_robust_train.json.gz": (699, []),
}
"""Number of questions, and the ids of those whose answers are longer than what a window can hold whole."""


def source(name: str, batch_size: int = 32) -> ReadingDataModule:
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, "reading_comprehension").is_dir():
        pytest.skip("KEXUE_DATA does not name a folder with reading_comprehension")
    file = f"reading_comprehension/{name}"
    batches = WindowBatches(mark_shared=True)
    module = ReadingDataModule(
        batch_size, batches=batches, root=root, train_files=[file], dev_file=file, on_bad_row="skip", lowercase=True
    )
    module.setup("fit")
    return module


@pytest.mark.parametrize("name", FILES)
def test_gold_answers_come_back(name: str) -> None:
    data = source(name)
    module = Lic2020MRC(**data.model_arguments(), max_answer=512, abstains=True)
    scores, lost, sure = AnswerScores(abstains=True), [], 0.0
    for batch in data.val_dataloader():
        target = batch["targets"][:, 0]
        gold = torch.full((len(target), 2, batch["ids"].shape[1]), -20.0).scatter(2, target[..., None], 20.0)
        found = module.answers(*module.candidates(gold, batch["places"]), batch)
        given = ["" if answer is None or margin < 0 else answer.text for answer, margin in found]
        scores.update(given, [record.texts for record in batch["records"]], [margin for _, margin in found])
        for text, record in zip(given, batch["records"], strict=True):
            sure += text in record.texts or (not text and not record.answers)
            lost += [record.id for _ in range(not text and bool(record.answers))]
    number, expected = FILES[name]
    assert len(data.records("val")) == number
    assert sorted(lost) == expected
    assert sure / number >= 0.99
    assert scores.compute()["exact_match"] == pytest.approx(sure / number)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["positions", "pairs"])
def test_20_questions_are_learnt_by_heart(head: str, tmp_path: Path) -> None:
    data = source("dureader_robust_train.json.gz", batch_size=10)
    rows = sorted(data.records("train"), key=data.length)[:20]
    data.set_records("train", rows)
    data.set_records("val", rows)
    pl.seed_everything(0, verbose=False)
    module = Lic2020MRC(
        **data.model_arguments(),
        dim=96,
        num_layers=2,
        num_heads=4,
        feedforward_dim=384,
        dropout=0.0,
        head=head,
        warmup_steps=20,
        schedule="linear",
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3),
    )
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        max_epochs=60,
        gradient_clip_val=1.0,
        check_val_every_n_epoch=60,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/exact_match"] == 1
    assert trainer.callback_metrics["val/f1"] == 1
