"""What the models for named entities share: encoder, windows, scores.  Shapes: W windows, T tokens, D features.

A text that is longer than the encoder takes comes as several windows, all in one batch; what is found in them is put
together here, and scores and answers are those of whole texts, in their characters.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.records import Span, SpanRecord
from ...errors import InputError
from ...nn.decoding import TypedScores
from ...nn.decoding.tags import Cells
from ...nn.optim import OptimizerFactory
from ...nn.transformer import TransformerConfig
from ..schedules import Schedule
from .encoder_module import EncoderModule, found_in_texts
from .predictions import Predictions


class EntityModule(EncoderModule):
    """Finds typed spans. A subclass gives the head: `make_head`, `losses` and `find`, and says whether spans overlap.

    Args:
        types: names of the types.
        config, warmup_steps, schedule, optimizer: see `EncoderModule`.

    Raises:
        InputError: no types, one that is there twice, or a value out of range.
    """

    overlapping: bool

    def __init__(
        self,
        types: list[str],
        config: TransformerConfig,
        warmup_steps: int,
        schedule: Schedule,
        optimizer: OptimizerFactory | None,
    ) -> None:
        if not types or len(set(types)) != len(types):
            raise InputError(f"{type(self).__name__}(types={types}): give at least one, each once")
        super().__init__(config, TypedScores(types), warmup_steps, schedule, optimizer)
        self.types = list(types)

    @abstractmethod
    def losses(self, features: Tensor, batch: dict[str, Any], training: bool) -> dict[str, Tensor]:
        """Losses of hidden states `(W, T, D)`; in training those that were chosen, else the usual ones."""

    @abstractmethod
    def find(self, features: Tensor, batch: dict[str, Any]) -> list[Cells]:
        """The spans of each window that the head finds in hidden states `(W, T, D)`."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states `(W, T, D)` of token ids `(W, T)`."""
        return self.encoder(ids, mask)

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses, given the encoder's output `(W, T, D)`."""
        return self.losses(features, batch, training=True)

    def evaluate(self, features: Tensor, batch: dict[str, Any]) -> Tensor:
        """Update the metrics; return the loss."""
        found = self._extract(features, batch)
        self.scores.update([plain_spans(record) for record in found], [plain_spans(r) for r in batch["records"]])
        return torch.stack(list(self.losses(features, batch, training=False).values())).sum()

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[SpanRecord]:
        """The records of the batch with the spans that the model finds in them."""
        return Predictions(self._extract(self.features(batch), batch))

    def _extract(self, features: Tensor, batch: dict[str, Any]) -> list[SpanRecord]:
        texts = found_in_texts(batch, self.find(features, batch), self.types, self.overlapping)
        return [
            SpanRecord(record.id, record.text, _spans(record.text, found))
            for record, found in zip(batch["records"], texts, strict=True)
        ]


def inner_places(batch: dict[str, Any]) -> Tensor:
    """Where a token is neither special nor padding `(W, T)`: the first and the last token of a window are special."""
    mask = batch["mask"].bool()
    places = torch.zeros_like(mask)
    places[:, 1:-1] = mask[:, 2:]
    return places


def plain_spans(record: SpanRecord) -> list[tuple[str, int, int]]:
    """Spans of a record as `TypedScores` takes them, by their characters."""
    return [(span.type, span.start, span.end) for span in record.spans]


def _spans(text: str, found: Sequence[tuple[tuple[int, int], str]]) -> tuple[Span, ...]:
    return tuple(Span(kind, text[start:end], start) for (start, end), kind in found)
