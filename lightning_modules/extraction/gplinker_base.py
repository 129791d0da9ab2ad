"""What GPLinker's forms share: spans by one pointer, links between first and between last tokens by two more.

Shapes: B batch, T tokens, H labels, L links.

Source: https://kexue.fm/archives/8926 (events), https://kexue.fm/archives/8888 (relations).
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ...errors import InputError
from ...nn.heads import HEADS, CompactScores, HeadKind
from ...nn.losses import SpanLoss, multilabel_pointer_loss
from ...nn.optim import OptimizerFactory
from ...nn.transformer import TransformerConfig, encode
from .encoder_module import EncoderModule, Schedule, span_loss

Scores = Tensor | CompactScores


class LinkedPointers(nn.ModuleDict):
    """The three pointers: spans know their length by RoPE, links between spans have no rule of distance.

    Args:
        spans: what the spans are called: the name of their pointer.
        dim: width of the hidden states.
        num_labels: labels of a span, H.
        num_links: kinds of links, L.
        directed: a link goes from the first index to the second; else only cells i <= j are used.
        head_size: width of a pointer's queries and keys.
        kind: "efficient" or "standard".
    """

    def __init__(
        self, spans: str, dim: int, num_labels: int, num_links: int, directed: bool, head_size: int, kind: HeadKind
    ) -> None:
        pointer = HEADS[kind]
        link = {"rope": False, "triangular": not directed}
        pointers = {spans: pointer(dim, num_labels, head_size)}
        pointers |= {name: pointer(dim, num_links, head_size, **link) for name in ("heads", "tails")}
        super().__init__(pointers)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> dict[str, Scores]:
        """Scores of the spans `(B, H, T, T)`, of `heads` and `tails` `(B, L, T, T)` for hidden states `(B, T, D)`."""
        return {name: pointer.compact(hidden, mask) for name, pointer in self.items()}  # type: ignore[operator]


class GPLinker(EncoderModule):
    """An encoder under three pointers.

    A subclass gives `TARGETS`, `make_head`, `update_scores` and `predict_step`.

    Args:
        config: sizes and choices of the encoder.
        scores: what `update_scores` updates.
        head_size: width of a pointer's queries and keys.
        head: "efficient" or "standard" pointers.
        loss: what the pointers train on, with a method `spans`; the multi-label loss when None, and for validation in
            any case.
        warmup_steps, schedule, optimizer: see `EncoderModule`.

    Raises:
        InputError: a value out of range.
    """

    TARGETS: dict[str, str]
    """Name of each pointer -> key of its positive cells in a batch."""
    head: LinkedPointers

    def __init__(
        self,
        config: TransformerConfig,
        scores: Metric,
        head_size: int,
        head: HeadKind,
        loss: SpanLoss | None,
        warmup_steps: int,
        schedule: Schedule,
        optimizer: OptimizerFactory | None,
    ) -> None:
        super().__init__(config, scores, warmup_steps, schedule, optimizer)
        name = type(self).__name__
        if head not in HEADS:
            raise InputError(f"{name}(head={head!r}): use one of {', '.join(HEADS)}")
        self._loss = span_loss(name, loss)
        self.head_size = head_size
        self.head_kind: HeadKind = head

    @abstractmethod
    def update_scores(self, scores: dict[str, Scores], batch: dict[str, Any]) -> None:
        """Take the predictions for a batch into the metrics."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Scores]:
        """Scores of the three pointers, see `LinkedPointers.forward`, for token ids `(B, T)`."""
        return self.head(self.encoder(ids, mask), mask)

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of each pointer, given the encoder's output `(B, T, D)`."""
        return self._losses(self.head(features, batch["mask"]), batch, self._loss)

    def evaluate(self, features: Tensor, batch: dict[str, Any]) -> Tensor:
        """Update the metrics; return the multi-label loss."""
        scores = self.head(features, batch["mask"])
        self.update_scores(scores, batch)
        return torch.stack(list(self._losses(scores, batch, multilabel_pointer_loss).values())).sum()

    def _scores(self, batch: dict[str, Any]) -> dict[str, Scores]:
        return self.head(encode(self.encoder, batch), batch["mask"])

    def _losses(
        self, scores: dict[str, Scores], batch: dict[str, Any], loss: Callable[[Scores, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        return {name: loss(scores[name], batch[key]) for name, key in self.TARGETS.items()}
