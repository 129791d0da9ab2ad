"""Relations in two stages over one encoder: subjects, then the objects of a given subject under every label.

Shapes: B batch, T tokens, D features, P labels, S statements of a sentence, N subjects.

First and last tokens are scored apart, as a power of the sigmoid. For the second stage the last LayerNorm of the
encoder is replaced by one whose gain and bias follow the subject's first and last token. In training one subject of
a sentence is drawn: its first token from those of all subjects, its last token, with probability `mismatch`, from all
that are not before it, whether or not the two belong together. This is meant: where they do not, no object is right,
and the second stage learns to refuse wrong subjects.

Source: https://kexue.fm/archives/7321 (bert4keras at LIC 2020), https://kexue.fm/archives/6671,
https://kexue.fm/archives/7161.  Checked against: the formulas written plainly in the tests; bert4torch's layer norm.
Expected: see conf/model/lic2020_relation.yaml.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...data.records import VALUE_SLOT, RelationRecord
from ...errors import InputError
from ...nn.decoding import TypedScores, merge_slots, pair_nearest
from ...nn.decoding.relations import PlainRelation, Span
from ...nn.decoding.spans import best_of
from ...nn.heads import ConditionalLayerNorm
from ...nn.losses import power_binary_cross_entropy, power_sigmoid
from ...nn.optim import OptimizerFactory
from ...nn.transformer import encode, take_last_norm
from ...nn.transformer.config import Norm, Positions
from ..schedules import Schedule
from .encoder_module import EncoderModule, check_pairs, encoder_config, token_places
from .predictions import Predictions
from .relations import plain_relations, records_of

SUBJECT_POWER, OBJECT_POWER = 2.0, 4.0
SUBJECTS_AT_ONCE = 8
"""Subjects of a sentence whose objects are looked for together."""


def distinct_subjects(triples: Tensor) -> Tensor:
    """Where a subject stands for the first time in its sentence, `(B, S)`.

    Args:
        triples: rows (label, subject's first token, its last, object's first, its last), `(B, S, 5)`; padding is -1.
    """
    spans = triples[..., 1:3]
    same = (spans[:, :, None] == spans[:, None]).all(-1)
    return (triples[..., 0] >= 0) & ~same.tril(-1).any(-1)


def sample_subjects(triples: Tensor, mismatch: float) -> tuple[Tensor, Tensor]:
    """Draw a subject for each sentence, by torch's generator.

    Args:
        triples: as in `distinct_subjects`.
        mismatch: probability with which the last token is drawn apart from the first.

    Returns:
        First and last token `(B, 2)`, and where there is a subject at all, `(B,)`.
    """
    distinct = distinct_subjects(triples)
    starts, ends = triples[..., 1], triples[..., 2]

    def draw(allowed: Tensor) -> Tensor:
        return torch.rand(allowed.shape, device=allowed.device).masked_fill(~allowed, -1).argmax(-1, keepdim=True)

    one = draw(distinct)
    start = starts.gather(-1, one)
    apart = torch.rand(len(triples), 1, device=triples.device) < mismatch
    other = torch.where(apart, draw(distinct & (ends >= start)), one)
    there = distinct.any(-1)
    return torch.cat((start, ends.gather(-1, other)), -1).masked_fill(~there[:, None], 0), there


def object_targets(triples: Tensor, spans: Tensor, length: int, num_labels: int) -> Tensor:
    """Where the objects of a subject begin and end under each label, `(N, T, P, 2)`: nowhere if it is no gold subject.

    Args:
        triples: as in `distinct_subjects`, a sentence for each subject, `(N, S, 5)`.
        spans: first and last token of each subject, `(N, 2)`.
        length: T.
        num_labels: P.
    """
    row, place = ((triples[..., 0] >= 0) & (triples[..., 1:3] == spans[:, None]).all(-1)).nonzero(as_tuple=True)
    label, _, _, first, last = triples[row, place].unbind(-1)
    targets = torch.zeros(len(spans), length, num_labels, 2, device=triples.device)
    targets[row, first, label, 0] = 1
    targets[row, last, label, 1] = 1
    return targets


class PointerLinear(nn.Linear):
    """Linear layer that starts with small weights and no bias (set inside its constructor, as ZeRO 3 needs)."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.bias)


