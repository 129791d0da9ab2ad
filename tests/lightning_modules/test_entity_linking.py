"""EntityLinker: right to the formulas, on built-in texts and toys, from gold to targets and back, and resumed."""

import functools
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from kexue.data.knowledge import KnowledgeBase
from kexue.data.linking import LinkDataModule
from kexue.data.records import NIL, Entity, Link, LinkRecord
from kexue.errors import InputError
from kexue.lightning_modules.extraction import entity_linking
from kexue.lightning_modules.extraction.entity_linking import EntityLinker, draw_pairs, linked_records, typed_links
from kexue.strategies import SingleDevice

TINY = {"dim": 16, "num_heads": 2, "dropout": 0.0}
QUIET = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)


ALL_BEARERS = {"min_annotations": 10**6}
"""Keeps all entities of a name as candidates, also where training has shown some of them often."""


def data(rows: int = 24, batch_size: int = 8, **options: Any) -> LinkDataModule:
    module = LinkDataModule(batch_size, num_generated=rows, **options)
    module.prepare()
    return module


def model(source: LinkDataModule, **options: Any) -> EntityLinker:
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.Adam, lr=5e-3)
    return EntityLinker(**source.model_arguments(), **{**TINY, **options}, optimizer=optimizer)


def built(source: LinkDataModule, **options: Any) -> EntityLinker:
    module = model(source, **options)
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    return module.eval()


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", strategy=SingleDevice(), devices=1, **{**QUIET, **options}
    )


def test_probabilities_are_those_of_the_formula_and_padding_is_not_seen() -> None:
    """Every text and every pair alone, without padding, step by step, beside the batch."""
    source = data()
    module, batch = built(source), source.collator()(list(source.records("train"))[:9])
    borders, links = module(batch)
    assert (borders[~batch["borders"]] == 0).all()
    head, embedding = module.head, module.encoder.embedding
    hidden = []
    for row, record in enumerate(batch["records"]):
        size = len(record.text)
        mask = torch.ones(1, size, dtype=torch.bool)
        inputs = torch.cat([embedding(batch["ids"][row : row + 1, :size]), batch["borders"][row : row + 1, :size]], -1)
        hidden.append(module.encoder.layers(inputs, mask))
        expected = head.spans(hidden[-1])[0].sigmoid() * batch["borders"][row, :size]
        torch.testing.assert_close(borders[row, :size], expected)
    for number, (row, first, last, entity) in enumerate(batch["pairs"].tolist()):
        size, chars = hidden[row].shape[1], int(batch["entity_mask"][entity].sum())
        inside = torch.zeros(1, size, 1)
        inside[0, first : last + 1] = 1
        mask, entity_mask = torch.ones(1, size, dtype=torch.bool), torch.ones(1, chars, dtype=torch.bool)
        read = head.text(torch.cat([hidden[row], inside, batch["features"][number : number + 1, :size]], -1), mask)
        described = head.entity(embedding(batch["entity_ids"][entity : entity + 1, :chars]), entity_mask)
        score = head.match(read, described, mask, entity_mask, read[:, first : last + 1].mean(1))
        torch.testing.assert_close(links[number], score[0].sigmoid())


def test_padding_changes_no_output() -> None:
    source = data()
    module, records = built(source), sorted(source.records("train"), key=lambda record: len(record.text))
    collate = source.collator()
    alone, beside = collate(records[:1]), collate([records[0], records[-1]])
    borders, links = module(alone)
    more_borders, more_links = module(beside)
    torch.testing.assert_close(more_borders[:1, : borders.shape[1]], borders)
    assert (more_borders[0, borders.shape[1] :] == 0).all()
    torch.testing.assert_close(more_links[: len(links)], links)


def test_loss_on_one_batch_falls() -> None:
    source = data(12, 12)
    module = built(source).train()
    batch, optimizer = source.training_collator()(list(source.records("train"))), module.configure_optimizers()
    losses = []
    for _ in range(120):
        output = module.training_step(batch, 0)
        assert sorted(output["losses"]) == ["end", "link", "start"]
        assert output["loss"].item() == pytest.approx(sum(loss.item() for loss in output["losses"].values()), rel=1e-5)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_batch_without_mentions_is_trained_on() -> None:
    """And so is one whose gold mention is not in the dictionary: all parameters take part, nothing is infinite."""
    source = data()
    module = built(source).train()
    strange = LinkRecord("b", "没有这个名字", (Link("这个名字", 2, "10001", None),))
    for records in ([LinkRecord("a", "无")], [strange], [*source.records("train")[:3], LinkRecord("a", "无")]):
        output = module.training_step(source.training_collator()(records), 0)
        output["loss"].backward()
        assert torch.isfinite(output["loss"])
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    assert output["losses"]["link"] > 0
    assert next(iter(module.predict_step(source.collator()([strange])))).links == ()


