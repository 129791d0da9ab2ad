"""Lic2020Event on DuEE: how many tags, what they cannot say of the annotated rows, and that rows can be learnt."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from event_taggers import OUTPUTS, model, sayable, triples
from ner_models import trainer

from kexue.data.events import EventDataModule


def duee(**options: Any) -> EventDataModule:
    root = os.environ.get("KEXUE_DATA")
    if not root or not (Path(root) / "event_extraction_duee").is_dir():
        pytest.skip("KEXUE_DATA does not name a folder with event_extraction_duee")
    module = EventDataModule(8, root=root, **options)
    module.setup("fit")
    return module


def said(output: str, source: EventDataModule) -> list[tuple[Any, set[Any], set[Any]]]:
    """Each record, what its gold tags say of it, and all that there is to say."""
    module, rows = model(source, output=output), []
    for batch in [*source.train_dataloader(), *source.val_dataloader()]:
        found = module.records_of(module.gold_tags(batch), batch)
        rows += [(gold, triples(one), triples(gold)) for one, gold in zip(found, batch["records"], strict=True)]
    return rows


def test_the_schema_has_217_pairs_and_435_tags() -> None:
    source = duee()
    for output, tags, scores in (("unique", 435, 435), ("multi", 3, 434)):
        module = model(source, output=output)
        module.configure_model()
        assert len(module.pairs) == 217
        assert (module.head.crf.num_tags, module.head.emissions.out_features) == (tags, scores)
    assert len(model(source, triggers=True).pairs) == 217 + 65


def test_one_layer_says_what_counts_imply() -> None:
    """A text has one pair, so that all further ones of its sentence are lost; so is a text that others cover."""
    rows = said("unique", duee())
    assert len(rows) == 1042
    assert all(found <= gold for _, found, gold in rows)
    texts = [{text for _, _, text in gold} for _, _, gold in rows]
    total = sum(len(gold) for *_, gold in rows)
    several = sum(len(gold) - len(group) for (*_, gold), group in zip(rows, texts, strict=True))
    covered = sum(len(group) - len(sayable(row[0], False)) for row, group in zip(rows, texts, strict=True))
    assert several > 0
    assert covered > 0
    assert sum(len(found) for _, found, _ in rows) == total - several - covered


def test_a_layer_each_says_nearly_all() -> None:
    rows = said("multi", duee())
    assert all(found == sayable(record, True) for record, found, _ in rows)
    lost, total = sum(len(gold - found) for _, found, gold in rows), sum(len(gold) for *_, gold in rows)
    assert 0 < lost <= 0.002 * total


def test_windows_say_what_they_hold() -> None:
    """Of windows of 64 characters that begin 32 apart; what all of them cut is listed."""
    source = duee(max_length=66, stride=32)
    cut = {record.id: arguments for split in ("train", "val") for record, arguments in source.cut_by_windows(split)}
    assert cut
    for record, found, gold in said("multi", source):
        lost = {part.text for part in cut.get(record.id, ())}
        assert {text for _, _, text in sayable(record, True) - found} <= lost
        assert found <= gold


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_60_sentences_are_learnt_by_heart(output: str, tmp_path: Path) -> None:
    source = duee()
    rows = source.records("train")[:60]
    source.set_records("train", rows)
    source.set_records("val", rows)
    module = model(
        source,
        output=output,
        dim=96,
        num_layers=2,
        num_heads=4,
        feedforward_dim=192,
        warmup_steps=30,
        schedule="linear",
        crf_rate=10.0,
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
    )
    runner = trainer(tmp_path, max_epochs=40, gradient_clip_val=1.0, check_val_every_n_epoch=40, num_sanity_val_steps=0)
    runner.fit(module, datamodule=source)
    assert runner.callback_metrics["val/f1"] > 0.95
