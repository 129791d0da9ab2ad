"""GPLinker: events of a sentence by three pointer networks over one encoder.  Shapes: B batch, T tokens, H labels.

One pointer scores every span under every (event type, role), the trigger being one more role; two more score whether
two first tokens, and two last tokens, belong to one event. Events are the maximal cliques that these links form.

Source: https://kexue.fm/archives/8926.  Checked against: the formulas of the articles, written plainly in the tests.
Expected: see conf/model/gplinker_event.yaml.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ...data.records import TRIGGER_ROLE, Argument, Event, EventRecord
from ...errors import InputError
from ...nn.decoding import EventScores, decode_event_batch
from ...nn.decoding.events import Span
from ...nn.heads import EfficientGlobalPointer, FactoredScores, GlobalPointer
from ...nn.losses import SpanLoss, multilabel_pointer_loss
from ...nn.optim import OptimizerFactory
from ...nn.transformer import Transformer, TransformerConfig, encode
from ...nn.transformer.config import Norm, Positions
from .predictions import Predictions

Scores = Tensor | FactoredScores
HeadKind = Literal["efficient", "standard"]
Schedule = Literal["constant", "linear"]
HEADS = {"efficient": EfficientGlobalPointer, "standard": GlobalPointer}


class EventPointers(nn.Module):
    """The three pointers: spans know their length by RoPE, links between spans have no rule of distance."""

    def __init__(self, dim: int, num_labels: int, head_size: int, kind: HeadKind) -> None:
        super().__init__()
        pointer = HEADS[kind]
        self.arguments = pointer(dim, num_labels, head_size)
        self.heads = pointer(dim, 1, head_size, rope=False)
        self.tails = pointer(dim, 1, head_size, rope=False)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> dict[str, Scores]:
        """Scores of `arguments` `(B, H, T, T)`, `heads` and `tails` `(B, 1, T, T)` for hidden states `(B, T, D)`."""
        pointers = {"arguments": self.arguments, "heads": self.heads, "tails": self.tails}
        return {name: pointer.compact(hidden, mask) for name, pointer in pointers.items()}


class EventGPLinker(pl.LightningModule):
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

    encoder: Transformer
    head: EventPointers

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
        super().__init__()
        self.labels = check_labels(labels)
        if head not in HEADS:
            raise InputError(f"EventGPLinker(head={head!r}): use one of {', '.join(HEADS)}")
        if schedule not in get_args(Schedule):
            raise InputError(f"EventGPLinker(schedule={schedule!r}): use one of {', '.join(get_args(Schedule))}")
        if loss is not None and not hasattr(loss, "spans"):
            raise InputError(
                f"EventGPLinker(loss={type(loss).__name__}): it is for one class an item, here any number of spans is "
                "right; use loss=label_smoothing, or none."
            )
        self.save_hyperparameters(ignore=["optimizer", "loss"])
        self._loss = multilabel_pointer_loss if loss is None else loss.spans
        self.head_size = head_size
        self.head_kind: HeadKind = head
        self.config = TransformerConfig(
            vocab_size,
            dim,
            num_layers,
            num_heads,
            feedforward_dim,
            dropout,
            max_length,
            positions,
            norm,
            feedforward_dropout=dropout,
        )
        self.max_nodes = max_nodes
        self.required_role = TRIGGER_ROLE if require_trigger else None
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.scores = EventScores(trigger_role=TRIGGER_ROLE)
        self._optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=5e-4))

    def configure_model(self) -> None:
        if not hasattr(self, "encoder"):
            self.encoder = Transformer(self.config)
            self.head = EventPointers(self.config.dim, len(self.labels), self.head_size, self.head_kind)

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated units of the encoder."""
        return self.encoder.blocks()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Scores]:
        """Scores of the three pointers, see `EventPointers.forward`, for token ids `(B, T)`."""
        return self.head(self.encoder(ids, mask), mask)

    def _scores(self, batch: dict[str, Any]) -> dict[str, Scores]:
        return self.head(encode(self.encoder, batch), batch["mask"])

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of each pointer, given the encoder's output `(B, T, D)`."""
        return self._losses(self.head(features, batch["mask"]), batch, self._loss)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        losses = self.task_losses(encode(self.encoder, batch), batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["ids"]))
        return {"loss": loss, "losses": losses}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[EventRecord]:
        """The records of the batch with the events that the model finds in them, see `without_contained`."""
        found = self._extract(self._scores(batch), batch)
        return Predictions(replace(record, events=without_contained(record.events)) for record in found)

    def on_validation_epoch_start(self) -> None:
        self.scores.reset()

    def on_test_epoch_start(self) -> None:
        self.scores.reset()

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters())
        if self.schedule == "constant" and not self.warmup_steps:
            return optimizer
        last = self.trainer.estimated_stepping_batches if self.schedule == "linear" else None
        if last == float("inf"):
            raise InputError(
                "EventGPLinker(schedule='linear'): set trainer.max_epochs or trainer.max_steps, where it ends"
            )

        def share(step: int) -> float:
            risen = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
            return risen if last is None else risen * max(0.0, 1 - step / last)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        scores = self._scores(batch)
        loss = torch.stack(list(self._losses(scores, batch).values())).sum()
        self.log(f"{stage}/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["ids"]))
        found = self._extract(scores, batch)
        self.scores.update([plain_events(record) for record in found], [plain_events(r) for r in batch["records"]])

    def _log_scores(self, stage: str) -> None:
        # Every rank has the same figures already; sync_dist only tells Lightning so.
        self.log_dict({f"{stage}/{name}": value for name, value in self.scores.compute().items()}, sync_dist=True)

    def _losses(
        self,
        scores: dict[str, Scores],
        batch: dict[str, Any],
        loss: Callable[[Scores, Tensor], Tensor] = multilabel_pointer_loss,
    ) -> dict[str, Tensor]:
        labels = {"arguments": "argument_labels", "heads": "head_labels", "tails": "tail_labels"}
        return {name: loss(scores[name], batch[key]) for name, key in labels.items()}

    def _extract(self, scores: dict[str, Scores], batch: dict[str, Any]) -> list[EventRecord]:
        places = torch.zeros_like(batch["mask"], dtype=torch.bool)
        for row, offsets in enumerate(batch["offsets"]):
            places[row, : len(offsets)] = torch.tensor([end > start for start, end in offsets], device=places.device)
        heads, tails = (torch.stack([matrices[0] for matrices in scores[name]]) for name in ("heads", "tails"))
        decoded = decode_event_batch(
            scores["arguments"],
            heads,
            tails,
            self.labels,
            places,
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


def check_labels(labels: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """The labels as pairs of event type and role.

    Raises:
        InputError: there are none, one is not a pair, or one is there twice.
    """
    if not labels:
        raise InputError("EventGPLinker(labels=[]): give at least one [event type, role]")
    pairs: dict[tuple[str, str], None] = {}
    for number, label in enumerate(labels):
        if isinstance(label, str) or len(label) != 2:
            raise InputError(f"EventGPLinker(labels): entry {number} is {label!r}; use [event type, role]")
        pair = (label[0], label[1])
        if pair in pairs:
            raise InputError(f"EventGPLinker(labels): {list(pair)} is there twice; give each [event type, role] once")
        pairs[pair] = None
    return list(pairs)


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
