"""Arguments of events by tags of (event type, role) pairs and a CRF.  Shapes: W windows, T tokens, D features, P pairs.

Triggers earn nothing in the contest, so that events come down to tagging: O, and B and I of each pair. The transitions
learn at a rate of their own; nothing scores the first and the last tag, [CLS] is outside. One layer of such tags cannot
say a span in two roles, nor one inside another. Where that counts, each pair has a layer of its own: a chain of three
tags, all of them over the same nine transitions. That is as many scores a token, and 9 P in place of (2 P + 1)^2
products, cheaper than one chain for all pairs (and than one a type, which still cannot say a span in two roles of it).

Source: https://kexue.fm/archives/7321 (bert4keras at LIC 2020), https://kexue.fm/archives/7196 (rate of a CRF).
Checked against: pytorch-crf, all paths enumerated; labels of all rows of DuEE decoded again.  Expected: see
conf/experiment/lic2020_event.yaml.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...data.records import TRIGGER_ROLE, Argument, Event, EventRecord
from ...errors import InputError
from ...nn.decoding import ArgumentScores, TagScheme
from ...nn.decoding.argument_metrics import PlainArgument
from ...nn.decoding.tags import Cells, apart
from ...nn.heads import LinearChainCRF
from ...nn.heads.crf import FORBIDDEN
from ...nn.optim import OptimizerFactory, with_rates
from ...nn.transformer import encode
from ...nn.transformer.config import Norm, Positions
from .encoder_module import EncoderModule, Schedule, check_pairs, check_rate, encoder_config, found_in_texts
from .predictions import Predictions

Output = Literal["unique", "multi"]
Inside = Literal["strict", "any"]
Found = tuple[tuple[str, str], int, int]
"""(event type, role), start and exclusive end in the text."""

START_SCORE = -6.0
"""Of B and I beside 0 for O, in a layer of its own: from 0 the way to rare tags would take most of the training."""


class JointTags:
    """Spans of pairs as tags of one layer, or of a layer each.

    Args:
        num_pairs: P.
        layered: a layer each.
    """

    def __init__(self, num_pairs: int, layered: bool) -> None:
        self.layered = layered
        self.num_layers = num_pairs if layered else 1
        self.scheme = TagScheme(1 if layered else num_pairs, "BIO")

    def tags(self, cells: Tensor, length: int) -> Tensor:
        """Tags `(W * layers, length)` of rows (pair, first, last) `(W, S, 3)`; of those that one layer cannot say
        together the longest, see `apart`.
        """
        layer = cells[..., 0] if self.layered else torch.zeros_like(cells[..., 0])
        row, place = apart(cells, length, layer, self.num_layers).nonzero(as_tuple=True)
        spans = cells[row, place]
        if self.layered:
            spans = torch.cat((torch.zeros_like(spans[:, :1]), spans[:, 1:]), 1)
        tags = torch.zeros(len(cells) * self.num_layers, length, dtype=torch.long, device=cells.device)
        return tags.index_add_(0, row * self.num_layers + layer[row, place], self.scheme.tags(spans[:, None], length))

    def spans(self, tags: Tensor, inside: Inside) -> list[Cells]:
        """(pair, first, last) of what the tags `(W * layers, T)` of each window say."""
        rows = self.scheme.spans(tags, "any" if inside == "any" else "type")
        if not self.layered:
            return rows
        windows: list[Cells] = [[] for _ in range(len(rows) // self.num_layers)]
        for number, row in enumerate(rows):
            window, pair = divmod(number, self.num_layers)
            windows[window] += [(pair, first, last) for _, first, last in row]
        return windows


class RareLinear(nn.Linear):
    """Linear layer of what hardly ever is: nearly all tokens are outside of nearly all layers.

    Set inside its constructor, as ZeRO 3 needs.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, START_SCORE)


