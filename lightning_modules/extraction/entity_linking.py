"""Entity linking: which words of a text are mentions, and which of their namesakes each one means, in one model.
Shapes: B texts, T characters, P pairs of a mention and an entity, E entities, K characters of a description.

A BiLSTM reads the text beside the borders of dictionary words and points to starts and ends of mentions. For each
candidate, two more read the text, beside the mention's place and what it has in common with the entity, and the
description of the entity; both attend to each other, and a small network judges whether they belong together.

Source: https://kexue.fm/archives/6919.  Checked against: the formulas written plainly in the tests.
Expected: see conf/experiment/entity_linking.yaml.
"""

import math
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ...data.records import Link, LinkRecord
from ...errors import InputError
from ...nn.decoding import TypedScores, merge_windows, pair_nearest
from ...nn.embeddings import MixedEmbedding
from ...nn.heads import CrossMatch, HalfPointer, bordered_loss
from ...nn.optim import OptimizerFactory
from ...nn.recurrent import BiLSTM
from .predictions import Predictions

NUM_FEATURES = 3
"""What a character of a text may have in common with an entity, see `LinkCollator`."""
NO_TYPE = "no type"
CELLS_AT_ONCE = 1 << 20
"""Pairs times characters that are scored together when predicting."""


class TextEncoder(nn.Module):
    """Characters, words and borders of dictionary words to hidden states."""

    def __init__(self, vocab_size: int, dim: int, word_dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding = MixedEmbedding(vocab_size, dim, word_dim, dropout)
        self.layers = BiLSTM(dim + 2, dim)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states `(B, T, D)`, 0 on padding."""
        mask = batch["mask"]
        embedded = self.embedding(batch["ids"], batch.get("words"), batch.get("word_vectors"))
        inputs = torch.cat([embedded, batch["borders"].to(embedded.dtype)], -1) * mask[..., None].to(embedded.dtype)
        return self.layers(inputs, mask)


class LinkHead(nn.Module):
    """Both tasks on the text's hidden states."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.spans = HalfPointer(dim)
        self.text = BiLSTM(dim + 1 + NUM_FEATURES, dim)
        self.entity = BiLSTM(dim, dim)
        self.match = CrossMatch(dim, num_heads, dropout)

    def link(
        self, hidden: Tensor, mask: Tensor, entities: Tensor, entity_mask: Tensor, pairs: Tensor, features: Tensor
    ) -> Tensor:
        """Scores `(P,)`, whose sigmoids are probabilities, that mentions mean entities.

        Args:
            hidden, mask: of the texts, `(B, T, D)` and `(B, T)`.
            entities, entity_mask: embedded descriptions `(E, K, D)` and `(E, K)`.
            pairs: rows of (text, first character, last character, entity), `(P, 4)`.
            features: `(P, T, 3)`.
        """
        text, first, last, entity = pairs.unbind(-1)
        place = torch.arange(mask.shape[1], device=mask.device)
        inside = ((place >= first[:, None]) & (place <= last[:, None])).to(hidden.dtype)[..., None]
        inputs = torch.cat([hidden[text], inside, features.to(hidden.dtype)], -1)
        read = self.text(inputs, mask[text])
        mention = (read * inside).sum(1) / inside.sum(1)  # a mention has at least one character
        described = self.entity(entities, entity_mask)
        return self.match(read, described[entity], mask[text], entity_mask[entity], mention)


class EntityLinker(pl.LightningModule):
    """Mentions and the entities that they mean.

    Args:
        vocab_size: number of characters.
        types: types of the entities, for scores by type; those without one count as "no type".
        word_dim: width of the word vectors that come with the batches; 0: there are none.
        dim: width of everything.
        num_heads: heads of the attention between text and description.
        dropout: rate on embeddings and before the last network.
        span_threshold: starts and ends are those whose probability is above it.
        link_threshold: a mention whose best entity has a lower probability is left out.
        optimizer: how to make the optimizer; Adam with learning rate 1e-3 when None. Not saved in checkpoints.

    Raises:
        InputError: a value out of range.
    """

    encoder: TextEncoder
    head: LinkHead

    def __init__(
        self,
        vocab_size: int,
        types: list[str] | None = None,
        word_dim: int = 0,
        dim: int = 128,
        num_heads: int = 8,
        dropout: float = 0.2,
        span_threshold: float = 0.4,
        link_threshold: float = 0.1,
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("dropout", dropout),
            ("span_threshold", span_threshold),
            ("link_threshold", link_threshold),
        ):
            if not 0 <= value < 1:
                raise InputError(f"EntityLinker({name}={value}): use 0 or more and less than 1")
        for name, value in (("vocab_size", vocab_size), ("dim", dim), ("num_heads", num_heads)):
            if value < 1:
                raise InputError(f"EntityLinker({name}={value}): use 1 or more")
        if dim % 2 or dim % num_heads:
            raise InputError(f"EntityLinker(dim={dim}, num_heads={num_heads}): dim is even and num_heads divides it")
        self.save_hyperparameters(ignore=["optimizer"])
        self.vocab_size, self.word_dim, self.dim = vocab_size, word_dim, dim
        self.num_heads, self.dropout = num_heads, dropout
        self.span_threshold, self.link_threshold = span_threshold, link_threshold
        self.link_scores = TypedScores([*(types or ()), NO_TYPE])
        self.mention_scores = TypedScores(["mention"])
        self._optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3))

    def configure_model(self) -> None:
        if not hasattr(self, "encoder"):
            self.encoder = TextEncoder(self.vocab_size, self.dim, self.word_dim, self.dropout)
            self.head = LinkHead(self.dim, self.num_heads, self.dropout)

    def blocks(self) -> Iterable[nn.Module]:
        """The recurrent layers."""
        return [self.encoder.layers, self.head.text, self.head.entity]

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Probabilities of starts and ends `(B, T, 2)`, and of each pair of a batch `(P,)`."""
        hidden = self.encoder(batch)
        return self._border_probabilities(hidden, batch), self._link(hidden, batch).float().sigmoid()

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of starts, ends and links, given the encoder's output `(B, T, D)`.

        Of each text one gold mention is drawn, and one entity of its name: whether it is the one that is meant is what
        the link is trained on.
        """
        pairs = draw_pairs(batch["pairs"][:, 0], batch["mentions"], batch["judged"])
        return self._losses(features, batch, pairs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        losses = self.task_losses(self.encoder(batch), batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["ids"]))
        return {"loss": loss, "losses": losses}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[LinkRecord]:
        """The records of the batch with the mentions that the model finds in them and what they mean."""
        return Predictions(self._extract(self.encoder(batch), batch))

    def on_validation_epoch_start(self) -> None:
        self._reset_scores()

    def on_test_epoch_start(self) -> None:
        self._reset_scores()

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", by_type=False)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test", by_type=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer(self.parameters())

    def _losses(self, hidden: Tensor, batch: dict[str, Any], pairs: Tensor) -> dict[str, Tensor]:
        """Losses of starts and ends, and the mean over these pairs, 0 if there are none."""
        start, end = bordered_loss(self.head.spans(hidden), batch["labels"], batch["borders"], batch["mask"])
        some = pairs if len(pairs) else pairs.new_zeros(1)  # parameters that take no part would stop DDP
        scores = self._link(hidden, batch, some).float()
        link = nn.functional.binary_cross_entropy_with_logits(scores, batch["right"][some].float())
        return {"start": start, "end": end, "link": link if len(pairs) else link * 0}

    def _border_probabilities(self, hidden: Tensor, batch: dict[str, Any]) -> Tensor:
        return self.head.spans(hidden).float().sigmoid() * batch["borders"]

    def _link(self, hidden: Tensor, batch: dict[str, Any], chosen: Tensor | None = None) -> Tensor:
        """Scores of the chosen pairs; None: of all."""
        pairs, features = batch["pairs"], batch["features"]
        if chosen is not None:
            pairs, features = pairs[chosen], features[chosen]
        used, entity = pairs[:, 3].unique(return_inverse=True)
        pairs = torch.cat([pairs[:, :3], entity[:, None]], 1)
        entity_mask = batch["entity_mask"][used]
        words = batch["entity_words"][used] if "entity_words" in batch else None
        entities = self.encoder.embedding(batch["entity_ids"][used], words, batch.get("word_vectors"))
        return self.head.link(hidden, batch["mask"], entities, entity_mask, pairs, features)

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        hidden = self.encoder(batch)
        losses = self._losses(hidden, batch, batch["judged"].nonzero()[:, 0])
        loss = torch.stack(list(losses.values())).sum()
        self.log(f"{stage}/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["ids"]))
        found = self._extract(hidden, batch)
        for scores, items in ((self.link_scores, typed_links), (self.mention_scores, mentions)):
            scores.update([items(record) for record in found], [items(record) for record in batch["records"]])

    def _extract(self, hidden: Tensor, batch: dict[str, Any]) -> list[LinkRecord]:
        spans = (self._border_probabilities(hidden, batch) > self.span_threshold).unbind(-1)
        of_span: dict[tuple[int, ...], list[int]] = {}
        for number, (*place, _) in enumerate(batch["pairs"].tolist()):
            of_span.setdefault(tuple(place), []).append(number)
        if batch["mentions"][0] < 0:
            of_span = {}
        places = [(row, first, last) for row, _, first, last in pair_nearest(*spans).tolist()]
        found = [place for place in places if place in of_span]
        asked = [number for place in found for number in of_span[place]]
        of_pair = dict(zip(asked, self._probabilities(hidden, batch, asked), strict=True))
        return linked_records(batch, found, of_span, of_pair, self.link_threshold)

    def _probabilities(self, hidden: Tensor, batch: dict[str, Any], asked: list[int]) -> list[float]:
        """Probabilities of these pairs, some at a time: a long text has thousands.

        All processes take as many turns, whatever they have found: each gathers what stage 3 of ZeRO has divided.
        """
        turns = max(1, math.ceil(len(asked) * hidden.shape[1] / CELLS_AT_ONCE))
        if self._trainer is not None and self.trainer.world_size > 1:
            turns = int(self.all_gather(torch.tensor(turns, device=hidden.device)).max())  # type: ignore[union-attr]
        probabilities: list[float] = []
        for part in torch.tensor(asked, dtype=torch.long, device=hidden.device).tensor_split(turns):
            some = part if len(part) else part.new_zeros(1)
            probabilities += self._link(hidden, batch, some).float().sigmoid()[: len(part)].tolist()
        return probabilities

    def _reset_scores(self) -> None:
        self.link_scores.reset()
        self.mention_scores.reset()

    def _log_scores(self, stage: str, by_type: bool) -> None:
        values = {name: value for name, value in self.link_scores.compute().items() if by_type or "/" not in name}
        mention = self.mention_scores.compute()
        values |= {f"mention_{name}": mention[name] for name in ("f1", "precision", "recall")}
        # Every rank has the same figures already; sync_dist only tells Lightning so.
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)


