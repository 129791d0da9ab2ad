"""What is written of reading comprehension, the Daguan cup's tagger and entity linking, checked over the whole way."""

import functools
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytorch_lightning as pl
import tokenizers
import torch
from daguan_models import PLANS, built, data, model
from ner_models import trainer
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.data.daguan import read_daguan, record_of, write_daguan
from kexue.data.daguan_2019 import DaguanCorpusDataModule, DaguanDataModule
from kexue.data.knowledge import KnowledgeBase
from kexue.data.link_batches import entry_of, match_features
from kexue.data.linking import LinkDataModule
from kexue.data.passage_rows import PassageBatches
from kexue.data.reading import ReadingDataModule
from kexue.data.reading_windows import WindowBatches
from kexue.data.records import Entity, without_overlaps
from kexue.data.tagged import read_tagged
from kexue.data.tokenizers import WordPieceTokenizer
from kexue.lightning_modules.extraction import DGCNN, DaguanIE, EntityLinker, Lic2020MRC
from kexue.lightning_modules.extraction.dgcnn import PassageReader
from kexue.lightning_modules.extraction.entity_linking import draw_pairs
from kexue.lightning_modules.pretraining import MaskedLM
from kexue.nn.decoding import answer_f1, exact_match
from kexue.nn.gated_convolution import AttentionPooling, GatedStack
from kexue.nn.heads import start_end_classes
from kexue.nn.trunks import LSTMTrunk
from kexue.strategies import Lookahead, SingleDevice, StartFrom, Technique

TINY: dict[str, Any] = {"dim": 32, "num_layers": 1, "num_heads": 2, "feedforward_dim": 64, "dropout": 0.0}


def real(folder: str) -> str:
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, folder).is_dir():
        pytest.skip(f"KEXUE_DATA does not name a folder with {folder}")
    return root


