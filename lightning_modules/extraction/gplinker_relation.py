"""GPLinker: relations of a sentence by three pointer networks over one encoder.  Shapes: B batch, T tokens, H labels.

One pointer scores every span as a subject and as an object; two more score, for each (predicate, slot of its object),
whether a first token belongs to a subject and another to its object, and the same for last tokens. Objects of several
slots are told apart by further links from the value to its other slots.

Source: https://kexue.fm/archives/8888; the links between slots are this project's own.  Checked against: the formulas
of the articles, written plainly in the tests.  Expected: see conf/experiment/relation_extraction_duie.yaml.
"""

from typing import Any, ClassVar

from ...data.records import RelationRecord, slot_links
from ...nn.decoding import TypedScores, decode_relation_batch
from ...nn.heads import HeadKind
from ...nn.losses import SpanLoss
from ...nn.optim import OptimizerFactory
from ...nn.transformer.config import Norm, Positions
from ..schedules import Schedule
from .encoder_module import check_pairs, encoder_config, token_places
from .gplinker_base import GPLinker, LinkedPointers, Scores
from .predictions import Predictions
from .relations import plain_relations, records_of


class RelationGPLinker(GPLinker):
    """Relation extraction by GPLinker.

    Args:
        vocab_size: number of token ids.
        labels: [predicate, slot] of each label, the value's slot first for each predicate.
        dim: width of the encoder.
        num_layers: blocks of the encoder.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise networks.
        dropout: rate everywhere in the encoder.
        max_length: longest input, for positions other than "rope".
        positions: "rope", "learned" or "sinusoidal".
        norm: "pre" or "post".
        head_size: width of a pointer's queries and keys.
        head: "efficient" or "standard" pointers.
        max_spans: subjects, and objects, that decoding looks at in one sentence.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.
        loss: what the pointers train on, with a method `spans`; the multi-label loss when None, and for validation in
            any case. Not saved in checkpoints.

    Raises:
        InputError: a value out of range; labels that are empty, repeated or not pairs.
    """

    TARGETS: ClassVar[dict[str, str]] = {"entities": "entity_labels", "heads": "head_labels", "tails": "tail_labels"}
    scores: TypedScores

    def __init__(
        self,
        vocab_size: int,
        labels: list[list[str]],
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        max_length: int = 512,
        positions: Positions = "rope",
        norm: Norm = "pre",
        head_size: int = 64,
        head: HeadKind = "efficient",
        max_spans: int = 30,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
        loss: SpanLoss | None = None,
    ) -> None:
        pairs = check_pairs("RelationGPLinker", labels, "[predicate, slot]")
        super().__init__(
            encoder_config(
                vocab_size, dim, num_layers, num_heads, feedforward_dim, dropout, max_length, positions, norm
            ),
            TypedScores([predicate for predicate, _ in pairs]),
            head_size,
            head,
            loss,
            warmup_steps,
            schedule,
            optimizer,
        )
        self.save_hyperparameters(ignore=["optimizer", "loss"])
        self.labels = pairs
        self.links = slot_links(pairs)
        self.max_spans = max_spans

    def make_head(self) -> LinkedPointers:
        """Subjects and objects; a link for each label, and for each slot that is joined to a value."""
        num_links = len(self.labels) + len(self.links)
        return LinkedPointers("entities", self.config.dim, 2, num_links, True, self.head_size, self.head_kind)

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[RelationRecord]:
        """The records of the batch with the relations that the model finds in them, each said once."""
        return Predictions(self._extract(self._scores(batch), batch))

    def update_scores(self, scores: dict[str, Scores], batch: dict[str, Any]) -> None:
        found = self._extract(scores, batch)
        self.scores.update([plain_relations(r) for r in found], [plain_relations(r) for r in batch["records"]])

    def _extract(self, scores: dict[str, Scores], batch: dict[str, Any]) -> list[RelationRecord]:
        decoded = decode_relation_batch(
            scores["entities"],
            scores["heads"],
            scores["tails"],
            self.labels,
            self.links,
            token_places(batch),
            max_spans=self.max_spans,
        )
        return records_of(batch, decoded)