class JointTagHead(nn.Module):
    """Emissions of each token, and the CRF over them.

    Args:
        dim: D.
        joint: the tags.
        constrained: forbid tags that cannot follow each other.
        boundary_scores: also score the first and the last tag.
    """

    def __init__(self, dim: int, joint: JointTags, constrained: bool, boundary_scores: bool) -> None:
        super().__init__()
        self.joint = joint
        scheme = joint.scheme
        # In a layer of its own "outside" scores 0: only differences of a token's scores count.
        self.emissions = RareLinear(dim, 2 * joint.num_layers) if joint.layered else nn.Linear(dim, scheme.num_tags)
        self.crf = LinearChainCRF(
            scheme.num_tags, *(scheme.allowed() if constrained else ()), boundaries=boundary_scores
        )

    def forward(self, features: Tensor, mask: Tensor, tags: Tensor | None = None) -> Tensor:
        """Loss of each window `(W,)`, or without tags the best ones `(W * layers, T)`, the first of them outside."""
        scores = self.emissions(features)
        if self.joint.layered:
            scores = pad(scores.unflatten(-1, (-1, 2)), (1, 0)).transpose(1, 2).flatten(0, 1)
            mask = mask.repeat_interleave(self.joint.num_layers, 0)
        if tags is not None:
            return self.crf(scores, mask, tags).view(len(features), -1).sum(-1)
        first = scores[:, :1, 1:].new_full((), FORBIDDEN).expand(len(scores), 1, scores.shape[-1] - 1)
        return self.crf(torch.cat((torch.cat((scores[:, :1, :1], first), -1), scores[:, 1:]), 1), mask)


