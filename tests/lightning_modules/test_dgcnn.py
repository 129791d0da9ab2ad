"""DGCNN on built-in passages: its formulas, that it learns and resumes, and that passages vote in characters."""

import functools
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from kexue.data.passage_rows import PassageBatches
from kexue.data.reading import ReadingDataModule
from kexue.data.records import Answer, ReadingRecord
from kexue.data.tokenizers.words import words_of
from kexue.errors import InputError
from kexue.lightning_modules.extraction.dgcnn import DGCNN
from kexue.nn.decoding import AnswerScores
from kexue.strategies import SingleDevice

VERSIONS = ("open", "competition")


def data(version: str = "open", rows: int = 20, batch_size: int = 10, **options: Any) -> ReadingDataModule:
    words = version == "competition"
    if words:
        pytest.importorskip("rjieba")
    batches = PassageBatches(max_length=64, features=words, half_ascii=words)
    defaults = {
        "num_generated": rows,
        "num_passages": 2,
        "unanswerable": 0.2,
        "units": "words" if words else "characters",
    }
    module = ReadingDataModule(batch_size, batches=batches, format="webqa", **{**defaults, **options})
    module.setup("fit")
    return module


def model(source: ReadingDataModule, version: str = "open", lr: float = 3e-3, **options: Any) -> DGCNN:
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.RAdam, lr=lr)
    module = DGCNN(**source.model_arguments(), version=version, **{"dim": 16, **options}, optimizer=optimizer)
    module.configure_model()
    return module


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", num_sanity_val_steps=0, **{**quiet, "devices": 1, **options}
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("word_dim", [16, 6])
def test_word_vectors_take_part(version: str, word_dim: int, tmp_path: Path) -> None:
    """Beside the characters; in the competition's version in place of a table, as they are where they fit."""
    pytest.importorskip("rjieba")
    words = ["什么", "哪里", "多少", "是", "的", "在"]
    lines = [
        " ".join([word, *(f"{(n + 1) * (k + 1) / 50:.2f}" for k in range(word_dim))]) for n, word in enumerate(words)
    ]
    path = tmp_path / "vectors.txt"
    path.write_text("\n".join([f"{len(words)} {word_dim}", *lines]) + "\n", encoding="utf-8")
    competition = version == "competition"
    batches = PassageBatches(64, features=competition, word_vectors=str(path), cache_dir=str(tmp_path / "cache"))
    source = ReadingDataModule(
        4,
        batches=batches,
        format="webqa",
        num_generated=12,
        num_passages=2,
        units="words" if competition else "characters",
    )
    source.setup("fit")
    module = model(source, version, unknown_rate=0.5)
    assert (module.reader.tokens is None) == competition
    assert (module.reader.words is None) == (competition and word_dim == 16)
    batch = next(iter(source.train_dataloader()))
    assert batch["words"].any()
    module.eval()
    other = {**batch, "word_vectors": 2 * batch["word_vectors"]}
    assert not torch.equal(module.features(batch), module.features(other))
    one, several = module.features(batch), {**batch, "words": torch.zeros_like(batch["words"])}
    assert not torch.equal(one, module.features(several))
    module.train()
    loss = torch.stack(list(module.task_losses(module.features(batch), batch).values())).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("version", VERSIONS)
def test_loss_on_one_batch_falls(version: str) -> None:
    source = data(version, 10)
    module = model(source, version, lr=2e-2, dropout=0.0, gate_rate=0.0)
    batch = next(iter(source.train_dataloader()))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer, losses = module.configure_optimizers(), []
    for _ in range(60):
        output = module.training_step(batch, 0)
        assert output["loss"].item() == pytest.approx(sum(loss.item() for loss in output["losses"].values()), rel=1e-5)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert len(list(module.blocks())) == 9


def test_a_passage_without_an_answer_silences_its_tokens() -> None:
    """Both probabilities are those of the token times that of the passage: at 0 no span is left."""
    source = data()
    module, batch = model(source).eval(), next(iter(source.train_dataloader()))
    read = module.features(batch)
    pooled = module.head.pooling(read, batch["mask"])
    whole, tokens = module.head.passage(pooled).sigmoid(), module.head.tokens(read).sigmoid()
    torch.testing.assert_close(module.head(read, batch["mask"]).exp(), (whole[:, None] * tokens).transpose(1, 2))
    with torch.no_grad():
        module.head.tokens[-1].bias.fill_(9.0)
        module.head.passage.bias.fill_(9.0)
        assert all(answer is not None for answer, _ in module.find(read, batch))
        module.head.passage.bias.fill_(-1e4)
        assert module.find(read, batch) == [(None, 0.0)] * len(batch["records"])