def word_pieces(texts: list[str], folder: Path) -> str:
    """A tokenizer in which words of letters and digits are whole or in pieces, and Chinese characters single."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    )
    tokenizer = WordPieceTokenizer(sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__))
    assert sum(token.startswith("##") for token in tokenizer.vocabulary) > 100
    tokenizer.save(folder)
    return str(folder)


def test_real_answers_come_back_through_word_pieces_and_rows_of_256(tmp_path: Path) -> None:
    """Those late in their passages too. One is lost, which begins with a blank: no token stands for that."""
    root, file = real("reading_comprehension"), "reading_comprehension/dureader_robust_dev.json"
    options: dict[str, Any] = {"root": root, "train_files": [file], "dev_file": file}
    records = ReadingDataModule(batches=WindowBatches(), **options).records("val")
    folder = word_pieces([text for record in records for text in (record.question, *record.passages)], tmp_path)
    source = ReadingDataModule(32, batches=WindowBatches(256), tokenizer=folder, **options)
    source.setup("fit")
    module, late, lost = Lic2020MRC(**source.model_arguments(), max_answer=250), 0, []
    for batch in source.val_dataloader():
        assert batch["ids"].shape[1] <= 256
        target = batch["targets"][:, 0]
        gold = torch.full((len(target), 2, batch["ids"].shape[1]), -20.0).scatter(2, target[..., None], 20.0)
        found = module.answers(*module.candidates(gold, batch["places"]), batch)
        for (answer, _), record in zip(found, batch["records"], strict=True):
            assert answer is not None
            lost += [] if answer.text in record.texts else [record.texts]
            late += all(known.start > 230 for known in record.answers)
    assert (len(source.records("val")), late, lost) == (150, 9, [(" 5-10万元",)])


@pytest.mark.parametrize("head", ["positions", "pairs"])
def test_a_row_has_the_same_scores_and_loss_alone_and_beside_longer_ones(head: str) -> None:
    source = ReadingDataModule(8, batches=WindowBatches(256, max_question=24), num_generated=20, unanswerable=0.2)
    source.setup("fit")
    pl.seed_everything(0, verbose=False)
    module = Lic2020MRC(**source.model_arguments(), **TINY, head=head)  # type: ignore[arg-type]
    module.configure_model()
    batch = next(iter(source.train_dataloader()))
    names = ("ids", "mask", "segments", "places")
    together, losses = module(*(batch[name] for name in names)), []
    for row, length in enumerate(batch["mask"].sum(1).tolist()):
        alone = {name: batch[name][row : row + 1, :length] for name in names}
        scores = module(*alone.values())
        torch.testing.assert_close(together[row][..., :length, :length][None], scores, rtol=1e-4, atol=1e-5)
        alone["targets"] = batch["targets"][row : row + 1]
        losses.append(module.task_losses(module.features(alone), alone)["span"])
    assert len(set(batch["mask"].sum(1).tolist())) > 1
    loss = module.task_losses(module.features(batch), batch)["span"]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def blocks(stack: GatedStack, dilations: tuple[int, ...], passes: Callable[[int], bool], hidden: Tensor) -> Tensor:
    """Gated convolutions over a sequence `(T, D)` without padding, tap by tap."""
    for number, (block, dilation) in enumerate(zip(stack.blocks, dilations, strict=True)):
        padded, weight = F.pad(hidden, (0, 0, dilation, dilation)), block.convolution.weight
        taps = (padded[k * dilation : k * dilation + len(hidden)] @ weight[..., k].T for k in range(3))
        found, gate = (sum(taps) + block.convolution.bias).chunk(2, -1)
        gate = 1 / (1 + (-gate).exp())
        hidden = found * gate + (hidden * (1 - gate) if passes(number) else 0)
    return hidden


def pooled(layer: AttentionPooling, hidden: Tensor) -> Tensor:
    weights = ((hidden @ layer.layer.weight.T).tanh() @ layer.score.weight[0]).exp()
    return weights @ hidden / weights.sum()


def embedded(reader: PassageReader, batch: dict[str, Any], ids: Tensor, words: str, place: tuple[int, int]) -> Tensor:
    """The table's vectors `(T, D)` and the words', projected where there is a layer for it."""
    found = 0 if reader.tokens is None else reader.tokens.weight[ids]
    if words not in batch:
        return found
    vectors = batch["word_vectors"][batch[words][place[0], : place[1]]]
    return found + (vectors if reader.words is None else vectors @ reader.words.weight.T)


@pytest.mark.parametrize("word_dim", [0, 3, 8])
@pytest.mark.parametrize("version", ["open", "competition"])
def test_dgcnn_is_the_formula(version: str, word_dim: int, tmp_path: Path) -> None:
    """Each passage alone, step by step, beside the batch; the losses are a hundred times the focal ones."""
    dim, vectors = 8, tmp_path / "vectors.txt"
    options: dict[str, Any] = {"features": version == "competition"}
    if word_dim:
        rows = [
            " ".join([word, *(f"{(n - k) / 5:.1f}" for k in range(word_dim))]) for n, word in enumerate("是的在有人")
        ]
        vectors.write_text("\n".join([f"5 {word_dim}", *rows]) + "\n", encoding="utf-8")
        options |= {"word_vectors": str(vectors), "words": "characters", "cache_dir": str(tmp_path / "cache")}
    batches = PassageBatches(256, **options)
    source = ReadingDataModule(6, batches=batches, format="webqa", num_generated=12, num_passages=2, unanswerable=0.2)
    source.setup("fit")
    pl.seed_everything(0, verbose=False)
    module = DGCNN(**source.model_arguments(), version=version, dim=dim)  # type: ignore[arg-type]
    module.configure_model()
    reader, head, batch = module.eval().reader, module.head, next(iter(source.train_dataloader()))
    logs, focal = module(batch), {"starts": 0.0, "ends": 0.0}
    for row, (owner, length) in enumerate(zip(batch["owners"].tolist(), batch["mask"].sum(1).tolist(), strict=True)):
        asked = batch["questions"][owner][batch["question_mask"][owner]]
        asked = embedded(reader, batch, asked, "question_words", (owner, len(asked)))
        vector = pooled(reader.pooling, blocks(reader.question, (1, 2, 1), lambda _: True, asked))
        beside = vector.expand(length, dim)
        parts = [embedded(reader, batch, batch["ids"][row, :length], "words", (row, length)), beside]
        if version == "competition":
            place = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
            parts += [batch["features"][row, :length], torch.stack((place.sin(), place.cos()), -1).flatten(1)]
        told = torch.cat(parts, -1)
        if reader.mix is not None:
            told = told @ reader.mix.weight.T
        told = blocks(reader.passage, (1, 2, 4, 8, 16, 1), lambda n: version == "open" or n > 0, told)
        read = torch.cat((told, beside), -1)
        whole = 1 / (1 + (-head.passage(pooled(head.pooling, read))).exp())
        *inner, outer = (part for part in head.tokens if isinstance(part, nn.Linear))
        assert len(inner) == (version == "competition")
        for part in inner:
            read = (read @ part.weight.T + part.bias).clamp(min=0)
        wanted = (whole / (1 + (-(read @ outer.weight.T + outer.bias)).exp())).T
        torch.testing.assert_close(logs[row, :, :length].exp(), wanted, rtol=1e-4, atol=1e-6)
        for name, p in zip(focal, wanted, strict=True):
            y = batch[name][row, :length]
            focal[name] -= (0.25 * y * p.log() * (1 - p) ** 2 + 0.75 * (1 - y) * (1 - p).log() * p**2).sum()
    assert not word_dim or all(batch[name].any() for name in ("words", "question_words"))
    losses = module.task_losses(module.features(batch), batch)
    assert len(set(batch["mask"].sum(1).tolist())) > 1
    for loss, total in zip(losses.values(), focal.values(), strict=True):
        torch.testing.assert_close(loss, 100 * total / batch["mask"].sum(), rtol=1e-4, atol=1e-6)


def test_dgcnn_has_a_million_weights_beside_its_embeddings() -> None:
    module = DGCNN(10)
    module.configure_model()
    convolutions = 9 * (128 * 256 * 3 + 256)
    others = (128 * 128 + 128) + 256 * 128 + (256 * 256 + 256) + 3 * (256 + 1)
    assert sum(p.numel() for name, p in module.named_parameters() if "reader.tokens" not in name) == (
        convolutions + others
    )
    assert convolutions + others == 1_002_883


def test_gold_strings_earn_the_highest_score() -> None:
    """Each right answer of the real sets, by the count of its set. A mark alone has no characters to agree on."""
    root, texts, less = real("reading_comprehension"), 0, []
    for name, format_, counting in (
        ("webqa_train.json.gz", "webqa", "characters"),
        ("webqa_dev.json", "webqa", "characters"),
        ("cmrc2018_dev.json", "squad", "common_string"),
        ("dureader_robust_dev.json", "squad", "common_string"),
    ):
        file = f"reading_comprehension/{name}"
        options: dict[str, Any] = {"root": root, "train_files": [file], "dev_file": file, "format": format_}
        for record in ReadingDataModule(batches=WindowBatches(), **options).records("val"):
            for text in record.texts:
                assert exact_match(text, record.texts, counting) == 1  # type: ignore[arg-type]
                less += [text] if answer_f1(text, record.texts, counting) < 1 else []  # type: ignore[arg-type]
                texts += 1
    assert (texts, less) == (2419, ["$"])


def test_wide_blanks_part_words_as_in_the_tool_of_sogou() -> None:
    assert exact_match("李白\u3000杜甫", ["杜甫 李白"], "characters") == 1


@pytest.mark.parametrize("plan", ["crf", "span_soft"])
def test_real_lines_come_back_through_the_targets_of_each_head(plan: str, tmp_path: Path) -> None:
    """Segments to tags, or to classes of borders, to spans to segments: the file of 250 lines, byte for byte."""
    path = Path(real("daguan_2019"), "daguan_2019", "dev.txt")
    source = DaguanDataModule(25, root=str(path.parents[1]), train_file="daguan_2019/dev.txt", max_length=512)
    source.setup("fit")
    module, answers = built(plan, source), {}
    for batch in source.val_dataloader():
        length = batch["ids"].shape[1]
        if plan == "crf":
            tags = module.scheme.tags(batch["flat_labels"], length)[:, 1:-1]
            module.head.crf.forward = lambda *_, tags=tags: tags  # type: ignore[union-attr, method-assign]
        else:
            gold = [torch.eye(4)[part[:, 1:-1]] for part in start_end_classes(batch["flat_labels"], length)]
            module.head.forward = lambda *_, gold=gold: gold  # type: ignore[method-assign, misc]
        answers |= {record.id: record for record in module._extract(torch.zeros(*batch["ids"].shape, 32), batch)}
    assert write_daguan((answers[record.id] for record in read_daguan(path)), tmp_path / "out.txt") == 250
    assert (tmp_path / "out.txt").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("plan", [*PLANS, "masked_lm"])
def test_each_parameter_of_each_plan_is_in_one_group_and_learns(plan: str) -> None:
    """The norms among them, which have no weight decay."""
    if plan == "masked_lm":
        source: Any = DaguanCorpusDataModule(10, num_generated=20)
        source.setup("fit")
        module: Any = MaskedLM(**source.model_arguments(), **TINY)
        module.configure_model()
        module.log = lambda *_, **__: None
    else:
        source = data()
        module = built(plan, source)
    optimizer, named = module.configure_optimizers(), dict(module.named_parameters())
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, named.values()))
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    output = module.training_step(next(iter(source.train_dataloader())), 0)
    (output["loss"] if isinstance(output, dict) else output).backward()
    optimizer.step()
    assert [name for name, parameter in named.items() if torch.equal(parameter, before[name])] == []


def test_a_fold_resumes_between_two_syncs_of_its_slow_weights(tmp_path: Path) -> None:
    """Saved after 4 steps, with a sync at every third: the slow weights are others than those that are trained."""
    source = data(30, fold=1, num_folds=3)

    def run(epochs: int, path: Path | None = None) -> tuple[pl.Trainer, DaguanIE]:
        module, strategy = model("crf", source, dropout=0.1), SingleDevice(techniques=[Lookahead(k=3)])
        runner = trainer(tmp_path, max_epochs=epochs, strategy=strategy, num_sanity_val_steps=0)
        runner.fit(module, datamodule=source, ckpt_path=path)
        return runner, module

    half, stopped = run(2)
    (optimizer,) = half.optimizers
    assert half.global_step == 4
    assert all(not torch.equal(optimizer.state[p]["lookahead_slow"], p) for p in stopped.parameters())
    half.save_checkpoint(tmp_path / "half.ckpt")
    (_, whole), (_, rest) = run(4), run(4, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def as_numbers(folder: Path) -> None:
    """The sentences of Resume with a random number for each character: 30 with labels, 150 for dev, 2200 without."""
    root, labels = real("ner_resume"), {"TITLE": "a", "ORG": "b", "NAME": "c"}
    rows = list(read_tagged(Path(root, "ner_resume", "train.char.bmes.gz")))
    characters = sorted({character for row in rows for character in row.text})
    Random(0).shuffle(characters)
    numbers = {character: str(number) for number, character in enumerate(characters)}
    records = []
    for row in rows:
        segments, place = [], 0
        for span in [span for span in without_overlaps(row.spans) if span.type in labels]:
            segments += [(row.text[place : span.start], "o"), (span.text, labels[span.type])]
            place = span.end
        segments.append((row.text[place:], "o"))
        told = [("_".join(map(numbers.__getitem__, text)), label) for text, label in segments if text]
        records.append(record_of(row.id, told))
    records = [record for record in records if record.text.count("_") < 100]
    Random(1).shuffle(records)
    for name, first, last in (("train", 0, 30), ("dev", 30, 180), ("corpus", 180, 2380)):
        write_daguan(records[first:last], folder / f"{name}.txt")


@pytest.mark.slow
def test_a_pretrained_encoder_is_at_least_5_points_better_than_a_random_one(tmp_path: Path) -> None:
    """Nothing but sentences of numbers helps; the worst F1 with them (0.53) and the best without (0.41), two seeds."""
    as_numbers(tmp_path)
    sizes: dict[str, Any] = {"dim": 64, "num_layers": 1, "num_heads": 4, "feedforward_dim": 128, "dropout": 0.1}
    options: dict[str, Any] = {"root": str(tmp_path), "dev_file": "dev.txt"}
    corpus = DaguanCorpusDataModule(32, train_files=["corpus.txt", "train.txt"], **options)
    corpus.setup("fit")
    corpus.save_assets(tmp_path)

    def fit(module: pl.LightningModule, source: Any, epochs: int, techniques: list[Technique]) -> pl.Trainer:
        strategy = SingleDevice(techniques=techniques)
        rare = {"check_val_every_n_epoch": epochs, "num_sanity_val_steps": 0, "gradient_clip_val": 5.0}
        runner = trainer(tmp_path, max_epochs=epochs, strategy=strategy, **rare)
        runner.fit(module, datamodule=source)
        return runner

    def settings(lr: float, warmup_steps: int) -> dict[str, Any]:
        optimizer = functools.partial(torch.optim.AdamW, lr=lr)
        return {**sizes, "warmup_steps": warmup_steps, "schedule": "linear", "optimizer": optimizer}

    pl.seed_everything(0, verbose=False)
    before = fit(MaskedLM(**corpus.model_arguments(), **settings(3e-3, 20)), corpus, 20, [])
    before.save_checkpoint(tmp_path / "before.ckpt")
    source = DaguanDataModule(10, train_file="train.txt", vocab_file=str(tmp_path / "vocab.txt"), **options)
    source.setup("fit")
    found: dict[bool, list[float]] = {False: [], True: []}
    for pretrained, seed in product(found, range(2)):
        pl.seed_everything(seed, verbose=False)
        module = DaguanIE(**source.model_arguments(), **settings(2e-3, 10), trunk="none", crf_rate=3.0)
        start: list[Technique] = [StartFrom(str(tmp_path / "before.ckpt"))] if pretrained else []
        found[pretrained].append(float(fit(module, source, 20, start).callback_metrics["val/f1"]))
    assert min(found[True]) > max(found[False]) + 0.05, found


def test_the_trunk_is_torchs_lstm_of_two_layers_and_a_norm() -> None:
    torch.manual_seed(0)
    ours, theirs = LSTMTrunk(8).eval(), nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True)
    for number, layer in enumerate(ours.layers):
        for suffix, part in (("", layer.ahead), ("_reverse", layer.back)):
            for name, parameter in part.named_parameters():
                getattr(theirs, name.replace("l0", f"l{number}{suffix}")).data = parameter.data
    hidden, lengths = torch.randn(3, 6, 8), torch.tensor([6, 2, 4])
    packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
    read = F.layer_norm(nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)[0], (8,))
    mask = torch.arange(6) < lengths[:, None]
    torch.testing.assert_close(ours(hidden, mask)[mask], read[mask])


def test_the_losses_of_linking_are_three_means_of_cross_entropies() -> None:
    """Of starts and of ends over all characters, p being 0 outside the dictionary; of links over the pairs drawn."""
    source = LinkDataModule(8, num_generated=24)
    source.prepare()
    pl.seed_everything(0, verbose=False)
    module = EntityLinker(**source.model_arguments(), dim=16, num_heads=2, dropout=0.0)
    module.configure_model()
    batch = source.training_collator()(list(source.records("train")))
    borders, links = module(batch)
    torch.manual_seed(7)
    found = module.task_losses(module.encoder(batch), batch)
    torch.manual_seed(7)
    drawn = draw_pairs(batch["pairs"][:, 0], batch["mentions"], batch["judged"])
    assert set(batch["right"][drawn].tolist()) == {True, False}
    q = torch.where(batch["right"][drawn], links[drawn], 1 - links[drawn])
    torch.testing.assert_close(found["link"], -q.log().mean())
    possible = batch["borders"] & batch["mask"][..., None]
    for side, name in enumerate(("start", "end")):
        q = torch.where(batch["labels"], borders, 1 - borders)[..., side][possible[..., side]]
        torch.testing.assert_close(found[name], -q.log().sum() / batch["mask"].sum())


def test_objects_of_up_to_ten_characters_are_looked_for_in_a_text() -> None:
    ten, eleven = "一二三四五六七八九十", "甲乙丙丁戊己庚辛壬癸子"
    entity = Entity("1", "名", (), (), (("短", ten), ("长", eleven), ("更短", "一二")))
    text = f"{eleven}又{ten}又一二"
    found = match_features(text, [*text], entry_of(KnowledgeBase.build([entity]), 0, "characters"))
    assert "".join(c for c, hit in zip(text, found[:, 2], strict=True) if hit) == ten + "一二"
