"""GPLinker: events of a sentence by three pointer networks over one encoder.  Shapes: B batch, T tokens, H labels.

One pointer scores every span under every (event type, role), the trigger being one more role; two more score whether
two first tokens, and two last tokens, belong to one event. Events are the maximal cliques that these links form.

Source: https://kexue.fm/archives/8926.  Checked against: the formulas of the articles, written plainly in the tests.
Expected: see conf/model/gplinker_event.yaml.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from ...data.records import TRIGGER_ROLE, Argument, Event, EventRecord
from ...errors import InputError
from ...nn.decoding import EventScores, decode_event_batch
from ...nn.decoding.events import Span
from ...nn.losses import SpanLoss
from ...nn.optim import OptimizerFactory
from ...nn.transformer.config import Norm, Positions
from .encoder_module import Schedule, check_pairs, encoder_config, token_places
from .gplinker_base import GPLinker, HeadKind, LinkedPointers, Scores
from .predictions import Predictions


class EventGPLinker(GPLinker):
    """Event extraction by GPLinker.

    Args:
        vocab_size: number of token ids.
        labels: [event type, role] of each head of the argument pointer.
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
        max_nodes: arguments of one type that decoding looks at in one sentence.
        require_trigger: leave out events without a trigger.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.
        loss: what the pointers train on, with a method `spans`; the multi-label loss when None, and for validation in
            any case. Not saved in checkpoints.

    Raises:
        InputError: a value out of range; labels that are empty, repeated or not pairs.
    """

    TARGETS: ClassVar[dict[str, str]] = {"arguments": "argument_labels", "heads": "head_labels", "tails": "tail_labels"}

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
        max_nodes: int = 30,
        require_trigger: bool = False,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
        loss: SpanLoss | None = None,
    ) -> None:
        super().__init__(
            encoder_config(
                vocab_size, dim, num_layers, num_heads, feedforward_dim, dropout, max_length, positions, norm
            ),
            EventScores(trigger_role=TRIGGER_ROLE),
            head_size,
            head,
            loss,
            warmup_steps,
            schedule,
            optimizer,
        )
        self.labels = check_pairs("EventGPLinker", labels, "[event type, role]")
        self.save_hyperparameters(ignore=["optimizer", "loss"])
        self.max_nodes = max_nodes
        self.required_role = TRIGGER_ROLE if require_trigger else None

    def make_head(self) -> LinkedPointers:
        """A label for each (event type, role); one kind of link, which has no direction."""
        return LinkedPointers("arguments", self.config.dim, len(self.labels), 1, False, self.head_size, self.head_kind)

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[EventRecord]:
        """The records of the batch with the events that the model finds in them, see `without_contained`."""
        found = self._extract(self._scores(batch), batch)
        return Predictions(replace(record, events=without_contained(record.events)) for record in found)

    def update_scores(self, scores: dict[str, Scores], batch: dict[str, Any]) -> None:
        found = self._extract(scores, batch)
        self.scores.update([plain_events(record) for record in found], [plain_events(r) for r in batch["records"]])

    def _extract(self, scores: dict[str, Scores], batch: dict[str, Any]) -> list[EventRecord]:
        if len(batch["offsets"]) > len(batch["records"]):
            raise InputError("EventGPLinker: a text in several windows, which it cannot link; use data.stride=null")
        heads, tails = (torch.stack([matrices[0] for matrices in scores[name]]) for name in ("heads", "tails"))
        decoded = decode_event_batch(
            scores["arguments"],
            heads,
            tails,
            self.labels,
            token_places(batch),
            max_nodes=self.max_nodes,
            required_role=self.required_role,
        )
        return [
            EventRecord(
                record.id,
                record.text,
                tuple(_event(record.text, offsets, kind, spans) for kind, group in events.items() for spans in group),
            )
            for record, offsets, events in zip(batch["records"], batch["offsets"], decoded, strict=True)
        ]


def without_contained(events: Sequence[Event]) -> tuple[Event, ...]:
    """The events that say something of their own: without those whose roles and texts are all in another of that type.

    Positions do not count here, as they do not in an answer: a second mention of a trigger alone adds nothing to it.
    """
    said = [{(argument.role, argument.text) for argument in event.arguments} for event in events]
    kept: list[int] = []
    for index in sorted(range(len(events)), key=lambda index: -len(said[index])):
        if not any(events[index].type == events[other].type and said[index] <= said[other] for other in kept):
            kept.append(index)
    return tuple(events[index] for index in sorted(kept))


def plain_events(record: EventRecord) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """Events of a record as `EventScores` takes them, arguments by their characters."""
    return [(event.type, [(arg.role, arg.start, arg.end) for arg in event.arguments]) for event in record.events]


def _event(text: str, offsets: Sequence[tuple[int, int]], event_type: str, spans: Iterable[Span]) -> Event:
    """An event over tokens as one over the characters of the text."""
    borders = [(role, offsets[first][0], offsets[last][1]) for role, first, last in spans]
    return Event(event_type, tuple(Argument(role, text[start:end], start) for role, start, end in borders))