def test_answers_do_not_depend_on_padding_or_company() -> None:
    source = data("competition")
    module = model(source, "competition").eval()
    batch = next(iter(source.train_dataloader()))
    together = module(batch)
    for owner, record in enumerate(batch["records"]):
        alone = module(source.collator()([record]))
        rows = (batch["owners"] == owner).nonzero().flatten()
        for ours, row in zip(alone, rows, strict=True):
            real = int(batch["mask"][row].sum())
            torch.testing.assert_close(ours[:, :real], together[row, :, :real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_gold_labels_become_gold_answers(version: str) -> None:
    source = data(version, 40)
    module = model(source, version, max_answer=30)
    for batch in source.train_dataloader():
        logs = torch.stack((batch["starts"], batch["ends"]), 1).clamp(min=1e-6).log()
        for (answer, _), record in zip(module.answers(logs, batch), batch["records"], strict=True):
            if record.answers:
                assert answer is not None
                assert answer.text in record.texts
            else:
                assert answer is None


def test_passages_vote_and_windows_of_one_are_one_voice() -> None:
    source = data()
    module = model(source)
    record = ReadingRecord("a", "问", ("甲" + "丙" * 70 + "乙", "乙", "乙", "乙"))
    batch = source.collator()([record])
    assert [window.passage for window in batch["windows"]] == [0, 0, 1, 2, 3]
    logs = torch.full((5, 2, 64), -20.0)
    # 甲 stands in the first window alone. 乙 is what three passages say, and the end of the first, but all in doubt.
    for row, place, probability in ((0, 0, 0.7), (1, 63, 0.2), (2, 0, 0.2), (3, 0, 0.2), (4, 0, 0.2)):
        logs[row, :, place] = torch.tensor(probability).sqrt().log()
    ((answer, score),) = module.answers(logs, batch)
    assert answer == Answer("甲", 0)
    assert score == pytest.approx(0.7**2 / 1.7)
    for row, place, probability in ((0, 0, 0.2), (2, 0, 0.3)):
        logs[row, :, place] = torch.tensor(probability).sqrt().log()
    ((answer, score),) = module.answers(logs, batch)
    assert answer == Answer("乙", 0, 1)
    assert score == pytest.approx((3 * 0.2**2 + 0.3**2) / (1 + 0.9))


def test_unknown_tokens_in_training_alone() -> None:
    source = data()
    module, batch = model(source, unknown_rate=0.5, gate_rate=0.0, dropout=0.0), next(iter(source.train_dataloader()))
    ids = batch["ids"].clone()
    hidden = (module._some_unknown(batch, "ids", "words")["ids"] != ids).float().mean().item()
    assert 0.3 < hidden < 0.6
    assert not torch.equal(module.features(batch), module.features(batch))
    module.eval()
    assert torch.equal(module.features(batch), module.features(batch))
    assert torch.equal(batch["ids"], ids)


@pytest.mark.parametrize("version", ["open", pytest.param("competition", marks=pytest.mark.slow)])
def test_fit_resumes_bit_for_bit_also_in_bf16(version: str, tmp_path: Path) -> None:
    """With its noise: the strategy brings back the random numbers."""
    source = data(version, 16, 8)
    for precision in ("32-true", "bf16-mixed"):
        options: dict[str, Any] = {"precision": precision, "gradient_clip_val": 1.0}
        whole = model(source, version)
        run = trainer(tmp_path, max_epochs=4, strategy=SingleDevice(), **options)
        run.fit(whole, datamodule=source)
        assert {"val/exact_match", "val/f1", "val/average", "train/loss"} <= set(run.callback_metrics)
        first = trainer(tmp_path, max_epochs=2, strategy=SingleDevice(), **options)
        first.fit(model(source, version), datamodule=source)
        first.save_checkpoint(tmp_path / "half.ckpt")
        second = model(source, version)
        again = trainer(tmp_path, max_epochs=4, strategy=SingleDevice(), **options)
        again.fit(second, datamodule=source, ckpt_path=tmp_path / "half.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def webqa(batch_size: int, version: str = "open") -> ReadingDataModule:
    root = os.environ.get("KEXUE_DATA")
    if not root or not (Path(root) / "reading_comprehension").is_dir():
        pytest.skip("KEXUE_DATA does not name a folder with reading_comprehension")
    words = version == "competition"
    return ReadingDataModule(
        batch_size,
        batches=PassageBatches(features=words, half_ascii=words),
        format="webqa",
        root=root,
        train_files=["reading_comprehension/webqa_train.json.gz"],
        dev_file="reading_comprehension/webqa_dev.json",
        units="words" if words else "characters",
    )


@pytest.mark.parametrize("version", ["open", pytest.param("competition", marks=pytest.mark.slow)])
def test_real_labels_reach_the_highest_score(version: str) -> None:
    """Labels as scores give every answer back that stands in its passage; 11 of 2000 stand in none.

    Over words, 156 are not made of whole words of the dictionary: what is said then holds the answer and more.
    """
    source = webqa(64, version)
    if version == "competition":
        pytest.importorskip("rjieba")
    module, scores = model(source, version, max_answer=30), AnswerScores("characters")
    nowhere = inexact = number = 0
    for split in ("train", "val"):
        source.records(split)
        for batch in source._loader(split):
            logs = torch.stack((batch["starts"], batch["ends"]), 1).clamp(min=1e-6).log()
            for (answer, _), record in zip(module.answers(logs, batch), batch["records"], strict=True):
                text = "" if answer is None else answer.text
                stands = all(known.start is not None for known in record.answers)
                nowhere += not stands
                inexact += stands and text not in record.texts
                assert not stands or any(known in text for known in record.texts)
                number += 1
                scores.update([text], [record.texts], [0.0])
    assert (number, nowhere) == (2000, 11)
    assert inexact == {"open": 0, "competition": 156}[version]
    assert scores.compute()["exact_match"] == pytest.approx((number - nowhere - inexact) / number)


def can_be_said(record: ReadingRecord, version: str) -> bool:
    """Whether all places of the answers begin and end with units of the passage."""
    if any(answer.start is None for answer in record.answers):
        return False
    if version == "open":
        return True
    spans = [words_of(passage) for passage in record.passages]
    starts, ends = ({(number, span[side]) for number, found in enumerate(spans) for span in found} for side in (0, 1))
    return all((a.passage, a.start) in starts and (a.passage, a.end) in ends for a in record.answers)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_50_questions_are_learnt_by_heart(version: str, tmp_path: Path) -> None:
    """Of those whose answers are made of whole words, where these are the units."""
    source = webqa(10, version)
    rows = [record for record in source.records("train") if record.answers and can_be_said(record, version)][:50]
    source.set_records("train", rows)
    source.set_records("val", rows)
    source.prepare()
    module = model(source, version, lr=5e-3, dim=64, dropout=0.0, gate_rate=0.0, schedule="linear")
    run = trainer(tmp_path, max_epochs=100, check_val_every_n_epoch=100, gradient_clip_val=1.0)
    run.fit(module, datamodule=source)
    assert run.callback_metrics["val/exact_match"] > 0.95
    assert run.callback_metrics["val/f1"] > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "closed"}, "version='closed'.*open, competition"),
        ({"voting": "sum"}, "voting='sum'.*vote, best"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"unknown_rate": -0.1}, r"unknown_rate=-0\.1"),
        ({"max_answer": 0}, "max_answer=0"),
        ({"least": 1.0}, r"least=1\.0"),
        ({"schedule": "cosine"}, "constant, linear"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DGCNN(10, **options)


def test_config_binds_to_the_constructor() -> None:
    path = Path(__file__).parents[2] / "conf" / "model" / "dgcnn.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{DGCNN.__module__}.DGCNN"
    assert set(config) <= set(inspect.signature(DGCNN).parameters)
    module = DGCNN(10, **{**config, "optimizer": None})
    module.configure_model()
    convolutions = sum(p.numel() for name, p in module.named_parameters() if "tokens" not in name)
    assert 0.5e6 < convolutions < 1.5e6