def draw_pairs(texts: Tensor, mentions: Tensor, judged: Tensor) -> Tensor:
    """Draw one gold mention of each text that has any, and one of its pairs; all are equally likely.

    Args:
        texts, mentions: of each pair, `(P,)`, by number.
        judged: whether its mention is gold, `(P,)`.

    Returns:
        Numbers of the pairs drawn, in order.
    """
    mentions = mentions.clamp(min=0)
    mention_rank = torch.randperm(int(mentions.max()) + 1).to(texts.device)
    rank = mention_rank[mentions] * len(texts) + torch.randperm(len(texts)).to(texts.device)
    rank = rank.masked_fill(~judged, -1)
    best = rank.new_full((int(texts.max()) + 1,), -1).scatter_reduce(0, texts, rank, "amax")
    return (judged & (rank == best[texts])).nonzero()[:, 0]


def linked_records(
    batch: dict[str, Any],
    found: list[tuple[int, int, int]],
    of_span: dict[tuple[int, ...], list[int]],
    probabilities: dict[int, float],
    threshold: float,
) -> list[LinkRecord]:
    """The records with the best entity of each mention, unless its probability is below the threshold.

    Args:
        batch: with `records`, `windows`, `pairs` and `entities`.
        found: mentions, as (row, first character, last character).
        of_span: the pairs of each of them.
        probabilities: of these pairs.
        threshold: for a mention to be linked at all.
    """
    rows: list[list[tuple[tuple[int, int], tuple[str, str | None]]]] = [[] for _ in batch["windows"]]
    for row, first, last in found:
        best = max(of_span[row, first, last], key=lambda number: probabilities[number])
        if probabilities[best] >= threshold:
            begin = batch["windows"][row][1]
            rows[row].append(((begin + first, begin + last + 1), batch["entities"][int(batch["pairs"][best, 3])]))
    seen: list[list[Any]] = [[] for _ in batch["records"]]
    for (number, *window), group in zip(batch["windows"], rows, strict=True):
        seen[number].append((tuple(window), group))
    return [
        LinkRecord(
            record.id,
            record.text,
            tuple(Link(record.text[start:end], start, *entity) for (start, end), entity in merge_windows(group)),
        )
        for record, group in zip(batch["records"], seen, strict=True)
    ]


def typed_links(record: LinkRecord) -> list[tuple[str, tuple[int, int, str]]]:
    """Mentions with their entities as `TypedScores` takes them."""
    return [(link.type or NO_TYPE, (link.start, link.end, link.entity)) for link in record.judged().links]


def mentions(record: LinkRecord) -> list[tuple[str, tuple[int, int]]]:
    """Mentions alone."""
    return [("mention", (link.start, link.end)) for link in record.judged().links]
