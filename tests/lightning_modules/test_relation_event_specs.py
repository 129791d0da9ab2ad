"""What the specifications of GPLinker's relations and of LIC 2020's two tasks ask for and other tests do not say."""

import functools
import itertools
import math
import operator
import os
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from event_taggers import OUTPUTS, built
from event_taggers import data as event_data
from event_taggers import triples as arguments_of
from ner_models import trainer
from torch import Tensor, nn
from torchcrf import CRF

from kexue.data.events import EventDataModule
from kexue.data.records import TRIGGER_ROLE, VALUE_SLOT, Argument, Event, EventRecord, Mention, Relation, RelationRecord
from kexue.data.relations import RelationDataModule
from kexue.lightning_modules.extraction import Lic2020Event, Lic2020Relation, RelationGPLinker
from kexue.nn.decoding import merge_slots
from kexue.nn.heads import ConditionalLayerNorm, LinearChainCRF
from kexue.nn.transformer import encode

TINY: dict[str, Any] = {"dim": 16, "num_layers": 1, "num_heads": 2, "feedforward_dim": 32, "dropout": 0.0}
Cells = set[tuple[int, int, int]]


def relation_data(rows: int, batch_size: int = 8, **options: Any) -> RelationDataModule:
    module = RelationDataModule(batch_size, num_generated=rows, **options)
    module.setup("fit")
    return module


def turned(vectors: Tensor) -> Tensor:
    """RoPE of `(T, d)`, written plainly over complex numbers."""
    length, size = vectors.shape
    angles = torch.arange(length)[:, None] * 10000 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    pairs = torch.view_as_complex(vectors.reshape(length, -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)


def plain_scores(kind: str, pointer: Any, hidden: Tensor, rope: bool) -> Tensor:
    """Scores `(H, T, T)` of one sentence `(T, D)` without padding."""
    turn, size = turned if rope else lambda vectors: vectors, pointer.head_size
    parts = hidden @ pointer.projection.weight.T + pointer.projection.bias
    if kind == "standard":
        pairs = (part.split(size, -1) for part in parts.split(2 * size, -1))
        return torch.stack([turn(query) @ turn(key).T for query, key in pairs]) / math.sqrt(size)
    shared = turn(parts[:, 0::2]) @ turn(parts[:, 1::2]).T / math.sqrt(size)
    bias = (parts @ pointer.bias.weight.T + pointer.bias.bias) / 2
    return torch.stack([shared + bias[:, a + 1, None] + bias[:, a] for a in range(0, bias.shape[1], 2)])


def plain_loss(scores: Tensor, positives: Cells, triangular: bool) -> float:
    """log(1 + sum over positives of e^-s) + log(1 + sum over negatives of e^s), summed over heads."""
    right, seen = torch.zeros(scores.shape), torch.ones(scores.shape)
    for cell in positives:
        right[cell] = 1
    negatives = (seen.triu() if triangular else seen) - right
    sums = (right * (-scores).exp()).sum((1, 2)), (negatives * scores.exp()).sum((1, 2))
    return sum(part.log1p().sum().item() for part in sums)


def plain_cells(record: RelationRecord, labels: list[tuple[str, str]]) -> dict[str, Cells]:
    """Positive cells of a record; character i is token i + 1, last tokens are inclusive."""
    joined = [label for label in labels if label[1] != VALUE_SLOT]
    cells: dict[str, Cells] = {"entities": set(), "heads": set(), "tails": set()}
    for relation in record.relations:
        subject, value = relation.subject, relation.object[0]
        cells["entities"].add((0, subject.start + 1, subject.end))
        for slot in relation.object:
            cells["entities"].add((1, slot.start + 1, slot.end))
            label = (relation.predicate, slot.role)
            links: list[tuple[int, Any]] = [(labels.index(label), subject)]
            links += [(len(labels) + joined.index(label), value)] if label in joined else []
            cells["heads"] |= {(number, one.start + 1, slot.start + 1) for number, one in links}
            cells["tails"] |= {(number, one.end, slot.end) for number, one in links}
    return cells


@pytest.mark.parametrize("kind", ["efficient", "standard"])
def test_losses_of_the_relation_pointers_are_the_formulas(kind: Any) -> None:
    """Subjects and objects: RoPE, first <= last. Links: neither, for an object may stand before its subject."""
    source = relation_data(24, 6)
    torch.manual_seed(0)
    module = RelationGPLinker(**source.model_arguments(), **TINY, head=kind, head_size=8)
    module.configure_model()
    module.double()
    batch = next(iter(source.train_dataloader()))
    assert not batch["mask"].all(), "no padding to leave out"
    hidden = 3 * encode(module.encoder, batch).detach()
    found = module.task_losses(hidden, batch)
    expected = dict.fromkeys(found, 0.0)
    backwards = 0
    for row, record in enumerate(batch["records"]):
        cells = plain_cells(record, module.labels)
        backwards += any(i > j for _, i, j in cells["heads"])
        for name, pointer in module.head.items():
            spans = name == "entities"
            scores = plain_scores(kind, pointer, hidden[row, : len(record.text) + 2], rope=spans)
            expected[name] += plain_loss(scores, cells[name], triangular=spans) / len(batch["records"])
    assert backwards
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-6)