def test_pairs_are_drawn_evenly_from_the_gold_mentions_of_each_text() -> None:
    """Text 0: mention 0 with three entities, mention 1 with one; text 1: none that is gold; text 2: one with two."""
    torch.manual_seed(0)
    texts = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    mentions, judged = torch.tensor([0, 0, 0, 1, 2, 3, 3]), torch.tensor([1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    counts: Counter[int] = Counter()
    for _ in range(6000):
        drawn = draw_pairs(texts, mentions, judged).tolist()
        assert texts[drawn].tolist() == [0, 2]
        counts.update(drawn)
    shares = [counts[number] / 6000 for number in range(7)]
    assert shares == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2, 0, 1 / 2, 1 / 2], abs=0.03)
    assert draw_pairs(texts, mentions, torch.zeros_like(judged)).tolist() == []
    assert draw_pairs(torch.tensor([0]), torch.tensor([-1]), torch.tensor([False])).tolist() == []


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({0: 0.6, 1: 0.7, 2: 0.05}, [("甲", "b")]),
        ({0: 0.7, 1: 0.7, 2: 0.1}, [("甲", "a"), ("乙", "c")]),  # of equals the first; at the threshold it counts
        ({0: 0.09, 1: 0.08, 2: 0.5}, [("乙", "c")]),
    ],
)
def test_the_best_entity_is_taken_unless_none_is_good(probabilities: dict, expected: list) -> None:
    batch = {
        "records": [LinkRecord("1", "甲与乙")],
        "windows": [(0, 0, 3)],
        "pairs": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 2, 2, 2]]),
        "entities": [("a", None), ("b", None), ("c", None)],
    }
    of_span = {(0, 0, 0): [0, 1], (0, 2, 2): [2]}
    (record,) = linked_records(batch, list(of_span), of_span, probabilities, 0.1)
    assert [(link.text, link.entity) for link in record.links] == expected


def test_scores_at_the_threshold_do_not_start_a_mention() -> None:
    source = data()
    module, batch = built(source), source.collator()(list(source.records("train"))[:4])
    hidden = module.encoder(batch)
    half = batch["borders"] * 0.5
    module._border_probabilities = lambda *_: half  # type: ignore[method-assign]
    module.span_threshold, module.link_threshold = 0.5, 0.0
    assert all(record.links == () for record in module._extract(hidden, batch))
    module.span_threshold = 0.4
    words = source.collator().lexicon.words([record.text for record in batch["records"]])
    found = module._extract(hidden, batch)
    assert [[(link.start, link.end) for link in record.links] for record in found] == [
        [(word.start, word.end) for word in group] for group in words
    ]


def decoded_gold(module: EntityLinker, batch: dict[str, Any]) -> list[LinkRecord]:
    """What the decoder makes of the targets in place of scores."""
    module._border_probabilities = lambda _, batch: (batch["labels"] & batch["borders"]).float()  # type: ignore
    module._link = lambda _, batch, chosen: torch.where(batch["right"][chosen], 9.0, -9.0)  # type: ignore
    return module._extract(torch.zeros(1, 1, 1), batch)


def test_gold_targets_decode_to_gold() -> None:
    source = data(40, **ALL_BEARERS)
    module = built(source)
    lost = 0
    for batch in source.val_dataloader():
        for found, gold in zip(decoded_gold(module, batch), batch["records"], strict=True):
            assert (found.id, found.text) == (gold.id, gold.text)
            assert set(found.links) <= set(gold.judged().links)
            lost += len(gold.judged().links) - len(found.links)
    assert lost == 0


