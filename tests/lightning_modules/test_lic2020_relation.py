"""Subjects first, then objects: which subjects are drawn, what they are to find, that each sees its own sentence."""

import functools
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from kexue.data.records import VALUE_SLOT
from kexue.data.relations import RelationDataModule
from kexue.errors import InputError
from kexue.lightning_modules.extraction.lic2020_relation import (
    Lic2020Relation,
    SubjectObjectHead,
    distinct_subjects,
    object_targets,
    sample_subjects,
)
from kexue.nn.losses import power_binary_cross_entropy

# (label, subject's first and last token, object's): two subjects in the first sentence, one of them with two objects.
TRIPLES = torch.tensor(
    [
        [[0, 5, 7, 1, 2], [1, 5, 7, 3, 3], [0, 9, 11, 1, 2]],
        [[1, 2, 2, 2, 2], [-1, -1, -1, -1, -1], [-1, -1, -1, -1, -1]],
        [[-1, -1, -1, -1, -1]] * 3,
    ]
)


def drawn(mismatch: float) -> Counter:
    torch.manual_seed(0)
    spans, there = sample_subjects(TRIPLES.repeat(600, 1, 1), mismatch)
    assert there.view(600, 3).tolist() == [[True, True, False]] * 600
    found = spans.view(600, 3, 2)
    assert (found[:, 1] == 2).all()
    return Counter(tuple(pair) for pair in found[:, 0].tolist())


def test_ends_are_drawn_apart_from_starts_but_never_before_them() -> None:
    """Half of the starts are 5; of these half take the end of the other subject: the deliberate negatives."""
    assert distinct_subjects(TRIPLES).tolist() == [[True, False, True], [True, False, False], [False] * 3]
    counts = drawn(1.0)
    assert set(counts) == {(5, 7), (5, 11), (9, 11)}
    assert counts[9, 11] == pytest.approx(300, abs=50)
    assert counts[5, 11] == pytest.approx(150, abs=45)
    assert set(drawn(0.0)) == {(5, 7), (9, 11)}
    assert 20 < drawn(0.4)[5, 11] < 110


def test_objects_belong_to_their_subject_and_to_nothing_else() -> None:
    rows = TRIPLES[[0, 0, 0, 1]]
    targets = object_targets(rows, torch.tensor([[5, 7], [9, 11], [5, 11], [2, 2]]), 12, 2)
    assert targets[0].nonzero().tolist() == [[1, 0, 0], [2, 0, 1], [3, 1, 0], [3, 1, 1]]
    assert targets[1].nonzero().tolist() == [[1, 0, 0], [2, 0, 1]]
    assert not targets[2].any(), "a mismatched subject has no objects"
    assert targets[3].nonzero().tolist() == [[2, 1, 0], [2, 1, 1]]


def test_each_subject_sees_its_own_sentence() -> None:
    torch.manual_seed(0)
    head = SubjectObjectHead(nn.LayerNorm(8), 8, 3, 1e-5)
    nn.init.normal_(head.conditional_norm.to_weight.weight)
    nn.init.normal_(head.conditional_norm.to_bias.weight)
    hidden = torch.randn(3, 6, 8)
    rows, spans = torch.tensor([2, 0, 2]), torch.tensor([[1, 3], [0, 0], [4, 5]])
    found = head.find_objects(hidden, rows, spans)
    assert found.shape == (3, 6, 3, 2)
    for number, (row, (first, last)) in enumerate(zip(rows.tolist(), spans.tolist(), strict=True)):
        condition = torch.cat((hidden[row, first], hidden[row, last]))[None]
        alone = head.objects(head.conditional_norm(hidden[row, None], condition))
        torch.testing.assert_close(found[number], alone.view(6, 3, 2))
    assert head.find_objects(hidden, rows[:0], spans[:0]).shape == (0, 6, 3, 2)


def test_losses_are_the_formulas() -> None:
    """Means over first and last and over real tokens; the objects' is summed over labels before."""
    source = RelationDataModule(batch_size=6, num_generated=24)
    source.setup("fit")
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "feedforward_dim": 32, "dropout": 0.0}
    module = Lic2020Relation(**source.model_arguments(), **sizes)
    module.configure_model()
    batch = next(iter(source.train_dataloader()))
    triples, mask = batch["triple_labels"], batch["mask"]
    hidden = module.encoder(batch["ids"], mask)
    torch.manual_seed(3)
    losses = module.task_losses(hidden, batch)
    torch.manual_seed(3)
    spans, there = sample_subjects(triples, 1.0)
    subject_logits, object_logits = module.head(hidden, torch.arange(len(spans)), spans)
    subject_sum = object_sum = 0.0
    for row in range(len(spans)):
        for token in range(int(mask[row].sum())):
            for column in (0, 1):
                stated = [t for t in triples[row].tolist() if t[0] >= 0]
                gold = any(t[1 + column] == token for t in stated)
                logit, target = subject_logits[row, token, column], torch.tensor(float(gold))
                subject_sum += power_binary_cross_entropy(logit, target, 2).item() / 2
                if there[row]:
                    found = {
                        t[0] for t in triples[row].tolist() if t[1:3] == spans[row].tolist() and t[3 + column] == token
                    }
                    targets = torch.tensor([float(label in found) for label in range(len(module.labels))])
                    logits = object_logits[row, token, :, column]
                    object_sum += power_binary_cross_entropy(logits, targets, 4).sum().item() / 2
    assert losses["subjects"].item() == pytest.approx(subject_sum / mask.sum().item(), rel=1e-4)
    assert losses["objects"].item() == pytest.approx(object_sum / mask[there].sum().item(), rel=1e-4)


@pytest.mark.slow
def test_30_sentences_are_learnt_by_heart() -> None:
    """Of those in which no subject has two values of one predicate: which slot is whose, the scheme only guesses."""
    source = RelationDataModule(batch_size=10, num_generated=300)
    stated = [
        (record, [(one.predicate, one.subject.text) for one in record.relations]) for record in source.records("train")
    ]
    rows = [record for record, pairs in stated if pairs and len(set(pairs)) == len(pairs)][:30]
    source.set_records("train", rows)
    source.set_records("val", rows)
    pl.seed_everything(0, verbose=False)
    module = Lic2020Relation(
        **source.model_arguments(),
        dim=64,
        num_layers=2,
        num_heads=4,
        feedforward_dim=256,
        dropout=0.0,
        warmup_steps=30,
        schedule="linear",
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3),
    )
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=300, check_val_every_n_epoch=300, **quiet)
    trainer.fit(module, datamodule=source)
    assert trainer.callback_metrics["val/f1"] > 0.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mismatch": 1.5}, r"mismatch=1.5\): use a number from 0 to 1"),
        ({"threshold": -1}, "threshold=-1"),
        ({"max_subjects": 0}, r"max_subjects=0\): use 1 or more"),
    ],
)
def test_wrong_options_are_explained(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Lic2020Relation(10, [["a", VALUE_SLOT]], **options)