def test_sizes_of_the_relation_pointers() -> None:
    """49 predicates over BERT base: some 10 million weights, or 0.3 million."""
    labels = [[f"p{number}", VALUE_SLOT] for number in range(49)]
    for kind, size in (("standard", 9_830_400), ("efficient", 320_512)):
        head = RelationGPLinker(10, labels, dim=768, num_heads=12, head=kind).make_head()  # type: ignore[arg-type]
        assert sum(weight.numel() for weight in head.parameters() if weight.dim() > 1) == size


def test_the_conditional_norm_is_that_of_bert4torch() -> None:
    layers = pytest.importorskip("bert4torch.layers", reason="bert4torch is not installed")
    torch.manual_seed(0)
    ours, theirs = (kind.double() for kind in (ConditionalLayerNorm(8, 5, 1e-6), layers.LayerNorm(8, 1e-6, 5)))
    for weight in ours.parameters():
        nn.init.normal_(weight)
    names = {"to_weight.weight": "dense1.weight", "to_bias.weight": "dense2.weight"}
    theirs.load_state_dict({names.get(name, name): weight for name, weight in ours.state_dict().items()})
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4, 8), (3, 5))]
    found, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(output.pow(3).sum(), inputs) for output in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_splitting_into_slots_and_merging_are_inverse() -> None:
    """Where a subject has one object of a predicate, in any order, and whatever characters the names hold."""
    rng, slots = random.Random(0), {"plays_in": ("work_@value", "year"), "plays": ("in_work",), "@value": ()}
    for _ in range(200):
        pairs = itertools.product(slots, [(place, place + 1) for place in range(0, 9, 3)])
        relations = []
        for predicate, subject in rng.sample(list(pairs), 5):
            roles = (VALUE_SLOT, *(slot for slot in slots[predicate] if rng.random() < 0.5))
            spans = [(place, place + rng.randrange(3)) for place in rng.choices(range(20), k=len(roles))]
            relations.append((predicate, subject, dict(zip(roles, spans, strict=True))))
        triples = [(predicate, slot, subject, each[slot]) for predicate, subject, each in relations for slot in each]
        rng.shuffle(triples)
        merged = merge_slots(triples, VALUE_SLOT)
        assert all(each[0][0] == VALUE_SLOT for *_, each in merged)
        order = operator.itemgetter(0, 1)
        assert sorted(((*where, dict(each)) for *where, each in merged), key=order) == sorted(relations, key=order)


class PerfectHead(nn.Module):
    """Logits of a network in two stages that knows the records of a batch."""

    def __init__(self, batch: dict[str, Any], labels: list[tuple[str, str]]) -> None:
        super().__init__()
        self.records, self.labels, self.length = batch["records"], labels, batch["ids"].shape[1]

    def find_subjects(self, hidden: Tensor) -> Tensor:
        logits = torch.full((len(self.records), self.length, 2), -40.0)
        for row, record in enumerate(self.records):
            for relation in record.relations:
                logits[row, relation.subject.start + 1, 0] = logits[row, relation.subject.end, 1] = 40
        return logits

    def find_objects(self, hidden: Tensor, rows: Tensor, spans: Tensor) -> Tensor:
        logits = torch.full((len(rows), self.length, len(self.labels), 2), -40.0)
        for number, (row, span) in enumerate(zip(rows.tolist(), spans.tolist(), strict=True)):
            for relation in self.records[row].relations:
                if [relation.subject.start + 1, relation.subject.end] == span:
                    for slot in relation.object:
                        label = self.labels.index((relation.predicate, slot.role))
                        logits[number, slot.start + 1, label, 0] = logits[number, slot.end, label, 1] = 40
        return logits


