"""The models for named entities on built-in sentences: they learn, resume, see windows, and explain wrong arguments."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ner_models import MODELS, built, data, model, round_trip, trainer

from kexue.cli.targets import build
from kexue.data.records import SpanRecord
from kexue.errors import InputError
from kexue.lightning_modules.extraction.ner import plain_spans
from kexue.nn.losses import ExactLoss, multilabel_pointer_loss
from kexue.nn.transformer import encode

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ner_crf", {"scheme": "BIO", "crf_rate": 10.0}),
        ("ner_crf", {"constrained": False}),
        ("ner_global_pointer", {"head": "efficient"}),
        ("ner_global_pointer", {"head": "standard"}),
    ],
)
def test_a_batch_is_learnt_by_heart(name: str, options: dict[str, Any]) -> None:
    source = data(10)
    module = built(name, source, **options)
    batch, optimizer = next(iter(source.train_dataloader())), module.configure_optimizers()
    losses = []
    for _ in range(150):
        output = module.training_step(batch, 0)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())
    found = module.eval().predict_step(batch)
    assert [(r.id, sorted(plain_spans(r))) for r in found] == [(r.id, sorted(plain_spans(r))) for r in batch["records"]]


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones(name: str) -> None:
    found = []
    for options in ({}, {"row_budget": 128}):
        source = data(16, 16, dictionary=True, **options)
        module = built(name, source, positions="learned")
        batch = next(iter(source.train_dataloader()))
        losses = module.task_losses(encode(module.encoder, batch), batch)
        torch.stack(list(losses.values())).sum().backward()
        found.append(([loss.item() for loss in losses.values()], [p.grad for p in module.parameters()]))
    assert batch["starts"][:, 0].max() < 15, "no two sentences share a row"
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)


def test_the_losses_are_those_of_the_formulas() -> None:
    source = data()
    batch = next(iter(source.train_dataloader()))
    crf, pointer = built("ner_crf", source), built("ner_global_pointer", source)
    features = crf.encoder(batch["ids"], batch["mask"])
    total = 0.0
    for row, offsets in enumerate(batch["offsets"]):  # sentence by sentence, special tokens cut off
        length = len(offsets) - 2
        tags = crf.scheme.tags(batch["flat_labels"][row : row + 1], length + 2)[:, 1:-1]  # type: ignore[union-attr]
        total += crf.head(features[row : row + 1, 1:-1][:, :length], torch.ones(1, length), tags).item()
    assert crf.task_losses(features, batch)["tags"].item() == pytest.approx(total / len(batch["ids"]), rel=1e-5)
    features = pointer.encoder(batch["ids"], batch["mask"])
    expected = multilabel_pointer_loss(pointer.head(features, batch["mask"]), batch["span_labels"])
    torch.testing.assert_close(pointer.task_losses(features, batch)["spans"], expected)


@pytest.mark.parametrize("options", [{}, {"max_length": 24, "stride": 8}], ids=["whole", "windows"])
@pytest.mark.parametrize("name", MODELS)
def test_gold_scores_become_gold_records(name: str, options: dict[str, Any]) -> None:
    assert round_trip(name, data(60, **options)) == 0


@pytest.mark.parametrize("name", MODELS)
def test_fit_logs_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = data(dictionary=True)
    options: dict[str, Any] = {"warmup_steps": 2, **({"crf_rate": 10.0} if name == "ner_crf" else {})}
    whole = model(name, source, **options)
    runner = trainer(tmp_path, max_epochs=4)
    runner.fit(whole, datamodule=source)
    figures = {f"val/{level}{score}" for level in ("", "macro_") for score in ("f1", "precision", "recall")}
    assert {*figures, "val/loss", "train/loss"} <= set(runner.callback_metrics)
    assert not any(key.count("/") > 1 for key in runner.callback_metrics)
    runner.test(whole, datamodule=source, verbose=False)
    kinds = {span.type for record in source.records("test") for span in record.spans}
    assert len(kinds) > 1
    assert {f"test/f1/{kind}" for kind in kinds} <= set(runner.callback_metrics)

    first = trainer(tmp_path, max_epochs=2)
    first.fit(model(name, source, **options), datamodule=source)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = model(name, source, **options)
    trainer(tmp_path, max_epochs=4).fit(second, datamodule=source, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))

    loaded = MODELS[name].load_from_checkpoint(tmp_path / "half.ckpt").eval()
    assert (loaded.types, "optimizer" in loaded.hparams) == (source.types, False)
    source.set_records("predict", [SpanRecord("1", "龘"), SpanRecord(2, "没见过的句子 with latin 😀" * 40)])
    found = [record for batch in runner.predict(loaded, datamodule=source) for record in batch]  # type: ignore
    assert sorted((str(record.id), record.text) for record in found) == [
        ("1", "龘"),
        ("2", source.records("predict")[1].text),
    ]


def test_transitions_have_a_rate_of_their_own() -> None:
    module = built("ner_crf", data(), crf_rate=7.0)
    optimizer = module.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3e-3, 21e-3])
    assert optimizer.param_groups[1]["params"] == list(module.head.crf.parameters())  # type: ignore[union-attr]
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, module.parameters()))


def test_the_pointer_takes_a_loss_by_config_and_is_validated_without() -> None:
    config = yaml.safe_load((CONF / "loss" / "label_smoothing.yaml").read_text("utf-8"))
    source = data()
    batch = next(iter(source.train_dataloader()))
    module = built("ner_global_pointer", source, loss=build(config, "model.loss"))
    features = module.encoder(batch["ids"], batch["mask"])
    scores = module.head(features, batch["mask"])
    smoothed = multilabel_pointer_loss(scores, batch["span_labels"], smoothing=0.1)
    plain = multilabel_pointer_loss(scores, batch["span_labels"])
    torch.testing.assert_close(module.losses(features, batch, training=True)["spans"], smoothed)
    torch.testing.assert_close(module.losses(features, batch, training=False)["spans"], plain)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ner_crf", {"scheme": "IOB"}, "use one of BIO, BIOS, BIOES"),
        ("ner_crf", {"crf_rate": 0.0}, "use a number above 0"),
        ("ner_crf", {"schedule": "cosine"}, r"NerCRF\(schedule='cosine'\): use one of constant, linear"),
        ("ner_crf", {"types": []}, r"NerCRF\(types=\[\]\): give at least one, each once"),
        ("ner_global_pointer", {"types": ["a", "a"]}, "each once"),
        ("ner_global_pointer", {"head": "big"}, "efficient, standard"),
        ("ner_global_pointer", {"max_spans": 0}, "use 1 or more"),
        ("ner_global_pointer", {"dim": 30, "num_heads": 4}, "must divide"),
        ("ner_global_pointer", {"loss": ExactLoss()}, "loss=ExactLoss.*use loss=label_smoothing, or none"),
    ],
)
def test_wrong_options_are_explained(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MODELS[name](10, **{"types": ["a", "b"], **options})


@pytest.mark.parametrize("name", MODELS)
def test_config_binds_to_the_constructor(name: str) -> None:
    config = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{MODELS[name].__module__}.{MODELS[name].__name__}"
    assert set(config) <= set(inspect.signature(MODELS[name]).parameters)