class SubjectObjectHead(nn.Module):
    """Both stages.

    Args:
        norm: the last norm of the encoder.
        dim: D.
        num_labels: P.
    """

    def __init__(self, norm: nn.Module, dim: int, num_labels: int, eps: float) -> None:
        super().__init__()
        self.norm = norm
        self.subjects = PointerLinear(dim, 2)
        self.conditional_norm = ConditionalLayerNorm(dim, 2 * dim, eps)
        self.objects = PointerLinear(dim, 2 * num_labels)

    def forward(self, hidden: Tensor, rows: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of subjects `(B, T, 2)` and of the objects of given subjects `(N, T, P, 2)`.

        Args:
            hidden: `(B, T, D)` before the last norm.
            rows: the sentence of each subject, `(N,)`.
            spans: its first and last token, `(N, 2)`.
        """
        return self.find_subjects(hidden), self.find_objects(hidden, rows, spans)

    def find_subjects(self, hidden: Tensor) -> Tensor:
        """Logits of first and last tokens of subjects, `(B, T, 2)`."""
        return self.subjects(self.norm(hidden))

    def find_objects(self, hidden: Tensor, rows: Tensor, spans: Tensor) -> Tensor:
        """Logits of first and last tokens of objects, `(N, T, P, 2)`."""
        subject = hidden[rows[:, None], spans].flatten(1)
        return self.objects(self.conditional_norm(hidden[rows], subject)).unflatten(-1, (-1, 2))


class Lic2020Relation(EncoderModule):
    """Relation extraction by subjects first, then objects.

    Args:
        vocab_size: number of token ids.
        labels: [predicate, slot] of each label.
        dim: width of the encoder.
        num_layers: blocks of the encoder.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise networks.
        dropout: rate everywhere in the encoder.
        max_length: longest input, for positions other than "rope".
        positions: "rope", "learned" or "sinusoidal".
        norm: "pre" or "post".
        mismatch: probability with which a subject's last token is drawn apart from its first, see above.
        threshold: probability above which a token counts when decoding.
        max_subjects: subjects that decoding looks at in one sentence, the best ones.
        max_objects: objects, over all labels, that decoding keeps of one subject, the best ones.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.

    Raises:
        InputError: a value out of range; labels that are empty, repeated or not pairs.
    """

    head: SubjectObjectHead
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
        mismatch: float = 1.0,
        threshold: float = 0.4,
        max_subjects: int = 30,
        max_objects: int = 100,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        pairs = check_pairs("Lic2020Relation", labels, "[predicate, slot]")
        for name, share in (("mismatch", mismatch), ("threshold", threshold)):
            if not 0 <= share <= 1:
                raise InputError(f"Lic2020Relation({name}={share}): use a number from 0 to 1")
        for name, count in (("max_subjects", max_subjects), ("max_objects", max_objects)):
            if count < 1:
                raise InputError(f"Lic2020Relation({name}={count}): use 1 or more")
        super().__init__(
            encoder_config(
                vocab_size, dim, num_layers, num_heads, feedforward_dim, dropout, max_length, positions, norm
            ),
            TypedScores([predicate for predicate, _ in pairs]),
            warmup_steps,
            schedule,
            optimizer,
        )
        self.save_hyperparameters(ignore=["optimizer"])
        self.labels = pairs
        self.mismatch = mismatch
        self.threshold = threshold
        self.max_subjects = max_subjects
        self.max_objects = max_objects

    def make_head(self) -> SubjectObjectHead:
        """The head takes over the encoder's last norm."""
        norm = take_last_norm(self.encoder)
        return SubjectObjectHead(norm, self.config.dim, len(self.labels), self.config.norm_eps)

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of `subjects` and, for one drawn subject a sentence, of `objects`."""
        spans, there = sample_subjects(batch["triple_labels"], self.mismatch)
        return self._losses(features, batch, torch.arange(len(spans), device=spans.device), spans, there)

    def evaluate(self, features: Tensor, batch: dict[str, Any]) -> Tensor:
        """Update the metrics; return the loss with every gold subject, nothing being drawn."""
        triples = batch["triple_labels"]
        rows, places = distinct_subjects(triples).nonzero(as_tuple=True)
        spans = triples[rows, places, 1:3]
        losses = self._losses(features, batch, rows, spans, torch.ones_like(rows, dtype=torch.bool))
        found = records_of(batch, self._decode(features, batch))
        self.scores.update([plain_relations(r) for r in found], [plain_relations(r) for r in batch["records"]])
        return torch.stack(list(losses.values())).sum()

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[RelationRecord]:
        """The records of the batch with the relations that the model finds in them, each said once."""
        return Predictions(records_of(batch, self._decode(encode(self.encoder, batch), batch)))

    def _losses(
        self, features: Tensor, batch: dict[str, Any], rows: Tensor, spans: Tensor, there: Tensor
    ) -> dict[str, Tensor]:
        """Losses averaged over tokens and over first and last; that of the objects summed over labels.

        `there` says which of the subjects count.
        """
        triples, mask = batch["triple_labels"], batch["mask"]
        subject_logits, object_logits = self.head(features, rows, spans)
        stated = (triples[..., 0] >= 0).nonzero(as_tuple=True)
        subjects = torch.zeros_like(subject_logits, dtype=torch.float32)
        for column in (0, 1):
            subjects[stated[0], triples[(*stated, 1 + column)], column] = 1
        objects = object_targets(triples[rows], spans, mask.shape[1], len(self.labels))
        subject_loss = power_binary_cross_entropy(subject_logits, subjects, SUBJECT_POWER).mean(-1)
        object_loss = power_binary_cross_entropy(object_logits, objects, OBJECT_POWER).mean(-1).sum(-1)
        return {
            "subjects": _masked_mean(subject_loss, mask),
            "objects": _masked_mean(object_loss, mask[rows] & there[:, None]),
        }

    @torch.no_grad()
    def _decode(self, features: Tensor, batch: dict[str, Any]) -> list[list[PlainRelation]]:
        places = token_places(batch)
        seen = power_sigmoid(self.head.find_subjects(features).float(), SUBJECT_POWER)
        found = self._pairs(seen, places, self.max_subjects)
        triples: list[list[tuple[str, str, Span, Span]]] = [[] for _ in range(len(features))]
        sentence = found[:, 0].contiguous()
        order = torch.arange(len(found), device=found.device) - torch.searchsorted(sentence, sentence)
        # As many calls whatever was found: under ZeRO stage 3 all processes must call the head equally often.
        for begin in range(0, self.max_subjects, SUBJECTS_AT_ONCE):
            part = found[(order >= begin) & (order < begin + SUBJECTS_AT_ONCE)]
            rows, spans = part[:, 0], part[:, 2:]
            seen = power_sigmoid(self.head.find_objects(features, rows, spans).float(), OBJECT_POWER)
            for number, label, first, last in self._pairs(seen, places[rows], self.max_objects).tolist():
                row, _, start, end = part[number].tolist()
                triples[row].append((*self.labels[label], (start, end), (first, last)))
        return [merge_slots(group, VALUE_SLOT) for group in triples]

    def _pairs(self, seen: Tensor, places: Tensor, count: int) -> Tensor:
        """Rows (sentence, label, first, last) from probabilities `(B, T, 2)` or `(B, T, P, 2)`, `count` a sentence."""
        allowed = places.view(*places.shape, *(1,) * (seen.dim() - 2))
        likely = (seen > self.threshold) & allowed
        found = pair_nearest(likely[..., 0], likely[..., 1])
        sentence, label, first, _ = found.unbind(-1)
        starts = seen[..., 0] if seen.dim() == 4 else seen[..., 0, None]
        best = best_of(sentence.cpu().numpy(), starts[sentence, first, label].cpu().numpy(), count)
        return found[torch.from_numpy(best).to(found.device)]


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `(N, T)` where the mask is True; 0 where it never is."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