def apart(spans: Collection[Mention | Argument]) -> bool:
    """Whether no two different spans share a character."""
    places = sorted({(span.start, span.end) for span in spans})
    return all(one[1] <= other[0] for one, other in itertools.pairwise(places))


def sayable(record: RelationRecord) -> bool:
    """Whether two stages can say all relations: no spans cross, and of several objects none has further slots."""
    objects: dict[Any, list[Sequence[Argument]]] = {}
    for relation in record.relations:
        objects.setdefault((relation.predicate, relation.subject), []).append(relation.object)
    several = [group for group in objects.values() if len(group) > 1]
    return apart([relation.subject for relation in record.relations]) and all(
        max(map(len, group)) == 1 and apart([slots[0] for slots in group]) for group in several
    )


def test_certain_probabilities_decode_to_the_gold_relations() -> None:
    """Generated sentences, and one of more subjects than are looked at together."""
    source = relation_data(300)
    rows = [record for record in source.records("train") if sayable(record)]
    assert sum(len({(r.predicate, r.subject) for r in row.relations}) < len(row.relations) for row in rows) > 10
    assert sum(any(len(relation.object) > 1 for relation in row.relations) for row in rows) > 10
    text = "".join(chr(0x4E00 + place) for place in range(90))
    predicates = [predicate for predicate, slot in source.labels if slot == VALUE_SLOT]
    crowd = [
        Relation(
            predicates[place % 3], Mention(text[place], place), (Argument(VALUE_SLOT, text[place + 1], place + 1),)
        )
        for place in range(0, 87, 3)
    ]
    rows = [*rows[:150], RelationRecord("crowd", text, tuple(crowd)), *rows[150:]]
    module = Lic2020Relation(**source.model_arguments(), **TINY)
    module.configure_model()
    for first in range(0, len(rows), 16):
        batch = source.collator()(rows[first : first + 16])
        module.head = PerfectHead(batch, module.labels)  # type: ignore[assignment]
        for found, gold in zip(module.predict_step(batch), batch["records"], strict=True):
            assert len(found.relations) == len(gold.relations)
            assert {(r.predicate, r.subject, frozenset(r.object)) for r in found.relations} == {
                (r.predicate, r.subject, frozenset(r.object)) for r in gold.relations
            }


def test_the_gradient_of_log_z_is_the_marginals() -> None:
    torch.manual_seed(0)
    crf = LinearChainCRF(5, boundaries=False).double()
    nn.init.normal_(crf.transitions)
    emissions = torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True)
    mask, tags = torch.arange(5) < torch.tensor([[5], [3], [1]]), torch.randint(5, (3, 5))
    crf(emissions, mask, tags).sum().backward()
    assert emissions.grad is not None
    found = emissions.grad + nn.functional.one_hot(tags, 5) * mask[..., None]
    torch.testing.assert_close(found.sum(-1), mask.double(), atol=1e-12, rtol=0)
    for row, length in enumerate((5, 3, 1)):
        paths = torch.tensor(list(itertools.product(range(5), repeat=length)))
        scores = emissions[row, torch.arange(length), paths].sum(-1)
        scores = scores + crf.transitions[paths[:, :-1], paths[:, 1:]].sum(-1)
        marginals = (scores.softmax(0)[:, None, None] * nn.functional.one_hot(paths, 5)).sum(0)
        torch.testing.assert_close(found[row, :length], marginals, atol=1e-12, rtol=0)


