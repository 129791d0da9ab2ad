"""Reading comprehension on built-in passages: parity with transformers, learning, resuming, answers in characters."""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch import Tensor

from kexue.callbacks import PredictionTable
from kexue.data.reading import ReadingDataModule
from kexue.data.reading_windows import WindowBatches
from kexue.data.records import Answer, ReadingRecord
from kexue.errors import InputError
from kexue.lightning_modules.extraction.lic2020_mrc import Lic2020MRC
from kexue.nn.transformer import from_pretrained

TINY = {"dim": 32, "num_layers": 1, "num_heads": 2, "feedforward_dim": 64, "dropout": 0.0, "head_size": 16}


def data(rows: int = 24, batch_size: int = 8, **options: Any) -> ReadingDataModule:
    batches = WindowBatches(max_length=80, max_question=24, mark_shared=True)
    module = ReadingDataModule(batch_size, batches=batches, num_generated=rows, **{"unanswerable": 0.25, **options})
    module.prepare()
    return module


def model(source: ReadingDataModule, **options: Any) -> Lic2020MRC:
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-3)
    arguments = {**source.model_arguments(), **TINY, "abstains": True, **options}
    module = Lic2020MRC(**arguments, optimizer=optimizer)
    module.configure_model()
    return module


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", num_sanity_val_steps=0, **{**quiet, "devices": 1, **options}
    )


def first_batch(source: ReadingDataModule) -> dict[str, Any]:
    source.setup("fit")
    return next(iter(source.train_dataloader()))


def gold_scores(batch: dict[str, Any], head: str) -> Tensor:
    """Scores of a head that is never wrong: high at one target of each row."""
    rows, length = batch["ids"].shape
    target = batch["targets"][:, 0]
    if head == "pairs":
        scores = torch.full((rows, length * length), -20.0)
        return scores.scatter(1, (target[:, :1] * length + target[:, 1:]), 20.0).view(rows, length, length)
    return torch.full((rows, 2, length), -20.0).scatter(2, target[..., None], 20.0)