def test_long_texts_are_read_in_windows_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 40 to 500 characters in windows of 30: gold decodes to gold, and each mention comes once."""
    source, rows = data(60, max_length=30, **ALL_BEARERS), []
    stream: list[Any] = list(source.records("train"))
    for number in range(2, 8):
        text, links = "", []
        for record in stream[: 3 * number]:
            links += [Link(link.text, link.start + len(text), link.entity, link.type) for link in record.links]
            text += record.text + "。"
        rows.append(LinkRecord(f"{number}", text, tuple(links)))
    assert min(len(row.text) for row in rows) > 40
    module, batch = built(source), source.collator()(rows)
    assert batch["ids"].shape[1] == 30
    assert len(batch["ids"]) > len(rows)
    for found, gold in zip(decoded_gold(module, batch), rows, strict=True):
        assert found.text == gold.text
        assert list(found.links) == sorted(gold.judged().links, key=lambda link: link.start)
    module = built(source, span_threshold=0.0, link_threshold=0.0)
    whole = list(module.predict_step(batch))
    assert all(record.links for record in whole)
    monkeypatch.setattr(entity_linking, "CELLS_AT_ONCE", 100)
    in_turns = list(module.predict_step(batch))
    assert [record.links for record in in_turns] == [record.links for record in whole]


def toy() -> LinkDataModule:
    """20 sentences, 10 entities, each name borne by two of them."""
    kinds = {"歌手": ["{}的歌真好听", "听{}唱新歌"], "教练": ["{}带队赢球", "球队请来{}"]}
    names = ["李娜", "王伟", "张敏", "刘洋", "陈静"]
    entities, rows = [], []
    for number, name in enumerate(names):
        for shift, (kind, templates) in enumerate(kinds.items()):
            entities.append(Entity(str(10 * number + shift), name, (), (kind,), (("职业", kind),)))
            for template in templates:
                link = Link(name, template.index("{"), entities[-1].id, kind)
                rows.append(LinkRecord(f"{len(rows)}", template.format(name), (link,)))
    source = LinkDataModule(20, min_count=1)
    source.knowledge = KnowledgeBase.build(entities)
    source.set_records("train", rows)
    source.set_records("val", rows)
    source.prepare()
    assert (len(rows), len(entities)) == (20, 10)
    return source


def test_a_toy_is_learnt_by_heart(tmp_path: Path) -> None:
    source = toy()
    runner = trainer(tmp_path, max_epochs=200, check_val_every_n_epoch=200, num_sanity_val_steps=0)
    runner.fit(model(source, dim=32, num_heads=4), datamodule=source)
    assert runner.callback_metrics["val/f1"] == runner.callback_metrics["val/mention_f1"] == 1


def test_fit_logs_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    source, options = data(), {"dropout": 0.2}
    whole = model(source, **options)
    runner = trainer(tmp_path, max_epochs=4)
    runner.fit(whole, datamodule=source)
    names = {f"val/{part}{name}" for part in ("", "macro_", "mention_") for name in ("f1", "precision", "recall")}
    assert {*names, "val/loss", "train/loss"} == set(runner.callback_metrics)

    first = trainer(tmp_path, max_epochs=2)
    first.fit(model(source, **options), datamodule=source)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = model(source, **options)
    pl.seed_everything(7, verbose=False)
    trainer(tmp_path, max_epochs=4).fit(second, datamodule=source, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))

    results = runner.test(whole, datamodule=source, verbose=False)[0]
    assert {"test/f1", "test/mention_recall"} <= set(results)
    assert any(name.count("/") == 2 for name in results), "no scores by type"

    loaded = EntityLinker.load_from_checkpoint(tmp_path / "half.ckpt").eval()
    assert "optimizer" not in loaded.hparams
    batch = next(iter(source.val_dataloader()))
    assert len(list(loaded.predict_step(batch))) == len(batch["records"])


def test_repeated_predictions_and_mentions_of_nobody_earn_nothing() -> None:
    module = EntityLinker(10, ["人物"])
    link, nil = Link("甲", 0, "1", "人物"), Link("乙", 1, NIL)
    gold, found = (
        LinkRecord("a", "甲乙", (link, nil)),
        LinkRecord("a", "甲乙", (link, link, Link("乙", 1, "2", "人物"))),
    )
    module.link_scores.update([typed_links(found)], [typed_links(gold)])
    scores = module.link_scores.compute()
    assert (scores["precision"], scores["recall"]) == (0.5, 1.0)
    module.link_scores.reset()
    other_id = LinkRecord("a", "甲乙", (Link("甲", 0, "2", "人物"),))
    module.link_scores.update([typed_links(other_id)], [typed_links(gold)])
    assert module.link_scores.compute()["f1"] == 0


def test_word_vectors_take_part(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("2 3\n的 1 2 3\n歌 4 5 6\n", encoding="utf-8")
    source = LinkDataModule(8, num_generated=12, word_vectors=str(path), cache_dir=str(tmp_path))
    module = built(source)
    module.training_step(source.training_collator()(list(source.records("train"))), 0)["loss"].backward()
    weight = module.encoder.embedding.words.weight  # type: ignore[union-attr]
    assert weight.shape == (16, 3)
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_the_network_is_built_once_and_offers_its_parts() -> None:
    module = built(data())
    weights = list(module.parameters())
    module.configure_model()
    assert all(one is other for one, other in zip(module.parameters(), weights, strict=True))
    assert [type(block).__name__ for block in module.blocks()] == ["BiLSTM"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"span_threshold": -0.1}, "span_threshold"),
        ({"dim": 30}, "dim is even and num_heads divides it"),
        ({"num_heads": 0}, "num_heads=0"),
    ],
)
def test_wrong_options_are_explained(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EntityLinker(10, **options)


def test_config_binds_to_the_constructor() -> None:
    path = Path(__file__).parents[2] / "conf" / "model" / "entity_linking.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{EntityLinker.__module__}.EntityLinker"
    assert set(config) <= set(inspect.signature(EntityLinker).parameters)