def plain_tags(record: EventRecord, module: Lic2020Event, length: int) -> list[list[int]]:
    """Tags of one layer or of each, 2k + 1 and 2k + 2 over pair k, the longest spans first, 0 everywhere else."""
    layered = module.joint.layered
    layers = [[0] * length for _ in range(len(module.pairs) if layered else 1)]
    parts = {(module.order.get((e.type, a.role), -1), a.start, a.end) for e in record.events for a in e.arguments}
    for pair, start, end in sorted(parts, key=lambda part: (part[1] - part[2], *part)):
        layer, tag = (layers[pair], 1) if layered else (layers[0], 2 * pair + 1)
        if pair >= 0 and not any(layer[start + 1 : end + 1]):
            layer[start + 1 : end + 1] = [tag] + [tag + 1] * (end - start - 1)
    return layers


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_loss_of_tags_is_that_of_pytorch_crf(output: str) -> None:
    """Summed over tokens, [CLS] and [SEP] among them, averaged over sentences; nothing scores first and last tags."""
    source = event_data(16, 16)
    module = built(source, output=output, inside="any").double()
    nn.init.normal_(module.head.crf.transitions)
    theirs = CRF(module.head.crf.num_tags, batch_first=True).double()
    zeros = torch.zeros(theirs.num_tags)
    weights = {"transitions": module.head.crf.transitions, "start_transitions": zeros, "end_transitions": zeros}
    theirs.load_state_dict(weights)
    batch = next(iter(source.train_dataloader()))
    features = encode(module.encoder, batch).detach()
    total = 0.0
    for row, record in enumerate(batch["records"]):
        length = len(record.text) + 2
        scores = module.head.emissions(features[row, :length])
        if output == "multi":  # outside, which has no weights of its own, and a beginning and an inside for each pair
            parts = [(torch.zeros(length), *pair) for pair in scores.T.split(2)]
            scores = torch.stack([torch.stack(part, -1) for part in parts])
        tags = torch.tensor(plain_tags(record, module, length))
        total -= theirs(scores.view(len(tags), length, -1), tags, reduction="sum").item()
    assert module.task_losses(features, batch)["tags"].item() == pytest.approx(total / 16, rel=1e-9)


@pytest.mark.parametrize("output", OUTPUTS)
def test_unknown_characters_come_back_as_they_are(output: str) -> None:
    """No vocabulary holds them; some are several code points, blanks or marks that other tokenizers drop."""
    text = "龘👨‍👩‍👧\u3000é\u0301Ⅷ\tİ𠮷甲"
    spans = [(TRIGGER_ROLE, 8, 9), ("r", 1, 6), ("s", 6, 9), ("r", 9, 12), ("s", 12, 14)]
    parts = tuple(Argument(role, text[start:end], start) for role, start, end in spans)
    gold = EventRecord("x", text, (Event("a", parts),))
    source = event_data(10)
    source.labels = [["a", TRIGGER_ROLE], ["a", "r"], ["a", "s"]]
    batch, tokenizer = source.collator()([gold]), source.get_tokenizer()
    assert (batch["ids"][0, 1:-2] == tokenizer.unk_id).all()
    module = Lic2020Event(10, source.labels, output=output)  # type: ignore[arg-type]
    (found,) = module.records_of(module.gold_tags(batch), batch)
    assert found.text == text
    assert {argument for event in found.events for argument in event.arguments} == set(parts[1:])
    assert arguments_of(found) == arguments_of(gold)


def f1_of_rows_learnt(kind: Any, source: Any, rows: list[Any], epochs: int, folder: Path, **options: Any) -> float:
    """Of a small encoder of two layers, on the rows that it was trained on."""
    for split in ("train", "val"):
        source.set_records(split, rows)
    pl.seed_everything(0, verbose=False)
    module = kind(
        **source.model_arguments(),
        dim=96,
        num_layers=2,
        num_heads=4,
        feedforward_dim=192,
        dropout=0.0,
        warmup_steps=50,
        schedule="linear",
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
        **options,
    )
    runner = trainer(
        folder, max_epochs=epochs, gradient_clip_val=1.0, check_val_every_n_epoch=epochs, num_sanity_val_steps=0
    )
    runner.fit(module, datamodule=source)
    return runner.callback_metrics["val/f1"].item()


@pytest.mark.slow
def test_30_sentences_are_learnt_without_a_mistake(tmp_path: Path) -> None:
    """Of those whose relations two stages can say."""
    source = relation_data(300, 15)
    rows = [record for record in source.records("train") if record.relations and sayable(record)][:30]
    assert f1_of_rows_learnt(Lic2020Relation, source, rows, 400, tmp_path, mismatch=0.5) == 1


REAL = {
    "relations": (RelationDataModule, "relation_extraction_duie", Lic2020Relation, 40, {"mismatch": 0.5}),
    "events": (EventDataModule, "event_extraction_duee", Lic2020Event, 25, {"crf_rate": 10.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_200_real_sentences_are_learnt_by_heart(name: str, tmp_path: Path) -> None:
    """As far as their labels can say them, see the experiments: the events in one layer lose a few."""
    data, folder, kind, epochs, options = REAL[name]
    root = os.environ.get("KEXUE_DATA")
    if not root or not (Path(root) / folder).is_dir():
        pytest.skip(f"KEXUE_DATA does not name a folder with {folder}")
    source: Any = data(8, root=root)
    source.setup("fit")
    assert f1_of_rows_learnt(kind, source, source.records("train")[:200], epochs, tmp_path, **options) > 0.95
