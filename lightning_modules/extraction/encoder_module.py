"""What models over one small encoder share: its sizes, its learning rate, the course of an evaluation."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ...errors import InputError
from ...nn.decoding import merge_windows
from ...nn.decoding.tags import Cells
from ...nn.decoding.windows import Border
from ...nn.heads import CompactScores
from ...nn.losses import SpanLoss, multilabel_pointer_loss
from ...nn.optim import OptimizerFactory
from ...nn.transformer import Transformer, TransformerConfig, encode
from ...nn.transformer.config import Norm, Positions
from ..schedules import Schedule, check_schedule, scheduled
from .predictions import Predictions

T = TypeVar("T")


class EncoderModule(pl.LightningModule):
    """A Transformer, a head over it, and metrics.

    A subclass gives `make_head`, `task_losses`, `evaluate` and `predict_step`, takes what it needs of these arguments
    in a constructor of its own, and calls `save_hyperparameters`.

    Args:
        config: sizes and choices of the encoder.
        scores: what `evaluate` updates.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None.

    Raises:
        InputError: a schedule that does not exist.
    """

    encoder: Transformer
    head: nn.Module

    def __init__(
        self,
        config: TransformerConfig,
        scores: Metric,
        warmup_steps: int,
        schedule: Schedule,
        optimizer: OptimizerFactory | None,
    ) -> None:
        super().__init__()
        check_schedule(type(self).__name__, schedule)
        self.config = config
        self.scores = scores
        self.warmup_steps = warmup_steps
        self.schedule: Schedule = schedule
        self._optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=5e-4))

    @abstractmethod
    def make_head(self) -> nn.Module:
        """Build what stands on the encoder."""

    @abstractmethod
    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of each part, given the encoder's output `(B, T, D)`."""

    @abstractmethod
    def evaluate(self, features: Tensor, batch: dict[str, Any]) -> Tensor:
        """Update `scores` with the predictions for a batch; return its loss."""

    def configure_model(self) -> None:
        if not hasattr(self, "encoder"):
            self.encoder = self.make_encoder()
            self.head = self.make_head()

    def make_encoder(self) -> Transformer:
        """Build the encoder."""
        return Transformer(self.config)

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated units of the encoder."""
        return self.encoder.blocks()

    def features(self, batch: dict[str, Any]) -> Tensor:
        """What the head takes, `(B, T, D)`: the encoder's output, or what a subclass makes of it."""
        return encode(self.encoder, batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        losses = self.task_losses(self.features(batch), batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["ids"]))
        return {"loss": loss, "losses": losses}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @abstractmethod
    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[Any]:
        """The records of the batch with what the model finds in them."""

    def on_validation_epoch_start(self) -> None:
        self.scores.reset()

    def on_test_epoch_start(self) -> None:
        self.scores.reset()

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def configure_optimizers(self) -> Any:
        return scheduled(self, self.make_optimizer(self._optimizer), self.schedule, self.warmup_steps)

    def make_optimizer(self, factory: OptimizerFactory) -> torch.optim.Optimizer:
        """Make the one optimizer of all parameters."""
        return factory(self.parameters())

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        loss = self.evaluate(self.features(batch), batch)
        self.log(f"{stage}/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["ids"]))

    def _log_scores(self, stage: str) -> None:
        # Figures by type are many: they are said once, of a test. Every rank has the same figures already; sync_dist
        # only tells Lightning so.
        found = {name: value for name, value in self.scores.compute().items() if stage == "test" or "/" not in name}
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()}, sync_dist=True)


def check_rate(model: str, crf_rate: float) -> None:
    """Refuse a learning rate of the CRF that is not above 0.

    Raises:
        InputError: it is not.
    """
    if crf_rate <= 0:
        raise InputError(f"{model}(crf_rate={crf_rate}): use a number above 0")


def found_in_texts(
    batch: dict[str, Any], found: Iterable[Cells], names: Sequence[T], overlapping: bool
) -> list[list[tuple[Border, T]]]:
    """What was found in the windows of a batch as what was found in its texts, see `merge_windows`.

    Args:
        batch: with `offsets` of the tokens of each window and, unless each text is one, its `owners`.
        found: (number of a name, first token, last token) in each window; special tokens are of no text.
        names: what is found.
        overlapping: whether two spans of a text may overlap.

    Returns:
        (borders in the text, name) of each record.
    """
    windows: list[list[tuple[Border, list[tuple[Border, T]]]]] = [[] for _ in batch["records"]]
    owners = batch["owners"] if "owners" in batch else range(len(windows))
    for owner, offsets, cells in zip(owners, batch["offsets"], found, strict=True):
        spans = [
            ((offsets[first][0], offsets[last][1]), names[number])
            for number, first, last in cells
            if 0 < first <= last < len(offsets) - 1
        ]
        windows[owner].append(((offsets[1][0], offsets[-2][1]), spans))
    return [merge_windows(group, overlapping=overlapping) for group in windows]


def token_places(batch: dict[str, Any]) -> Tensor:
    """Where a token stands for characters of its text, `(B, T)`: not at special tokens and padding."""
    places = torch.zeros_like(batch["mask"], dtype=torch.bool)
    for row, offsets in enumerate(batch["offsets"]):
        places[row, : len(offsets)] = torch.tensor([end > start for start, end in offsets], device=places.device)
    return places


def check_pairs(model: str, labels: Sequence[Sequence[str]], entry: str) -> list[tuple[str, str]]:
    """Labels of two parts.

    Args:
        model: name of the class, for the message.
        labels: the pairs.
        entry: what a pair is, such as "[event type, role]".

    Raises:
        InputError: there are none, one is not a pair, or one is there twice.
    """
    if not labels:
        raise InputError(f"{model}(labels=[]): give at least one {entry}")
    pairs: dict[tuple[str, str], None] = {}
    for number, label in enumerate(labels):
        if isinstance(label, str) or len(label) != 2:
            raise InputError(f"{model}(labels): entry {number} is {label!r}; use {entry}")
        pair = (label[0], label[1])
        if pair in pairs:
            raise InputError(f"{model}(labels): {list(pair)} is there twice; give each {entry} once")
        pairs[pair] = None
    return list(pairs)


def encoder_config(
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    feedforward_dim: int,
    dropout: float,
    max_length: int,
    positions: Positions,
    norm: Norm,
    num_segments: int = 0,
) -> TransformerConfig:
    """The encoder of these models: one rate of dropout everywhere."""
    return TransformerConfig(
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
        num_segments=num_segments,
    )


def span_loss(model: str, loss: SpanLoss | None) -> Callable[[Tensor | CompactScores, Tensor], Tensor]:
    """The function that pointers train on: the one chosen, or the multi-label loss.

    Args:
        model: name of the class, for the message.
        loss: with a method `spans`, or None.

    Raises:
        InputError: a loss that is for one class an item.
    """
    if loss is None:
        return multilabel_pointer_loss
    if not hasattr(loss, "spans"):
        raise InputError(
            f"{model}(loss={type(loss).__name__}): it is for one class an item, here any number of spans is right; use "
            "loss=label_smoothing, or none."
        )
    return loss.spans