class Lic2020Event(EncoderModule):
    """Arguments of events by a CRF over joint labels.

    Args:
        vocab_size: number of token ids.
        labels: [event type, role] pairs.
        dim: width of the encoder.
        num_layers: blocks of the encoder.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise networks.
        dropout: rate everywhere in the encoder.
        max_length: longest input, for positions other than "rope".
        positions: "rope", "learned" or "sinusoidal".
        norm: "pre" or "post".
        output: "unique": one layer of tags, and a text has one pair in a sentence, the last found, as in the source.
            "multi": a layer for each pair, and a text has any number of pairs.
        inside: "strict": tags that cannot follow each other are forbidden, in training and in decoding. "any": as in
            the source nothing is forbidden, and a span goes on through the I of any pair.
        triggers: also tag triggers; they earn nothing, and tell the type of an event without arguments.
        boundary_scores: also score the first and the last tag, which the source does not.
        crf_rate: learning rate of the transitions, in units of the others': an encoder that fits the emissions fast
            leaves them too small otherwise. 100 in the source, beside a pretrained encoder's 2e-5.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.

    Raises:
        InputError: a value out of range; labels that are empty, repeated or not pairs, or triggers alone.
    """

    head: JointTagHead
    scores: ArgumentScores
    pair_of: Tensor

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
        output: Output = "unique",
        inside: Inside = "strict",
        triggers: bool = False,
        boundary_scores: bool = False,
        crf_rate: float = 100.0,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        pairs = check_pairs("Lic2020Event", labels, "[event type, role]")
        for name, value, choices in (("output", output, Output), ("inside", inside, Inside)):
            if value not in get_args(choices):
                raise InputError(f"Lic2020Event({name}={value!r}): use one of {', '.join(get_args(choices))}")
        check_rate("Lic2020Event", crf_rate)
        super().__init__(
            encoder_config(
                vocab_size, dim, num_layers, num_heads, feedforward_dim, dropout, max_length, positions, norm
            ),
            ArgumentScores([kind for kind, _ in pairs], trigger_role=TRIGGER_ROLE),
            warmup_steps,
            schedule,
            optimizer,
        )
        self.save_hyperparameters(ignore=["optimizer"])
        self.pairs = [pair for pair in pairs if triggers or pair[1] != TRIGGER_ROLE]
        if not self.pairs:
            raise InputError("Lic2020Event(triggers=False): the labels are triggers alone; use triggers=true")
        self.order = {pair: number for number, pair in enumerate(self.pairs)}
        self.joint = JointTags(len(self.pairs), output == "multi")
        self.inside: Inside = inside
        self.boundary_scores = boundary_scores
        self.crf_rate = crf_rate
        # Labels of the data -> pairs; the last one is of no span.
        pair_of = torch.tensor([*(self.order.get(pair, -1) for pair in pairs), -1])
        self.register_buffer("pair_of", pair_of, persistent=False)

    def make_head(self) -> JointTagHead:
        """A `JointTagHead` for the pairs."""
        return JointTagHead(self.config.dim, self.joint, self.inside == "strict", self.boundary_scores)

    def make_optimizer(self, factory: OptimizerFactory) -> torch.optim.Optimizer:
        """Transitions in a group of their own where their rate is another."""
        rates = {True: self.crf_rate, False: 1.0}
        return with_rates(factory, self.named_parameters(), lambda name: rates[name.startswith("head.crf.")])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The best tags `(W * layers, T)` of token ids `(W, T)`."""
        return self.head(self.encoder(ids, mask), mask)

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean over windows of `-log p(tags)`, summed over layers; [CLS] and [SEP] are tagged "outside"."""
        return {"tags": self.head(features, batch["mask"], self.gold_tags(batch)).mean()}

    def gold_tags(self, batch: dict[str, Any]) -> Tensor:
        """The right tags `(W * layers, T)`."""
        cells = batch["argument_labels"]
        pairs = self.pair_of[cells[..., 0]]
        return self.joint.tags(torch.cat((pairs[..., None], cells[..., 1:]), -1), batch["ids"].shape[1])

    def evaluate(self, features: Tensor, batch: dict[str, Any]) -> Tensor:
        """Update the metrics; return the loss."""
        found = self.records_of(self.head(features, batch["mask"]), batch)
        self.scores.update(map(plain_arguments, found), map(plain_arguments, batch["records"]))
        return self.task_losses(features, batch)["tags"]

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[EventRecord]:
        """The records of the batch with the arguments that the model finds in them, one event for each type."""
        return Predictions(self.records_of(self.head(encode(self.encoder, batch), batch["mask"]), batch))

    def records_of(self, tags: Tensor, batch: dict[str, Any]) -> list[EventRecord]:
        """The records with what the tags `(W * layers, T)` of their windows say."""
        texts = found_in_texts(batch, self.joint.spans(tags, self.inside), self.pairs, self.joint.layered)
        return [
            self._record(record, [(pair, *span) for span, pair in found], not self.joint.layered)
            for record, found in zip(batch["records"], texts, strict=True)
        ]

    def expected(self, record: EventRecord) -> EventRecord:
        """What this model would find in a record if it knew all: no place, event or trigger that it does not say."""
        spans = [((event.type, part.role), part.start, part.end) for event in record.events for part in event.arguments]
        return self._record(record, spans, unique=False)

    def _record(self, record: EventRecord, found: Iterable[Found], unique: bool) -> EventRecord:
        """Each text once for a pair, or for all pairs; pairs in the order of the labels."""
        said: dict[Any, tuple[str, str, str, int]] = {}
        for pair, start, end in found:
            text = record.text[start:end]
            if pair in self.order:
                said[text if unique else (pair, text)] = (*pair, text, start)
        events: dict[str, list[Argument]] = {}
        for kind, role, text, start in sorted(said.values(), key=lambda item: (self.order[item[0], item[1]], item[2])):
            events.setdefault(kind, []).append(Argument(role, text, start))
        return replace(record, events=tuple(Event(kind, tuple(parts)) for kind, parts in events.items()))


def plain_arguments(record: EventRecord) -> list[PlainArgument]:
    """Arguments of a record as `ArgumentScores` takes them, triggers among them, in the order of the text."""
    parts = [(part.start, part.end, event.type, part) for event in record.events for part in event.arguments]
    return [(kind, part.role, part.text) for _, _, kind, part in sorted(parts, key=lambda item: item[:2])]