def test_logits_and_loss_are_those_of_bert(tmp_path: Path) -> None:
    """With the same weights, where every place is allowed and no row is padded; with padding nothing changes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    peer = transformers.BertForQuestionAnswering(config)
    peer.save_pretrained(tmp_path)
    ours = Lic2020MRC(40, max_length=20, **TINY)
    ours.configure_model()
    ours.encoder = from_pretrained(tmp_path, heads=(), ignore=["qa_outputs.*"]).train()
    ours.head = type(ours.head)(16)
    ours.head.projection.load_state_dict(peer.qa_outputs.state_dict())
    ids, segments = torch.randint(0, 40, (3, 12)), (torch.arange(12) > 4).long().expand(3, 12)
    target = torch.tensor([[[5, 7]], [[0, 0]], [[11, 11]]])
    batch = {"ids": ids, "mask": torch.ones_like(ids).bool(), "segments": segments, "targets": target}
    batch["places"] = torch.ones_like(batch["mask"])
    wanted = peer(
        ids, token_type_ids=segments, start_positions=target[:, 0, 0], end_positions=target[:, 0, 1], return_dict=True
    )
    scores = ours(ids, batch["mask"], segments, batch["places"])
    torch.testing.assert_close(scores[:, 0], wanted.start_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[:, 1], wanted.end_logits, rtol=1e-4, atol=1e-5)
    for several in ("any", "mean"):
        ours.several = several
        loss = sum(ours.task_losses(ours.features(batch), batch).values())
        torch.testing.assert_close(loss, wanted.loss, rtol=1e-5, atol=1e-6)
    padded = {key: torch.nn.functional.pad(batch[key], (0, 6)) for key in ("ids", "mask", "segments", "places")}
    padded["targets"] = target
    more = ours(*(padded[key] for key in ("ids", "mask", "segments", "places")))
    torch.testing.assert_close(more[..., :12], scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(ours.task_losses(ours.features(padded), padded).values()), loss)


@pytest.mark.parametrize("head", ["positions", "pairs"])
def test_loss_on_one_batch_falls(head: str) -> None:
    module, batch = model(source := data(10), head=head), first_batch(source)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer, losses = module.configure_optimizers(), []
    for _ in range(50):
        output = module.training_step(batch, 0)
        assert output["loss"].item() == pytest.approx(sum(loss.item() for loss in output["losses"].values()), rel=1e-5)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("head", ["positions", "pairs"])
def test_gold_scores_become_gold_answers(head: str) -> None:
    """From targets back to characters of the passage, through windows, decoder and vote."""
    source = data(40, num_passages=2)
    source.setup("fit")
    module = model(source, head=head)
    for batch in source.train_dataloader():
        found = module.answers(*module.candidates(gold_scores(batch, head), batch["places"]), batch)
        for (answer, margin), record in zip(found, batch["records"], strict=True):
            if record.answers:
                assert answer in record.answers
                assert margin > 10
            else:
                assert margin < -10


def test_windows_vote_by_text_and_the_least_silent_one_decides() -> None:
    source = data()
    module = model(source)
    record = ReadingRecord("a", "问", ("甲乙丙甲", "丁甲"))
    batch = source.collator()([record, ReadingRecord("b", "问", ("",))])
    assert batch["owners"].tolist() == [0, 0, 1]
    place = [int(row.nonzero()[0]) if row.any() else 0 for row in batch["places"]]
    # Window 0 is sure of 乙 at 0.5, and of 甲 at 0.3 in each of two places; window 1 knows 丁 at 0.1.
    logs = torch.tensor([[0.5, 0.3, 0.3], [0.1, 0.0, 0.0], [0.0, 0.0, 0.0]]).log()
    first = torch.tensor([[1, 0, 3], [0, 0, 0], [0, 0, 0]]) + torch.tensor(place)[:, None]
    none = torch.tensor([0.2, 0.9, 1.0]).log()
    (answer, margin), empty = module.answers((logs, first, first), none, batch)
    assert answer == Answer("甲", 0)
    assert margin == pytest.approx(torch.tensor(0.5 / 0.2).log().item(), rel=1e-5)
    assert empty == (None, -float("inf"))


def test_answers_without_conviction_are_withheld(tmp_path: Path) -> None:
    """The threshold is chosen on the validation rows, kept in the checkpoint, and decides in tests and answers."""
    source, run = data(40), trainer(tmp_path, max_epochs=1, callbacks=[PredictionTable(num_batches=99)])
    module = model(source)
    run.fit(module, datamodule=source)
    assert {"val/f1", "val/exact_match", "val/threshold", "val/answerable_f1", "train/loss"} <= set(
        run.callback_metrics
    )
    assert float(module.threshold) == float(run.callback_metrics["val/threshold"])
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Lic2020MRC.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert loaded.threshold == module.threshold
    batch = first_batch(source)
    for threshold, given in ((-1e9, 8), (1e9, 0)):
        loaded.threshold.fill_(threshold)
        assert sum(bool(record.answers) for record in loaded.predict_step(batch)) == given
    module.threshold.fill_(1e9)
    (figures,) = run.test(module, datamodule=source, verbose=False)
    silent = sum(not record.answers for record in source.records("test")) / len(source.records("test"))
    assert figures["test/f1"] == pytest.approx(silent)
    lines = [
        json.loads(line) for line in (tmp_path / "predictions/test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines[0] == {"wrong": round(4 * (1 - silent)), "right": round(4 * silent)}
    first = next(record for record in source.records("test") if lines[1]["input"].startswith(record.question))
    assert lines[1]["input"] == f"{first.question} | {first.passages[0]}"
    assert lines[1]["predicted"] == ""


def test_fit_resumes_bit_for_bit_also_in_bf16(tmp_path: Path) -> None:
    source = data(16)
    for precision in ("32-true", "bf16-mixed"):
        options: dict[str, Any] = {"precision": precision, "gradient_clip_val": 1.0}
        whole = model(source, warmup_steps=2, schedule="constant")
        trainer(tmp_path, max_epochs=4, **options).fit(whole, datamodule=source)
        first = trainer(tmp_path, max_epochs=2, **options)
        first.fit(model(source, warmup_steps=2), datamodule=source)
        first.save_checkpoint(tmp_path / "half.ckpt")
        second = model(source, warmup_steps=2)
        trainer(tmp_path, max_epochs=4, **options).fit(second, datamodule=source, ckpt_path=tmp_path / "half.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "start"}, "head='start'.*positions, pairs"),
        ({"several": "all"}, "several='all'.*any, mean"),
        ({"voting": "sum"}, "voting='sum'.*vote, best"),
        ({"max_answer": 0}, "max_answer=0"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"schedule": "cosine"}, "constant, linear"),
        ({"dim": 30}, "must divide"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Lic2020MRC(10, **options)


def test_config_binds_to_the_constructor() -> None:
    path = Path(__file__).parents[2] / "conf" / "model" / "lic2020_mrc.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{Lic2020MRC.__module__}.Lic2020MRC"
    assert set(config) <= set(inspect.signature(Lic2020MRC).parameters)
    module = Lic2020MRC(10, **{**config, "optimizer": None})
    module.configure_model()
    places = torch.tensor([[False, False, True, True]])
    ids = torch.ones(1, 4, dtype=torch.long)
    assert module(ids, places.logical_not() | True, torch.zeros_like(ids), places).shape == (1, 2, 4)
    assert len(list(module.blocks())) == config["num_layers"]
